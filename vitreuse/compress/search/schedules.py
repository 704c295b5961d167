"""Merging by one number: the same in all layers, as others do it, or falling from layer to layer."""

from __future__ import annotations

from bisect import bisect_left

from vitreuse.compress.search.space import Space
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import Plan, Spec

FALLING = (0.9, 0.8, 0.7)  # of the tokens that merge in a layer, in the next: early merges save the most


def constant_merging(space: Space, costs: PlanCosts, most: float) -> Plan | None:
    """What every plan is measured against: falling_merging that does not fall."""
    return falling_merging(space, costs, most, 1.0)


def falling_merging(space: Space, costs: PlanCosts, most: float, share: float) -> Plan | None:
    """The plan that merges in each layer this share of what the layer before merges, half of what is left at most.

    It merges as few tokens as keep to a cost; None if no such plan does, or no tokens merge in the space.
    """
    if not space.merge_step:
        return None
    numbers = range(1, space.num_patches // 2 + 1)
    place = bisect_left(numbers, True, key=lambda first: costs.of(_clipped(first, share, space)) <= most)
    return _clipped(numbers[place], share, space) if place < len(numbers) else None


def _clipped(first: int, share: float, space: Space) -> Plan:
    """So many tokens merged in the first layer and a share of that in each next, or half of those that are left."""
    specs, left = [], space.num_patches
    for layer in range(space.depth):
        number = min(round(first * share**layer), left // 2)
        specs.append(Spec("exact", merged=number))
        left -= number
    return Plan(tuple(specs))
