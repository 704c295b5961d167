"""How large a plan may make a model for the MACs of exact attention.

LazyFormer (arXiv 2102.12702) spends on wider layers what its reused maps save.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

from vitreuse.describe import model_on_meta
from vitreuse.macs import count_macs

PARTS = ("width", "mlp")
LARGEST = 8  # times what the model has; a plan saves less


def equal_macs(name: str, plan: str | None, part: str, image_size: int | None = None) -> dict[str, int | float]:
    """The keyword by which a plan's model is as large as the MACs of the exact plan allow.

    Args:
        name: a model of ours, or timm's plain model of one.
        plan: a plan, the model's own when None.
        part: "width" for embed_dim, with a multiple of 4 channels for each of as many heads; "mlp" for mlp_ratio, in
            steps of 1/16.
        image_size: side in pixels, the model's own when None.

    Returns:
        The keyword by name, for timm.create_model or a config's model.keywords.

    Raises:
        ValueError: a wrong plan, an unknown model, or a plan that is too costly in a model of any size.
    """
    depth = len(model_on_meta(name, plan, image_size).plan)
    exact = model_on_meta(name, f"exact*{depth}", image_size)
    keyword, unit, own = _measure(exact, part)

    def macs(num_units: int) -> int:
        return _macs(model_on_meta(name, plan, image_size, {keyword: num_units * unit}))

    num_units = bisect_right(range(1, math.ceil(LARGEST * own / unit)), _macs(exact), key=macs)
    if not num_units:
        raise ValueError(f"plan '{plan}' costs more MACs in {name} than exact attention at any {keyword}.")
    return {keyword: num_units * unit}


def _measure(exact: Any, part: str) -> tuple[str, int | float, float]:
    """The keyword of a part, the unit in which it grows, and what the model has of it."""
    layer = exact.blocks[0]
    if part == "width":
        return "embed_dim", 4 * layer.attn.num_heads, exact.embed_dim
    return "mlp_ratio", 1 / 16, layer.mlp.fc1.out_features / exact.embed_dim


def _macs(model: Any) -> int:
    return sum(count_macs(model, theoretical=True).values())
