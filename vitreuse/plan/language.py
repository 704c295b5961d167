"""The plan language: one attention spec per layer, as data and as text.

    plan := item+                      exact reuse*6 exact*5
    item := spec ['*' count]           (exact reuse*2)*4
          | '(' plan ')' ['*' count]   (span:7*2 exact)*4
    spec := 'exact'                    full softmax attention
          | 'reuse' [':' heads]        the map of the nearest layer before that has one: all heads, or the given number
          | 'lowrank' ':' k            keys and values projected from N tokens to k
          | 'span' ':' width           each patch sees a width x width neighbourhood of patches
          | 'none'                     no attention sub-layer

White space separates items and may surround a '*'. Errors count layers from 0, as in `blocks.0`, and characters from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vitreuse.io.errors import closest
from vitreuse.plan.notation import Flaw, expand, quoted, shortest_text

WORDS = ("exact", "reuse", "lowrank", "span", "none")
NUMBERED = ("reuse", "lowrank", "span")  # words that take a number
PRESETS = ("reuse", "lazy", "lowrank", "mixspan")
MAX_LAYERS = 256
_MAX_NUMBER = 999_999_999
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Spec:
    """The attention of one layer: a word of the plan language and, where the word takes one, its number."""

    word: str
    number: int | None = None

    @property
    def makes_map(self) -> bool:
        """Whether such a layer computes a map of its own, which later layers may reuse."""
        return self.word not in ("reuse", "none")

    def __str__(self) -> str:
        return self.word if self.number is None else f"{self.word}:{self.number}"


EXACT = Spec("exact")


@dataclass(frozen=True)
class Plan:
    """One attention spec per layer, first layer first; `str(plan)` is the shortest text that parses to it.

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
            if spec.word != "none":
                following = following + 1 if spec.word == "reuse" else 0
        return tuple(reversed(num_readers))

    @property
    def num_maps(self) -> int:
        """How many layers compute a map that a later layer reads."""
        return sum(n > 0 for spec, n in zip(self.specs, self.num_readers, strict=True) if spec.makes_map)

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


def parse_plan(text: str, depth: int | None = None, num_heads: int | None = None) -> Plan:
    """Reads a plan from text, and checks it against a model's depth and number of heads where they are given.

    Raises:
        ValueError: In one sentence, the plan, the position, the rule and the nearest valid plan.
    """
    _check_depth(depth)
    try:
        return Plan(_read(text, depth, num_heads))
    except Flaw as flaw:
        raise ValueError(_sentence(text, flaw, depth, num_heads)) from None


def preset_plan(method: str, depth: int) -> Plan:
    """Makes the default plan of a method in PRESETS for a model of the given depth.

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
    }
    return Plan((patterns[method] * depth)[:depth])


def _read(text: str, depth: int | None, num_heads: int | None) -> tuple[Spec, ...]:
    """The specs that a text spells; raises Flaw at the first rule it breaks."""
    specs = _read_specs(expand(text, max_words=MAX_LAYERS))
    _check_specs(specs, num_heads)
    _check_length(specs, depth)
    return specs


def _read_specs(words: Sequence[str]) -> tuple[Spec, ...]:
    """Splits each word from its number; raises Flaw where a colon is not followed by a number."""
    specs: list[Spec] = []
    for layer, spelling in enumerate(words):
        word, colon, digits = spelling.partition(":")
        if colon and not _WHOLE_NUMBER.fullmatch(digits):
            nearest = _WHOLE_NUMBER.search(digits)
            valid = f"{word}:{nearest[0]}" if nearest else word
            repaired = " ".join(valid if other == spelling else other for other in words)
            problem = f"layer {layer} is {quoted(spelling)}, but after a colon comes a whole number of up to 9 digits"
            raise Flaw(problem, repaired)
        specs.append(Spec(word, int(digits) if colon else None))
    return tuple(specs)


def _check_specs(specs: tuple[Spec, ...], num_heads: int | None = None) -> None:
    """Raises Flaw at the first layer that breaks a rule of its word or of the plan."""
    if not specs:
        raise Flaw("plan is empty", "exact")
    if len(specs) > MAX_LAYERS:
        raise Flaw(f"plan has {len(specs)} layers, more than the {MAX_LAYERS} it can have", _text(specs[:MAX_LAYERS]))
    has_map = False
    for layer, spec in enumerate(specs):
        subject = f"layer {layer} is {quoted(str(spec))}, but"
        if broken := _broken_rule(spec, num_heads):
            rule, valid = broken
            raise Flaw(f"{subject} {rule}", _text(valid if other == spec else other for other in specs))
        if spec.word == "reuse" and not has_map:
            repaired = (*specs[:layer], EXACT, *specs[layer + 1 :])
            raise Flaw(f"{subject} no layer before it has a map", _text(repaired))
        has_map = has_map or spec.makes_map


def _broken_rule(spec: Spec, num_heads: int | None) -> tuple[str, Spec] | None:
    """The rule that a spec breaks on its own and the nearest spec that keeps it; None for a valid spec."""
    word, number = spec.word, spec.number
    if word not in WORDS:
        return f"the words are {', '.join(WORDS)}", Spec(_nearest(word, WORDS), number)
    if word not in NUMBERED:
        return None if number is None else (f"{word} takes no number", Spec(word))
    if number is not None and not 0 <= number <= _MAX_NUMBER:
        return f"numbers run from 0 to {_MAX_NUMBER}", Spec(word, min(max(number, 0), _MAX_NUMBER))
    if word == "lowrank" and not number:
        return "lowrank needs the number of tokens it keeps, 1 or more", Spec(word, 64 if number is None else 1)
    if word == "span" and (number is None or number % 2 == 0):
        return "span needs a width, an odd number", Spec(word, 7 if number is None else number + 1)
    if word == "reuse" and number is not None and num_heads is not None and number > num_heads:
        return f"the model's number of heads is {num_heads}", Spec(word, num_heads)
    return None


def _check_length(specs: tuple[Spec, ...], depth: int | None) -> None:
    """Raises Flaw where a plan is not as long as the model is deep; a short one is repaired by going on as it began."""
    length = len(specs)
    if depth in (None, length):
        return
    period = next((p for p in range(1, length // 2 + 1) if specs[p:] == specs[:-p]), 1)
    problem = f"plan has {length} layer{'s' * (length > 1)}, the model has {depth}"
    raise Flaw(problem, _text((specs + specs[-period:] * depth)[:depth]))


def _sentence(text: str, flaw: Flaw, depth: int | None = None, num_heads: int | None = None) -> str:
    """One sentence on a flaw, ending in the valid plan that is reached by repairing one flaw after the other."""
    problem, valid = flaw.problem, shortest_text(["exact"] * (depth or 1))
    for _ in range(20):
        try:
            valid = shortest_text(map(str, _read(flaw.repaired, depth, num_heads)))
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
