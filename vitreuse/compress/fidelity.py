"""How far a converted model still says what the original says, image by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse.cost.measure import top_classes


@dataclass(frozen=True)
class Agreement:
    """How far two models agree, as means over images; None where a number is not known.

    Attributes:
        num_images: How many were compared.
        equal_top1: Percent of images of which both models say the same class.
        kl_divergence_nats: Divergence of the original's probabilities from the converted model's.
        cosine: Similarity of the features of models without classes.
        original_top1: Percent of images whose label the original says.
        converted_top1: The same of the converted model.
    """

    num_images: int
    equal_top1: float | None = None
    kl_divergence_nats: float | None = None
    cosine: float | None = None
    original_top1: float | None = None
    converted_top1: float | None = None


@torch.inference_mode()
def agreement(original: Any, converted: Any, batches: Iterable[tuple[Tensor, Tensor]], has_labels: bool) -> Agreement:
    """Compares two models in evaluation mode, on the device of the first.

    Args:
        original: The model that was converted.
        converted: What became of it; of as many classes, or of none too.
        batches: Images (B, channels, rows, columns) and labels (B,).
        has_labels: Whether the labels are classes of the models.

    Raises:
        ValueError: There are no images.
    """
    device = next(original.parameters()).device
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for images, labels in batches:
        wanted, found = original(images.to(device)), converted(images.to(device))
        if original.num_classes > 0 and wanted.ndim == 2:
            compared = _of_classes(wanted, found, labels.to(device), has_labels)
        else:
            compared = {"cosine": F.cosine_similarity(wanted.flatten(1), found.flatten(1))}
        for name, values in compared.items():
            rows[name].append(values.double())
    if not rows:
        raise ValueError("there are no images to compare on: give at least one.")
    columns = {name: torch.cat(values) for name, values in rows.items()}
    num_images = len(next(iter(columns.values())))
    return Agreement(num_images, **{name: float(column.mean()) for name, column in columns.items()})


def _of_classes(wanted: Tensor, found: Tensor, labels: Tensor, has_labels: bool) -> dict[str, Tensor]:
    """For each attribute of Agreement that logits can tell, its values image by image."""
    classes, found_classes = (top_classes(logits, 1)[:, 0] for logits in (wanted, found))
    ours, theirs = (logits.float().log_softmax(1) for logits in (found, wanted))
    columns = {
        "equal_top1": 100.0 * (classes == found_classes),
        "kl_divergence_nats": F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1),
    }
    if has_labels:
        columns |= {"original_top1": 100.0 * (classes == labels), "converted_top1": 100.0 * (found_classes == labels)}
    return columns
