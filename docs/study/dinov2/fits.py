"""What each piece of the fit in closed form is worth: one piece changed at a time, in two plans.

    python -m docs.study.dinov2 --fits

Fitted on images of the training split, no two of which show the same thing; none of the tests is looked at before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from docs.study.dinov2.ablation import BATCH_SIZE, IMAGE_SIZE_PX, NUM_IMAGES, distances, with_tokens
from docs.study.dinov2.images import PARTS
from docs.study.dinov2.measure import TESTS, Line, complete, images_apart, read_lines
from docs.study.dinov2.packages import HERE
from docs.study.dinov2.weights import trained
from eval.table import Column, to_markdown
from vitreuse import convert, fit_layers, parse_plan
from vitreuse.compress import closed_form
from vitreuse.compress.hidden_units import contributing_units
from vitreuse.compress.recording import inputs_of
from vitreuse.compress.ridge import Fit, NormalEquations
from vitreuse.cost.measure import describe_machine
from vitreuse.io.durable import write_durably
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy
from vitreuse.model.plan_weights import Units
from vitreuse.plan import EXACT, Plan

PLANS = ("exact-16*12", "exact*2 none exact/768*3 exact*2 linear exact/384 skip exact")
NUM_FITTED = 64
FITS = HERE / "fits.jsonl"

_observe, _parts_of, _row_weights = closed_form._observe, closed_form._parts_of, closed_form.row_weights


def _on_the_originals(block: Any, part: str, writer: Any, state: Any) -> Any:
    """What a fit sees where no layer before it has changed: the original's tokens, merged alike."""
    tokens = closed_form.merged_alike(state.original, state.carry)
    return _observe(block, part, writer, state._replace(tokens=tokens))


def _always(strength: float) -> Callable[[NormalEquations, NormalEquations], Fit]:
    """A fit of one strength, kept whatever the images say that were not fitted."""

    def fit(fitted: NormalEquations, aside: NormalEquations) -> Fit:
        update = fitted.solve(strength)
        return Fit(update, strength, aside.energy, aside.error(update))

    return fit


class _Unjudged(closed_form._Aside):
    """Keeps each fit wholly, whatever the whole model says then."""

    def keep_nearest(self, layer: int, writer: Any, update: torch.Tensor) -> float:
        writer.add(update)
        return 1.0


def _without(part: str) -> Callable[[Any], list[str]]:
    return lambda block: [each for each in _parts_of(block) if each != part]


@torch.inference_mode()
def _units_of_most_variance(original: Any, plan: Plan, batches: Sequence[torch.Tensor]) -> Units:
    """By layer of fewer hidden units those whose variance times the square of their column is largest."""
    layers = {layer: original.blocks[layer].mlp.fc2 for layer, spec in enumerate(plan) if spec.hidden}
    with ExitStack() as hooks:
        seen = {layer: hooks.enter_context(inputs_of(fc2)) for layer, fc2 in layers.items()}
        for images in batches:
            original(images)
    chosen = {}
    for layer, hidden in seen.items():
        worth = torch.cat(hidden).flatten(0, 1).double().var(0) * layers[layer].weight.double().square().sum(0)
        chosen[layer] = worth.topk(plan[layer].hidden or 0).indices.sort().values.tolist()
    return chosen


def _units_of_largest_norms(original: Any, plan: Plan, batches: Sequence[torch.Tensor]) -> Units:
    """None by name, so that the conversion takes those of largest norms."""
    return {}


def _as_one_patch(tokens: Any, sizes: Any, num_prefix_tokens: int) -> Any:
    weights = _row_weights(tokens, sizes, num_prefix_tokens)
    weights[:, :num_prefix_tokens] = 1.0
    return weights


@dataclass(frozen=True)
class Variant:
    """What is done otherwise: what of closed_form.py is replaced, another choice of units, no fit."""

    name: str
    replaced: Mapping[str, Any] = field(default_factory=dict)
    choose: Callable[[Any, Plan, Sequence[torch.Tensor]], Units] = contributing_units
    is_fitted: bool = True


VARIANTS = (
    Variant("as built"),
    Variant("not fitted", is_fitted=False),
    Variant("not fitted, units by norms", choose=_units_of_largest_norms, is_fitted=False),
    Variant("units by norms", choose=_units_of_largest_norms),
    Variant("units by variance", choose=_units_of_most_variance),
    Variant("on the original's tokens", {"_observe": _on_the_originals}),
    Variant("kept by the error of the layer", {"_Aside": _Unjudged}),
    Variant("strength 0.001, always kept", {"best_fit": _always(1e-3), "_Aside": _Unjudged}),
    Variant("strength 0.1, always kept", {"best_fit": _always(1e-1), "_Aside": _Unjudged}),
    Variant("layers that change alone", {"_parts_of": lambda block: _parts_of(block) if block.spec != EXACT else []}),
    Variant("no MLPs", {"_parts_of": _without("mlp")}),
    Variant("no means", {"_parts_of": _without("mean")}),
    Variant("a class token as one patch", {"row_weights": _as_one_patch}),
)


def made(original: Any, plan: str, variant: Variant, images: list[torch.Tensor]) -> Any:
    """The model under a plan, converted as a variant does."""
    units = variant.choose(exact_copy(original), parse_plan(plan), images)
    conversion = convert(original, plan, units=units)
    with ExitStack() as patches:
        for name, function in variant.replaced.items():
            patches.enter_context(patch.object(closed_form, name, function))
        if variant.is_fitted:
            fit_layers(conversion, images, WorkProgress(variant.name, "layers", len(original.blocks)))
    return conversion.model


def main() -> None:
    """Completes fits.jsonl, a variant a line, and writes fits.md."""
    original = trained(IMAGE_SIZE_PX, global_pool="")
    images = [images for images, _ in images_apart(PARTS[0], IMAGE_SIZE_PX, original, NUM_FITTED).batches(BATCH_SIZE)]
    batches = {test: with_tokens(original, test) for test in TESTS}
    by_name = {variant.name: variant for variant in VARIANTS}

    def line(image_size_px: int, name: str) -> Line:
        found: dict[str, Any] = {"image_size_px": image_size_px, "plan": name}
        for plan in PLANS:
            model = made(original, plan, by_name[name], images)
            for test in TESTS:
                lost = distances(model, batches[test])
                found[f"{plan} {test}"] = " / ".join(f"{100 * distance:.2f}" for distance in lost)
        return {**found, "machine": describe_machine(original.cls_token.device)}

    complete(FITS, [(IMAGE_SIZE_PX, name) for name in by_name], line)
    kept = read_lines(FITS)
    rows = [kept[IMAGE_SIZE_PX, name] for name in by_name]
    columns = [Column("plan", "variant")]
    columns += [Column(f"{plan} {test}", f"{plan}, {test}") for plan, test in product(PLANS, TESTS)]
    machine = rows[-1]["machine"]
    caption = (
        f"100 x (1 - cosine) to the original's class / patch tokens at {IMAGE_SIZE_PX} px, means over {NUM_IMAGES} "
        f"composites and 25 photographs, fitted on {NUM_FITTED} images that share nothing. {machine['device']}, "
        f"torch {machine['torch']}, timm {machine['timm']}, {machine['date']}."
    )
    table = to_markdown(rows, columns, caption)
    write_durably(HERE / "fits.md", f"# The fit in closed form, piece by piece\n\n{table}".encode())
