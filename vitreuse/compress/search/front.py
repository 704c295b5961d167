"""The plans that no other beats in cost and forecast damage at once, by exact dynamic programming.

What the layers to come need to know of those before is how many patch tokens are left, and which layer's map could be
read; a merge ends that. Of all beginnings of a plan that agree in these, of each cost the one of least damage goes on.
Costs are counted in parts of 1 / RESOLUTION of the exact model's; where that is less than 1 nothing is rounded.

A layer is gone through in three steps: its attention, its merge, and its MLP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vitreuse.compress.search.forecast import Forecast
from vitreuse.compress.search.space import Space
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import Plan, Spec
from vitreuse.plan.language import ON_GRID

RESOLUTION = 4096


class Candidate(NamedTuple):
    """A plan with its cost, in the unit of the costs, and its forecast damage."""

    cost: int
    damage: float
    plan: Plan


class _Anchor(NamedTuple):
    """The layer whose map could be read, and how it makes it."""

    layer: int
    spec: Spec


class _Key(NamedTuple):
    """What is to be known of the layers before: the level of patch tokens left, and the map that could be read."""

    level: int
    anchor: _Anchor | None


class _Inside(NamedTuple):
    """The same in the middle of a layer: behind its attention, whose word may let tokens merge, or a whole layer."""

    key: _Key
    may_merge: bool
    kind: str  # attention, none or whole


class _Arrow(NamedTuple):
    """A way from one step to the next: from where, at what cost in cells and what damage, by which choice."""

    source: Any
    cells: int
    damage: float
    choice: Any


Values = dict[Any, np.ndarray]  # by what is to be known, the least damage of each cost in cells
Arrows = dict[Any, list[_Arrow]]  # by where they lead


@dataclass(frozen=True)
class Front:
    """The plans that no other beats, and the way back to each.

    Attributes:
        steps: Of each step, the values before it and the arrows of it.
        last: The values behind the last layer.
    """

    steps: Sequence[tuple[Values, Arrows]]
    last: Values

    def plans(self) -> Iterator[tuple[int, float, Plan]]:
        """The cost in cells, the damage, and the plan, the cheapest first."""
        keys = list(self.last)
        table = np.stack([self.last[key] for key in keys])
        best, least = np.inf, table.min(0)
        for cells in np.flatnonzero(np.isfinite(least)).tolist():
            if least[cells] < best:
                best = least[cells]
                yield cells, float(best), self._back(keys[int(table[:, cells].argmin())], cells)

    def _back(self, key: Any, cells: int) -> Plan:
        """The plan that led to a key at a cost."""
        choices = []
        value = self.last[key][cells]
        for before, arrows in reversed(self.steps):
            for arrow in arrows[key]:
                earlier = cells - arrow.cells
                if earlier >= 0 and before[arrow.source][earlier] + arrow.damage == value:
                    choices.append(arrow.choice)
                    key, cells, value = arrow.source, earlier, before[arrow.source][earlier]
                    break
        choices.reverse()
        return Plan(tuple(_spec(*choices[first : first + 3]) for first in range(0, len(choices), 3)))


def _spec(word: Spec, merged: int, hidden: int | None) -> Spec:
    return Spec(word.word, word.number, merged, hidden)


def pareto_front(space: Space, forecast: Forecast, costs: PlanCosts) -> list[Candidate]:
    """The plans of a space that no other beats in cost and forecast damage at once, the cheapest first.

    Plans that cost more than the exact one are left out. Of plans alike the first by the order of the words is listed.

    Args:
        space: What a layer may become.
        forecast: What each change does.
        costs: What it saves.
    """
    plans = [plan for _, _, plan in _solve(space, forecast, costs).plans()]
    candidates = [Candidate(costs.of(plan), forecast.of(plan), plan) for plan in plans]
    most, kept = costs.of(space.exact), []
    for candidate in sorted(candidates, key=lambda each: each[:2]):
        if candidate.cost <= most and (not kept or candidate.damage < kept[-1].damage):
            kept.append(candidate)
    return kept


def best_within(front: Sequence[Candidate], most: float) -> Candidate | None:
    """The candidate of least damage of a front that costs no more than that."""
    return max((candidate for candidate in front if candidate.cost <= most), key=lambda each: each.cost, default=None)


def _solve(space: Space, forecast: Forecast, costs: PlanCosts) -> Front:
    """Goes through the layers."""
    exact = costs.of(space.exact)
    unit = max(1.0, exact / RESOLUTION)
    start = np.full(round(exact / unit) + 3 * space.depth + 2, np.inf)  # each step of a layer may be rounded up
    start[round(costs.rest / unit)] = 0.0
    values: Values = {_Key(0, None): start}
    ways, steps = _Ways(space, forecast, costs, unit), []
    for layer in range(space.depth):
        for step in (ways.attentions, ways.merges, ways.mlps):
            arrows = step(layer, list(values))
            steps.append((values, arrows))
            values = {target: _least(values, of_target) for target, of_target in arrows.items()}
    return Front(steps, values)


def _least(values: Values, arrows: Sequence[_Arrow]) -> np.ndarray:
    """The least damage of each cost of what some arrows lead to."""
    found = np.full_like(next(iter(values.values())), np.inf)
    for arrow in arrows:
        kept = len(found) - arrow.cells
        if kept > 0:
            np.minimum(found[arrow.cells :], values[arrow.source][:kept] + arrow.damage, out=found[arrow.cells :])
    return found


@dataclass(frozen=True)
class _Ways:
    """The arrows of each step of a layer, from all that could be known before it."""

    space: Space
    forecast: Forecast
    costs: PlanCosts
    unit: float

    def _cells(self, cost: float) -> int:
        return max(0, round(cost / self.unit))

    def attentions(self, layer: int, sources: Sequence[_Key]) -> Arrows:
        """Every word for every source."""
        found: Arrows = defaultdict(list)
        for source in sources:
            patches = self.space.levels[source.level]
            for spec in self.space.attention_words:
                if spec.word in ON_GRID and source.level > 0:
                    continue
                if spec.makes_map:
                    self._make_maps(found, layer, source, spec)
                elif spec.word == "none":
                    self._attend(found, layer, source, spec, source, None)
                elif source.anchor is not None:
                    self._attend(found, layer, source, spec, source, source.anchor)
            for spec in self.space.whole_words:
                damage = self.forecast.whole[layer, spec][source.level]
                arrow = _Arrow(source, self._cells(self.costs.whole(layer, spec, patches)), float(damage), spec)
                found[_Inside(source, False, "whole")].append(arrow)
        return found

    def _make_maps(self, found: Arrows, layer: int, source: _Key, spec: Spec) -> None:
        """A layer that makes a map, for itself and, dearer, for others."""
        self._attend(found, layer, source, spec, _Key(source.level, None), None)
        if self.space.reads_maps and layer < self.space.depth - 1:
            self._attend(found, layer, source, spec, _Key(source.level, _Anchor(layer, spec)), None)

    def _attend(self, found: Arrows, layer: int, source: _Key, spec: Spec, target: _Key, read: _Anchor | None) -> None:
        patches = self.space.levels[source.level]
        cost = self.costs.attention(layer, spec, None if read is None else read.spec, patches)
        if target.anchor is not None and target.anchor.layer == layer:
            cost += self.costs.handing_on(layer, spec, patches)
        damage = self.forecast.attending(layer, spec, None if read is None else read.layer)[source.level]
        may_merge = self.space.may_merge(spec, None if read is None else read.spec)
        inside = _Inside(target, may_merge, "attention" if spec.has_attention else "none")
        found[inside].append(_Arrow(source, self._cells(cost), float(damage), spec))

    def merges(self, layer: int, sources: Sequence[_Inside]) -> Arrows:
        """Every number of tokens that merge; a map that could be read is then none."""
        found: Arrows = defaultdict(list)
        for source in sources:
            level = source.key.level
            patches = self.space.levels[level]
            for merged in self.space.merges(patches) if source.may_merge else (0,):
                if merged == 0:
                    found[source].append(_Arrow(source, 0, 0.0, 0))
                    continue
                target = _Key(level + merged // self.space.merge_step, None)
                damage = self.forecast.merge(layer, merged)[level]
                cost = self._cells(self.costs.merging(layer, patches))
                found[_Inside(target, False, source.kind)].append(_Arrow(source, cost, float(damage), merged))
        return found

    def mlps(self, layer: int, sources: Sequence[_Inside]) -> Arrows:
        """Every number of hidden units; a layer without attention keeps some."""
        found: Arrows = defaultdict(list)
        for source in sources:
            if source.kind == "whole":
                found[source.key].append(_Arrow(source, 0, 0.0, None))
                continue
            patches = self.space.levels[source.key.level]
            for hidden in self.space.hidden:
                if hidden == 0 and source.kind == "none":
                    continue
                damage = self.forecast.mlp(layer, hidden)[source.key.level]
                cost = self._cells(self.costs.mlp(layer, hidden, patches))
                choice = None if hidden == self.space.num_hidden else hidden
                found[source.key].append(_Arrow(source, cost, float(damage), choice))
        return found


def least_cost(space: Space, costs: PlanCosts) -> int:
    """The cost of the cheapest plan, whatever its damage."""
    return pareto_front(space, Forecast.of_nothing(space), costs)[0].cost
