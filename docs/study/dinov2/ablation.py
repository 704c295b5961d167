"""What each choice in merging tokens is worth on a trained model: the variants of docs/study/merging.py, untrained.

    python -m docs.study.dinov2 --ablation
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from docs.study.dinov2.measure import TESTS, images_of
from docs.study.dinov2.packages import HERE
from docs.study.dinov2.weights import trained
from docs.study.merging import VARIANTS, varied
from eval.table import Column, to_markdown
from vitreuse import convert
from vitreuse.cost.measure import describe_machine
from vitreuse.io.durable import write_durably

IMAGE_SIZE_PX, BATCH_SIZE, NUM_IMAGES = 224, 16, 61  # of the composites; all of the photographs, which are fewer
MERGED = (8, 12, 16)

Batches = list[tuple[Tensor, Tensor]]  # images, and the original's tokens of them


@torch.inference_mode()
def with_tokens(original: Any, test: str) -> Batches:
    """The images of a test with the tokens (B, N, C) that the original makes of them."""
    sample = images_of(TESTS[test].format(px=IMAGE_SIZE_PX), original, NUM_IMAGES)
    return [(images, original.forward_features(images)) for images, _ in sample.batches(BATCH_SIZE)]


@torch.inference_mode()
def distances(model: Any, batches: Batches) -> list[float]:
    """Mean of 1 - cosine of class and of patch tokens to the original's."""
    found = [1 - F.cosine_similarity(model.forward_features(images), tokens, dim=-1) for images, tokens in batches]
    each = torch.cat(found).double()
    return [float(each[:, 0].mean()), float(each[:, 1:].mean())]


def main() -> None:
    """Writes ablation.md."""
    original, rows = trained(IMAGE_SIZE_PX, global_pool=""), []
    batches = {test: with_tokens(original, test) for test in TESTS}
    for variant in VARIANTS:
        row: dict[str, Any] = {"name": variant.name}
        for test, num_merged in product(TESTS, MERGED):
            model = convert(original, f"exact-{num_merged}*{len(original.blocks)}").model
            with varied(model, variant):
                found = distances(model, batches[test])
            row[f"{test}-{num_merged}"] = " / ".join(f"{100 * distance:.2f}" for distance in found)
        rows.append(row)
        print(row, flush=True)
    columns = [Column("name", "variant")]
    columns += [Column(f"{test}-{r}", f"{test}, exact-{r}*12") for test, r in product(TESTS, MERGED)]
    machine = describe_machine(torch.device("cpu"))
    caption = (
        f"100 x (1 - cosine) to the original's class / patch tokens at {IMAGE_SIZE_PX} px, means over {NUM_IMAGES} "
        f"composites and 25 photographs. torch {machine['torch']}, timm {machine['timm']}, {machine['date']}."
    )
    write_durably(HERE / "ablation.md", to_markdown(rows, columns, caption).encode())
