"""Each word of the language at three strengths, in a DINOv2 of 12 layers, without anything that has to be trained.

A word that goes into some layers only goes into those that lose least by it, one layer changed at a time, as ranking.py
finds. A `linear` that was not trained does nothing, as `skip` does: it costs a product more.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitreuse import parse_plan

DEPTH = 12
EXACT = f"exact*{DEPTH}"
ATTENTION_PLAN = "span:13*12"  # in the picture, beside a plan that merges
BEST_LAYERS = {"none": (2, 4, 6, 3), "reuse": (2, 1, 6, 11), "linear": (6, 4, 2), "skip": (6, 4, 2)}
STRENGTHS = {"none": (1, 2, 4), "reuse": (1, 2, 4), "linear": (1, 2, 3), "skip": (1, 2, 3)}
HIDDEN = (1152, 768, 384)  # of 1,536; those of the largest norms stay
BY_SIZE = {  # tokens that merge in each layer, tokens of keys and values, widths in patches of 16 x 16 and 37 x 37
    224: {"exact-r": (8, 12, 16), "lowrank": (196, 128, 64), "span": (13, 9, 5)},
    518: {"exact-r": (40, 80, 101), "lowrank": (1024, 512, 256), "span": (25, 13, 7)},
}


def plans(image_size_px: int) -> list[tuple[str, str]]:
    """Words and plans in the order of the table."""
    sized = BY_SIZE[image_size_px]
    found = [("exact", EXACT)]
    found += [("exact-r", f"exact-{merged}*{DEPTH}") for merged in sized["exact-r"]]
    for word, counts in STRENGTHS.items():
        found += [(word, in_layers(word, BEST_LAYERS[word][:count])) for count in counts]
    for word in ("lowrank", "span"):
        found += [(word, f"{word}:{strength}*{DEPTH}") for strength in sized[word]]
    return [*found, *(("exact/h", f"exact/{hidden}*{DEPTH}") for hidden in HIDDEN)]


def in_layers(word: str, layers: Sequence[int]) -> str:
    """A plan that has a word in some layers and exact attention in the others."""
    return str(parse_plan(" ".join(word if layer in layers else "exact" for layer in range(DEPTH))))
