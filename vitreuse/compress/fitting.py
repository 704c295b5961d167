"""A trained ViT taken into a plan by what images say: units that stay, token projections, and all that is fitted.

It is convert, then what improves on it without a gradient through the model: fit_projections, and fit_layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vitreuse.compress.closed_form import LayerFit, fit_layers
from vitreuse.compress.convert import Conversion, convert, fit_projections
from vitreuse.compress.hidden_units import contributing_units
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import EXACT, Plan


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
    plan: Plan,
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
    units = contributing_units(model, plan, images)
    conversion = convert(model, plan, distances, pooled=lowrank_start != "random", units=units, **options)
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
