"""What a layer of a model may become: the words of a search.

Shapes: L layers, N patch tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from vitreuse.plan import EXACT, Plan, Spec
from vitreuse.plan.language import MERGING, WHOLE, num_mergeable


@dataclass(frozen=True)
class Space:
    """The plans that are searched.

    Attributes:
        words: What attention, or with linear and skip a whole layer, may become; exact is one of them.
        depth: Layers of the model.
        num_patches: Patch tokens of an image.
        num_hidden: Hidden units of a layer's MLP.
        merge_step: Tokens merge in a layer by multiples of this; 0 where none do.
        hidden_step: Hidden units go by multiples of this; 0 where all stay.
    """

    words: tuple[Spec, ...]
    depth: int
    num_patches: int
    num_hidden: int
    merge_step: int = 0
    hidden_step: int = 0

    def __post_init__(self) -> None:
        if EXACT not in self.words:
            raise ValueError("words are without exact, which layers are that stay as they are: add it.")

    @cached_property
    def attention_words(self) -> tuple[Spec, ...]:
        """The words that leave a layer its MLP, exact first."""
        return (EXACT, *(spec for spec in self.words if spec.word not in WHOLE and spec != EXACT))

    @cached_property
    def whole_words(self) -> tuple[Spec, ...]:
        """linear and skip, as far as they are searched."""
        return tuple(spec for spec in self.words if spec.word in WHOLE)

    @cached_property
    def reads_maps(self) -> bool:
        """Whether a layer may read another's map."""
        return any(spec.word == "reuse" for spec in self.words)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """How many patch tokens may be left, all of them first."""
        if not self.merge_step:
            return (self.num_patches,)
        return tuple(range(self.num_patches, 0, -self.merge_step))

    @cached_property
    def hidden(self) -> tuple[int, ...]:
        """How many hidden units a layer may have, all of them first."""
        if not self.hidden_step:
            return (self.num_hidden,)
        fewer = range(self.num_hidden // self.hidden_step * self.hidden_step, -1, -self.hidden_step)
        return tuple(dict.fromkeys((self.num_hidden, *fewer)))

    def merges(self, num_patches: int) -> Iterator[int]:
        """How many of the tokens that are left may merge in a layer, none first."""
        step = self.merge_step or num_patches + 1
        most = min(num_mergeable(num_patches, num_patches), num_patches - self.levels[-1])
        yield from range(0, most + 1, step)

    def may_merge(self, spec: Spec, anchor: Spec | None) -> bool:
        """Whether tokens may merge in a layer of this word, which may read a map."""
        return spec.word in MERGING and (anchor is None or anchor.word in MERGING)

    def spec(self, word: Spec, merged: int = 0, hidden: int | None = None) -> Spec:
        """A layer's spec: a word, with tokens that merge and hidden units, all of which go unsaid."""
        return replace(word, merged=merged, hidden=None if hidden in (None, self.num_hidden) else hidden)

    @property
    def exact(self) -> Plan:
        """The plan that changes nothing."""
        return Plan((EXACT,) * self.depth)
