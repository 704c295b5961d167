"""Attention as two steps, making a map and applying it, which is what lets a later layer reuse the map.

Pure functions of tensors and numbers. ``width`` 0 is attention over all keys, another width a window of patches.
What depends on the input (device, dtype, a mask, a carried tensor or None) is decided here and not in a module's
forward, where a symbolic trace would see only proxies.

Shapes: B images, H heads, N queries, M keys, D head dim, P prefix tokens.
"""
import os
from typing import Optional, Tuple

import torch
from timm.layers import maybe_add_mask, register_notrace_function, resolve_self_attn_mask
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention import tiles
from vitreuse.attention.blocked import block_length, blocked_attention
from vitreuse.attention.choice import Costs, is_fused_faster, is_map_faster

REUSE_BACKENDS = ("auto", "map", "qk")


def is_tiled(grid: Tuple[int, int], width: int) -> bool:
    """Whether a span of this width runs as tiles on this grid; otherwise as one dense map."""
    return width > 0 and not tiles.covers_grid(grid, width)


def carries_map(
    backend: str,
    costs: Costs,
    device_type: str,
    dtype: torch.dtype,
    training: bool,
    num_keys: int,
    width: int,
    num_readers: int,
    dropout_p: float,
) -> bool:
    """Whether an anchor hands on its map rather than (q, k), as far as time decides.

    ``auto`` goes by measured costs, see choice.py. No fused kernel recomputes a window, so that its map is carried on
    the CPU, and elsewhere where it is small. Dropout on the map cannot be applied to one that a fused kernel
    recomputes, so with dropout the map is always carried.
    """
    short_row = 128  # local, since TorchScript reads no module-level numbers
    if dropout_p > 0.0 or backend == "map":
        return True
    if backend == "qk":
        return False
    if width > 0:
        return device_type in ("cpu", "meta") or width * width <= short_row
    return is_map_faster(costs, device_type, dtype, training, num_keys, num_readers)


def fits_in_memory(q: Tensor, num_keys: int, num_maps: int) -> bool:
    """Whether the maps that are alive together take at most a quarter of the device's memory.

    A rule of the device and not of what is free at the moment, so that a run that is resumed rounds as it did.
    """
    if not torch.jit.is_scripting():
        alive = num_maps if q.requires_grad else 1
        return 4 * alive * q.shape[:-1].numel() * num_keys * q.element_size() <= memory_bytes(q.device.type)
    return True


@torch.compiler.assume_constant_result
def memory_bytes(device_type: str) -> int:
    """Memory of the current device of a type; what is not known is taken for 16 GiB."""
    if device_type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device_type == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory
    return 16 << 30


def first_rows(attn_mask: Optional[Tensor], num_rows: int) -> Optional[Tensor]:
    """The part of a mask (..., N, M) or (..., 1, M) that the first ``num_rows`` queries need."""
    if attn_mask is None or attn_mask.shape[-2] == 1:
        return attn_mask
    return attn_mask[..., :num_rows, :]


def softmax_map(q: Tensor, k: Tensor, scale: float, attn_mask: Optional[Tensor], is_causal: bool) -> Tensor:
    """Softmax map (..., N, M) of queries (..., N, D) and keys (..., M, D), in the queries' dtype."""
    logits = scaled_logits(q, k, scale)
    bias = resolve_self_attn_mask(k.shape[-2], logits, attn_mask, is_causal)
    if bias is not None:
        bias = first_rows(bias, q.shape[-2])
    return softmax_rows(maybe_add_mask(logits, bias)).to(q.dtype)


def scaled_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k^T * scale, (..., N, M): one product over flat heads, without copies of transposed keys or scaled queries."""
    keys = k.flatten(0, -3).transpose(1, 2)
    logits = torch.baddbmm(q.new_empty((1, 1, 1)), q.flatten(0, -3), keys, beta=0, alpha=scale)
    return logits.view(q.shape[:-1] + (k.shape[-2],))


def windowed_map(q: Tensor, k: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Softmax map of the keys that a window's bias of 0 and -inf leaves."""
    logits = scaled_logits(q, k, scale)
    return softmax_rows(logits.add_(bias) if overwrites(logits) else logits + bias).to(q.dtype)


