"""What a layer may become, as somebody spells it: words of the plan language between commas, and steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from timm.layers import Mlp

from vitreuse.compress.search import Space
from vitreuse.plan import EXACT, Spec, parse_plan


def parse_words(text: str) -> tuple[Spec, ...]:
    """Specs of the plan language between commas.

    Raises:
        ValueError: One is none.
    """
    try:
        return tuple(parse_plan(f"exact {item}", depth=2)[1] for item in text.split(","))
    except ValueError as error:
        raise ValueError(f"in {text}, {error}") from error


def default_words(model: Any) -> tuple[Spec, ...]:
    """What an exact layer of a model may become: with 14 x 14 patches or more reuse, lowrank:64, span:7 and none."""
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    k, width = max(1, min(64, num_tokens // 3)), min(7, max(model.patch_embed.grid_size) // 2 | 1)
    return parse_words(f"reuse,lowrank:{k},span:{width},none")


class SearchWords(NamedTuple):
    """What a layer may become in a search: words, and steps by which tokens merge and hidden units go, 0 for none."""

    specs: tuple[Spec, ...]
    merge_step: int = 0
    hidden_step: int = 0

    @classmethod
    def parse(cls, text: str) -> SearchWords:
        """Of words between commas, -R for tokens that merge by steps of R and /H for hidden units by steps of H.

        Raises:
            ValueError: One is no word or step, or exact is not among them.
        """
        steps, specs = {"-": 0, "/": 0}, []
        for item in text.split(","):
            if item[:1] in steps:
                if not item[1:].isdecimal() or int(item[1:]) < 1 or steps[item[0]]:
                    raise ValueError(f"in {text}, {item} is no step: give {item[0]} and a number once.")
                steps[item[0]] = int(item[1:])
                continue
            (spec,) = parse_words(item)
            if spec.merged or spec.hidden is not None:
                raise ValueError(f"in {text}, {item} is more than a word: give it, and steps as -8, /192.")
            specs.append(spec)
        if EXACT not in specs:
            raise ValueError(f"{text} is without exact, which layers are that stay as they are: add it.")
        return cls(tuple(dict.fromkeys(specs)), steps["-"], steps["/"])

    @classmethod
    def of(cls, model: Any, text: str | None) -> SearchWords:
        """Those of a text, as parse has them; without one all words, with steps that suit the model."""
        if text is not None:
            return cls.parse(text)
        specs = (EXACT, *default_words(model), Spec("linear"), Spec("skip"))
        step = math.ceil(model.blocks[0].mlp.fc2.in_features / 8) if _has_plain_mlp(model) else 0
        return cls(specs, max(1, model.patch_embed.num_patches // 32), step)

    def texts(self) -> list[str]:
        """As they are given."""
        merges = [f"-{self.merge_step}"] if self.merge_step else []
        return [*map(str, self.specs), *merges, *([f"/{self.hidden_step}"] if self.hidden_step else [])]

    def space(self, model: Any) -> Space:
        """The plans of a model that are searched.

        Raises:
            ValueError: By a step no token can merge, or no hidden unit go.
        """
        num_patches, num_hidden = model.patch_embed.num_patches, model.blocks[0].mlp.fc2.in_features
        if self.hidden_step and not _has_plain_mlp(model):
            kind = type(model.blocks[0].mlp).__name__
            raise ValueError(f"/{self.hidden_step} takes hidden units of an MLP, and a {kind} is gated: leave it out.")
        most = num_patches // 2
        if self.merge_step > most:
            given = f"-{self.merge_step} merges more than half of {num_patches} patches"
            raise ValueError(f"{given}: give -{most} or less.")
        if self.hidden_step > num_hidden:
            units = f"an MLP has {num_hidden} hidden units"
            raise ValueError(f"{units} and /{self.hidden_step} are more: give /{num_hidden} or less.")
        return Space(self.specs, len(model.blocks), num_patches, num_hidden, self.merge_step, self.hidden_step)


def _has_plain_mlp(model: Any) -> bool:
    """Whether a hidden unit of a layer's MLP is one row of its first matrix: whether it is not gated."""
    return isinstance(model.blocks[0].mlp, Mlp)
