"""Trained models as files and folders: written for others to run, and found where somebody points."""
