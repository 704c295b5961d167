"""The plan of least damage to a trained model within a budget, and the model in it, measured on images apart."""

from vitreuse.verbs.search.searched import Searched, SearchOptions, search
from vitreuse.verbs.search.table import table

__all__ = ["SearchOptions", "Searched", "search", "table"]
