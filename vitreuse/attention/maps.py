"""Attention as two steps, making a map and applying it, which is what lets a later layer reuse the map.

Pure functions of tensors and numbers. ``width`` 0 is attention over all keys, another width a window of patches.
What depends on the input (device, dtype, a mask, a carried tensor or None) is decided here and not in a module's
forward, where a symbolic trace would see only proxies.

Shapes: B images, H heads, N queries, M keys, D head dim, P prefix tokens.
"""
from typing import Optional, Tuple

import torch
from timm.layers import maybe_add_mask, register_notrace_function, resolve_self_attn_mask
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention import tiles

REUSE_BACKENDS = ("auto", "map", "qk")


def is_tiled(grid: Tuple[int, int], width: int) -> bool:
    """Whether a span of this width runs as tiles on this grid; otherwise as one dense map."""
    return width > 0 and not tiles.covers_grid(grid, width)


def carries_map(backend: str, device_type: str, num_keys: int, dropout_p: float) -> bool:
    """Whether an anchor hands on its map rather than (q, k).

    ``auto`` carries the map on the CPU: a whole ViT-S ran 1.02 to 1.49 times faster so than with (q, k), at 224 and
    384 px in float32 and bfloat16 (experiments.md). Elsewhere it carries only a small map: on paper, reading a longer
    row on a GPU costs more than recomputing it, which is not yet measured. Dropout on the map cannot be applied to one
    that a fused kernel recomputes, so with dropout the map is always carried.
    """
    small_map_keys = 128  # local, since TorchScript reads no module-level numbers
    if dropout_p > 0.0 or backend == "map":
        return True
    if backend == "qk":
        return False
    return device_type in ("cpu", "meta") or num_keys <= small_map_keys


def first_rows(attn_mask: Optional[Tensor], num_rows: int) -> Optional[Tensor]:
    """The part of a mask (..., N, M) or (..., 1, M) that the first ``num_rows`` queries need."""
    if attn_mask is None or attn_mask.shape[-2] == 1:
        return attn_mask
    return attn_mask[..., :num_rows, :]


