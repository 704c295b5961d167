"""A trained ViT taken into a plan by what images say: units that stay, token projections, and all that is fitted.

It is convert, then what improves on it without a gradient through the model: fit_projections, and fit_layers.

Shapes: B images, N tokens, R rows that are read, C channels.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention import LowRankAttention
from vitreuse.compress.closed_form import LayerFit, fit_layers
from vitreuse.compress.convert import Conversion, fitting_plan, take_into
from vitreuse.compress.hidden_units import contributing_units
from vitreuse.compress.recording import recorded_attention
from vitreuse.compress.ridge import images_apart
from vitreuse.io.progress import WorkProgress
from vitreuse.io.spool import Spool
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT, Plan

FIT_STEPS, FIT_BATCH_SIZE = 300, 16
TINY = torch.finfo(torch.float32).tiny
FIT_LR = 0.06  # of the share that one of N tokens has in a mean that makes k, k / N


@dataclass(frozen=True)
class FittedConversion:
    """A conversion, and what the fits were worth.

    Attributes:
        conversion: As convert returns it; its model is fitted.
        projections: By low-rank layer, the error of its attention before and after, as fit_projections returns it.
        layers: What each fit of a layer was worth, in the order in which they were made.
    """

    conversion: Conversion
    projections: Mapping[int, tuple[float, float]]
    layers: Sequence[LayerFit]


def convert_on_images(
    model: Any,
    plan: str | Plan,
    images: Iterable[Tensor],
    distances: Tensor | None = None,
    *,
    lowrank_start: str = "fitted",
    fits_layers: bool = True,
    seed: int = 0,
    **options: Any,
) -> FittedConversion:
    """A trained ViT under a plan, fitted on images, with its progress shown.

    Args:
        model: What convert takes.
        plan: One spec per layer.
        images: Batches (B, channels, rows, columns), which are gone over several times, each image once.
        distances: Between heads, as convert takes them.
        lowrank_start: What token projections start as: random, pooled or fitted.
        fits_layers: Whether layers are fitted to the original's tokens in closed form.
        seed: Of the order of images where projections are fitted.
        options: Further keywords of a model with a plan, such as lowrank_sharing.

    Raises:
        ValueError: The plan does not suit the model, or there are fewer than four images to fit layers on.
    """
    original = exact_copy(model)
    return take_into_on_images(
        original,
        fitting_plan(original, plan),
        images,
        distances,
        lowrank_start=lowrank_start,
        fits_layers=fits_layers,
        seed=seed,
        **options,
    )


@torch.inference_mode(False)
def take_into_on_images(
    original: Any,
    plan: Plan,
    images: Iterable[Tensor],
    distances: Tensor | None = None,
    *,
    lowrank_start: str = "fitted",
    fits_layers: bool = True,
    seed: int = 0,
    **options: Any,
) -> FittedConversion:
    """As convert_on_images, of one of ours with exact layers in evaluation mode, which is not copied."""
    units = contributing_units(original, plan, images)
    conversion = take_into(original, plan, distances, pooled=lowrank_start != "random", units=units, **options)
    projections, layers = {}, []
    num_projected = sum(spec.word == "lowrank" for spec in plan)
    if lowrank_start == "fitted" and num_projected:
        with WorkProgress("fitting", "projections", num_projected) as progress:
            projections = fit_projections(conversion, images, seed, partial(_one_more, progress))
    if fits_layers and any(spec != EXACT for spec in plan):
        with WorkProgress("fitting", "layers", len(plan)) as progress:
            layers = fit_layers(conversion, images, progress)
    return FittedConversion(conversion, projections, layers)


def _one_more(progress: WorkProgress, _: int) -> None:
    progress.reach(progress.done + 1)


@torch.inference_mode(False)
def fit_projections(
    conversion: Conversion, images: Iterable[Tensor], seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> dict[int, tuple[float, float]]:
    """Takes the token projections to what best gives back the attention of the original, each layer by itself.

    Each layer sees the tokens that it has in the original, and its projections are all that moves: Adam on the squared
    error of its output against that of exact attention, from where they are. They stay where they were unless the
    error falls on the images that were kept aside.

    Args:
        conversion: What convert returned; its model changes.
        images: Batches (B, channels, rows, columns), which are gone over once for each layer; of all images every
            fourth is kept aside. What attention makes of them lies in a temporary folder.
        seed: Of which images a step learns from.
        progress: Told each layer that is done.

    Returns:
        By layer, the error before and after on images kept aside, relative to the square of the exact output.

    Raises:
        ValueError: Layers share a projection, so that none can be fitted by itself; fewer than four images.
    """
    if conversion.model.key_proj is not None:
        raise ValueError("projections of all layers in one cannot be fitted layer by layer: choose the pooled start.")
    errors = {}
    for layer, block in enumerate(conversion.model.blocks):
        projections = [parameter for name, parameter in block.attn.named_parameters() if name.endswith("_proj")]
        if isinstance(block.attn, LowRankAttention) and projections:
            with Spool() as fitted, Spool() as aside:
                for pair, is_aside in _attention_pairs(conversion.original, layer, images):
                    (aside if is_aside else fitted).append(pair)
                errors[layer] = _fit(block.attn, projections, fitted, aside, seed)
            progress(layer)
    return errors


class _Pair(NamedTuple):
    """Tokens that an attention is given (B, N, C), what it gives back in the rows that are read (B, R, C), and the grid
    of patches."""

    tokens: Tensor
    output: Tensor
    grid: tuple[int, int]

    def of(self, attn: Any) -> Tensor:
        """What another attention gives back in these rows."""
        return attn(self.tokens, None, self.grid, self.output.shape[1])


@torch.no_grad()
def _attention_pairs(model: Any, layer: int, batches: Iterable[Tensor]) -> Iterator[tuple[_Pair, bool]]:
    """What the attention of a layer makes of few images after the other, and whether these are kept aside."""
    device = next(model.parameters()).device
    with recorded_attention(model) as calls:
        for images, is_aside in images_apart(batches):
            for few in images.split(FIT_BATCH_SIZE):
                model(few.to(device))
                tokens, _, grid, *_ = calls[layer].inputs
                yield _Pair(tokens, calls[layer].output, grid or model.patch_embed.grid_size), is_aside


def _fit(attn: Any, projections: list[Any], fitted: Spool, aside: Spool, seed: int) -> tuple[float, float]:
    """Fits the projections of one attention; its error before and after. The better ones stay."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(projections, lr=FIT_LR * attn.projected_dim / attn.num_tokens)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    before, start = _error(attn, aside), copy.deepcopy(attn.state_dict())
    for number in torch.randint(len(fitted), (FIT_STEPS,), generator=generator).tolist():
        pair = fitted[number]
        loss = F.mse_loss(pair.of(attn), pair.output) / pair.output.square().mean().clamp_min(TINY)
        optimizer.zero_grad()
        loss.backward(inputs=projections)
        optimizer.step()
        schedule.step()
    after = _error(attn, aside)
    if not after < before:
        attn.load_state_dict(start)
        return before, before
    return before, after


@torch.no_grad()
def _error(attn: Any, pairs: Iterable[_Pair]) -> float:
    """The squared error of an attention over the square of what the original's gives back."""
    error = energy = 0.0
    for pair in pairs:
        error += float((pair.of(attn) - pair.output).double().square().sum())
        energy += float(pair.output.double().square().sum())
    return error / max(energy, sys.float_info.min)  # of a layer that gives back nothing
