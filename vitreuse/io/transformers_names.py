"""Hugging Face transformers' names for the weights of ViT, DeiT and DINOv2, old and new, as timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MARKER = "embeddings.patch_embeddings.projection.weight"  # by which a state dict is known to be of transformers
NAMES = (  # of transformers, and of timm
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.register_tokens", "register_tokens"),  # DINOv2's own names, which timm converts
    (r"embeddings\.mask_token", "mask_token"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"(head|head_dist)\.", r"\1."),
)
LAYER = r"(?:encoder\.)?layers?\.(\d+)\."
NAMES_IN_LAYER = (
    (r"(?:layernorm_before|norm1)\.", "norm1."),
    (r"(?:layernorm_after|norm2)\.", "norm2."),
    (r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attn.q."),
    (r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attn.k."),
    (r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attn.v."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.gate_proj\.", "mlp.w1."),
    (r"mlp\.up_proj\.", "mlp.w2."),
    (r"mlp\.(?:weights_out|down_proj)\.", "mlp.w3."),
)
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}  # one product in timm


def renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict by timm's names, and the keys of transformers that timm has no place for.

    One of other names stays as it is.
    """
    if MARKER not in state:
        return dict(state), []
    names = {key: _name(key) for key in state}
    known = {name: state[key] for key, name in names.items() if name is not None}
    return _fused(known), [key for key, name in names.items() if name is None]


def _name(key: str) -> str | None:
    """timm's name, None where it has none."""
    layer = re.match(LAYER, key)
    inner, start = (key[layer.end() :], f"blocks.{layer[1]}.") if layer else (key, "")
    for theirs, ours in NAMES_IN_LAYER if layer else NAMES:
        if found := re.match(theirs, inner):
            return start + found.expand(ours) + inner[found.end() :]
    return None


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values, and a gate and its values, joined where timm has one layer for them."""
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        whole = next((whole for whole, parts in FUSED.items() if f".{parts[0]}." in key), None)
        if whole is not None:
            parts = [key.replace(FUSED[whole][0], part) for part in FUSED[whole]]
            joined[key.replace(FUSED[whole][0], whole)] = torch.cat([state[part] for part in parts if part in state])
        elif not any(f".{part}." in key for parts in FUSED.values() for part in parts):
            joined[key] = value
    return joined
