"""What a change of one layer's attention does to a trained model, before anything is trained again.

Each layer is measured with the tokens that it gets in the unchanged model. A change makes an error in its output; how
much that matters is told by the gradient of the model's own output, in one backward pass per image:

    damage = mean over images of sum over tokens and channels of (gradient * error)^2 / mean over images of |logits|^2

The gradient is that of the logits summed with random signs. Were the errors of tokens and channels independent and
small, this would be the relative squared error of the logits; they are not, so that it ranks changes, single ones and
whole plans by their sum, and forecasts no error. What else was tried is in experiments.md. Where there are many tokens
a sample of them stands for all, without bias (row_sample.py).

Shapes: B images, N tokens, R query rows, M keys, C channels, H heads, D head dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor

from vitreuse.attention import ExactAttention
from vitreuse.compress.convert import pool_projections
from vitreuse.compress.head_matching import match_heads
from vitreuse.compress.recording import AttentionCall, attentions, dense_map, project_map, recorded_attention
from vitreuse.compress.redundancy import Batches, Redundancy, mean_over_images
from vitreuse.compress.row_sample import NUM_ROWS, RowSample
from vitreuse.io.progress import WorkProgress
from vitreuse.model.block import PlanBlock, PlanBlocks
from vitreuse.model.copies import adopted_layers
from vitreuse.plan import EXACT, Spec
from vitreuse.plan.language import WHOLE


class Change(NamedTuple):
    """One layer under another attention.

    Attributes:
        layer: The layer's number.
        spec: What it becomes.
        anchor: The layer that makes the map where the spec is reuse, else None.
        anchor_spec: The spec of that one, else None.
    """

    layer: int
    spec: Spec
    anchor: int | None = None
    anchor_spec: Spec | None = None


@torch.inference_mode(False)
def measure_damage(
    model: Any,
    batches: Batches,
    specs: Sequence[Spec],
    redundancy: Redundancy,
    progress: WorkProgress,
    num_rows: int | None = NUM_ROWS,
    seed: int = 0,
) -> dict[Change, float]:
    """The damage of each change that the specs allow, in one pass that holds a few images' maps at a time.

    A reuse layer may read each layer before it, exact or of any other kind that is asked for and makes a map, with its
    own heads in the order that matches the anchor's. A low-rank layer pools the tokens over the grid.

    Args:
        model: One of timm's ViTs or ours whose layers are all exact, on any device; its mode is restored.
        batches: Of images first.
        specs: What a layer may become.
        redundancy: What was measured on this model, for the heads that match.
        progress: Told how many images are done.
        num_rows: How many patches' rows have their errors looked at in each image, as measure_redundancy takes it.
        seed: By which they are drawn.

    Raises:
        ValueError: The model is not exact, a spec does not fit it, or there are no images, or no rows.
    """
    check_specs(model, specs)
    if (measured := len(redundancy.entropy)) != (depth := len(model.blocks)):
        raise ValueError(f"redundancy is of {measured} layers, the model has {depth}: measure it on this model.")
    changes = possible_changes(len(model.blocks), specs)
    orders = {  # the layer's own heads that read the first of the anchor's, as many as are reused
        change: match_heads(redundancy.variation[change.anchor, change.layer][: change.spec.number])
        for change in changes
        if change.anchor is not None
    }
    signs = torch.Generator().manual_seed(0)
    kinds = cache(partial(_layers_by_kind, model, specs))

    def measure(images: Tensor, sample: RowSample) -> tuple[Tensor, Tensor]:
        layers, logits = _observe(model, images, sample, signs)
        grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
        return _errors(changes, layers, kinds(grid), orders), logits.double().square().sum()

    errors, size = mean_over_images(model, batches, progress, measure, num_rows, seed)
    return dict(zip(changes, (errors / size).tolist(), strict=True))


def has_exact_layers(model: Any) -> bool:
    """Whether damage can be measured: all layers are timm's standard ones or our exact ones.

    Raises:
        ValueError: The model is no ViT of timm or ours, or has attention of another kind.
    """
    layers = zip(attentions(model), model.blocks, strict=True)  # attentions refuses what has no layers
    return all(
        (type(block) is PlanBlock and block.spec == EXACT)
        or (type(block) is Block and type(attn) is TimmAttention and attn.gate is None)
        for attn, block in layers
    )


def refuse_other_layers(model: Any) -> None:
    """Raises ValueError for a model whose layers are not all exact."""
    if not has_exact_layers(model):
        plan = f" {model.plan}" if hasattr(model, "plan") else ""
        raise ValueError(
            f"{type(model).__name__}{plan} has layers that are not exact, and damage is measured on exact ones alone: "
            "give a plain vit, deit or deit3 of timm, or one of ours whose plan is exact."
        )


def check_specs(model: Any, specs: Sequence[Spec]) -> None:
    """Refuses what measure_damage cannot measure, before any work is done.

    Raises:
        ValueError: The model is not exact, or a spec does not fit it.
    """
    refuse_other_layers(model)
    num_tokens, num_heads = model.num_prefix_tokens + model.patch_embed.num_patches, model.blocks[0].attn.num_heads
    limits = {"lowrank": (num_tokens - 1, f"{num_tokens} tokens"), "reuse": (num_heads, f"{num_heads} heads")}
    for spec in specs:
        if spec.merged or spec.hidden is not None or spec.word in WHOLE:
            raise ValueError(
                f"{spec} changes more than a layer's attention, and damage is measured of attention alone: leave it "
                "out here, vitreuse convert takes it."
            )
        limit, size = limits.get(spec.word, (math.inf, ""))
        if (spec.number or 0) > limit:
            raise ValueError(f"{spec} does not fit a model of {size}: give {spec.word}:{limit} or less.")


def possible_changes(depth: int, specs: Sequence[Spec]) -> list[Change]:
    """Each layer under each spec; reuse of each earlier layer, exact or under any of them that makes a map."""
    changes = []
    for layer, spec in product(range(depth), dict.fromkeys(specs)):
        read = product(range(layer), _makers(specs)) if spec.word == "reuse" else [(None, None)]
        changes += [Change(layer, spec, anchor, maker) for anchor, maker in read]
    return changes


def _makers(specs: Sequence[Spec]) -> list[Spec]:
    """The ways to make a map: exact, and each other kind of layer that makes one."""
    return [*dict.fromkeys((EXACT, *(spec for spec in specs if spec.makes_map)))]


def _layers_by_kind(model: Any, specs: Sequence[Spec], grid: tuple[int, int]) -> dict[Spec, PlanBlocks]:
    """The model's layers under each way to make a map, for images of a grid of patches."""
    with warnings.catch_warnings():  # of a span that covers the grid: here it is only tried
        warnings.simplefilter("ignore")
        found = {spec: adopted_layers(model, spec, grid) for spec in _makers(specs)}
    for layers in found.values():
        pool_projections(layers)
    return found