def softmax_map(q: Tensor, k: Tensor, scale: float, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
    """Softmax map (..., N, M) of queries (..., N, D) and keys (..., M, D), in the queries' dtype."""
    logits = (q * scale) @ k.transpose(-2, -1)
    bias = resolve_self_attn_mask(k.shape[-2], logits, attn_mask, is_causal)
    if bias is not None:
        bias = first_rows(bias, q.shape[-2])
    return maybe_add_mask(logits, bias).softmax(dim=-1).to(q.dtype)


def windowed_map(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Softmax map of keys that ``visible`` allows. A padded query, which is cut off later, may see no key at all: it is
    shown all of them, since the gradient of a row of -inf is NaN."""
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    logits = (q * scale) @ k.transpose(-2, -1)
    return logits.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(q.dtype)


def make_map(
    q: Tensor,
    k: Tensor,
    scale: float,
    grid: Tuple[int, int],
    width: int,
    num_prefix_tokens: int,
    attn_mask: Optional[Tensor],
    is_causal: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """The map (B, H, N, M) and None, or a tiled map (B, H, T, Q, P + K) and the prefix tokens' rows (B, H, P, N)."""
    if width == 0:
        return softmax_map(q, k, scale, attn_mask, is_causal), None
    if not is_tiled(grid, width):
        return windowed_map(q, k, scale, tiles.neighbourhood(grid, width, num_prefix_tokens, q.device)), None
    queries = tiles.to_tiles(q[:, :, num_prefix_tokens:], grid, width)
    halos = tiles.to_halos(k, grid, width, num_prefix_tokens)
    weights = windowed_map(queries, halos, scale, tiles.tile_mask(grid, width, num_prefix_tokens, q.device))
    return weights, softmax_map(q[:, :, :num_prefix_tokens], k, scale, None, False)


def apply_map(
    weights: Tensor,
    prefix_weights: Optional[Tensor],
    v: Tensor,
    grid: Tuple[int, int],
    width: int,
    num_prefix_tokens: int,
    dropout_p: float,
) -> Tensor:
    """Values (B, H, M, D) mixed by a map of ``make_map``: (B, H, N, D). Dropout is drawn afresh at every use."""
    if prefix_weights is None:
        return F.dropout(weights, dropout_p) @ v
    halos = tiles.to_halos(v, grid, width, num_prefix_tokens)
    patches = tiles.from_tiles(F.dropout(weights, dropout_p) @ halos, grid, width)
    return torch.cat([F.dropout(prefix_weights, dropout_p) @ v, patches], dim=2)


@torch.fx.wrap
@register_notrace_function
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grid: Tuple[int, int],
    width: int,
    num_prefix_tokens: int,
    attn_mask: Optional[Tensor],
    is_causal: bool,
    dropout_p: float,
    fused: bool,
    hands_on: bool,
    backend: str,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Mixed values (B, H, N, D) of fresh queries and keys, then what is handed on."""
    num_keys = width * width if width > 0 else k.shape[-2]
    carry_map = hands_on and carries_map(backend, q.device.type, num_keys, dropout_p)
    handed_q, handed_k = (q, k) if hands_on and not carry_map else (None, None)
    if fused and width == 0 and not carry_map:
        mask = first_rows(attn_mask, q.shape[-2])
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
        return mixed, None, None, handed_q, handed_k
    weights, prefix_weights = make_map(q, k, scale, grid, width, num_prefix_tokens, attn_mask, is_causal)
    mixed = apply_map(weights, prefix_weights, v, grid, width, num_prefix_tokens, dropout_p)
    if carry_map:
        return mixed, weights, prefix_weights, None, None
    return mixed, None, None, handed_q, handed_k


@torch.fx.wrap
@register_notrace_function
def reattend(
    weights: Optional[Tensor],
    prefix_weights: Optional[Tensor],
    q: Optional[Tensor],
    k: Optional[Tensor],
    own_q: Optional[Tensor],
    own_k: Optional[Tensor],
    v: Tensor,
    scale: float,
    num_reused_heads: int,
    num_queries: Optional[int],
    grid: Tuple[int, int],
    width: int,
    num_prefix_tokens: int,
    attn_mask: Optional[Tensor],
    is_causal: bool,
    dropout_p: float,
    fused: bool,
    hands_on: bool,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Mixed values (B, H, N, D) of a handed-on map or (q, k) pair, then what is handed on.

    Value heads 0 .. K-1 read the first K reused heads, the others the layer's own ``own_q``, ``own_k``; what is handed
    on has the new heads first. ``num_queries`` asks for that many prefix rows, which see every key.

    Raises:
        ValueError: neither a map nor a (q, k) pair was handed on.
    """
    handed_weights, handed_prefix, handed_q, handed_k = weights, prefix_weights, q, k
    if num_queries is not None:
        width = 0
    if weights is not None:
        if num_queries is not None:
            weights, prefix_weights = (weights if prefix_weights is None else prefix_weights)[:, :, :num_queries], None
        if own_q is not None and own_k is not None:
            own, own_prefix = make_map(own_q, own_k, scale, grid, width, num_prefix_tokens, attn_mask, is_causal)
            weights, handed_weights = join_heads(weights, own, num_reused_heads)
            if prefix_weights is not None and own_prefix is not None:
                prefix_weights, handed_prefix = join_heads(prefix_weights, own_prefix, num_reused_heads)
        mixed = apply_map(weights, prefix_weights, v, grid, width, num_prefix_tokens, dropout_p)
    elif q is not None and k is not None:
        if num_queries is not None:
            q = q[:, :, :num_queries]
        if own_q is not None and own_k is not None:
            q, handed_q = join_heads(q, own_q, num_reused_heads)
            k, handed_k = join_heads(k, own_k, num_reused_heads)
        mixed = attend(
            q, k, v, scale, grid, width, num_prefix_tokens, attn_mask, is_causal, dropout_p, fused, False, "qk"
        )[0]
    else:
        raise ValueError(
            "a reuse layer was run without a map: call the whole model or model.blocks, or pass the carry that the "
            "layer before returned."
        )
    if not hands_on:
        return mixed, None, None, None, None
    return mixed, handed_weights, handed_prefix, handed_q, handed_k


def join_heads(reused: Tensor, own: Tensor, num_reused_heads: int) -> Tuple[Tensor, Tensor]:
    """Heads (dim 1) as the values read them, reused ones first, and as they are handed on, new ones first."""
    kept = reused[:, :num_reused_heads]
    return torch.cat([kept, own], dim=1), torch.cat([own, kept], dim=1)
