"""What the attentions of a model do in a forward pass, seen from outside: the one place that looks inside a model.

Fused kernels never show their maps, so whoever wants one computes it again from what an attention was given. Works on
timm's layers and on ours; nothing is changed but hooks, which are gone at the end of the block.

Shapes: B images, N tokens, M keys, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from timm.layers import Attention as TimmAttention
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreuse.attention import Attention, LowRankAttention, ReuseAttention
from vitreuse.attention.base import split_heads
from vitreuse.attention.maps import join_heads, softmax_map
from vitreuse.attention.masks import Mask
from vitreuse.attention.tiles import neighbourhood_bias


class AttentionCall(NamedTuple):
    """One call of an attention: its arguments, tokens (B, N, C) first, and the tokens that it gave back."""

    inputs: tuple[Any, ...]
    output: Tensor


class Heads(NamedTuple):
    """Queries, keys and values (B, H, N, D) of an attention, queries and keys normalised."""

    q: Tensor
    k: Tensor
    v: Tensor


class AttentionMap(NamedTuple):
    """The map of one layer.

    Attributes:
        weights: (B, H, N, M), in the order of the heads of the values that it mixes.
        keys: What the columns stand for: maps of equal keys can be compared.
    """

    weights: Tensor
    keys: Hashable


@contextmanager
def recorded_attention(model: Any) -> Iterator[dict[int, AttentionCall]]:
    """Fills what it gives, by layer, with the newest call of each attention inside the block; no entry without one."""
    calls: dict[int, AttentionCall] = {}

    def record(layer: int, inputs: tuple[Any, ...], output: Any) -> None:
        calls[layer] = AttentionCall(inputs, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hook = block.attn.register_forward_hook(lambda _, *call, layer=layer: record(layer, *call))
            hooks.callback(hook.remove)
        yield calls


def project_heads(attn: Any, x: Tensor) -> Heads:
    """What an attention of timm's or ours makes of tokens (B, N, C), before any projection along the tokens.

    A reuse layer has queries and keys of those heads alone that it does not reuse, none of a map that it reuses whole.
    """
    if not isinstance(attn, ReuseAttention):
        q, k, v = split_heads(attn.qkv(x), attn.head_dim).chunk(3, dim=1)
        return Heads(attn.q_norm(q), attn.k_norm(k), v)
    v = split_heads(attn.v(x), attn.head_dim)
    if attn.qk is None:
        return Heads(v[:, :0], v[:, :0], v)
    q, k = split_heads(attn.qk(x), attn.head_dim).chunk(2, dim=1)
    return Heads(attn.q_norm(q), attn.k_norm(k), v)


def attentions(model: nn.Module) -> list[Any]:
    """The attention of each layer, None of a layer without.

    Raises:
        ValueError: The model is no ViT of timm or ours, or has attention of another kind.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{type(model).__name__} has no maps that are known: give a ViT of timm or vitreuse.")
    found = []
    for layer, block in enumerate(model.blocks):
        attn = getattr(block, "attn", block) if getattr(block, "has_attention", True) else None
        if type(attn) is not TimmAttention and not isinstance(attn, Attention | None):
            raise ValueError(f"layer {layer} has {type(attn).__name__}, whose map is not known: give a ViT of timm.")
        found.append(attn)
    return found


def attention_maps(model: Any, images: Tensor) -> list[AttentionMap | None]:
    """The map of each layer, over all tokens, in one forward pass; None of a layer without attention.

    Raises:
        ValueError: The model is none that attentions takes.
    """
    own = attentions(model)
    maps: list[AttentionMap | None] = [None] * len(own)
    with recorded_attention(model) as calls:
        model.forward_features(images)
    handed: Any = None  # what the newest layer with a map hands on
    for layer, call in calls.items():
        maps[layer], handed = _map(layer, own[layer], call.inputs, handed)
    return maps


def dense_map(
    attn: Any,
    x: Tensor,
    grid: tuple[int, int],
    num_rows: int | None = None,
    layerwise_proj: Tensor | None = None,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The map (B, H, rows, M) that an attention computes, zero outside a span, and its values (B, H, M, D)."""
    if isinstance(attn, TimmAttention):
        q, k, v = project_heads(attn, x)
        return softmax_map(q[:, :, :num_rows], k, attn.scale), v
    q, k, v, *_ = attn.project(x, num_rows, grid, layerwise_proj)
    return softmax_map(attn.q_norm(q), attn.k_norm(k), attn.scale, _mask(attn, x, grid, sizes)), v


def _mask(attn: Attention, x: Tensor, grid: tuple[int, int], sizes: Tensor | None) -> Mask:
    """The mask that keeps a map over all keys to the windows of an attention, or weighs keys by sizes."""
    if attn.width == 0:
        return Mask(sizes=sizes)
    return Mask(neighbourhood_bias(grid, attn.width, attn.num_prefix_tokens, x.dtype, x.device))


def _map(layer: int, attn: Any, inputs: Any, handed: AttentionMap) -> tuple[AttentionMap, AttentionMap]:
    """A layer's map as its values read it, and as it hands it on; its anchor's is what was handed to it."""
    if isinstance(attn, TimmAttention):
        made = AttentionMap(dense_map(attn, inputs[0], (0, 0))[0], "tokens")
        return made, made
    x, carry, grid = inputs[0], inputs[1], inputs[2] or attn.grid
    if isinstance(attn, ReuseAttention):
        own = attn.own_queries_and_keys(x, None, carry.key_proj)
        if own is None:
            return handed, handed
        computed = softmax_map(*own, attn.scale, _mask(attn, x, grid, carry.sizes))
        read, given = join_heads(handed.weights, computed, attn.num_reused_heads)
        return handed._replace(weights=read), handed._replace(weights=given)
    made = AttentionMap(dense_map(attn, x, grid, None, carry.layerwise_proj, carry.sizes)[0], _keys(layer, attn))
    return made, made


def _keys(layer: int, attn: Attention) -> Hashable:
    """What the columns of a map stand for; a projection that was learned gives a layer keys of its own, and a merge
    gives all layers after it new ones."""
    if not isinstance(attn, LowRankAttention):
        return ("tokens", attn.merges) if attn.merges else "tokens"
    is_own = attn.sharing != "layerwise" and attn.kind == "linear"
    return attn.kind, attn.projected_dim, layer if is_own else None
