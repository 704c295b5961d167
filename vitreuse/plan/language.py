"""The plan language: one spec per layer, as data and as text.

    plan      := item+                              exact reuse*6 exact*5
    item      := layer ['*' count]                  (exact reuse*2)*4
               | '(' plan ')' ['*' count]           (span:7*2 exact)*4
    layer     := attention ['-' tokens] ['/' hidden]    exact*3 exact-16*6 exact-16/768*2 linear
               | 'linear'                           the whole layer is an affine map of each token
               | 'skip'                             the layer does nothing
    attention := 'exact'                            full softmax attention
               | 'reuse' [':' heads]                the map of the nearest layer before that has one; for some heads
               | 'lowrank' ':' k                    keys and values projected from N tokens to k
               | 'span' ':' width                   each patch sees a width x width neighbourhood of patches
               | 'none'                             no attention sub-layer

So many tokens are merged into others between the layer's attention and its MLP, which has so many hidden units. White
space separates items and may surround a '*'. Errors count layers from 0, as in `blocks.0`, and characters from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vitreuse.io.errors import closest
from vitreuse.plan.notation import Flaw, expand, quoted, shortest_text

WORDS = ("exact", "reuse", "lowrank", "span", "none", "linear", "skip")
NUMBERED = ("reuse", "lowrank", "span")  # words that take a number
MERGING = ("exact", "span", "reuse")  # whose attention has a key or a value for every token, by which tokens merge
ON_GRID = ("lowrank", "span")  # that must know where on the grid of patches each token lies
WHOLE = ("linear", "skip")  # that are all there is of their layer
PRESETS = ("reuse", "lazy", "lowrank", "mixspan", "merge")
MAX_LAYERS = 256
_MAX_NUMBER = 999_999_999
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")
_SIGNS = {":": 0, "-": 1, "/": 2}  # before each number of a spec, in their order


@dataclass(frozen=True)
class Spec:
    """What one layer is.

    Attributes:
        word: Its attention, or all of it.
        number: Where the word takes one.
        merged: Patch tokens that its attention's keys, or values, merge into others before the MLP.
        hidden: Units of its MLP, those of the model when None.
    """

    word: str
    number: int | None = None
    merged: int = 0
    hidden: int | None = None

    @property
    def has_attention(self) -> bool:
        """Whether the layer has an attention."""
        return self.word not in ("none", *WHOLE)

    @property
    def makes_map(self) -> bool:
        """Whether such a layer computes a map of its own, which later layers may reuse."""
        return self.has_attention and self.word != "reuse"

    def __str__(self) -> str:
        number = "" if self.number is None else f":{self.number}"
        merged = f"-{self.merged}" if self.merged else ""
        return self.word + number + merged + ("" if self.hidden is None else f"/{self.hidden}")


EXACT = Spec("exact")


@dataclass(frozen=True)
class Plan:
    """One spec per layer, first layer first; `str(plan)` is the shortest text that parses to it.

    Raises:
        ValueError: A spec breaks the rules of its word, a reuse layer has no map before it, or there is no layer.
    """

    specs: tuple[Spec, ...]

    def __post_init__(self) -> None:
        try:
            _check_specs(self.specs)
        except Flaw as flaw:
            raise ValueError(_sentence(shortest_text(map(str, self.specs)), flaw)) from None

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[Spec]:
        return iter(self.specs)

    def __getitem__(self, layer: int) -> Spec:
        return self.specs[layer]

    def __str__(self) -> str:
        return shortest_text(map(str, self.specs))

    @property
    def anchors(self) -> tuple[int | None, ...]:
        """For each reuse layer the index of the layer that computed its map, None for every other layer."""
        anchors: list[int | None] = []
        anchor = None
        for layer, spec in enumerate(self.specs):
            if spec.makes_map:
                anchor = layer
            anchors.append(anchor if spec.word == "reuse" else None)
        return tuple(anchors)

    @property
    def num_readers(self) -> tuple[int, ...]:
        """For each layer how many reuse layers read the carry it returns; a none layer returns the one it got."""
        num_readers: list[int] = []
        following = 0  # reuse layers until the next anchor
        for spec in reversed(self.specs):
            num_readers.append(following)
            if spec.has_attention:
                following = following + 1 if spec.word == "reuse" else 0
        return tuple(reversed(num_readers))

    @property
    def num_maps(self) -> int:
        """How many layers compute a map that a later layer reads."""
        return sum(n > 0 for spec, n in zip(self.specs, self.num_readers, strict=True) if spec.makes_map)

    def patches_left(self, num_patches: int) -> tuple[int, ...]:
        """The patch tokens that each layer gets, and those after the last; of so many at most half merge in a layer."""
        left = [num_patches]
        for spec in self.specs:
            left.append(left[-1] - num_mergeable(spec.merged, left[-1]))
        return tuple(left)

    @property
    def repeats_span(self) -> tuple[bool, ...]:
        """For each layer whether it is a span of the width that the newest span before it has."""
        repeats: list[bool] = []
        width = None
        for spec in self.specs:
            repeats.append(spec.word == "span" and spec.number == width)
            if spec.word == "span":
                width = spec.number
        return tuple(repeats)


def num_mergeable(num_merged: int, num_patches: int) -> int:
    """How many of the patch tokens that are left can really merge: at most half of them."""
    return min(num_merged, num_patches // 2)


def parse_plan(
    text: str, depth: int | None = None, num_heads: int | None = None, num_patches: int | None = None
) -> Plan:
    """Reads a plan from text, and checks it against a model's depth, heads and patches where they are given.

    Raises:
        ValueError: In one sentence, the plan, the position, the rule and the nearest valid plan.
    """
    _check_depth(depth)
    try:
        return Plan(_read(text, depth, num_heads, num_patches))
    except Flaw as flaw:
        raise ValueError(_sentence(text, flaw, depth, num_heads, num_patches)) from None


def preset_plan(method: str, depth: int, num_patches: int = 196) -> Plan:
    """Makes the default plan of a method in PRESETS for a model of the given depth.

    Merging depends on the number of patches too, those of 224 px by default: it halves them from the first to the last
    layer.

    Raises:
        ValueError: There is no such method, or depth is outside 1 to MAX_LAYERS.
    """
    if method not in PRESETS:
        nearest = _nearest(method, PRESETS)
        raise ValueError(f"unknown method {method!r}, the methods are {', '.join(PRESETS)}: try {nearest!r}.")
    _check_depth(depth)
    exact, reuse, span = EXACT, Spec("reuse"), Spec("span", 7)
    patterns = {
        "reuse": (exact, *[reuse] * (depth // 2), *[exact] * depth),
        "lazy": (exact, reuse, reuse),
        "lowrank": (Spec("lowrank", 64),),
        "mixspan": (span, span, exact),
        "merge": (Spec("exact", merged=num_patches // (2 * depth)),),
    }
    return Plan((patterns[method] * depth)[:depth])


def _read(text: str, depth: int | None, num_heads: int | None, num_patches: int | None) -> tuple[Spec, ...]:
    """The specs that a text spells; raises Flaw at the first rule it breaks."""
    specs = _read_specs(expand(text, max_words=MAX_LAYERS))
    _check_specs(specs, num_heads, num_patches)
    _check_length(specs, depth)
    return specs


def _read_specs(words: Sequence[str]) -> tuple[Spec, ...]:
    """Splits each word from its numbers; raises Flaw where a sign is not followed by one."""
    specs: list[Spec] = []
    for layer, spelling in enumerate(words):
        word, *parts = re.split("(?=[:/-])", spelling)
        numbers: dict[str, int] = {}
        for part in parts:
            sign, digits = part[0], part[1:]
            if not _WHOLE_NUMBER.fullmatch(digits) or sign in numbers or any(_SIGNS[sign] < _SIGNS[s] for s in numbers):
                raise _misspelt(words, layer, sign)
            numbers[sign] = int(digits)
        specs.append(Spec(word, numbers.get(":"), numbers.get("-", 0), numbers.get("/")))
    return tuple(specs)


def _misspelt(words: Sequence[str], layer: int, sign: str) -> Flaw:
    """The flaw of a word whose sign has no whole number behind it, stands twice, or out of order."""
    spelling = words[layer]
    word, found = re.split("[:/-]", spelling)[0], {}
    for each, digits in re.findall("([:/-])[^0-9:/]*([0-9]{1,9})", spelling):
        found.setdefault(each, digits)
    valid = word + "".join(f"{each}{found[each]}" for each in _SIGNS if each in found)
    problem = (
        f"layer {layer} is {quoted(spelling)}, but after {'a colon' if sign == ':' else f'a {sign!r}'} comes a whole "
        f"number of up to 9 digits{'' if sign == ':' else ', once, in the order word:number-tokens/hidden'}"
    )
    return Flaw(problem, " ".join(valid if other == spelling else other for other in words))


def _check_specs(specs: tuple[Spec, ...], num_heads: int | None = None, num_patches: int | None = None) -> None:
    """Raises Flaw at the first layer that breaks a rule of its word or of the plan."""
    if not specs:
        raise Flaw("plan is empty", "exact")
    if len(specs) > MAX_LAYERS:
        raise Flaw(f"plan has {len(specs)} layers, more than the {MAX_LAYERS} it can have", _text(specs[:MAX_LAYERS]))
    state, problem, repaired = _State(None, None, None, num_patches), None, []
    for layer, spec in enumerate(specs):
        subject = f"layer {layer} is {quoted(str(spec))}, but"
        if broken := _broken_rule(spec, num_heads):
            if problem is None:
                raise Flaw(f"{subject} {broken[0]}", _text(broken[1] if other == spec else other for other in specs))
            repaired += specs[layer:]
            break
        while broken := _broken_order(spec, state):
            problem, spec = problem or f"{subject} {broken[0]}", broken[1]
        repaired.append(spec)
        state = state.after(layer, spec)
    if problem is not None:
        raise Flaw(problem, _text(repaired))


class _State(NamedTuple):
    """What a layer finds: the newest layer with a map and its spec, the newest that merged, and the patches left."""

    anchor: int | None
    anchor_spec: Spec | None
    merge: int | None
    num_patches: int | None  # None where the model is not known

    def after(self, layer: int, spec: Spec) -> _State:
        """What the next layer finds."""
        anchor, anchor_spec = (layer, spec) if spec.makes_map else (self.anchor, self.anchor_spec)
        left = None if self.num_patches is None else self.num_patches - spec.merged
        return _State(anchor, anchor_spec, layer if spec.merged else self.merge, left)


def _broken_rule(spec: Spec, num_heads: int | None) -> tuple[str, Spec] | None:
    """The rule that a spec breaks on its own and the nearest spec that keeps it; None for a valid spec."""
    word, number = spec.word, spec.number
    if word not in WORDS:
        return f"the words are {', '.join(WORDS)}", replace(spec, word=_nearest(word, WORDS))
    if word not in NUMBERED and number is not None:
        return f"{word} takes no number", replace(spec, number=None)
    if word in WHOLE and (spec.merged or spec.hidden is not None):
        return f"{word} is all there is of its layer, which merges nothing and has no MLP", Spec(word)
    if spec.merged and word not in MERGING:
        return f"{word} has no keys of all tokens by which they could merge", replace(spec, merged=0)
    if word == "none" and spec.hidden == 0:
        return "without attention and MLP that is skip", Spec("skip")
    for name in ("number", "merged", "hidden"):
        value = getattr(spec, name)
        if value is not None and not 0 <= value <= _MAX_NUMBER:
            return f"numbers run from 0 to {_MAX_NUMBER}", replace(spec, **{name: min(max(value, 0), _MAX_NUMBER)})
    if word == "lowrank" and not number:
        least = 64 if number is None else 1
        return "lowrank needs the number of tokens it keeps, 1 or more", replace(spec, number=least)
    if word == "span" and (number is None or number % 2 == 0):
        return "span needs a width, an odd number", replace(spec, number=7 if number is None else number + 1)
    if word == "reuse" and number is not None and num_heads is not None and number > num_heads:
        return f"the model's number of heads is {num_heads}", replace(spec, number=num_heads)
    return None


def _broken_order(spec: Spec, state: _State) -> tuple[str, Spec] | None:
    """The rule that a spec breaks by what comes before it and the nearest spec that keeps it; None for a valid one."""
    exact = Spec("exact", None, spec.merged, spec.hidden)
    if spec.word == "reuse" and state.anchor is None:
        return "no layer before it has a map", exact
    if state.merge is not None and spec.word in ON_GRID:
        return f"after the merge in layer {state.merge} the tokens have no grid, which {spec.word} needs", exact
    if spec.word == "reuse" and state.merge is not None and state.anchor is not None and state.anchor <= state.merge:
        return f"the map of layer {state.anchor} is of the tokens before the merge in layer {state.merge}", exact
    if spec.word == "reuse" and spec.merged and state.anchor_spec is not None and state.anchor_spec.word == "lowrank":
        return f"the map of layer {state.anchor} is low-rank, without a value of each token", replace(spec, merged=0)
    if state.num_patches is not None and spec.merged > num_mergeable(spec.merged, state.num_patches):
        most, left = num_mergeable(spec.merged, state.num_patches), state.num_patches
        return f"{left} patch tokens are left there, of which at most {most} can merge", replace(spec, merged=most)
    return None


def _check_length(specs: tuple[Spec, ...], depth: int | None) -> None:
    """Raises Flaw where a plan is not as long as the model is deep; a short one is repaired by going on as it began."""
    length = len(specs)
    if depth in (None, length):
        return
    period = next((p for p in range(1, length // 2 + 1) if specs[p:] == specs[:-p]), 1)
    problem = f"plan has {length} layer{'s' * (length > 1)}, the model has {depth}"
    raise Flaw(problem, _text((specs + specs[-period:] * depth)[:depth]))


def _sentence(text: str, flaw: Flaw, *sizes: int | None) -> str:
    """One sentence on a flaw, ending in the valid plan that is reached by repairing one flaw after the other."""
    depth, num_heads, num_patches = sizes or (None, None, None)
    problem, valid = flaw.problem, shortest_text(["exact"] * (depth or 1))
    for _ in range(20):
        try:
            valid = shortest_text(map(str, _read(flaw.repaired, depth, num_heads, num_patches)))
            break
        except Flaw as next_flaw:
            flaw = next_flaw
    head, _, last_item = valid.rpartition(" ")
    if head and head == text.rpartition(" ")[0] and ")" not in last_item:
        return f"{problem}: {quoted(text)} could end in {last_item!r}."
    return f"{problem}: {quoted(text)} could be {valid!r}."


def _text(specs: Iterable[Spec]) -> str:
    return " ".join(map(str, specs))


def _check_depth(depth: int | None) -> None:
    if depth is not None and not 1 <= depth <= MAX_LAYERS:
        raise ValueError(f"depth is {depth}, but a plan has 1 to {MAX_LAYERS} layers: give a depth in that range.")


def _nearest(word: str, words: tuple[str, ...]) -> str:
    return closest(word, words, likeness=0.4) or words[0]
