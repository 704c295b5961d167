"""A plan made better by real distances: changes are tried one at a time, and those that pay each other go together.

Of all single changes of a plan (more or fewer tokens that merge, more or fewer hidden units, another word) those that
the forecast thinks best are tried. The best combination of one, two and more of them that keeps to the budget is found
as if their effects added up; the combinations are tried in turn and the best one is the next plan. The search ends
where no combination of changes that were tried on the plan itself makes it better, or when time is up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vitreuse.compress.search.forecast import Forecast
from vitreuse.compress.search.space import Space
from vitreuse.compress.search.trials import Trials
from vitreuse.plan import Plan, Spec

NUM_TRIED = 32  # single changes that save, and as many that spend
SIZES = (1, 2, 3, 4, 6, 8)  # changes that are combined
MERGE_STEPS, HIDDEN_STEPS = (1, 2, 4), (1, 2)
CELLS = 512  # of the exact cost, in which savings are added up


class Step(NamedTuple):
    """A change of one layer, by how much it costs more, and by how much the answers are farther."""

    layer: int
    spec: Spec
    cost: int
    damage: float


class Refined(NamedTuple):
    """A plan, how far its answers are, and whether no step makes it better (or time was up)."""

    plan: Plan
    distance: float
    is_best: bool


@dataclass(frozen=True)
class Refiner:
    """What a plan is made better with.

    Attributes:
        trials: What tries plans.
        space: What a layer may become.
        forecast: Which changes are tried first.
        cost: Of a plan.
        most: That a plan may cost.
        is_over: Whether time is up.
        report: Told the plan and its distance, whenever it is better.
    """

    trials: Trials
    space: Space
    forecast: Forecast
    cost: Callable[[Plan], int]
    most: float
    is_over: Callable[[], bool]
    report: Callable[[Plan, float], None]

    def refine(self, plan: Plan) -> Refined:
        """The best plan that is reached from one that keeps to the budget."""
        distance, fresh = self.trials.distance(plan), False
        steps: list[Step] = []
        while not self.is_over():
            if not fresh and not steps:
                steps, fresh = self._try_steps(plan), True
            better = self._best_combination(plan, distance, steps)
            if better is None and fresh:
                return Refined(plan, distance, not self.is_over())
            if better is None:
                steps = []
                continue
            changed = {layer for layer, (one, other) in enumerate(zip(plan, better, strict=True)) if one != other}
            steps, fresh = [step for step in steps if step.layer not in changed], False
            plan, distance = better, self.trials.distance(better)
            self.report(plan, distance)
        return Refined(plan, distance, False)

    def _try_steps(self, plan: Plan) -> list[Step]:
        """The single changes that look best, tried."""
        cost, forecast = self.cost(plan), self.forecast.of(plan)
        saving, spending = [], []
        for layer, spec, changed in neighbours(self.space, plan):
            more, damage = self.cost(changed) - cost, self.forecast.of(changed) - forecast
            rank = damage / abs(more) if more else damage
            (spending if more > 0 else saving).append((rank, Step(layer, spec, more, damage), changed))
        standing, distance = self.trials.run(plan), self.trials.distance(plan)
        found = []
        for _, step, changed in _first(saving, NUM_TRIED) + _first(spending, NUM_TRIED):
            if self.is_over():
                break
            found.append(step._replace(damage=self.trials.distance(changed, standing) - distance))
        return found

    def _best_combination(self, plan: Plan, distance: float, steps: Sequence[Step]) -> Plan | None:
        """The best of some combinations of steps, tried; None where none is better than the plan."""
        best, least = None, distance
        slack = self.most - self.cost(plan)
        for size in SIZES:
            changed = self._affordable(plan, steps, slack, size)
            if changed is None or self.is_over():
                continue
            found = self.trials.distance(changed)
            if found < least:
                best, least = changed, found
        return best

    def _affordable(self, plan: Plan, steps: Sequence[Step], slack: float, size: int) -> Plan | None:
        """The plan with the best combination of so many steps; a merge also changes what later steps cost."""
        for _ in range(4):
            chosen = best_steps(steps, slack, size, self.cost(self.space.exact) / CELLS)
            changed = _with_specs(plan, {step.layer: step.spec for step in chosen})
            if not chosen or changed is None or not fits(self.space, changed):
                return None
            over = self.cost(changed) - self.most
            if over <= 0:
                return changed
            slack -= over
        return None


def _with_specs(plan: Plan, specs: Mapping[int, Spec]) -> Plan | None:
    """A plan with other specs in some layers; None where they break a rule."""
    try:
        return Plan(tuple(specs.get(layer, spec) for layer, spec in enumerate(plan)))
    except ValueError:
        return None


def best_steps(steps: Sequence[Step], slack: float, size: int, unit: float) -> list[Step]:
    """The steps, at most one a layer and so many in all, of the least damage in sum whose costs keep to a slack.

    Costs are counted in a unit, rounded.
    """
    layers = sorted({step.layer for step in steps})
    farthest = (max(abs(step.cost) for step in steps if step.layer == layer) for layer in layers)
    offset = int(sum(farthest) / unit) + len(layers) + 1
    width = 2 * offset + 1
    table = np.full((size + 1, width), np.inf)
    table[0, offset] = 0.0
    back: list[dict[tuple[int, int], Step]] = []
    for layer in layers:
        new, ways = table.copy(), {}
        for step in (step for step in steps if step.layer == layer):
            cells = round(step.cost / unit)
            moved = np.full_like(table, np.inf)
            into = slice(max(0, cells), width + min(0, cells))
            come = slice(max(0, -cells), width - max(0, cells))
            moved[1:, into] = table[:-1, come] + step.damage
            for place in zip(*np.nonzero(moved < new), strict=True):
                ways[int(place[0]), int(place[1])] = step
            new = np.minimum(new, moved)
        back.append(ways)
        table = new
    allowed = table[:, : max(0, min(width, offset + int(np.floor(slack / unit)) + 1))]
    if allowed.size == 0 or not allowed.min() < 0:
        return []
    count, place = (int(each) for each in np.unravel_index(allowed.argmin(), allowed.shape))
    chosen: list[Step] = []
    for ways in reversed(back):
        step = ways.get((count, place))
        if step is not None:
            chosen.append(step)
            count, place = count - 1, place - round(step.cost / unit)
    return chosen[::-1]


def neighbours(space: Space, plan: Plan) -> Iterator[tuple[int, Spec, Plan]]:
    """Every single change of a plan that leaves it one of the space: the layer, what it becomes, and the plan then."""
    for layer, spec in enumerate(plan):
        for other in dict.fromkeys(_others(space, spec)):
            changed = _with_specs(plan, {layer: other})
            if other != spec and changed is not None and fits(space, changed):
                yield layer, other, changed


def _others(space: Space, spec: Spec) -> Iterator[Spec]:
    """What a layer may become in one step."""
    word = Spec(spec.word, spec.number)
    yield from space.whole_words
    for other in space.attention_words:
        merged = spec.merged if space.may_merge(other, None) else 0
        yield space.spec(other, merged, spec.hidden)
    if spec.word in {each.word for each in space.whole_words}:
        return
    for steps in MERGE_STEPS if space.merge_step else ():
        for sign in (1, -1):
            merged = spec.merged + sign * steps * space.merge_step
            if merged >= 0 and space.may_merge(word, None):
                yield space.spec(word, merged, spec.hidden)
    place = space.hidden.index(space.num_hidden if spec.hidden is None else spec.hidden)
    for steps in HIDDEN_STEPS:
        for near in (place - steps, place + steps):
            if 0 <= near < len(space.hidden):
                yield space.spec(word, spec.merged, space.hidden[near])


def fits(space: Space, plan: Plan) -> bool:
    """Whether a plan merges nowhere more tokens than it can, and leaves some."""
    left = plan.patches_left(space.num_patches)
    merged = [before - after for before, after in pairwise(left)]
    is_whole = all(spec.merged == number for spec, number in zip(plan, merged, strict=True))
    return is_whole and left[-1] >= space.levels[-1]


def _first(found: list[tuple[float, Step, Plan]], count: int) -> list[tuple[float, Step, Plan]]:
    return sorted(found, key=lambda each: each[0])[:count]
