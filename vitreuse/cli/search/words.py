"""What a layer may become in a search, and the budgets, from the command line."""

import argparse
import math
from typing import Any, NamedTuple

from timm.layers import Mlp

from vitreuse.cli.source import default_words, words
from vitreuse.compress.search import Space
from vitreuse.plan import EXACT, Spec


class SearchWords(NamedTuple):
    """What a layer may become: words, and the steps by which tokens merge and hidden units go, 0 for none."""

    specs: tuple[Spec, ...]
    merge_step: int
    hidden_step: int

    def texts(self) -> list[str]:
        """As they are given."""
        merges = [f"-{self.merge_step}"] if self.merge_step else []
        return [*map(str, self.specs), *merges, *([f"/{self.hidden_step}"] if self.hidden_step else [])]


def share(text: str) -> float:
    """A budget, from the command line."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of an exact model's cost: give a number above 0, up to 1")
    return number


def minutes(text: str) -> float:
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time in minutes: give a number, 0 or more")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def search_words(text: str) -> SearchWords:
    """What a layer may become, from the command line."""
    steps, specs = {"-": 0, "/": 0}, []
    for item in text.split(","):
        if item[:1] in steps:
            if not item[1:].isdecimal() or int(item[1:]) < 1 or steps[item[0]]:
                raise argparse.ArgumentTypeError(f"in {text}, {item} is no step: give {item[0]} and a number once")
            steps[item[0]] = int(item[1:])
            continue
        (spec,) = words(item)
        if spec.merged or spec.hidden is not None:
            raise argparse.ArgumentTypeError(f"in {text}, {item} is more than a word: give it, and steps as -8, /192")
        specs.append(spec)
    if EXACT not in specs:
        raise argparse.ArgumentTypeError(f"{text} is without exact, which layers are that stay as they are: add it")
    return SearchWords(tuple(dict.fromkeys(specs)), steps["-"], steps["/"])


def all_words(model: Any) -> SearchWords:
    """All words, with steps that suit the model."""
    specs = (EXACT, *default_words(model), Spec("linear"), Spec("skip"))
    step = math.ceil(model.blocks[0].mlp.fc2.in_features / 8) if has_plain_mlp(model) else 0
    return SearchWords(specs, max(1, model.patch_embed.num_patches // 32), step)


def space_of(model: Any, chosen: SearchWords) -> Space:
    num_hidden = model.blocks[0].mlp.fc2.in_features
    return Space(chosen.specs, len(model.blocks), model.patch_embed.num_patches, num_hidden, *chosen[1:])


def has_plain_mlp(model: Any) -> bool:
    """Whether a hidden unit of a layer's MLP is one row of its first matrix: whether it is not gated."""
    return isinstance(model.blocks[0].mlp, Mlp)
