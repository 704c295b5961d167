"""Checkpoints of plain ViTs loaded into a plan: what the plan has no use for is dropped, what it adds is new.

A layer keeps timm's keys except that a reuse layer has no queries and keys for the heads it reuses (``attn.v``, and
``attn.qk`` for the others) and a none layer has no attention at all.
"""
import math
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from vitreuse.attention import LowRankAttention, ReuseAttention
from vitreuse.attention.lowrank import at_grid, kernel_size


@dataclass(frozen=True)
class LoadReport:
    """What loading a checkpoint did: keys that stayed as initialised, and keys or rows that the plan has no use for."""

    new: Tuple[str, ...]
    dropped: Tuple[str, ...]


def load_checkpoint(model: nn.Module, state_dict: Dict[str, Any]) -> LoadReport:
    """Loads a checkpoint of timm's plain ViT, or of the same plan, into a model with a plan.

    Position embeddings, patch embeddings and token projections of another resolution are resampled.

    Raises:
        ValueError: a key is missing that the plan does not add, is unknown, or has another shape.
    """
    adapted, dropped = adapt_state_dict(state_dict, model)
    own = model.state_dict()
    new = tuple(key for key in own if key not in adapted)
    missing = [key for key in new if not key.endswith(("key_proj", "value_proj"))]
    unknown = [key for key in adapted if key not in own]
    if missing or unknown:
        what = f"no {missing[0]}" if missing else f"a {unknown[0]} that the model lacks"
        raise ValueError(
            f"the checkpoint has {what} ({len(missing)} keys missing, {len(unknown)} unknown): "
            "it is of another model; create the model that it was trained as, with the plan you want."
        )
    for key, value in adapted.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(own[key].shape)} in the model: "
                "create the model with the checkpoint's sizes (num_classes, in_chans, embed_dim)."
            )
    model.load_state_dict(adapted, strict=False)
    return LoadReport(new, tuple(dropped))


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """timm's hook for pretrained weights."""
    return adapt_state_dict(state_dict, model)[0]


def adapt_state_dict(state_dict: Dict[str, Any], model: Any) -> Tuple[Dict[str, Tensor], List[str]]:
    """The checkpoint with the keys and shapes of the model's plan, and what was dropped of it."""
    plain = timm_vit.checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    adapted: Dict[str, Tensor] = {}
    dropped: List[str] = []
    for key, value in plain.items():
        layer, name = _split_key(key)
        if layer is None or layer >= len(model.blocks):
            adapted[key] = _layerwise(value, model) if key == "key_proj" else value
            continue
        kept = _layer_entries(model.blocks[layer], name, value)
        adapted.update({f"blocks.{layer}.{new_name}": part for new_name, part in kept.items()})
        if name not in kept:
            dropped.append(key if not kept else f"{key} (all but {', '.join(sorted(kept))})")
    return adapted, dropped


def _split_key(key: str) -> Tuple[Any, str]:
    """Layer index and name within the layer; None for a key outside the layers."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    return (int(match[1]), match[2]) if match else (None, key)


def _layer_entries(block: Any, name: str, value: Tensor) -> Dict[str, Tensor]:
    """What a layer keeps of one entry of its plain checkpoint, by its own names."""
    attn = block.attn
    if not block.has_attention and name.startswith(("norm1.", "attn.", "ls1.")):
        return {}
    if isinstance(attn, ReuseAttention):
        if name.startswith("attn.qkv."):
            return _reuse_entries(attn, name.removeprefix("attn.qkv."), value)
        if attn.qk is None and name.startswith(("attn.q_norm.", "attn.k_norm.")):
            return {}
    if isinstance(attn, LowRankAttention) and name in ("attn.key_proj", "attn.value_proj"):
        return {name: _resampled(value, attn.kind, attn.grid, attn.num_prefix_tokens, attn.projected_dim)}
    return {name: value}


def _reuse_entries(attn: ReuseAttention, name: str, value: Tensor) -> Dict[str, Tensor]:
    """The rows of a fused projection that a reuse layer has: its own heads' q and k, and all of v."""
    q, k, v = value.chunk(3)
    entries = {f"attn.v.{name}": v}
    if attn.qk is not None:
        first_own = attn.num_reused_heads * attn.head_dim
        entries[f"attn.qk.{name}"] = torch.cat([q[first_own:], k[first_own:]])
    return entries


def _layerwise(projection: Tensor, model: Any) -> Tensor:
    """The model's one token projection at its grid."""
    layer = next(block.attn for block in model.blocks if isinstance(block.attn, LowRankAttention))
    return _resampled(projection, layer.kind, layer.grid, layer.num_prefix_tokens, layer.projected_dim)


def _resampled(projection: Tensor, kind: str, grid: Tuple[int, int], num_prefix_tokens: int, k: int) -> Tensor:
    """A token projection at the model's grid; another number of patches is taken to be a square grid."""
    num_patches = projection.shape[-1] - num_prefix_tokens
    if kind == "conv":
        old_grid = grid if projection.shape[-1] == kernel_size(num_prefix_tokens + grid[0] * grid[1], k) else (0, 0)
    else:
        side = math.isqrt(max(num_patches, 0))
        old_grid = grid if num_patches == grid[0] * grid[1] or side * side != num_patches else (side, side)
    resampled = at_grid(projection, kind, old_grid, grid, num_prefix_tokens, k)
    assert resampled is not None
    return resampled
