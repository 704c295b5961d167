"""A trained ViT in a plan, by what images say where there are any, and what that did to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from vitreuse.compress.closed_form import LayerFit
from vitreuse.compress.convert import LOWRANK_STARTS, Conversion, fitting_plan, take_into
from vitreuse.compress.fidelity import agreement
from vitreuse.compress.fitting import FittedConversion, take_into_on_images
from vitreuse.compress.redundancy import measure_head_errors, measure_redundancy
from vitreuse.compress.ridge import ASIDE
from vitreuse.compress.row_sample import NUM_ROWS, count_rows
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.data.samples import Images, are_classes, images_for, num_shown
from vitreuse.io.progress import WorkProgress
from vitreuse.io.tables import Shown, table_of, titled
from vitreuse.model.copies import exact_copy, seeded
from vitreuse.model.keywords import architecture
from vitreuse.plan import EXACT, Plan
from vitreuse.plan.options import POOLS
from vitreuse.verbs.similarity import rows_remarks

DISTANCES, IN_ORDER = ("error", "variation"), "in order"
AGREEMENT = {
    "equal_top1": "{:.2f} % equal top-1",
    "kl_divergence_nats": "KL divergence {:.4f} nats",
    "cosine": "cosine of features {:.4f}",
    "worst_cosine": "{:.4f} in the worst tenth",
    "patch_cosine": "of patch tokens {:.4f}",
    "worst_patch_cosine": "{:.4f} in the worst tenth",
}


class How(NamedTuple):
    """How a model is converted.

    Attributes:
        heads: What heads of reuse layers are matched by, or "in order"; None in a plan without reuse.
        lowrank_start: What token projections start as; None where a plan has none with parameters.
        layers: What layers that the plan changes are, "fitted" to the original's tokens or "as they come" out of it.
        linear_start: What linear layers start as; None where a plan has none.
        units: Which hidden units stay; None where a plan does not choose.
    """

    heads: str | None
    lowrank_start: str | None
    layers: str | None
    linear_start: str | None
    units: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Converted(Shown, Conversion):
    """A converted model, and what was done to it.

    Attributes:
        projections: By low-rank layer, the error of its attention before and after it was fitted.
        layers: What each fit of a layer was worth, in the order in which they were made.
        facts: What was done and measured, as the command has it under --json.
    """

    projections: Mapping[int, tuple[float, float]]
    layers: Sequence[LayerFit]
    facts: dict[str, Any]

    @property
    def plan(self) -> Plan:
        return self.model.plan

    def table(self) -> Group:
        return table(self.facts)


@torch.inference_mode(False)
def convert(
    model: Any,
    plan: str | Plan,
    images: Any = None,
    shown: Any = None,
    heads: str | None = None,
    lowrank_start: str | None = None,
    fits_layers: bool = True,
    num_rows: int = NUM_ROWS,
    seed: int = 0,
    **options: Any,
) -> Converted:
    """A trained ViT under a plan, without a gradient step through the model.

    Args:
        model: A plain ViT of timm, or one of ours whose layers are exact, on any device; it stays as it is.
        plan: One spec per layer.
        images: What Images takes, as a tensor, a data set or a loader, to learn from; None leaves all as it comes.
        shown: Other images, to measure agreement on; an eighth of the images by default.
        heads: By what heads are matched to the maps that they read, error or variation, or "in order"; default: error.
        lowrank_start: What token projections start as, random, pooled or fitted; by default fitted on images.
        fits_layers: Whether layers are fitted to the original's tokens in closed form, where there are four images.
        num_rows: Patches of each image whose rows of the maps are looked at, where heads are matched.
        seed: Of which images are kept, of these rows, and of what begins at random.
        options: Further keywords of a model with a plan, such as lowrank_sharing; without images also ``units``.

    Raises:
        ValueError: The model takes no plan, the plan does not suit it, or images are missing or not as it takes them.
    """
    original = exact_copy(model)
    learned, shown = _images(model, images, shown, seed)
    wish = _Wish(heads, lowrank_start, fits_layers, options)
    how = wish.choose(fitting_plan(original, plan), 0 if learned is None else len(learned))
    distances = None
    if learned is not None and how.heads in DISTANCES:
        distances = _distances(original, how.heads, learned, num_rows, seed)
    with seeded(seed):
        fitted = wish.convert(original, fitting_plan(original, plan), how, learned, distances, seed)
    facts = {
        "rows": count_rows(original, num_rows) if how.heads in DISTANCES else None,
        "images": None if learned is None or shown is None else {"learned": len(learned), "shown": len(shown)},
        **_facts(model, fitted, how, shown),
    }
    return Converted(**vars(fitted.conversion), projections=fitted.projections, layers=fitted.layers, facts=facts)


def _images(model: Any, images: Any, shown: Any, seed: int) -> tuple[Images | None, Images | None]:
    """Images to learn from, and others to measure on; nothing of nothing.

    Raises:
        ValueError: There is one image, or none is to be learned from.
    """
    if images is None:
        if shown is not None:
            raise ValueError("shown has no effect without images to learn from: give some, or leave it out.")
        return None, None
    given = images_for(model, images)
    if shown is not None:
        return given, images_for(model, shown)
    if len(given) < 2:
        raise ValueError("one image is given, and none is both learned from and shown: give more.")
    kept = num_shown(len(given))
    learned, apart = given.parts(len(given) - kept, kept, seed=seed)
    return learned, apart


def without_effect(plan: Plan, lowrank_projection: str | None) -> set[str]:
    """The arguments of convert by which nothing changes under a plan, whose tokens may be projected by a way."""
    words, found = {spec.word for spec in plan}, set()
    if "reuse" not in words:
        found |= {"heads", "num_rows"}
    if "lowrank" not in words:
        found |= {"lowrank_sharing", "lowrank_projection"}
    if "lowrank" not in words or lowrank_projection in POOLS:
        found.add("lowrank_start")
    return found | ({"fits_layers"} if all(spec == EXACT for spec in plan) else set())


class _Wish(NamedTuple):
    """How somebody wants a model converted, as convert takes it."""

    heads: str | None
    lowrank_start: str | None
    fits_layers: bool
    options: dict[str, Any]

    def choose(self, plan: Plan, num_images: int) -> How:
        """What is asked for, else the best that so many images allow; raises as convert does."""
        self._refuse_odd(num_images)
        self._refuse_idle(plan)
        words = {spec.word for spec in plan}
        heads = (self.heads or DISTANCES[0]) if num_images else IN_ORDER
        can_fit = num_images >= ASIDE and self.options.get("lowrank_sharing") != "layerwise"
        start = self.lowrank_start or ("fitted" if can_fit else "pooled")
        has_projections = "lowrank" in words and self.options.get("lowrank_projection") not in POOLS
        is_fitted = num_images >= ASIDE and self.fits_layers
        units = "that say most" if num_images else "of the largest norms"
        return How(
            heads if "reuse" in words else None,
            start if has_projections else None,
            None if all(spec == EXACT for spec in plan) else "fitted" if is_fitted else "as they come",
            ("fitted" if is_fitted else "zero") if "linear" in words else None,
            ("that are named" if "units" in self.options else units) if any(spec.hidden for spec in plan) else None,
        )

    def _refuse_odd(self, num_images: int) -> None:
        """Raises ValueError for what is none of its kind, or takes images where there are none."""
        heads = ("heads", self.heads, (*DISTANCES, IN_ORDER))
        for name, given, known in (heads, ("lowrank_start", self.lowrank_start, LOWRANK_STARTS)):
            if given is not None and given not in known:
                raise ValueError(f"{name} is {given!r}: give one of {', '.join(known)}.")
            if given in (*DISTANCES, "fitted") and not num_images:
                raise ValueError(f"{name}={given!r} needs images: give some, or leave it out.")
        if "units" in self.options and num_images:
            raise ValueError("units are chosen by the images: give units or images.")

    def _refuse_idle(self, plan: Plan) -> None:
        """Raises ValueError for what the plan leaves without effect."""
        given = {**self.options, "heads": self.heads, "lowrank_start": self.lowrank_start}
        given["fits_layers"] = not self.fits_layers
        idle = without_effect(plan, self.options.get("lowrank_projection"))
        for name in sorted(name for name in idle if given.get(name)):
            raise ValueError(f"{name} has no effect on plan '{plan}': leave it out.")

    def convert(
        self, original: Any, plan: Plan, how: How, learned: Images | None, distances: Tensor | None, seed: int
    ) -> FittedConversion:
        """The conversion, and what its fits gained."""
        if learned is None:
            bare = take_into(original, plan, pooled=how.lowrank_start != "random", **self.options)
            return FittedConversion(bare, {}, [])
        start, fits_layers = how.lowrank_start or "pooled", how.layers == "fitted"
        settings: dict[str, Any] = {"lowrank_start": start, "fits_layers": fits_layers, "seed": seed, **self.options}
        return take_into_on_images(original, plan, learned, distances, **settings)


def _distances(original: Any, by: str | None, images: Images, num_rows: int, seed: int) -> Tensor:
    """Distances (L, L, H, H) between the heads of each two layers, measured on images."""
    with WorkProgress("matching heads", "images", len(images)) as progress:
        if by == "variation":
            return measure_redundancy(original, images.labelled(), progress, num_rows, seed).variation
        return measure_head_errors(original, images.labelled(), progress, num_rows, seed)


def _facts(model: Any, fitted: FittedConversion, how: How, shown: Images | None) -> dict[str, Any]:
    """What was done to a model, and what it says of images that it was not fitted on."""
    conversion, found = fitted.conversion, None
    if shown is not None:
        compared = (conversion.original, conversion.model, shown.labelled(), are_classes(shown, model))
        with WorkProgress("measuring", "images", len(shown)) as progress:
            found = asdict(agreement(*compared, progress.reach))
    return {
        "name": architecture(model),
        "plan": str(conversion.model.plan),
        **how._asdict(),
        "matches": conversion.matches,
        "fits": dict(fitted.projections),
        "layer_fits": [asdict(fit) for fit in fitted.layers],
        **{key: list(getattr(conversion, key)) for key in ("new", "touched", "dropped")},
        "macs": [sum(count_macs(of, theoretical=True).values()) for of in (conversion.original, conversion.model)],
        "params": [count_params(of) for of in (conversion.original, conversion.model)],
        "agreement": found,
    }


def table(result: dict[str, Any]) -> Group:
    """The original beside the model in the plan, what each fit was worth, and remarks."""
    found = result["agreement"] or {}
    rows = []
    for name, macs, params in zip(("original", "converted"), result["macs"], result["params"], strict=True):
        top1 = found.get(f"{name}_top1")
        rows.append((name, f"{macs / 1e9:.4g}", f"{params / 1e6:.2f}", "-" if top1 is None else f"{top1:.2f}"))
    shown = table_of(("", "GMACs", "M params", "top-1 (%)"), rows, ("",))
    fits = [_layer_fits(result["layer_fits"])] if result["layer_fits"] else []
    return titled(f"{result['name']} as '{result['plan']}'", shown, *fits, *_remarks(result))


def _layer_fits(fits: list[dict[str, Any]]) -> Table:
    """What each fit left of the error, which is that of the tokens over what the original's layer adds to them, and how
    far the whole model was from the original then."""
    headings = ("layer", "fitted", "error before (%)", "after (%)", "distance of answers")
    rows = [
        (
            str(fit["layer"]),
            fit["part"],
            *(f"{100 * fit[key]:.3g}" for key in ("before", "after")),
            f"{fit['distance']:.3g}",
        )
        for fit in fits
    ]
    return table_of(headings, rows, ("fitted",))


def _remarks(result: dict[str, Any]) -> list[str]:
    """What the table has no column for."""
    remarks = [f"the original: {result['training']}"] if result.get("training") else []
    numbers = {"new": "new and", "touched": "touched parameters, untrained,", "dropped": "dropped"}
    said = " ".join(f"{len(result[key])} {text}" for key, text in numbers.items())
    remarks.append(f"{result['output']}: {said}, by name in conversion.json" if "output" in result else said)
    if result["agreement"] is not None:
        values = {name: value for name, value in result["agreement"].items() if value is not None}
        said = [form.format(values[name]) for name, form in AGREEMENT.items() if name in values]
        remarks.append(f"{', '.join(said)} over {values['num_images']:,} images")
    if result.get("labels") is not None:
        remarks.append(result["labels"])
    if result["heads"] is not None:
        by = "in their order" if result["heads"] == "in order" else f"matched by {result['heads']}"
        remarks.append(f"heads of reuse layers: {by}")
        remarks += rows_remarks(result["rows"])
    if result["lowrank_start"] is not None:
        remarks.append(f"token projections: {result['lowrank_start']}")
    if result["layers"] == "fitted":
        remarks.append("layers: fitted to the original's tokens; the errors are of images that were not fitted")
    if result["linear_start"] == "zero":
        remarks.append("linear layers: zero, which is as if they were skipped")
    if result["units"] is not None:
        remarks.append(f"hidden units: those {result['units']} stay")
    return remarks
