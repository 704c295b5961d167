"""The search for the plan that does a trained ViT the least damage at a cost: forecast, front, and real distances."""

from vitreuse.compress.search.found import Found, search
from vitreuse.compress.search.front import Candidate, best_within, least_cost, pareto_front
from vitreuse.compress.search.space import Space

__all__ = ["Candidate", "Found", "Space", "best_within", "least_cost", "pareto_front", "search"]
