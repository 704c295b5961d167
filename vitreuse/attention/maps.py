"""Attention as two steps, making a map and applying it, which is what lets a later layer reuse the map.

``attend`` is what a layer that makes a map calls, ``reattend`` is where one that was handed on is reused. Functions of
tensors, numbers and a dropout. What depends on the input (device, dtype, a mask, a carried tensor or None) is decided
here and not in a module's forward, where a symbolic trace would see only proxies.

Shapes: B images, H heads, N queries, M keys, D head dim, P prefix tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.attention import tiles
from vitreuse.attention.masks import NO_MASK, Mask, checked, first_rows, log_sizes, mask_bias, over_heads
from vitreuse.attention.policy import Call, Settings, choose
from vitreuse.attention.submodules import dropout_rate

BLOCK_BYTES = 2 << 20  # of logits at a time, which stay in a CPU's cache


class Layout(NamedTuple):
    """Where the tokens lie, and how far a patch sees: prefix tokens first, then the patches row by row."""

    grid: tuple[int, int]  # (rows, columns) of patches
    width: int  # of the window of patches that a patch sees, 0 for all keys
    num_prefix_tokens: int

    @property
    def is_tiled(self) -> bool:
        """Whether the window runs as tiles on this grid; otherwise as one dense map."""
        return self.width > 0 and not tiles.covers_grid(self.grid, self.width)


class Carried(NamedTuple):
    """What an anchor hands on to the layers that reuse it: its map, or its queries and keys."""

    weights: Tensor | None = None
    prefix_weights: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None


def overwrites(*tensors: Tensor) -> bool:
    """Whether operations may write into what is computed from these: in eager inference, without a gradient of any of
    them, a trace or vmap."""
    is_captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_captured or torch._C._are_functorch_transforms_active():
        return False
    return not any(x.requires_grad or torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def softmax_map(q: Tensor, k: Tensor, scale: float, mask: Mask = NO_MASK) -> Tensor:
    """Softmax map (..., N, M) of queries (..., N, D) and keys (..., M, D), in the queries' dtype.

    A query that a mask shows no key has zeros in its row, as under torch's scaled_dot_product_attention.
    """
    logits = scaled_logits(q, k, scale, log_sizes(mask, q))
    bias = mask_bias(mask, logits)
    if bias is None:
        return softmax_rows(logits).to(q.dtype)
    logits = logits + bias
    is_blind = logits.isneginf().all(dim=-1, keepdim=True)
    return softmax_rows(logits.masked_fill(is_blind, 0.0)).masked_fill(is_blind, 0.0).to(q.dtype)


def scaled_logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """q k^T * scale + bias, (..., N, M): one product over flat heads, without copies of transposed keys or scaled
    queries; the bias is (B, 1, 1, M)."""
    if torch.jit.is_tracing():  # a product that counters know, of a batch that may grow
        logits = (q * scale) @ k.transpose(-2, -1)
        return logits if bias is None else logits + bias
    beta, added = (0, q.new_empty((1, 1, 1))) if bias is None else (1, over_heads(bias, q))
    logits = torch.baddbmm(added, q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2), beta=beta, alpha=scale)
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


@torch.fx.wrap
@register_notrace_function
def span_bias(handed: Tensor | None, like: Tensor, layout: Layout) -> Tensor:
    """Which keys a window's queries see, 0 or -inf: (N, N), or of tiles (T, Q, P + K); that of an earlier layer if
    ``handed``, else one of the dtype and on the device of ``like``."""
    if handed is not None:
        return handed
    make = tiles.tile_bias if layout.is_tiled else tiles.neighbourhood_bias
    return make(*layout, like.dtype, like.device)


def make_map(q: Tensor, k: Tensor, scale: float, mask: Mask, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The map (B, H, N, M) and None, or a tiled map (B, H, T, Q, P + K) and the prefix tokens' rows (B, H, P, N)."""
    if layout.width == 0:
        return softmax_map(q, k, scale, mask), None
    assert mask.attn_mask is not None
    if layout.is_tiled:
        return make_tiled_map(q, k, scale, mask.attn_mask, layout)
    return windowed_map(q, k, scale, mask.attn_mask), None


