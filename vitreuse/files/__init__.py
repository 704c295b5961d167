"""Trained models as files and folders: written for other programs, and read from whatever a command is given."""
