"""``vitreuse convert MODEL --plan TEXT -o DIR``: a trained ViT in a plan, as a hub folder, and what that did to it."""

import argparse
import json
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from vitreuse.cli.console import add_output, add_plan
from vitreuse.cli.source import (
    add_source_arguments,
    learning_split,
    load_model,
    load_sample,
    rows_remarks,
    training_note,
)
from vitreuse.compress.convert import LOWRANK_STARTS, convert, fitting_plan
from vitreuse.compress.fidelity import agreement
from vitreuse.compress.fitting import FittedConversion, convert_on_images
from vitreuse.compress.redundancy import measure_head_errors, measure_redundancy
from vitreuse.compress.ridge import ASIDE
from vitreuse.compress.row_sample import NUM_ROWS, count_rows
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.data.samples import ImageSample
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import Target
from vitreuse.io.durable import durable_folder, refuse_filled, write_durably
from vitreuse.io.process import choose_device
from vitreuse.io.progress import WorkProgress
from vitreuse.io.tables import table_of, titled
from vitreuse.model.class_names import has_classes
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT, Plan
from vitreuse.plan.options import POOLS, PROJECTIONS, SHARINGS

HELP = "convert a trained ViT into a plan: a folder that timm.create_model loads"
DISTANCES = ("error", "variation")
AGREEMENT = {
    "equal_top1": "{:.2f} % equal top-1",
    "kl_divergence_nats": "KL divergence {:.4f} nats",
    "cosine": "cosine of features {:.4f}",
    "worst_cosine": "{:.4f} in the worst tenth",
    "patch_cosine": "of patch tokens {:.4f}",
    "worst_patch_cosine": "{:.4f} in the worst tenth",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add_plan(parser, required=True)
    add_output(parser, "a new or empty folder", required=True)
    meaning = "let the heads of a reuse layer read maps in their order; default: matched on images, where there are any"
    parser.add_argument("--no-match-heads", action="store_true", help=meaning)
    meaning = "match by the error of the layer's output, or by the total variation of the maps; default: error"
    parser.add_argument("--match-by", choices=DISTANCES, help=meaning)
    meaning = "leave layers as they come out of the original; default: fitted in closed form, where there are images"
    parser.add_argument("--no-fit", action="store_true", help=meaning)
    meaning = "what token projections start as; default: fitted on images, where there are any, else pooled"
    parser.add_argument("--lowrank-start", choices=LOWRANK_STARTS, help=meaning)
    parser.add_argument("--lowrank-sharing", choices=SHARINGS, help="what shares a token projection")
    parser.add_argument("--lowrank-projection", choices=PROJECTIONS, help="how tokens are projected")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The conversion, written to its folder, beside what it changed."""
    refuse_filled(args.output)
    device = choose_device(args.device)
    target, model = load_model(args)
    model = model.to(device).eval()
    original = exact_copy(model)
    plan = fitting_plan(original, args.plan)
    _refuse_idle(args, plan)
    samples = _samples(args, target, model)
    how = _choose(args, plan, 0 if samples is None else len(samples.learned))
    fitted = _convert(args, original, plan, how, samples)
    conversion = fitted.conversion
    result = {
        "name": target.label,
        "training": training_note(args, target),
        "plan": str(plan),
        **how._asdict(),
        "rows": count_rows(original, args.rows or NUM_ROWS) if how.heads in DISTANCES else None,
        "matches": conversion.matches,
        "fits": dict(fitted.projections),
        "layer_fits": [asdict(fit) for fit in fitted.layers],
        **{key: list(getattr(conversion, key)) for key in ("new", "touched", "dropped")},
        "macs": [sum(count_macs(of, theoretical=True).values()) for of in (original, conversion.model)],
        "params": [count_params(of) for of in (original, conversion.model)],
        "images": None if samples is None else {samples.split: len(samples.learned), args.split: len(samples.shown)},
        "labels": None if samples is None else samples.shown.remark,
        "agreement": None if samples is None else _agreement(args, model, conversion.model, samples.shown),
    }
    with durable_folder(args.output) as folder:
        save_hub_folder(conversion.model, folder, target.crop_pct, result["training"])
        write_durably(folder / "conversion.json", json.dumps(result, indent=2).encode())
    return {"output": str(args.output), **result}


class _How(NamedTuple):
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


class _Samples(NamedTuple):
    """Images to measure the conversion on, and those that it may learn from, of their split."""

    shown: ImageSample
    learned: ImageSample
    split: str


def _refuse_idle(args: argparse.Namespace, plan: Plan) -> None:
    """Raises ValueError for an argument that the plan, or another argument, leaves without effect."""
    words = {spec.word for spec in plan}
    idle: dict[str, Any] = {}
    if "reuse" not in words:
        idle |= {"--no-match-heads": args.no_match_heads, "--match-by": args.match_by, "--rows": args.rows}
    if args.no_match_heads:
        idle |= {"--match-by": args.match_by, "--rows": args.rows}
    if "lowrank" not in words:
        idle |= {"--lowrank-sharing": args.lowrank_sharing, "--lowrank-projection": args.lowrank_projection}
    if "lowrank" not in words or args.lowrank_projection in POOLS:
        idle["--lowrank-start"] = args.lowrank_start
    if all(spec == EXACT for spec in plan):
        idle["--no-fit"] = args.no_fit
    for flag, given in idle.items():
        if given:
            raise ValueError(f"{flag} has no effect on plan '{plan}' beside the other arguments: leave it out.")


def _samples(args: argparse.Namespace, target: Target, model: Any) -> _Samples | None:
    """The images to measure on, and others to learn from, of the split train if there is one; None without images."""
    if args.data is None and target.config is None:
        return None
    shown = load_sample(args, target, model, args.split)
    split = learning_split(target, args.data, args.split)
    if split == args.split:
        return _Samples(*shown.apart(), f"other images of {split}")
    return _Samples(shown, load_sample(args, target, model, split), split)


def _choose(args: argparse.Namespace, plan: Plan, num_images: int) -> _How:
    """What is asked for, else the best that so many images allow.

    Raises:
        ValueError: It takes images, and there are none or too few.
    """
    asked = {"--match-by": args.match_by, "--rows": args.rows, "--lowrank-start fitted": args.lowrank_start == "fitted"}
    for flag, needs_images in asked.items():
        if needs_images and not num_images:
            raise ValueError(f"{flag} needs images and {args.model} is no run, which would know some: give --data DIR.")
    if args.no_fit and num_images < ASIDE:
        raise ValueError(f"--no-fit has no effect on {num_images} images, fitting takes {ASIDE} or more: leave it out.")
    words = {spec.word for spec in plan}
    heads = (args.match_by or DISTANCES[0]) if num_images and not args.no_match_heads else "in order"
    can_fit = num_images > 0 and args.lowrank_sharing != "layerwise"
    start = args.lowrank_start or ("fitted" if can_fit else "pooled")
    has_projections = "lowrank" in words and args.lowrank_projection not in POOLS
    is_fitted = num_images >= ASIDE and not args.no_fit
    units = "that say most" if num_images else "of the largest norms"
    return _How(
        heads if "reuse" in words else None,
        start if has_projections else None,
        None if all(spec == EXACT for spec in plan) else "fitted" if is_fitted else "as they come",
        ("fitted" if is_fitted else "zero") if "linear" in words else None,
        units if any(spec.hidden for spec in plan) else None,
    )


def _convert(
    args: argparse.Namespace, original: Any, plan: Plan, how: _How, samples: _Samples | None
) -> FittedConversion:
    """The conversion, and what its fits gained."""
    options = {key: getattr(args, key) for key in ("lowrank_sharing", "lowrank_projection") if getattr(args, key)}
    distances = None
    if samples is not None and how.heads in DISTANCES:
        distances = _distances(args, original, how.heads, samples.learned)
    torch.manual_seed(args.seed)
    if samples is None:
        return FittedConversion(convert(original, plan, pooled=how.lowrank_start != "random", **options), {}, [])
    return convert_on_images(
        original,
        plan,
        samples.learned.inputs(args.batch_size),
        distances,
        lowrank_start=how.lowrank_start or "pooled",
        fits_layers=how.layers == "fitted",
        seed=args.seed,
        **options,
    )


def _distances(args: argparse.Namespace, original: Any, by: str, sample: ImageSample) -> Tensor:
    """Distances (L, L, H, H) between the heads of each two layers, measured on images."""
    batches, rows = sample.batches(args.batch_size), (args.rows or NUM_ROWS, args.seed)
    with WorkProgress("matching heads", "images", len(sample)) as progress:
        if by == "variation":
            return measure_redundancy(original, batches, progress, *rows).variation
        return measure_head_errors(original, batches, progress, *rows)


def _agreement(args: argparse.Namespace, model: Any, converted: Any, sample: ImageSample) -> dict[str, Any]:
    """How the converted model agrees with the original; with top-1 where images and model have as many classes."""
    has_labels = has_classes(model) and len(sample.class_names) == model.num_classes
    return asdict(agreement(model, converted, sample.batches(args.batch_size), has_labels))


def render(result: dict[str, Any]) -> Group:
    found = result["agreement"] or {}
    rows = []
    for name, macs, params in zip(("original", "converted"), result["macs"], result["params"], strict=True):
        top1 = found.get(f"{name}_top1")
        rows.append((name, f"{macs / 1e9:.4g}", f"{params / 1e6:.2f}", "-" if top1 is None else f"{top1:.2f}"))
    table = table_of(("", "GMACs", "M params", "top-1 (%)"), rows, ("",))
    fits = [_layer_fits(result["layer_fits"])] if result["layer_fits"] else []
    return titled(f"{result['name']} as '{result['plan']}'", table, *fits, *_remarks(result))


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
    remarks = [] if result["training"] is None else [f"the original: {result['training']}"]
    numbers = {"new": "new and", "touched": "touched parameters, untrained,", "dropped": "dropped"}
    said = " ".join(f"{len(result[key])} {text}" for key, text in numbers.items())
    remarks.append(f"{result['output']}: {said}, by name in conversion.json")
    if result["agreement"] is not None:
        values = {name: value for name, value in result["agreement"].items() if value is not None}
        said = [form.format(values[name]) for name, form in AGREEMENT.items() if name in values]
        remarks.append(f"{', '.join(said)} over {values['num_images']:,} images")
    if result["labels"] is not None:
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
