"""How alike the attention maps of a model's layers are: the redundancy that reuse lives on.

Fused kernels never show their maps. They are computed again from what each attention is given in a forward pass, by
hooks that live as long as one call.

Shapes: L layers, B images, H heads, N queries, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from vitreuse.attention import Attention, LowRankAttention, ReuseAttention
from vitreuse.attention.base import Carry, split_heads
from vitreuse.attention.maps import join_heads, softmax_map
from vitreuse.attention.tiles import neighbourhood_bias


class AttentionMap(NamedTuple):
    """The map of one layer.

    Attributes:
        weights: (B, H, N, M), in the order of the heads of the values that it mixes.
        keys: What the columns stand for: maps of equal keys can be compared.
    """

    weights: Tensor
    keys: Hashable


@torch.inference_mode()
def map_similarity(model: nn.Module, images: Tensor) -> Tensor:
    """One minus the mean total variation between the rows of each two layers' maps, head by head: (L, L), 0 to 1.

    A reuse layer has its anchor's map, so that the two are 1 alike. NaN where a layer has no map, and where the columns
    of one are not those of the other, as in low-rank layers that project the tokens each in its own way.

    Args:
        model: One of timm's ViTs, fused or not, or one with a plan; its mode is restored.
        images: (B, channels, rows, columns); one after another, so that only one image's maps are in memory.

    Paper: Bhojanapalli et al., 2021, Reuse Transformer (arXiv 2110.06821).

    Raises:
        ValueError: An attention of another kind.
    """
    was_training = model.training
    model.eval()
    similarities = torch.stack([_similarity(attention_maps(model, image)) for image in images.split(1)])
    model.train(was_training)
    return similarities.mean(0)


def attention_maps(model: Any, images: Tensor) -> list[AttentionMap | None]:
    """The map of each layer, over all tokens, in one forward pass; None of a layer without attention.

    Raises:
        ValueError: An attention of another kind than ours and timm's own.
    """
    maps: list[AttentionMap | None] = [None] * len(model.blocks)
    with _recorded(model, maps):
        model.forward_features(images)
    return maps


@contextmanager
def _recorded(model: Any, maps: list[AttentionMap | None]) -> Iterator[None]:
    """Fills in the map of each layer that runs inside the block."""
    carried: list[AttentionMap] = []  # what the newest layer with a map would hand on

    def record(layer: int, attn: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(attn, Attention):
            maps[layer], handed = _own_map(layer, attn, inputs, carried)
            carried[:] = [handed]
        elif type(attn) is TimmAttention:
            maps[layer] = _timm_map(attn, inputs[0])
        else:
            raise ValueError(f"layer {layer} has {type(attn).__name__}, whose map is not known: give a ViT of timm.")

    hooks = [
        block.attn.register_forward_pre_hook(lambda attn, inputs, layer=layer: record(layer, attn, inputs))
        for layer, block in enumerate(model.blocks)
        if getattr(block, "has_attention", True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _timm_map(attn: TimmAttention, x: Tensor) -> AttentionMap:
    q, k, _ = (split_heads(part, attn.attn_dim // attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
    return AttentionMap(softmax_map(attn.q_norm(q), attn.k_norm(k), attn.scale, None, False), "tokens")


def _own_map(
    layer: int, attn: Any, inputs: tuple[Any, ...], carried: list[AttentionMap]
) -> tuple[AttentionMap, AttentionMap]:
    """A layer's map as its values read it, and as it would hand it on."""
    x: Tensor = inputs[0]
    carry: Carry = inputs[1]
    grid = attn.grid if inputs[2] is None else inputs[2]
    if not isinstance(attn, ReuseAttention):
        q, k, *_ = attn.project(x, None, grid, carry.layerwise_proj)
        made = AttentionMap(_softmax(attn, attn.q_norm(q), attn.k_norm(k), grid), _keys(layer, attn))
        return made, made
    (anchor,) = carried
    q, k = attn.own_queries_and_keys(x, None, carry.key_proj)
    if q is None or k is None:
        return anchor, anchor
    read, handed = join_heads(anchor.weights, _softmax(attn, q, k, grid), attn.num_reused_heads)
    return anchor._replace(weights=read), anchor._replace(weights=handed)


def _softmax(attn: Attention, q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map over all keys, with zeros outside a span."""
    bias = None
    if attn.width > 0:
        bias = neighbourhood_bias(grid, attn.width, attn.num_prefix_tokens, q.dtype, q.device)
    return softmax_map(q, k, attn.scale, bias, False)


def _keys(layer: int, attn: Attention) -> Hashable:
    """What the columns of a map stand for; a projection that was learned gives a layer keys of its own."""
    if not isinstance(attn, LowRankAttention):
        return "tokens"
    is_own = attn.sharing != "layerwise" and attn.kind == "linear"
    return attn.kind, attn.projected_dim, layer if is_own else None


def _similarity(maps: list[AttentionMap | None]) -> Tensor:
    """Of each two layers by one image's maps: (L, L)."""
    found = torch.full((len(maps), len(maps)), torch.nan)
    for keys in {layer.keys for layer in maps if layer is not None}:
        members = {number: layer for number, layer in enumerate(maps) if layer is not None and layer.keys == keys}
        weights = torch.stack([layer.weights.float().flatten(0, 2) for layer in members.values()], dim=1)  # (H*N, L, M)
        numbers = torch.tensor([*members])
        found[numbers[:, None], numbers] = 1 - torch.cdist(weights, weights, p=1).mean(0).cpu() / 2
    return found
