"""What was promised, measured: a converted model and others beside it, on images that nothing was chosen on.

Distances are means over these images, and times are taken in turns in one run with the best plain model of timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from vitreuse.compress.fidelity import Agreement, agreements
from vitreuse.cost.measure import Timing, inference_call, time_interleaved
from vitreuse.io.progress import WorkProgress
from vitreuse.model.preprocessing import example

TOKENS_TIMED = 2056  # of a batch: 8 images of 257 tokens
REPEATS = 10


@dataclass(frozen=True)
class Audited:
    """A model that was looked at.

    Attributes:
        distance: How far its answers are from the original's, see output_distance, a mean over the images.
        agreement: The same in other words.
        timing: Of a batch.
        speedup: The minimum time of the best plain model over its own.
    """

    distance: float
    agreement: Agreement
    timing: Timing
    speedup: float


def audit(
    original: Any,
    models: Mapping[str, Any],
    plain: Callable[[bool], Any],
    shown: Any,
    has_labels: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Audited]:
    """Measures models in evaluation mode on the device of the original.

    Args:
        original: What they were converted from.
        models: By name.
        plain: Makes timm's plain model, with fused attention or without.
        shown: What has a length, of images, and under labelled() batches (B, channels, rows, columns) with labels (B,).
        has_labels: Whether the labels are classes of the models.
        dtype: Of weights and images while times are taken.
    """
    device = next(original.parameters()).device
    with WorkProgress("measuring", "images", len(shown)) as progress:
        agreed = agreements(original, models, shown.labelled(), has_labels, progress.reach)
    baselines = {f"timm, {name}": plain(name == "fused").to(device).eval() for name in ("fused", "unfused")}
    images = example(original, batch_of(original)).to(dtype)
    is_own = next(original.parameters()).dtype == dtype
    timed = {name: model if is_own else deepcopy(model).to(dtype) for name, model in models.items()}
    timed |= {name: model.to(dtype) for name, model in baselines.items()}
    calls = {name: inference_call(_forward(model), images) for name, model in timed.items()}
    with WorkProgress("timing in turns", "models", len(calls)) as progress:
        timings = time_interleaved(calls, device, REPEATS)
        progress.reach(len(calls))
    best = min(timings[name].minimum_ms for name in baselines)
    return {
        name: Audited(found.distance, found, timings[name], best / timings[name].minimum_ms)
        for name, found in agreed.items()
    }


def batch_of(model: Any) -> int:
    """How many images of a model are timed at a time."""
    return max(1, round(TOKENS_TIMED / (model.num_prefix_tokens + model.patch_embed.num_patches)))


def _forward(model: Any) -> Callable[..., Any]:
    """What is timed: logits, or of a model without classes all tokens."""
    return model.forward if model.num_classes > 0 else model.forward_features
