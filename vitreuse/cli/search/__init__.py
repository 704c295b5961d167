"""``vitreuse search MODEL --data DIR --budget SHARE``: the plan of least damage to a trained model within a budget."""

import argparse
import json
import math
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitreuse.cli.console import add_dtype, add_output
from vitreuse.cli.plots import front_plot, prepare_folder
from vitreuse.cli.search.measured import Measured
from vitreuse.cli.search.table import render as render
from vitreuse.cli.search.words import SearchWords, all_words, has_plain_mlp, minutes, search_words, share, space_of
from vitreuse.cli.source import Source, add_source_arguments, load_sample, load_source
from vitreuse.compress.damage import check_specs, refuse_other_layers
from vitreuse.compress.search import Candidate, Found, Space, least_cost, search
from vitreuse.compress.search.audit import batch_of
from vitreuse.compress.search.delivery import Delivery, deliveries, nearest
from vitreuse.compress.search.healing import expected_of_healing
from vitreuse.cost.plan_costs import METRICS, PlanCosts
from vitreuse.data import find_split
from vitreuse.data.samples import ImageSample
from vitreuse.files.hub import save_hub_folder
from vitreuse.io.durable import refuse_filled, write_durably
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT

HELP = "find the plan that does a trained model the least damage at a share of its cost, and convert the model into it"
LEAST_IMAGES = 6
ARGUMENTS = ("checkpoint", "image_size", "data", "split", "images", "seed", "batch_size", "rows", "device")
ARGUMENTS += ("metric", "dtype", "budget", "words", "minutes")  # all that decide what is found
LEAST_TRIED, MOST_TRIED, PATCHES_TRIED = 8, 32, 8192  # images on which plans are tried, and their patches together
TRIALS, RESULTS = "trials.jsonl", ("search.json", "front.png", "config.json", "model.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser, split=None)
    meaning = "the most that the plan may cost, as a share of the exact model; default: %(default)s"
    parser.add_argument("--budget", type=share, default=0.75, metavar="SHARE", help=meaning)
    meaning = (
        "what it is a share of: macs, multiply-adds that the methods need; latency, inference time by what vitreuse "
        "tune measured; memory, activations that a training step keeps; bytes, of the file; default: %(default)s"
    )
    parser.add_argument("--metric", choices=METRICS, default="macs", help=meaning)
    add_dtype(parser, "latency", default=None)
    meaning = (
        "what a layer may become: words of the plan language, -R for tokens that merge by steps of R, /H for hidden "
        "units by steps of H; default: exact,reuse,lowrank:64,span:7,none,linear,skip, with steps of a 32nd of the "
        "patches and an eighth of the hidden units, less for few patches"
    )
    parser.add_argument("--words", type=search_words, metavar="TEXT", help=meaning)
    meaning = "how long plans may be improved by running them, 0 to take the best of the front; default: %(default)g"
    parser.add_argument("--minutes", type=minutes, default=10.0, metavar="M", help=meaning)
    meaning = (
        "measure what healing this long regains, on copies: a tenth of it at each of three learning rates, then on to "
        "all of it at the best one; default: not at all"
    )
    parser.add_argument("--heal-minutes", type=minutes, default=0.0, metavar="M", help=meaning)
    add_output(parser, "write the converted model, search.json, front.png, and trials.jsonl, by which a search goes on")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The front of plans, the chosen one, measured beside others, and with -o the model converted into it."""
    if args.dtype is not None and args.metric != "latency":
        raise ValueError(f"--dtype has no effect on {args.metric}: leave it out, or give --metric latency.")
    source = load_source(args)
    refuse_other_layers(source.model)
    chosen_words = args.words or all_words(source.model)
    space = space_of(source.model, chosen_words)
    check_specs(source.model, space.attention_words)
    _refuse_steps(source.model, chosen_words, space)
    if args.rows is not None and not space.reads_maps:
        raise ValueError("--rows has no effect on words without reuse: leave it out.")
    samples = _samples(args, source)
    prepare_folder(args.output)
    if args.output is not None and not (args.output / TRIALS).exists():
        refuse_filled(args.output)
    original = exact_copy(source.model)
    costs = _costs(args, original)
    _refuse_unreachable(args, source, space, costs)
    fitted, tried = (part.inputs(args.batch_size) for part in (samples.fitted, samples.tried))
    path = None if args.output is None else args.output / TRIALS
    found = search(original, fitted, tried, space, costs, args.budget, args.minutes, path, (source.num_rows, args.seed))
    if found is None:
        raise _unreachable(args, source, args.budget)
    measured = Measured(source, original, space, costs, found, samples.shown, args.batch_size)
    made = deliveries(original, measured.rivals(), fitted, tried, found.trials.pieces.distances)
    name = nearest(made, costs, args.budget * costs.of(space.exact))
    result = {
        **_settings(args, source, chosen_words, samples),
        **_found(found, costs.of(space.exact)),
        **_delivered(name, made[name], found, costs, costs.of(space.exact)),
        **measured.audited(made, name),
    }
    if args.heal_minutes:
        size, shown = batch_of(original), partial(samples.shown.batches, args.batch_size)
        model = made[name].conversion.model
        healed = expected_of_healing(original, model, fitted, tried, shown, args.heal_minutes, 2 * size)
        result["healing"] = asdict(healed)
    if args.output is not None:
        _write(args.output, made[name].conversion.model, source, result)
    return result


def _write(folder: Path, model: Any, source: Source, result: dict[str, Any]) -> None:
    """Leaves the converted model and what was found; of an earlier search in the folder only its trials stay."""
    for file in RESULTS:
        (folder / file).unlink(missing_ok=True)
    save_hub_folder(model, folder, source.target.crop_pct, source.training)
    write_durably(folder / "front.png", front_plot(result))
    write_durably(folder / "search.json", json.dumps(result).encode())


def _refuse_steps(model: Any, chosen: SearchWords, space: Space) -> None:
    """Raises ValueError for steps by which no token can merge, or no hidden unit go."""
    if chosen.hidden_step and not has_plain_mlp(model):
        kind = type(model.blocks[0].mlp).__name__
        raise ValueError(f"/{chosen.hidden_step} takes hidden units of an MLP, and a {kind} is gated: leave it out.")
    most = space.num_patches // 2
    if chosen.merge_step > most:
        given = f"-{chosen.merge_step} merges more than half of {space.num_patches} patches"
        raise ValueError(f"{given}: give -{most} or less.")
    if chosen.hidden_step > space.num_hidden:
        units = f"an MLP has {space.num_hidden} hidden units"
        raise ValueError(f"{units} and /{chosen.hidden_step} are more: give /{space.num_hidden} or less.")


class _Samples(NamedTuple):
    """Images that share none: layers are fitted on some, plans tried on others, and nothing is chosen on the last."""

    fitted: ImageSample
    tried: ImageSample
    shown: ImageSample
    shown_split: str


def _samples(args: argparse.Namespace, source: Source) -> _Samples:
    """Three parts of the images; the last one of the split val, where they are of another.

    Raises:
        ValueError: There are too few images.
    """
    total = len(source.sample)
    if total < LEAST_IMAGES:
        given = f"{source.sample.dataset.folder} gives {total} images"
        way_out = "add some" if len(source.sample.dataset) == total else f"give --images {LEAST_IMAGES} or more"
        raise ValueError(f"{given}, and a search needs {LEAST_IMAGES}, to fit, to try and to show: {way_out}.")
    few = max(LEAST_TRIED, PATCHES_TRIED // source.model.patch_embed.num_patches)
    tried = min(few, MOST_TRIED, total // 4)
    has_val = source.split == "train" and args.data is not None and find_split(args.data, "val") is not None
    if has_val:
        sample = load_sample(args, source.target, source.model, "val")
        (shown,) = sample.parts(min(len(sample), max(1, total // 4)))
        fit_on, try_on = source.sample.parts(total - tried, tried)
        return _Samples(fit_on, try_on, shown, "val")
    kept = max(1, total // 8)
    fit_on, try_on, shown = source.sample.parts(total - tried - kept, tried, kept)
    return _Samples(fit_on, try_on, shown, f"other images of {source.split}")


def _costs(args: argparse.Namespace, model: Any) -> PlanCosts:
    device = next(model.parameters()).device
    return PlanCosts(model, args.metric, device, getattr(torch, args.dtype or "float32"))


def _refuse_unreachable(args: argparse.Namespace, source: Source, space: Space, costs: PlanCosts) -> None:
    """Raises ValueError where no plan meets the budget, with the least share that one has."""
    share = least_cost(space, costs) / costs.of(space.exact)
    if share > args.budget:
        raise _unreachable(args, source, share)


def _unreachable(args: argparse.Namespace, source: Source, share: float) -> ValueError:
    """The error where no plan meets the budget, and about the least share is given."""
    given = "the words given" if args.words else "all words"
    return ValueError(
        f"no plan of {given} has {args.budget:g} of the {METRICS[args.metric]} of {source.target.label}: the least "
        f"is {math.ceil(1000 * share) / 1000:g}: raise --budget{', or give more --words' if args.words else ''}."
    )


def _settings(args: argparse.Namespace, source: Source, chosen: SearchWords, samples: _Samples) -> dict[str, Any]:
    return {
        "name": source.target.label,
        "training": source.training,
        "metric": args.metric,
        "budget": args.budget,
        "words": chosen.texts(),
        "num_images": len(source.sample),
        "images": {
            "fitted": len(samples.fitted),
            "tried": len(samples.tried),
            f"shown, {samples.shown_split}": len(samples.shown),
        },
        "split": source.split,
        "minutes": args.minutes,
        "output": None if args.output is None else str(args.output),
        "command": _conversion(args, source),
    }


def _found(found: Found, exact: int) -> dict[str, Any]:
    return {
        "start": {**_row(found.start, exact), "distance": found.trials.distance(found.start.plan)},
        "distance": found.distance,
        "is_best": found.is_best,
        "num_tried": len(found.trials.asked),
        "front": [_row(candidate, exact) for candidate in found.front],
    }


def _delivered(name: str, made: Delivery, found: Found, costs: PlanCosts, exact: int) -> dict[str, Any]:
    """The model that is handed over: its plan, and what became of the original's weights."""
    candidate = Candidate(costs.of(made.plan), found.forecast.of(made.plan), made.plan)
    conversion = made.conversion
    return {
        "chosen": _row(candidate, exact),
        "delivered": {
            "name": name,
            "distance": made.distance,
            "layer_fits": None if made.fits is None else [asdict(fit) for fit in made.fits],
            "matches": conversion.matches,
            **{key: list(getattr(conversion, key)) for key in ("new", "touched", "dropped")},
        },
    }


def _row(candidate: Candidate, exact: int) -> dict[str, Any]:
    return {
        "plan": str(candidate.plan),
        "cost": candidate.cost,
        "share": candidate.cost / exact,
        "damage": candidate.damage,
        "num_changed": sum(spec != EXACT for spec in candidate.plan),
    }


def _conversion(args: argparse.Namespace, source: Source) -> str:
    """The command that goes on from here: with a folder its export, else the same search with one."""
    if args.output is not None:
        file = f"{args.output.name}.onnx"
        return shlex.join(["vitreuse", "export", str(args.output), "--format", "onnx", "-o", file])
    folder = f"{source.target.label}-{args.metric}-{args.budget:g}"
    given = {name: getattr(args, name) for name in ARGUMENTS if getattr(args, name) is not None}
    if args.words is not None:
        given["words"] = ",".join(args.words.texts())
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in given.items()}
    options = [part for name, text in texts.items() for part in (f"--{name.replace('_', '-')}", text)]
    return shlex.join(["vitreuse", "search", args.model, *options, "-o", folder])
