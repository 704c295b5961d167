"""Merging as others do it, by one number for all layers: what every plan is measured against."""

from __future__ import annotations

from bisect import bisect_left

from vitreuse.compress.search.space import Space
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import Plan, Spec


def constant_merging(space: Space, costs: PlanCosts, most: float) -> Plan | None:
    """The plan that merges as many tokens in each layer, half at most, as few as keep to a cost; None if none does,
    or no tokens merge in the space."""
    if not space.merge_step:
        return None
    numbers = range(1, space.num_patches // 2 + 1)
    place = bisect_left(numbers, True, key=lambda merged: costs.of(_clipped(merged, space)) <= most)
    return _clipped(numbers[place], space) if place < len(numbers) else None


def _clipped(merged: int, space: Space) -> Plan:
    """So many tokens merged in each layer, or half of those that are left."""
    specs, left = [], space.num_patches
    for _ in range(space.depth):
        number = min(merged, left // 2)
        specs.append(Spec("exact", merged=number))
        left -= number
    return Plan(tuple(specs))
