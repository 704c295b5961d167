"""Which layers lose least by a word, one after the other: what plans.py lists as its best layers.

    python -m docs.study.dinov2 --ranking

Nothing of a test is looked at: images are of the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docs.study.dinov2.measure import images_of
from docs.study.dinov2.packages import HERE
from docs.study.dinov2.plans import BEST_LAYERS, DEPTH, in_layers
from docs.study.dinov2.weights import trained
from eval.table import Column, to_markdown
from vitreuse import convert
from vitreuse.compress.fidelity import agreement
from vitreuse.io.durable import write_durably

FOLDER, SIZE_PX, NUM_IMAGES = "224/train", 224, 8
COLUMNS = (Column("word", "word"), Column("layers", "layers, the least loss first (cosine of patch tokens)"))


def patch_cosine(model: Any, batches: Sequence[Any], word: str, layer: int) -> float:
    """How near the patch tokens stay to the model's where one layer is a word."""
    found = agreement(model, convert(model, in_layers(word, [layer])).model, batches, has_labels=False).patch_cosine
    assert found is not None  # of a ViT
    return found


def main() -> None:
    """Writes ranking.md; a word that reuses a map cannot be in the first layer."""
    model = trained(SIZE_PX)
    batches = [*images_of(FOLDER, model, NUM_IMAGES).batches(NUM_IMAGES)]
    rows = []
    for word in BEST_LAYERS:
        found = {layer: patch_cosine(model, batches, word, layer) for layer in range(word == "reuse", DEPTH)}
        ranked = sorted(found, key=lambda layer: -found[layer])
        rows.append({"word": word, "layers": ", ".join(f"{layer} ({found[layer]:.3f})" for layer in ranked)})
        print(rows[-1], flush=True)
    untrained = "A `linear` layer that is not fitted begins at zero, and so does what skip does."
    caption = f"{untrained} One layer changed, {NUM_IMAGES} images of {FOLDER}, {SIZE_PX} px, no training."
    table = to_markdown(rows, COLUMNS, caption)
    write_durably(HERE / "ranking.md", f"# Layers by what a word loses in them\n\n{table}".encode())
