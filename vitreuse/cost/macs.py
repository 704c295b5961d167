"""Multiply-adds of a model in closed form, from the shapes of its layers, and its parameters.

MACs are the multiply-adds of matrix products and convolutions of one image's forward pass; FLOPs are twice as many.
"""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionPoolPrr
from torch import nn


def count_macs(
    model: Any, image_size: int | tuple[int, int] | None = None, theoretical: bool = False
) -> dict[str, int]:
    """MACs by part, such as ``blocks.0.attn.qkv``; their sum is the model's.

    Args:
        model: A model with a plan.
        image_size: Pixels, (height, width) or one for both; the size the model is built for when None.
        theoretical: Count a carried map and exact neighbourhoods instead of the products that run on this device.

    Raises:
        ValueError: The model has no plan.
    """
    _check(model)
    grid = model.patch_embed.grid_size if image_size is None else model.patch_embed.dynamic_feat_size(_pair(image_size))
    parts = {"patch_embed": grid[0] * grid[1] * model.patch_embed.proj.weight.numel()}
    for index, block in enumerate(model.blocks):
        is_last = index == len(model.blocks) - 1
        num_queries = model.num_class_rows if is_last and model.reads_class_rows else None
        for part, macs in block.macs(grid, num_queries, theoretical).items():
            parts[f"blocks.{index}.{part}"] = macs
    parts |= _pool(model, grid[0] * grid[1])
    for name, head in _heads(model).items():
        parts[name] = head.in_features * head.out_features
    return parts


def count_params(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def _heads(model: Any) -> dict[str, nn.Linear]:
    """The model's classifiers by name."""
    found = {name: getattr(model, name, None) for name in ("head", "head_dist")}
    return {name: head for name, head in found.items() if isinstance(head, nn.Linear)}


def _pool(model: Any, num_patches: int) -> dict[str, int]:
    """What timm's attention pools multiply: one latent query, or all tokens with themselves and nothing projected."""
    pool = model.attn_pool
    if pool is None:
        return {}
    num_tokens = num_patches + (model.num_prefix_tokens if model.pool_include_prefix else 0)
    if isinstance(pool, AttentionPoolPrr):
        return {"attn_pool.mixing": 2 * num_tokens**2 * model.embed_dim}
    rows = {"kv": num_tokens}
    parts = {
        f"attn_pool.{name}": rows.get(name, pool.latent_len) * part.in_features * part.out_features
        for name, part in pool.named_modules()
        if isinstance(part, nn.Linear)
    }
    return {**parts, "attn_pool.mixing": 2 * pool.latent_len * num_tokens * model.embed_dim}


def _check(model: Any) -> None:
    if not hasattr(model, "plan"):
        name = type(model).__name__
        raise ValueError(f"{name} has no plan and so no closed form: count it with vitreuse.cost.counters.")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
