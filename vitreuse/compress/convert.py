"""A trained ViT taken into a plan, before anything is fitted.

Heads: the map that a reuse layer reads is mixed by the value head that suits it, and queries and keys go. Token
projections start as pooling over the grid. Hidden units: the largest stay, or those that are named. Linear layers begin
as ones that do nothing. All else stays.

Shapes: L layers, H heads, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitreuse.attention import LowRankAttention
from vitreuse.attention.lowrank import grid_pooling
from vitreuse.compress.head_matching import match_plan, order_of_heads, rows_of_heads
from vitreuse.model.checkpoint import load_checkpoint
from vitreuse.model.copies import exact_copy, untrained_copy
from vitreuse.model.keywords import layers_of
from vitreuse.model.plan_weights import Units, refuse_more_units
from vitreuse.plan import Plan, parse_plan

LOWRANK_STARTS = ("random", "pooled", "fitted")


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what was done to it.

    Attributes:
        model: With the plan and all the weights, in evaluation mode.
        original: The model it was made of, as one of ours with exact layers.
        matches: By reuse layer, for each map that it reads, the head of the original that mixes it.
        new: Parameters that the original does not have: token projections and linear layers.
        touched: Parameters of the original in attentions that are no longer exact, and in MLPs of fewer hidden units.
        dropped: What the plan has no use for.
    """

    model: Any
    original: Any
    matches: dict[int, list[int]]
    new: tuple[str, ...]
    touched: tuple[str, ...]
    dropped: tuple[str, ...]


def convert(
    model: Any,
    plan: str | Plan,
    distances: Tensor | None = None,
    *,
    pooled: bool = True,
    units: Units | None = None,
    **options: Any,
) -> Conversion:
    """A trained ViT under a plan.

    Args:
        model: A ViT, DeiT, DeiT III or DINO model of timm, or one of ours whose layers are exact; it stays as it is.
        plan: One spec per layer.
        distances: (L, L, H, H), what it costs each head of the second layer to read the map of each head of the first,
            from measure_head_errors, or the variation of measure_redundancy; None leaves the heads in their order.
        pooled: Whether token projections start as pooling, rather than from torch's global generator.
        units: By layer, the hidden units of its MLP that stay where the plan has fewer; see load_checkpoint.
        options: Further keywords of a model with a plan, such as lowrank_sharing.

    Raises:
        ValueError: The model is of another kind, or the plan does not suit it.
    """
    fitting_plan(model, plan)  # is asked before all else
    return take_into(exact_copy(model), plan, distances, pooled=pooled, units=units, **options)


def take_into(
    original: Any,
    plan: str | Plan,
    distances: Tensor | None = None,
    *,
    pooled: bool = True,
    units: Units | None = None,
    **options: Any,
) -> Conversion:
    """As convert, of one of ours with exact layers in evaluation mode, which is not copied: it is the original."""
    plan, num_heads = fitting_plan(original, plan), original.blocks[0].attn.num_heads
    converted = untrained_copy(original, plan, **options).eval()
    state, matches = in_order_of_heads(original.state_dict(), plan, num_heads, distances)
    report = load_checkpoint(converted, state, original.patch_embed.img_size, units)
    if pooled:
        pool_projections(converted.blocks, converted.key_proj)
    touched = tuple(name for name in _touched(converted, original) if name not in report.new)
    return Conversion(converted, original, matches, report.new, touched, report.dropped)


def in_order_of_heads(
    state: Mapping[str, Tensor], plan: Plan, num_heads: int, distances: Tensor | None
) -> tuple[dict[str, Tensor], dict[int, list[int]]]:
    """A plain state dict whose heads stand as a plan's reuse layers read maps, and the matches of Conversion."""
    matches = match_plan(plan, num_heads, distances)
    ordered = dict(state)
    for layer, matched in matches.items():
        _reorder_heads(ordered, f"blocks.{layer}.attn.", order_of_heads(matched, num_heads))
    return ordered, matches


def fitting_plan(model: Any, plan: str | Plan) -> Plan:
    """A plan that a trained ViT can be taken into.

    Raises:
        ValueError: The model is of another kind, the plan does not suit it, or has more hidden units than there are.
    """
    layers = layers_of(model)
    plan = parse_plan(str(plan), len(layers), layers[0].attn.num_heads, model.patch_embed.num_patches)
    for layer, (spec, block) in enumerate(zip(plan, layers, strict=True)):
        refuse_more_units(layer, spec, block.mlp.fc2.in_features)
    return plan


def _touched(converted: Any, original: Any) -> list[str]:
    """Parameters in attentions of a converted model that are not exact, and in MLPs of fewer hidden units."""
    prefixes: list[str] = []
    for layer, (block, old) in enumerate(zip(converted.blocks, original.blocks, strict=True)):
        if block.has_attention and block.spec.word != "exact":
            prefixes.append(f"blocks.{layer}.attn.")
        if block.has_mlp and block.mlp.fc2.in_features != old.mlp.fc2.in_features:
            prefixes.append(f"blocks.{layer}.mlp.")
    return [name for name, _ in converted.named_parameters() if name.startswith(tuple(prefixes))]


def _reorder_heads(state: dict[str, Tensor], prefix: str, order: list[int]) -> None:
    """Puts the heads of a layer of a plain state dict in another order, which changes nothing of what it computes."""
    width = state[f"{prefix}proj.weight"].shape[1]
    rows = rows_of_heads(order, width // len(order))
    for name, parts in (("qkv.weight", 3), ("qkv.bias", 3), ("norm.weight", 1), ("norm.bias", 1)):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].unflatten(0, (parts, width))[:, rows].flatten(0, 1)
    state[f"{prefix}proj.weight"] = state[f"{prefix}proj.weight"][:, rows]


@torch.no_grad()
def pool_projections(layers: Iterable[Any], layerwise_proj: Tensor | None = None) -> None:
    """Starts token projections as averages over cells of the grid; a convolution's as its mean."""
    for attn in (layer.attn for layer in layers if isinstance(layer.attn, LowRankAttention)):
        for projection in (attn.key_proj, attn.value_proj, layerwise_proj):
            if projection is not None:
                projection.copy_(pooled_projection(attn, projection))


def pooled_projection(attn: LowRankAttention, projection: Tensor) -> Tensor:
    """What pool_projections makes of one projection of an attention, of its shape, on the CPU."""
    if attn.kind == "conv":
        return torch.full(projection.shape, 1 / projection.shape[-1])
    return grid_pooling(attn.grid, attn.num_prefix_tokens, attn.projected_dim).expand(projection.shape)