def make_tiled_map(q: Tensor, k: Tensor, scale: float, bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """A tiled map (B, H, T, Q, P + K) and the prefix tokens' rows (B, H, P, N)."""
    weights = windowed_map(tiles.to_tiles(q, *layout), tiles.to_halos(k, *layout), scale, bias)
    return weights, softmax_map(q[:, :, : layout.num_prefix_tokens], k, scale)


def apply_map(
    weights: Tensor, prefix_weights: Tensor | None, v: Tensor, layout: Layout, drop: nn.Module | None = None
) -> Tensor:
    """Values (B, H, M, D) mixed by a map of ``make_map``: (B, H, N, D). Dropout is drawn afresh at every use."""
    dropped = weights if drop is None else drop(weights)
    if prefix_weights is None:
        return dropped @ v
    patches = tiles.from_tiles(dropped @ tiles.to_halos(v, *layout), layout.grid, layout.width)
    return torch.cat([(prefix_weights if drop is None else drop(prefix_weights)) @ v, patches], dim=2)


@torch.fx.wrap
@register_notrace_function
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: Layout, drop: nn.Module, settings: Settings
) -> tuple[Tensor, Carried]:
    """Mixed values (B, H, N, D) of fresh queries and keys, and what is handed on to the layers that reuse them.

    All are computed in the values' dtype, which the projections have chosen: a norm of queries and keys widens under
    autocast.

    Raises:
        ValueError: See ``checked``.
    """
    mask = checked(mask, v)
    q, k = q.type_as(v), k.type_as(v)
    call = describe_call(q, k, v, mask, layout, dropout_rate(drop), settings)
    way = choose(call, settings)
    handed = Carried(q=q, k=k) if way.carried == "qk" else Carried()
    if way.kernel == "fused":
        fused = padded_attention if way.sizes == "channel" else fused_attention
        return fused(q, k, v, mask, call.dropout or 0.0, settings.scale), handed
    if way.kernel in ("blocked", "tiles") and call.in_blocks:
        bias = log_sizes(mask, q) if mask.attn_mask is None else mask.attn_mask
        return blocked(q, k, v, bias, layout, settings.scale), handed
    weights, prefix_weights = make_map(q, k, settings.scale, mask, layout)
    mixed = apply_map(weights, prefix_weights, v, layout, drop)
    return mixed, Carried(weights, prefix_weights) if way.carried == "map" else handed