class _Layer(NamedTuple):
    """An attention at work.

    Attributes:
        attn: The attention.
        tokens: (B, N, C), that it is given.
        rows: (B, R), numbers of the rows of its output that are looked at, of those that are computed.
        gradient: (B, R, C), of the signed sum of logits by these, times the root of how many rows each stands for.
    """

    attn: Any
    tokens: Tensor
    rows: Tensor
    gradient: Tensor


class _Mixture(NamedTuple):
    """A map (B, H, R, M), the values (B, H, M, D), and the values mixed by it, (B, H, R, D)."""

    weights: Tensor
    values: Tensor
    mixed: Tensor


def _observe(model: Any, images: Tensor, sample: RowSample, signs: torch.Generator) -> tuple[list[_Layer], Tensor]:
    """Each attention at work, and the logits, which are the features of a model without a head."""
    with torch.enable_grad(), recorded_attention(model) as calls:
        logits = model(images.clone().requires_grad_())
        drawn = 2 * torch.randint(2, logits.shape, generator=signs) - 1
        outputs = [call.output for call in calls.values()]
        gradients = torch.autograd.grad((logits * drawn.to(logits)).sum(), outputs)
    layers = zip(model.blocks, calls.values(), gradients, strict=True)
    return [_layer(block.attn, call, gradient, sample) for block, call, gradient in layers], logits.detach()


def _layer(attn: Any, call: AttentionCall, gradient: Tensor, sample: RowSample) -> _Layer:
    """An attention at work, whose output has the gradient (B, N, C), or of its first rows where no others are computed:
    those of prefix tokens."""
    tokens = call.inputs[0].detach()
    rows = sample.rows(tokens.shape[1])[:, : gradient.shape[1]]
    counts = sample.counts(tokens.shape[1])[: rows.shape[1], None].to(gradient)
    return _Layer(attn, tokens, rows, gradient.take_along_dim(rows[..., None], dim=1) * counts.sqrt())


@torch.no_grad()
def _errors(
    changes: list[Change],
    layers: list[_Layer],
    kinds: Mapping[Spec, PlanBlocks],
    orders: dict[Change, list[int]],
) -> Tensor:
    """For each change the sum over images, tokens and channels of (gradient * error)^2."""
    made = [
        _mixtures(layer, {spec: of[number].attn for spec, of in kinds.items()}) for number, layer in enumerate(layers)
    ]
    unchanged = [_output(layer, own[EXACT].mixed) for layer, own in zip(layers, made, strict=True)]
    found = []
    for change in changes:
        layer, error = layers[change.layer], -unchanged[change.layer]
        if change.spec.word != "none":
            error += _output(layer, _changed(change, made, orders))
        wide = torch.promote_types(error.dtype, torch.float32)  # squares of half precision vanish
        found.append((layer.gradient.to(wide) * error.to(wide)).square().sum())
    return torch.stack(found) if found else torch.zeros(0)


def _mixtures(layer: _Layer, kinds: Mapping[Spec, Any]) -> dict[Spec, _Mixture]:
    """A layer's own map and values, made as attentions of other kinds make them."""
    found, projected = {}, {}
    for spec, attn in kinds.items():
        source = EXACT if type(attn).project is ExactAttention.project else spec  # as a span's, which differs by a mask
        if source not in projected:
            projected[source] = project_map(attn, layer.tokens, attn.grid)
        q, k, v = projected[source]
        weights = dense_map(attn, q, k, attn.grid, layer.rows)
        found[spec] = _Mixture(weights, v, weights @ v)
    return found


def _changed(change: Change, made: list[dict[Spec, _Mixture]], orders: dict[Change, list[int]]) -> Tensor:
    """The mixed values of a layer after a change: heads that match the anchor's read its map."""
    if change.anchor is None or change.anchor_spec is None:
        return made[change.layer][change.spec].mixed
    weights, order = made[change.anchor][change.anchor_spec].weights, orders[change]
    _, values, mixed = made[change.layer][change.anchor_spec]
    mixed = mixed.clone()
    mixed[:, order] = weights[:, : len(order), : mixed.shape[2]] @ values[:, order]
    return mixed


def _output(layer: _Layer, mixed: Tensor) -> Tensor:
    """What the attention makes of mixed values, (B, R, C)."""
    return layer.attn.proj(layer.attn.norm(mixed.transpose(1, 2).flatten(2)))