def softmax_rows(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in the logits' own memory where nobody else needs them: a map is large, and
    fresh memory costs more than the softmax."""
    if overwrites(logits):
        return torch.softmax(logits, dim=-1, out=logits)
    return logits.softmax(dim=-1)


def overwrites(x: Tensor) -> bool:
    """Whether operations may write into their inputs: in eager inference, without a gradient, trace or vmap."""
    if not torch.jit.is_scripting():
        is_captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return not (x.requires_grad or is_captured or torch._C._are_functorch_transforms_active())
    return False


@torch.fx.wrap
@register_notrace_function
def span_bias(
    handed: Optional[Tensor], like: Tensor, grid: Tuple[int, int], width: int, num_prefix_tokens: int
) -> Tensor:
    """Which keys a window's queries see, 0 or -inf: (N, N), or of tiles (T, Q, P + K); that of an earlier layer if
    ``handed``, else one of the dtype and on the device of ``like``."""
    if handed is not None:
        return handed
    if is_tiled(grid, width):
        return tiles.tile_bias(grid, width, num_prefix_tokens, like.dtype, like.device)
    return tiles.neighbourhood_bias(grid, width, num_prefix_tokens, like.dtype, like.device)


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
    """The map (B, H, N, M) and None, or a tiled map (B, H, T, Q, P + K) and the prefix tokens' rows (B, H, P, N).

    The mask of a window is its ``span_bias``.
    """
    if width == 0:
        return softmax_map(q, k, scale, attn_mask, is_causal), None
    assert attn_mask is not None
    if not is_tiled(grid, width):
        return windowed_map(q, k, scale, attn_mask), None
    return make_tiled_map(q, k, scale, grid, width, num_prefix_tokens, attn_mask)


def make_tiled_map(
    q: Tensor, k: Tensor, scale: float, grid: Tuple[int, int], width: int, num_prefix_tokens: int, bias: Tensor
) -> Tuple[Tensor, Tensor]:
    """A tiled map (B, H, T, Q, P + K) and the prefix tokens' rows (B, H, P, N)."""
    queries = tiles.to_tiles(q, grid, width, num_prefix_tokens)
    halos = tiles.to_halos(k, grid, width, num_prefix_tokens)
    weights = windowed_map(queries, halos, scale, bias)
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
    num_readers: int,
    num_maps: int,
    backend: str,
    costs: Costs,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Mixed values (B, H, N, D) of fresh queries and keys, then what is handed on to ``num_readers`` layers.

    The mask of a window is its ``span_bias``.
    """
    training = q.requires_grad
    num_keys = k.shape[-2]
    carry_map = num_readers > 0 and carries_map(
        backend, costs, q.device.type, q.dtype, training, num_keys, width, num_readers, dropout_p
    )
    if carry_map and backend == "auto" and width == 0 and dropout_p == 0.0:
        carry_map = fits_in_memory(q, num_keys, num_maps)
    handed_q, handed_k = (q, k) if num_readers > 0 and not carry_map else (None, None)
    if not carry_map:
        if fused and width == 0 and is_fused_faster(costs, q.device.type, q.dtype, training, num_keys):
            mask = first_rows(attn_mask, q.shape[-2])
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
            )
            return mixed, None, None, handed_q, handed_k
        if is_blockable(q, v) and (attn_mask is None or width > 0) and not is_causal and dropout_p == 0.0:
            mixed = blocked(q, k, v, scale, grid, width, num_prefix_tokens, attn_mask)
            return mixed, None, None, handed_q, handed_k
    weights, prefix_weights = make_map(q, k, scale, grid, width, num_prefix_tokens, attn_mask, is_causal)
    mixed = apply_map(weights, prefix_weights, v, grid, width, num_prefix_tokens, dropout_p)
    if carry_map:
        return mixed, weights, prefix_weights, None, None
    return mixed, None, None, handed_q, handed_k


def is_blockable(q: Tensor, v: Tensor) -> bool:
    """Whether the map need not exist as a whole: in eager inference on a CPU, where blocks of it stay in the cache."""
    return q.device.type == "cpu" and overwrites(q) and overwrites(v)


@torch.jit.unused  # a scripted model overwrites nothing, and so never comes here
def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    grid: Tuple[int, int],
    width: int,
    num_prefix_tokens: int,
    bias: Optional[Tensor],
) -> Tensor:
    """Mixed values (B, H, N, D), a block of the map at a time; the bias is that of a window."""
    if bias is None or not is_tiled(grid, width):
        return blocked_attention(q, k, v, scale, bias)
    step = block_length(q.shape[1] * bias.numel() * q.element_size())
    mixed = []
    for queries, keys, values in zip(q.split(step), k.split(step), v.split(step), strict=True):
        weights, prefix_weights = make_tiled_map(queries, keys, scale, grid, width, num_prefix_tokens, bias)
        mixed.append(apply_map(weights, prefix_weights, values, grid, width, num_prefix_tokens, 0.0))
    return torch.cat(mixed)


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
    costs: Costs,
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
            q, k, v, scale, grid, width, num_prefix_tokens, attn_mask, is_causal, dropout_p, fused, 0, 0, "qk", costs
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
