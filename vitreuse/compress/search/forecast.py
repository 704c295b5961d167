"""What each change of a layer does to the answers, by the tokens that are left, and the forecast for a plan.

A change is tried alone: its damage is how much farther the answers are with it than without. Merges, whose damage
depends most on the tokens before them, are tried with all of them and with half, which merges in earlier layers leave,
and between the two interpolated on logarithmic scales; all else is tried with all tokens. The forecast of a plan is the
sum over its changes; where answers are tokens, whose cosines end at 0, each change takes its part of what the others
leave: 1 - (1 - d1) (1 - d2) ..., and what is added up is -log(1 - d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from vitreuse.compress.damage import Change
from vitreuse.compress.search.space import Space
from vitreuse.compress.search.trials import Standing, Trials
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import EXACT, Plan, Spec
from vitreuse.plan.language import WHOLE

SHARES_LEFT = (1.0, 0.5)  # of the patch tokens, at which merges are tried; other changes depend little on them
KEPT_IN_LAYER = 0.8  # of the tokens, the least in each layer before: more haste spoils what is measured behind it
USUAL, STEEPEST = 4.5, 6.0  # powers of the tokens that are left by which the damage of a merge falls: usual, at most
HIDDEN_TRIED = 3  # numbers of hidden units that are tried, evenly from none to the most
LEAST = 1e-9  # of a damage: noise can make a change look like a gain
FARTHEST = 0.999  # that answers are taken to be which are compared by cosines

Curve = np.ndarray  # a damage for each of the levels of a space


@dataclass(frozen=True)
class Forecast:
    """Damages by the parts of a layer, each a curve over the levels of a space.

    Attributes:
        space: What was tried.
        saturates: Whether a curve is of -log(1 - damage), and not of the damage itself.
        attention: By change of a layer's attention; nothing of one that stays exact.
        merges: By layer and number of tokens that merge, over the tokens before.
        hidden: By layer and number of hidden units that stay, over the tokens that the MLP gets.
        whole: By layer and word, linear or skip.
    """

    space: Space
    saturates: bool = False
    attention: dict[Change, Curve] = field(default_factory=dict)
    merges: dict[tuple[int, int], Curve] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Curve] = field(default_factory=dict)
    whole: dict[tuple[int, Spec], Curve] = field(default_factory=dict)

    @classmethod
    def of_nothing(cls, space: Space) -> Forecast:
        """One by which no change does any damage."""
        zeros, layers = np.zeros(len(space.levels)), range(space.depth)
        words = (spec for spec in space.attention_words if spec.word != "reuse")
        readers = [spec for spec in space.attention_words if spec.word == "reuse"]
        attention = {Change(layer, spec): zeros for layer, spec in product(layers, words)}
        read = product(layers, readers, layers)
        attention |= {Change(layer, spec, anchor, EXACT): zeros for layer, spec, anchor in read}
        return cls(
            space,
            False,
            attention,
            dict.fromkeys(product(layers, space.merges(space.num_patches)), zeros),
            dict.fromkeys(product(layers, space.hidden), zeros),
            dict.fromkeys(product(layers, space.whole_words), zeros),
        )

    def of(self, plan: Plan) -> float:
        """The damage of a plan, whose levels are rounded to those of the space."""
        total, left = 0.0, plan.patches_left(self.space.num_patches)
        for layer, (spec, anchor) in enumerate(zip(plan, plan.anchors, strict=True)):
            word, before, after = Spec(spec.word, spec.number), self._level(left[layer]), self._level(left[layer + 1])
            if spec.word in WHOLE:
                total += self.whole[layer, word][before]
                continue
            total += self.attending(layer, word, anchor)[before]
            total += self.merge(layer, left[layer] - left[layer + 1])[before]
            total += self.mlp(layer, self.space.num_hidden if spec.hidden is None else spec.hidden)[after]
        return float(-np.expm1(-total) if self.saturates else total)

    def as_sum(self, distance: float) -> float:
        """What the changes of a plan add up to whose answers are so far off; of() goes the other way."""
        return -math.log1p(-min(distance, FARTHEST)) if self.saturates else distance

    def attending(self, layer: int, word: Spec, anchor: int | None) -> Curve:
        """The damage of an attention word; maps of any kind are taken to be as good to read as exact ones."""
        if word == EXACT:
            return np.zeros(len(self.space.levels))
        return self.attention[Change(layer, word, anchor, None if anchor is None else EXACT)]

    def merge(self, layer: int, merged: int) -> Curve:
        """The damage of a merge of so many tokens, by the tokens before it."""
        return self._between(self.merges, layer, merged, 0)

    def mlp(self, layer: int, hidden: int) -> Curve:
        """The damage of so few hidden units, by the tokens that they get."""
        return self._between(self.hidden, layer, hidden, self.space.num_hidden)

    def _level(self, patches: int) -> int:
        return int(np.argmin(np.abs(np.array(self.space.levels) - patches)))

    def _between(self, tried: Mapping[tuple[int, int], Curve], layer: int, wanted: int, harmless: int) -> Curve:
        """The curve of a number between those that were tried, by how far each is from the number that does nothing."""
        if wanted == harmless:
            return np.zeros(len(self.space.levels))
        if (layer, wanted) in tried:
            return tried[layer, wanted]
        known = sorted((abs(number - harmless), curve) for (of, number), curve in tried.items() if of == layer)
        steps, curves = [step for step, _ in known], np.log(np.stack([curve for _, curve in known]))
        return np.exp(_interpolated(np.log(abs(wanted - harmless)), np.log(steps), curves))


class Try(NamedTuple):
    """A change that is tried.

    Attributes:
        kind: The part of the forecast that it is of.
        key: What the forecast knows it by.
        patches: The patch tokens that the layer gets.
        base: The plan without the change.
        changed: The plan with it.
        from_plan: One that is run as a whole, so that both go on from its images.
    """

    kind: str
    key: tuple[int, int] | tuple[int, Spec] | Change
    patches: int
    base: Plan
    changed: Plan
    from_plan: Plan


def measure_changes(trials: Trials, space: Space, progress: WorkProgress) -> Forecast:
    """Tries each kind of change in each layer at several numbers of tokens left.

    Args:
        trials: What tries plans.
        space: What a layer may become.
        progress: Told how many changes were tried; its total should be the number of tries.
    """
    forecast = Forecast(space, trials.saturate)
    points: dict[tuple[str, Any], list[tuple[int, float]]] = {}
    standing: Standing | None = None
    for done, each in enumerate(tries(space), 1):
        if {str(each.base), str(each.changed)} - trials.known.keys() and not (
            standing is not None and standing.plan == each.from_plan
        ):
            standing = trials.run(each.from_plan)
        before, after = (forecast.as_sum(trials.distance(plan, standing)) for plan in (each.base, each.changed))
        points.setdefault((each.kind, each.key), []).append((each.patches, max(after - before, LEAST)))
        progress.reach(done)
    for (kind, key), found in points.items():
        getattr(forecast, kind)[key] = _curve(found, space, depends=kind == "merges")
    _make_monotone(forecast.merges, sorted(forecast.merges))
    _make_monotone(forecast.hidden, sorted(forecast.hidden, reverse=True))
    return forecast


def _make_monotone(curves: dict[tuple[int, int], Curve], keys: Sequence[tuple[int, int]]) -> None:
    """Sees to it that more of a change does no less damage in a layer, its keys given in the order of more and more."""
    for (layer, less), (other, more) in pairwise(keys):
        if layer == other:
            curves[layer, more] = np.maximum(curves[layer, less], curves[layer, more])


def tries(space: Space) -> list[Try]:
    """Every change that is tried, those together that go on from the same images."""
    found = []
    for layer in range(space.depth):
        for patches in _levels_tried(space, layer):
            merging = [Spec("exact", merged=merged) for merged in _falling(patches, layer, space)]
            base = Plan((*merging, *[EXACT] * (space.depth - layer)))
            for kind, key, spec in _changes(space, layer, patches):
                found.append(Try(kind, key, patches, base, _with(base, layer, spec), base))
    return [*found, *_readings(space)]


def _with(plan: Plan, layer: int, spec: Spec) -> Plan:
    """A plan with another spec in a layer."""
    return Plan((*plan.specs[:layer], spec, *plan.specs[layer + 1 :]))


def _readings(space: Space) -> Iterator[Try]:
    """Layers that read the map of an exact one, each beside the plan in which those between the two do so already."""
    for word in (spec for spec in space.attention_words if spec.word == "reuse"):
        for anchor in range(space.depth):
            base = space.exact
            for layer in range(anchor + 1, space.depth):
                changed = _with(base, layer, word)
                key = Change(layer, word, anchor, EXACT)
                yield Try("attention", key, space.num_patches, base, changed, space.exact)
                base = changed


def _levels_tried(space: Space, layer: int) -> list[int]:
    """How many patch tokens a layer is tried with, as far as the layers before can merge so many."""
    found = []
    for share in SHARES_LEFT:
        patches = min(space.levels, key=lambda level: abs(level - share * space.num_patches))
        if share >= KEPT_IN_LAYER**layer:
            found.append(patches)
    return [*dict.fromkeys(found)]


def _falling(patches: int, num_layers: int, space: Space) -> list[int]:
    """How many tokens merge in each of some layers, by whole steps and the same share of those that are left in each,
    so that so many are left."""
    shares = np.linspace(0, 1, num_layers + 1)
    steps = (space.num_patches - patches) / max(1, space.merge_step)
    goal = 1 - patches / space.num_patches
    gone = [round(steps * (1 - (1 - goal) ** share) / max(goal, LEAST)) for share in shares]
    return [space.merge_step * (after - before) for before, after in pairwise(gone)]


def _changes(space: Space, layer: int, patches: int) -> Iterator[tuple[str, Any, Spec]]:
    """What is tried in a layer with so many patch tokens: the kind, the key, and what the layer becomes."""
    for merged in _merges_tried(space, patches):
        yield "merges", (layer, merged), space.spec(EXACT, merged)
    if patches < space.num_patches:
        return
    for spec in space.whole_words:
        yield "whole", (layer, spec), spec
    for spec in space.attention_words:
        if spec != EXACT and spec.word != "reuse":  # a reading is of an anchor, see _readings
            yield "attention", Change(layer, spec), spec
    for hidden in _hidden_tried(space):
        yield "hidden", (layer, hidden), space.spec(EXACT, hidden=hidden)


def _merges_tried(space: Space, patches: int) -> list[int]:
    """Numbers of tokens that are tried to merge: one step, and twice as many again and again."""
    allowed, found, merged = [*space.merges(patches)], [], space.merge_step
    while merged and merged in allowed:
        found.append(merged)
        merged *= 2
    return found


def _hidden_tried(space: Space) -> list[int]:
    """Numbers of hidden units that are tried."""
    fewer = space.hidden[1:]
    places = {round(place) for place in np.linspace(0, len(fewer) - 1, HIDDEN_TRIED)} if fewer else set()
    return [fewer[place] for place in sorted(places)]


def _curve(found: list[tuple[int, float]], space: Space, depends: bool) -> Curve:
    """Damages at numbers of tokens left, on which they depend or not, as a curve over the levels of a space.

    With fewer tokens than were tried it grows as between the last two, by a power of their number that has a limit.
    """
    found = sorted(found)
    patches, damages = (np.log(np.array(column, dtype=float)) for column in zip(*found, strict=True))
    levels = np.log(np.array(space.levels, dtype=float))
    power = (damages[0] - damages[1]) / (patches[1] - patches[0]) if len(found) > 1 else USUAL
    beyond = np.clip(patches[0] - levels, 0, None) * (np.clip(power, 0, STEEPEST) if depends else 0.0)
    return np.exp(np.interp(levels, patches, damages) + beyond)


def _interpolated(at: float, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows of values between the places that they are of, and beyond the last ones on the line through these."""
    if len(places) == 1:
        return values[0] + (at - places[0])  # as if in proportion
    place = int(np.clip(np.searchsorted(places, at), 1, len(places) - 1))
    share = (at - places[place - 1]) / (places[place] - places[place - 1])
    return values[place - 1] + share * (values[place] - values[place - 1])
