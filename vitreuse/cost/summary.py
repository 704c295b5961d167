"""What a model name or a plan means in numbers, from the closed form, and how large a plan may be for equal MACs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import torch

from vitreuse.cost.macs import count_macs, count_params
from vitreuse.model.create import create_model
from vitreuse.model.keywords import mlp_ratio
from vitreuse.plan.options import PLAN_KEYWORDS

PARTS = ("width", "mlp")  # of a model that may grow
LARGEST = 8  # times what the model has; most plans save less


def describe(
    name: str,
    plan: str | None = None,
    image_size: int | None = None,
    keywords: Mapping[str, Any] | None = None,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters and MACs of a plan in a model, as a whole and per layer and part, beside those of the exact plan.

    Args:
        name: A model of ours, or a plain ViT of timm.
        plan: A plan, the model's own when None.
        image_size: Side in pixels, the model's own when None.
        keywords: Further ones of the model; the exact plan's, which it is compared with, is made without them.
        shape: Keywords of both.

    Returns:
        A JSON object: ``theoretical_macs`` counts carried maps and exact neighbourhoods, and ratios quote it; ``macs``
        counts the products that run, here on a CPU.

    Raises:
        ValueError: A wrong plan or an unknown model.
    """
    model = model_on_meta(name, plan, image_size, {**(shape or {}), **(keywords or {})})
    plain = {key: value for key, value in (shape or {}).items() if key not in PLAN_KEYWORDS}
    exact = model_on_meta(name, f"exact*{len(model.plan)}", image_size, plain)
    macs, exact_macs = count_macs(model, theoretical=True), count_macs(exact, theoretical=True)
    total, exact_total = sum(macs.values()), sum(exact_macs.values())
    params, exact_params = count_params(model), count_params(exact)
    return {
        "name": name,
        "plan": str(model.plan),
        "keywords": dict(keywords or {}),
        "image_size_px": list(model.patch_embed.img_size),
        "params": params,
        "params_ratio": params / exact_params,
        "macs": sum(count_macs(model).values()),
        "theoretical_macs": total,
        "macs_ratio": total / exact_total,
        "layers": [_layer(model, layer, macs, exact_macs) for layer in range(len(model.plan))],
    }


def model_on_meta(
    name: str, plan: str | None, image_size: int | None, keywords: Mapping[str, Any] | None = None
) -> Any:
    """The model on the meta device, where initialising it would only take time; arguments as for describe."""
    size = {} if image_size is None else {"img_size": image_size}
    with torch.device("meta"):
        return create_model(name, plan, **{**(keywords or {}), **size, "weight_init": "skip"})


def _layer(model: Any, layer: int, macs: dict[str, int], exact_macs: dict[str, int]) -> dict[str, Any]:
    """One layer's spec, the layer whose map it reads, the tokens it gets and merges, its hidden units, MACs by part."""
    parts = _parts(macs, layer)
    patches, left = model.plan.patches_left(model.patch_embed.num_patches)[layer : layer + 2]
    block = model.blocks[layer]
    return {
        "layer": layer,
        "spec": str(model.plan[layer]),
        "anchor": model.plan.anchors[layer],
        "tokens": model.num_prefix_tokens + patches,
        "merged": patches - left,
        "hidden": block.mlp.fc2.in_features if block.has_mlp else 0,
        "theoretical_macs": parts,
        "macs_ratio": sum(parts.values()) / sum(_parts(exact_macs, layer).values()),
    }


def _parts(macs: dict[str, int], layer: int) -> dict[str, int]:
    """MACs of a layer by the last word of their name."""
    prefix = f"blocks.{layer}."
    return {name.rpartition(".")[2]: count for name, count in macs.items() if name.startswith(prefix)}


def equal_macs(name: str, plan: str | None, part: str, image_size: int | None = None) -> dict[str, int | float]:
    """The keyword by which a plan's model is as large as the MACs of the exact plan allow.

    Args:
        name: A model of ours, or a plain ViT of timm.
        plan: A plan, the model's own when None.
        part: "width" for embed_dim, with a multiple of 4 channels for each of as many heads; "mlp" for mlp_ratio, in
            steps of 1/16.
        image_size: Side in pixels, the model's own when None.

    Returns:
        The keyword by name, for timm.create_model or a config's model.keywords.

    Raises:
        ValueError: A wrong plan, an unknown model, or a plan that is too costly or too cheap in a model of any size.
    """
    depth = len(model_on_meta(name, plan, image_size).plan)
    exact = model_on_meta(name, f"exact*{depth}", image_size)
    keyword, unit, own = _measure(exact, part)

    def macs(num_units: int) -> int:
        return _macs(model_on_meta(name, plan, image_size, {keyword: num_units * unit}))

    sizes = range(1, math.ceil(LARGEST * own / unit))
    num_units = bisect_right(sizes, _macs(exact), key=macs)
    if not num_units:
        raise ValueError(f"plan '{plan}' costs more MACs in {name} than exact attention at any {keyword}.")
    if num_units == len(sizes):
        most = f"{keyword}={num_units * unit:g}"
        raise ValueError(f"plan '{plan}' costs fewer MACs in {name} than exact attention at all up to {most}.")
    return {keyword: num_units * unit}


def _measure(exact: Any, part: str) -> tuple[str, int | float, float]:
    """The keyword of a part, the unit in which it grows, and what the model has of it."""
    layer = exact.blocks[0]
    if part == "width":
        return "embed_dim", 4 * layer.attn.num_heads, exact.embed_dim
    return "mlp_ratio", 1 / 16, mlp_ratio(layer.mlp)


def _macs(model: Any) -> int:
    return sum(count_macs(model, theoretical=True).values())
