"""Which plans are worth their cost: the Pareto front of damage over cost, by exact dynamic programming.

Damage is assumed to add over the layers, and that of an exact layer is 0: each change is measured in a model that is
exact elsewhere, so that what two changes do to each other is left out. Costs do add: here layer by layer, in
cost/plan_costs.py for a plan that is given.

What the layers to come need to know of those before is which layer makes the map that a reuse layer would read, and
how: of all beginnings of a plan that agree in this, only those survive that no other beats in cost and damage at once.
Costs are whole numbers and nothing is rounded, so the front is that of all plans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vitreuse.compress.damage import Change
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import EXACT, Plan, Spec, parse_plan

PAYS = 1.1  # protected layers are given up where they cost more than this times the damage of the best plan without


class Candidate(NamedTuple):
    """A plan, or its first layers; of two alike in cost and damage the smaller tuple is taken.

    Attributes:
        cost: In the unit of the costs, of the whole model.
        damage: Predicted, the sum over the layers.
        num_changed: Layers that are not exact.
        words: The specs as text, the last thing that breaks a tie.
    """

    cost: int
    damage: float
    num_changed: int
    words: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        """The plan that the words make, which must be those of all layers."""
        return parse_plan(" ".join(self.words))


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        front: The plans that no other beats in cost and damage at once, the cheapest first; where the first and last
            layer are protected, of those plans that keep both exact.
        chosen: The one of least damage within the budget.
        protected: The one that keeps the first and last layer exact, the chosen one unless that does not pay; None
            where no such plan is within the budget.
    """

    front: list[Candidate]
    chosen: Candidate
    protected: Candidate | None


class _Anchor(NamedTuple):
    """The layer that a reuse layer would read.

    Attributes:
        layer: The layer's number.
        spec: How it makes its map.
        unpaid: What the layer costs more once its map is read.
    """

    layer: int
    spec: Spec
    unpaid: int


Damage = Mapping[Change, float]  # of every change that some specs allow, as measure_damage gives it
Fronts = dict[_Anchor | None, list[Candidate]]  # of the first layers of plans, by the anchor that they leave


def search(damage: Damage, costs: PlanCosts, specs: Sequence[Spec], depth: int, budget: float) -> Search | None:
    """The plan of least damage within a budget, and the front that it is from; None where no plan meets the budget.

    The first and the last layer stay exact unless that costs more than PAYS times the damage, or the budget.

    Args:
        damage: What each change does that the specs allow.
        costs: What the layers cost under these specs.
        specs: What a layer may become.
        depth: Number of layers.
        budget: The most that the plan may cost, as a share of the exact model's cost.
    """
    most = budget * costs.of(Plan((EXACT,) * depth))
    kept, free = (pareto_front(damage, costs, specs, depth, is_protected) for is_protected in (True, False))
    best_kept, best_free = best_within(kept, most), best_within(free, most)
    if best_free is None:
        return None
    if best_kept is None or best_kept.damage > PAYS * best_free.damage:
        return Search(free, best_free, best_kept)
    return Search(kept, best_kept, best_kept)


def best_within(front: Sequence[Candidate], most: float) -> Candidate | None:
    """The candidate of least damage of a front that costs no more than that."""
    return max((candidate for candidate in front if candidate.cost <= most), default=None)


def pareto_front(
    damage: Damage, costs: PlanCosts, specs: Sequence[Spec], depth: int, is_protected: bool = False
) -> list[Candidate]:
    """The plans that no other beats in cost and damage at once, the cheapest first.

    Of plans alike in both the one with the fewest changed layers is listed, then the first by the alphabet. Arguments
    as for search; the first and last layer are exact in each plan if they are protected.
    """
    fronts: Fronts = {None: [Candidate(costs.rest, 0.0, 0, ())]}
    for layer in range(depth):
        allowed = [EXACT] if is_protected and layer in (0, depth - 1) else specs
        fronts = _one_layer_on(fronts, layer, allowed, damage, costs)
    return _undominated(candidate for front in fronts.values() for candidate in front)


def least_cost(costs: PlanCosts, specs: Sequence[Spec], depth: int) -> int:
    """The cost of the cheapest plan, whatever its damage; arguments as for search."""
    return pareto_front(defaultdict(float), costs, specs, depth)[0].cost


def score(plan: Plan, damage: Damage, costs: PlanCosts) -> Candidate:
    """A given plan as a candidate."""
    total = 0.0
    for layer, (spec, anchor) in enumerate(zip(plan, plan.anchors, strict=True)):
        total += _damage(damage, Change(layer, spec, anchor, None if anchor is None else plan[anchor]))
    return Candidate(costs.of(plan), total, sum(spec != EXACT for spec in plan), tuple(map(str, plan)))


def _one_layer_on(fronts: Fronts, layer: int, specs: Sequence[Spec], damage: Damage, costs: PlanCosts) -> Fronts:
    """The fronts after one more layer, which is one of the specs."""
    found: dict[_Anchor | None, list[Candidate]] = defaultdict(list)
    ended = _undominated(candidate for front in fronts.values() for candidate in front)  # by a new anchor

    def extend(front: Sequence[Candidate], change: Change, cost: int, anchor: _Anchor | None) -> None:
        word, more, is_changed = str(change.spec), _damage(damage, change), change.spec != EXACT
        found[anchor] += [
            Candidate(sum_cost + cost, sum_damage + more, num_changed + is_changed, (*words, word))
            for sum_cost, sum_damage, num_changed, words in front
        ]

    for spec in specs:
        if spec.makes_map:
            anchor = _Anchor(layer, spec, costs.handing_on.get(spec, 0))
            extend(ended, Change(layer, spec), costs.layers[layer, spec, None], anchor)
            continue
        for anchor, front in fronts.items():
            if spec.word == "none":
                extend(front, Change(layer, spec), costs.layers[layer, spec, None], anchor)
            elif anchor is not None:
                cost = costs.layers[layer, spec, anchor.spec] + anchor.unpaid
                extend(front, Change(layer, spec, anchor.layer, anchor.spec), cost, anchor._replace(unpaid=0))
    return {anchor: _undominated(front) for anchor, front in found.items()}


def _damage(damage: Damage, change: Change) -> float:
    return 0.0 if change.spec == EXACT else damage[change]


def _undominated(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other beats in cost and damage at once, the cheapest first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates):
        if not kept or candidate.damage < kept[-1].damage:
            kept.append(candidate)
    return kept
