"""Checkpoints of plain ViTs loaded into a plan: what the plan has no use for is dropped, what it adds is new.

A layer keeps timm's keys except that a reuse layer has no queries and keys for the heads it reuses (``attn.v``, and
``attn.qk`` for the others) and a none layer has no attention at all.
"""
import math
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.models import vision_transformer as timm_vit
from timm.models._input import get_pretrained_grid_size
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
    patch_weight = state_dict.get("model", state_dict).get("patch_embed.proj.weight")
    adapted: Dict[str, Tensor] = {}
    dropped: List[str] = []
    for key, value in plain.items():
        if key.endswith(("key_proj", "value_proj")):
            value = _resampled(value, key, model, patch_weight)
        layer, name = _split_key(key)
        if layer is None or layer >= len(model.blocks):
            adapted[key] = value
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
    return {name: value}


def _reuse_entries(attn: ReuseAttention, name: str, value: Tensor) -> Dict[str, Tensor]:
    """The rows of a fused projection that a reuse layer has: its own heads' q and k, and all of v."""
    q, k, v = value.chunk(3)
    entries = {f"attn.v.{name}": v}
    if attn.qk is not None:
        first_own = attn.num_reused_heads * attn.head_dim
        entries[f"attn.qk.{name}"] = torch.cat([q[first_own:], k[first_own:]])
    return entries


def _resampled(projection: Tensor, key: str, model: Any, patch_weight: Optional[Tensor]) -> Tensor:
    """A token projection at the model's grid, unchanged where the model has no such projection."""
    layer, _ = _split_key(key)
    blocks = model.blocks if layer is None else model.blocks[layer : layer + 1]
    attn = next((block.attn for block in blocks if isinstance(block.attn, LowRankAttention)), None)
    if attn is None:
        return projection
    if attn.kind == "conv":
        kernel = kernel_size(attn.num_prefix_tokens + attn.grid[0] * attn.grid[1], attn.projected_dim)
        old_grid = attn.grid if projection.shape[-1] == kernel else (0, 0)
    else:
        old_grid = _source_grid(projection.shape[-1] - attn.num_prefix_tokens, model, patch_weight)
    resampled = at_grid(projection, attn.kind, old_grid, attn.grid, attn.num_prefix_tokens, attn.projected_dim)
    assert resampled is not None
    return resampled


def _source_grid(num_patches: int, model: Any, patch_weight: Optional[Tensor]) -> Tuple[int, int]:
    """The grid that a checkpoint was built for: the pretrained config's where it has so many patches, as timm takes it
    for position embeddings, else the model's own or a square."""
    configured = get_pretrained_grid_size(model, patch_weight, num_patches)
    if configured is not None:
        return configured
    own = model.patch_embed.grid_size
    side = math.isqrt(max(num_patches, 0))
    return own if num_patches == own[0] * own[1] or side * side != num_patches else (side, side)