def describe_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: Layout, dropout: float | None, settings: Settings
) -> Call:
    """What ``choose`` goes by; a number of keys that a trace has not fixed is that of the grid built for."""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[-2] if type(k.shape[-2]) is int else settings.num_keys
    can_block = q.device.type == "cpu" and dropout == 0.0 and (layout.width > 0 or not mask.is_given)
    is_fixed = type(batch) is int and type(num_queries) is int and not torch.compiler.is_exporting()
    return Call(
        device_type=q.device.type,
        dtype=q.dtype,
        num_keys=num_keys,
        num_logits=batch * heads * num_queries * num_keys if is_fixed else None,
        width=layout.width,
        is_tiled=layout.is_tiled,
        dropout=dropout,
        in_blocks=can_block and overwrites(q, k, v),
        is_traced=torch.jit.is_tracing(),
        has_sizes=mask.sizes is not None,
    )


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, scale: float) -> Tensor:
    """Mixed values (B, H, N, D) by torch's kernel, for the first N queries."""
    bias = log_sizes(mask, q) if mask.attn_mask is None else first_rows(mask.attn_mask, q.shape[-2])
    if bias is not None and torch.compiler.is_exporting():  # onnxruntime's operator widens no row for all queries
        bias = bias.expand(*bias.shape[:-2], q.shape[-2], -1)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, mask.is_causal, scale=scale)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float, scale: float) -> Tensor:
    """The same with sizes in one more channel of the queries, 1, and of the keys, the logarithm over the scale.

    So the fastest kernels, which take no mask, take sizes; they want values as wide.
    """
    sizes = log_sizes(mask, q)
    assert sizes is not None
    q, v = F.pad(q, (0, 1), value=1.0), F.pad(v, (0, 1))
    k = torch.cat([k, (sizes / scale).mT.expand(*k.shape[:-1], 1)], dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return mixed[..., :-1]


def blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Mixed values (B, H, N, D), a block of the map at a time; the bias is that of a window, or of sizes."""
    if bias is None or not layout.is_tiled:
        return blocked_attention(q, k, v, scale, bias)
    step = block_length(q.shape[1] * bias.numel() * q.element_size())
    mixed = []
    for queries, keys, values in zip(q.split(step), k.split(step), v.split(step), strict=True):
        weights, prefix_weights = make_tiled_map(queries, keys, scale, bias, layout)
        mixed.append(apply_map(weights, prefix_weights, values, layout))
    return torch.cat(mixed)


@torch.fx.wrap
@register_notrace_function
def reattend(
    carried: Carried,
    own: tuple[Tensor, Tensor] | None,
    v: Tensor,
    mask: Mask,
    layout: Layout,
    drop: nn.Module,
    settings: Settings,
) -> tuple[Tensor, Carried]:
    """Mixed values (B, H, N, D) of a handed-on map or (q, k) pair, and what is handed on where a later layer reads it.

    Of H value heads the first read the first reused heads, the others the layer's ``own`` queries and keys; what is
    handed on has the new heads first.

    Raises:
        ValueError: Neither a map nor a (q, k) pair was handed on.
    """
    weights, prefix_weights, q, k = carried
    mask, own = checked(mask, v), None if own is None else (own[0].type_as(v), own[1].type_as(v))
    num_reused_heads = v.shape[1] - (0 if own is None else own[0].shape[1])
    if weights is not None:
        if own is not None:
            made, made_prefix = make_map(*own, settings.scale, mask, layout)
            weights, handed = join_heads(weights, made, num_reused_heads)
            carried = Carried(handed)
            if prefix_weights is not None and made_prefix is not None:
                prefix_weights, handed_prefix = join_heads(prefix_weights, made_prefix, num_reused_heads)
                carried = Carried(handed, handed_prefix)
        mixed = apply_map(weights, prefix_weights, v, layout, drop)
    elif q is not None and k is not None:
        if own is not None:
            q, handed_q = join_heads(q, own[0], num_reused_heads)
            k, handed_k = join_heads(k, own[1], num_reused_heads)
            carried = Carried(q=handed_q, k=handed_k)
        mixed, _ = attend(q, k, v, mask, layout, drop, settings._replace(num_readers=0))
    else:
        raise ValueError(
            "a reuse layer was run without a map: call the whole model or model.blocks, or pass the carry that the "
            "layer before returned."
        )
    return mixed, carried if settings.num_readers > 0 else Carried()


@torch.fx.wrap
@register_notrace_function
def first_queries(carried: Carried, num_queries: int | None) -> Carried:
    """The part of what was handed on that the first queries read, which see every key; all of it when None."""
    if num_queries is None:
        return carried
    weights, prefix_weights, q, k = carried
    dense = weights if prefix_weights is None else prefix_weights
    return Carried(
        weights=None if dense is None else dense[:, :, :num_queries],
        q=None if q is None else q[:, :, :num_queries],
        k=k,
    )


def join_heads(reused: Tensor, own: Tensor, num_reused_heads: int) -> tuple[Tensor, Tensor]:
    """Heads (dim 1) as the values read them, reused ones first, and as they are handed on, new ones first."""
    kept = reused[:, :num_reused_heads]
    return torch.cat([kept, own], dim=1), torch.cat([own, kept], dim=1)


def block_length(item_bytes: int) -> int:
    """How many items of a map, heads or images, make a block: as many as fit into BLOCK_BYTES, or one."""
    return max(1, BLOCK_BYTES // item_bytes)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Mixed values (B, H, N, D) of queries (B, H, N, D), keys and values (B, H, M, D).

    The bias is (N, M) of a window, or (B, 1, 1, M) of sizes.

    The same function as softmax(q k^T * scale + bias) v at once, whose logits of all heads and images are written to
    fresh memory and read again.
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    num_maps = block_length(num_queries * num_keys * q.element_size())
    num_images, num_heads = min(max(1, num_maps // heads), batch), min(num_maps, heads)
    memory = q.new_empty(num_images, num_heads, num_queries, num_keys)
    mixed = q.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)  # as the next layer reads it
    for image in range(0, batch, num_images):
        for head in range(0, heads, num_heads):
            part = (slice(image, image + num_images), slice(head, head + num_heads))
            own = over_heads(bias[part[0]], q[part]) if bias is not None and bias.ndim == 4 else bias
            mixed[part] = _attention(q[part], k[part], v[part], scale, own, memory)
    return mixed


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, memory: Tensor) -> Tensor:
    """Mixed values of one block, whose logits are written to ``memory``, as large or larger."""
    shape = q.shape[:2]
    logits = memory[: shape[0], : shape[1]].flatten(0, 1)
    queries, keys, values = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # with strides products take 5 % longer
    beta = 0 if bias is None else 1
    torch.baddbmm(logits if bias is None else bias, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=logits)
    torch.softmax(logits, dim=-1, out=logits)
    return torch.bmm(logits, values).unflatten(0, shape)
