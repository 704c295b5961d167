"""How a model begins where that is not how timm's constructor leaves it."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.models import VisionTransformer

from vitreuse.io.errors import ConfigError


@torch.no_grad()
def fill_with_sincos2d(model: Any) -> None:
    """Writes timm's sines and cosines over the patch grid into the position embedding; prefix tokens have zeros.

    Raises:
        ConfigError: The model has no position embedding, or a width that does not divide into four.
    """
    pos_embed = getattr(model, "pos_embed", None)
    if not isinstance(model, VisionTransformer) or pos_embed is None:
        raise ConfigError(
            f"model.pos_embed 'sincos2d' needs a vision transformer with a position embedding, {type(model).__name__} "
            "has none: leave it out."
        )
    if model.embed_dim % 4:
        raise ConfigError(
            f"model.pos_embed 'sincos2d' needs a width that is a multiple of 4, not {model.embed_dim}: "
            "choose another embed_dim, or leave it out."
        )
    grid = list(model.patch_embed.grid_size)
    table = build_sincos2d_pos_embed(grid, model.embed_dim, device=pos_embed.device, dtype=pos_embed.dtype)
    pos_embed.zero_()
    pos_embed[:, -len(table) :] = table


def set_drop_paths_alike(model: Any, rate: float) -> None:
    """Gives every layer the same rate of stochastic depth.

    Raises:
        ConfigError: The model is no vision transformer.
    """
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise ConfigError(f"model.drop_path 'uniform' needs a vision transformer, and this is a {kind}: leave it out.")
    for block in model.blocks:
        for name in [name for name, _ in block.named_modules() if name.rpartition(".")[2].startswith("drop_path")]:
            block.set_submodule(name, DropPath(rate))


@torch.no_grad()
def spread_qkv(model: Any) -> None:
    """Gives query, key and value, uniform as one matrix (rows, C), the bound that each has as one of its own (C, C)."""
    for name, weight in model.named_parameters():
        if name.endswith(("attn.qkv.weight", "attn.qk.weight")):
            rows, width = weight.shape
            weight *= ((rows + width) / (2 * width)) ** 0.5
