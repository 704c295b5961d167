"""``vitreuse convert MODEL --plan TEXT -o DIR``: a trained ViT in a plan, as a hub folder, and what that did to it."""

import argparse
import json
from dataclasses import replace
from typing import Any, NamedTuple

from vitreuse.cli.console import add_output, add_plan
from vitreuse.cli.source import add_source_arguments, learning_split, load_model, load_sample, training_note
from vitreuse.compress.convert import LOWRANK_STARTS, fitting_plan
from vitreuse.compress.ridge import ASIDE
from vitreuse.compress.row_sample import NUM_ROWS
from vitreuse.data.samples import Images, ImageSample
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import Target
from vitreuse.io.durable import durable_folder, refuse_filled, write_durably
from vitreuse.io.process import choose_device
from vitreuse.plan import Plan
from vitreuse.plan.options import PROJECTIONS, SHARINGS
from vitreuse.verbs.convert import DISTANCES, IN_ORDER, Converted, convert, table, without_effect

HELP = "convert a trained ViT into a plan: a folder that timm.create_model loads"
render = table
FLAGS = {  # by the argument of the function that they give
    "--no-match-heads": "heads",
    "--match-by": "heads",
    "--rows": "num_rows",
    "--lowrank-sharing": "lowrank_sharing",
    "--lowrank-projection": "lowrank_projection",
    "--lowrank-start": "lowrank_start",
    "--no-fit": "fits_layers",
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
    _refuse_idle(args, fitting_plan(model, args.plan))
    samples = _samples(args, target, model)
    _refuse_without_images(args, 0 if samples is None else len(samples.learned))
    found = _convert(args, model, samples)
    found = replace(found, facts={**found.facts, **_about(args, target, samples)})
    with durable_folder(args.output) as folder:
        save_hub_folder(found.model, folder, found.facts["training"])
        write_durably(folder / "conversion.json", json.dumps(found.facts, indent=2).encode())
    return {"output": str(args.output), **found.facts}


class _Samples(NamedTuple):
    """Images to measure the conversion on, and those that it may learn from, of their split."""

    shown: ImageSample
    learned: ImageSample
    split: str


def _refuse_idle(args: argparse.Namespace, plan: Plan) -> None:
    """Raises ValueError for an argument that the plan, or another argument, leaves without effect."""
    idle = without_effect(plan, args.lowrank_projection)
    flags = [flag for flag, name in FLAGS.items() if name in idle]
    flags += ["--match-by", "--rows"] if args.no_match_heads else []
    for flag in flags:
        if getattr(args, flag.removeprefix("--").replace("-", "_")):
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


def _refuse_without_images(args: argparse.Namespace, num_images: int) -> None:
    """Raises ValueError for an argument that takes images, where there are none or too few."""
    asked = {"--match-by": args.match_by, "--rows": args.rows, "--lowrank-start fitted": args.lowrank_start == "fitted"}
    for flag, needs_images in asked.items():
        if needs_images and not num_images:
            raise ValueError(f"{flag} needs images and {args.model} is no run, which would know some: give --data DIR.")
    if args.no_fit and num_images < ASIDE:
        raise ValueError(f"--no-fit has no effect on {num_images} images, fitting takes {ASIDE} or more: leave it out.")


def _convert(args: argparse.Namespace, model: Any, samples: _Samples | None) -> Converted:
    options = {key: getattr(args, key) for key in ("lowrank_sharing", "lowrank_projection") if getattr(args, key)}
    learned = shown = None
    if samples is not None:
        learned, shown = (Images(sample, args.batch_size) for sample in (samples.learned, samples.shown))
    heads = IN_ORDER if args.no_match_heads else args.match_by
    settings = {"heads": heads, "lowrank_start": args.lowrank_start, "fits_layers": not args.no_fit, **options}
    return convert(model, args.plan, learned, shown, num_rows=args.rows or NUM_ROWS, seed=args.seed, **settings)


def _about(args: argparse.Namespace, target: Target, samples: _Samples | None) -> dict[str, Any]:
    """What the command knows beside what was done."""
    images = None
    if samples is not None:
        images = {samples.split: len(samples.learned), args.split: len(samples.shown)}
    labels = None if samples is None else samples.shown.remark
    training = training_note(args, target)
    return {"name": target.label, "training": training, "images": images, "labels": labels}
