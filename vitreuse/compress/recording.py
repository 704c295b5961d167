"""What the attentions of a model do in a forward pass, seen from outside: the one place that looks inside a model.

Fused kernels never show their maps, so whoever wants one computes it again from what an attention was given. Works on
timm's layers and on ours; nothing is changed but hooks, which are gone at the end of the block.

Shapes: B images, N tokens, M keys, R query rows, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from timm.layers import Attention as TimmAttention
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreuse.attention import Attention, Carry, LowRankAttention, ReuseAttention
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
        weights: (B, H, N, M), of R rows (B, H, R, M), in the order of the heads of the values that it mixes.
        keys: What the columns stand for: maps of equal keys can be compared.
        num_tokens: N, the rows of the whole map.
    """

    weights: Tensor
    keys: Hashable
    num_tokens: int


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


@contextmanager
def inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Fills what it gives with the first argument of each call of a module inside the block; of none with nothing."""
    inputs: list[Tensor] = []
    with ExitStack() as hooks:
        if module is not None:
            hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            hooks.callback(hook.remove)
        yield inputs


class LayerPass(NamedTuple):
    """What a layer makes of tokens: rows (B, N, C) between attention and merge, tokens behind it, and the carry."""

    middle: Tensor
    after: Tensor
    carry: Carry


def layer_pass(block: Any, tokens: Tensor, carry: Carry, grid: tuple[int, int] | None) -> LayerPass:
    """A layer of ours at work on tokens (B, N, C), with the rows between its attention and its merge or its MLP."""
    merging = getattr(block, "merge", None)
    following = merging if merging is not None else block.norm2 if block.has_mlp else None
    with inputs_of(following) as inputs:
        after, handed = block(tokens, carry, grid)
    return LayerPass(inputs[0] if inputs else after, after, handed)


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


def attention_maps(
    model: Any, images: Tensor, choose_rows: Callable[[int], Tensor] | None = None
) -> list[AttentionMap | None]:
    """The map of each layer, over all tokens, in one forward pass; None of a layer without attention.

    Args:
        model: One of timm's ViTs or ours.
        images: (B, channels, rows, columns).
        choose_rows: Gives, for a number of tokens, the numbers (B, R) of the rows that are computed; all when None.

    Raises:
        ValueError: The model is none that attentions takes.
    """
    own = attentions(model)
    maps: list[AttentionMap | None] = [None] * len(own)
    with recorded_attention(model) as calls:
        model.forward_features(images)
    handed: Any = None  # what the newest layer with a map hands on
    for layer, call in calls.items():
        maps[layer], handed = _map(layer, own[layer], call.inputs, handed, choose_rows)
    return maps


def project_map(attn: Any, x: Tensor, grid: tuple[int, int], layerwise_proj: Tensor | None = None) -> Heads:
    """What the map of an attention is made of, and the values that it mixes, after any projection along the tokens.

    Keys and values are (B, H, M, D). Not of a reuse layer, which is handed its map.
    """
    if isinstance(attn, TimmAttention):
        return project_heads(attn, x)
    q, k, v, *_ = attn.project(x, None, grid, layerwise_proj)
    return Heads(attn.q_norm(q), attn.k_norm(k), v)


def dense_map(
    attn: Any,
    q: Tensor,
    k: Tensor,
    grid: tuple[int, int],
    rows: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The map (B, H, R, M) that an attention makes of queries and keys, zero outside a span.

    Args:
        attn: The attention, of timm's or ours.
        q, k: (B, H, N, D) and (B, H, M, D), normalised.
        grid: The (rows, columns) of patches.
        rows: Numbers (B, R) of the rows that are computed; all when None.
        sizes: (B, M), how many tokens each key stands for.
    """
    mask = Mask(sizes=sizes)
    if getattr(attn, "width", 0) > 0:
        bias = neighbourhood_bias(grid, attn.width, attn.num_prefix_tokens, q.dtype, q.device)
        mask = Mask(bias if rows is None else bias[rows][:, None])
    return softmax_map(q if rows is None else q.take_along_dim(rows[:, None, :, None], dim=2), k, attn.scale, mask)


def _map(
    layer: int, attn: Any, inputs: Any, handed: AttentionMap, choose_rows: Callable[[int], Tensor] | None
) -> tuple[AttentionMap, AttentionMap]:
    """A layer's map as its values read it, and as it hands it on; its anchor's is what was handed to it."""
    x = inputs[0]
    rows = None if choose_rows is None else choose_rows(x.shape[1])
    if isinstance(attn, TimmAttention):
        q, k, _ = project_map(attn, x, (0, 0))
        made = AttentionMap(dense_map(attn, q, k, (0, 0), rows), "tokens", x.shape[1])
        return made, made
    carry, grid = inputs[1], inputs[2] or attn.grid
    if isinstance(attn, ReuseAttention):
        own = attn.own_queries_and_keys(x, None, carry.key_proj)
        if own is None:
            return handed, handed
        computed = dense_map(attn, *own, grid, rows, carry.sizes)
        read, given = join_heads(handed.weights, computed, attn.num_reused_heads)
        return handed._replace(weights=read), handed._replace(weights=given)
    q, k, _ = project_map(attn, x, grid, carry.layerwise_proj)
    made = AttentionMap(dense_map(attn, q, k, grid, rows, carry.sizes), _keys(layer, attn), x.shape[1])
    return made, made


def _keys(layer: int, attn: Attention) -> Hashable:
    """What the columns of a map stand for; a projection that was learned gives a layer keys of its own, and a merge
    gives all layers after it new ones."""
    if not isinstance(attn, LowRankAttention):
        return ("tokens", attn.merges) if attn.merges else "tokens"
    is_own = attn.sharing != "layerwise" and attn.kind == "linear"
    return attn.kind, attn.projected_dim, layer if is_own else None
