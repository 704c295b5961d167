"""``vitreuse search MODEL --data DIR --budget SHARE``: the plan of least damage to a trained model within a budget."""

import argparse
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitreuse.cli.console import add_dtype, add_output
from vitreuse.cli.plots import front_plot, prepare_folder
from vitreuse.cli.search.table import render as render
from vitreuse.cli.search.words import SearchWords, all_words, has_plain_mlp, minutes, search_words, share, space_of
from vitreuse.cli.source import Source, add_source_arguments, load_sample, load_source
from vitreuse.compress.closed_form import fit_layers
from vitreuse.compress.convert import convert
from vitreuse.compress.damage import check_specs, refuse_other_layers
from vitreuse.compress.hidden_units import contributing_units
from vitreuse.compress.search import Candidate, Found, Space, least_cost, search
from vitreuse.compress.search.audit import audit, batch_of
from vitreuse.compress.search.constant import constant_merging
from vitreuse.compress.search.healing import expected_of_healing
from vitreuse.cost.backends import fused_attention
from vitreuse.cost.plan_costs import METRICS, PlanCosts
from vitreuse.data import find_split
from vitreuse.data.samples import ImageSample
from vitreuse.export.hub import save_hub_folder
from vitreuse.export.networks import plain_model
from vitreuse.io.durable import write_durably
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT, PRESETS, Plan, preset_plan

HELP = "find the plan that does a trained model the least damage at a share of its cost, and convert the model into it"
LEAST_IMAGES = 6
LEAST_TRIED, MOST_TRIED, PATCHES_TRIED = 8, 32, 8192  # images on which plans are tried, and their patches together
TRIALS = "trials.jsonl"


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
    meaning = "how long plans may be improved by running them, 0 to go by the forecast alone; default: %(default)g"
    parser.add_argument("--minutes", type=minutes, default=10.0, metavar="M", help=meaning)
    meaning = "measure what healing this long regains, on copies: at three learning rates in turn; default: not at all"
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
    path = None if args.output is None else _trials_of(args, source, chosen_words)
    original = exact_copy(source.model)
    costs = _costs(args, original)
    _refuse_unreachable(args, source, space, costs)
    batches = [[images for images, _ in part.batches(args.batch_size)] for part in (samples.fitted, samples.tried)]
    rows = (source.num_rows, args.seed)
    found = search(original, batches[0], batches[1], space, costs, args.budget, args.minutes, path, rows)
    assert found is not None
    conversion = _converted(original, found, batches[0])
    result = {
        **_settings(args, source, chosen_words, samples),
        **_found(found, space, costs),
        **_audited(source, original, conversion, found, space, costs, samples.shown, args.batch_size),
    }
    if args.heal_minutes:
        size, shown = batch_of(original), partial(samples.shown.batches, args.batch_size)
        fitted, tried = batches
        healed = expected_of_healing(original, conversion, fitted, tried, shown, args.heal_minutes, 2 * size)
        result["healing"] = asdict(healed)
    if args.output is not None:
        save_hub_folder(conversion, args.output, source.target.crop_pct, source.training)
        write_durably(args.output / "search.json", json.dumps(result).encode())
        write_durably(args.output / "front.png", front_plot(result))
    return result


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
        raise ValueError(f"{given}, and a search needs {LEAST_IMAGES}, to fit, to try and to show: add some.")
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


def _trials_of(args: argparse.Namespace, source: Source, chosen: SearchWords) -> Path:
    """The file of trials in the output folder, begun or of the same search.

    Raises:
        ValueError: It is of another search.
    """
    digest = hashlib.sha256()
    for key, value in source.model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    about = {
        "weights": digest.hexdigest(),
        "image_size_px": list(source.model.patch_embed.img_size),
        "data": str(Path(source.sample.dataset.folder).absolute()),
        "images": len(source.sample),
        "seed": args.seed,
        "words": chosen.texts(),
    }
    path = args.output / TRIALS
    first = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    if first and first != json.dumps(about):
        raise ValueError(f"{path} is of another search, by its first line: give another -o, or the same arguments.")
    if not first:
        write_durably(path, (json.dumps(about) + "\n").encode())
    return path


def _costs(args: argparse.Namespace, model: Any) -> PlanCosts:
    device = next(model.parameters()).device
    return PlanCosts(model, args.metric, device, getattr(torch, args.dtype or "float32"))


def _refuse_unreachable(args: argparse.Namespace, source: Source, space: Space, costs: PlanCosts) -> None:
    """Raises ValueError where no plan meets the budget, with the least share that one has."""
    share = least_cost(space, costs) / costs.of(space.exact)
    if share > args.budget:
        least = f"{math.ceil(1000 * share) / 1000:g}"
        given = "the words given" if args.words else "all words"
        raise ValueError(
            f"no plan of {given} has {args.budget:g} of the {METRICS[args.metric]} of {source.target.label}: the least "
            f"is {least}: raise --budget{', or give more --words' if args.words else ''}."
        )


def _converted(original: Any, found: Found, fitted: Sequence[Tensor]) -> Any:
    """The original under the chosen plan, fitted layer after layer on its own prefix."""
    plan = found.chosen.plan
    units = contributing_units(original, plan, fitted)
    conversion = convert(original, plan, found.trials.pieces.distances, units=units)
    if any(spec != EXACT for spec in plan):
        with WorkProgress("fitting", "layers", len(plan)) as progress:
            fit_layers(conversion, fitted, progress)
    return conversion.model


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


def _found(found: Found, space: Space, costs: PlanCosts) -> dict[str, Any]:
    exact = costs.of(space.exact)
    return {
        "chosen": _row(found.chosen, exact),
        "start": {**_row(found.start, exact), "distance": found.trials.distance(found.start.plan)},
        "distance": found.distance,
        "is_best": found.is_best,
        "num_tried": len(found.trials.known),
        "front": [_row(candidate, exact) for candidate in found.front],
    }


def _audited(
    source: Source,
    original: Any,
    converted: Any,
    found: Found,
    space: Space,
    costs: PlanCosts,
    shown: ImageSample,
    batch_size: int,
) -> dict[str, Any]:
    """The chosen model, constant merging of its predicted time, and the presets, measured on images that nothing was
    chosen on; of the metric's cost where no time can be predicted on this device."""
    others, latency = dict(_presets(space)), _latency(costs, original)
    equal = costs if latency is None else latency
    constant = constant_merging(space, equal, equal.of(found.chosen.plan))
    if constant is not None:
        others["constant merging"] = constant
    distances = found.trials.pieces.distances
    models = {name: convert(original, plan, distances).model.eval() for name, plan in others.items()}
    has_labels = len(shown.class_names) == source.model.num_classes > 0
    plain = partial(plain_model_of, source)
    measured = audit(original, {"chosen": converted, **models}, plain, partial(shown.batches, batch_size), has_labels)
    plans = {"chosen": found.chosen.plan, **others}
    rows = {
        name: {
            "plan": str(plan),
            "cost": costs.of(plan),
            "share": costs.of(plan) / costs.of(space.exact),
            "predicted_speedup": None if latency is None else latency.of(space.exact) / latency.of(plan),
            "damage": found.forecast.of(plan),
            **asdict(measured[name]),
        }
        for name, plan in plans.items()
    }
    return {"audited": rows, "batch_size_timed": batch_of(original)}


def _latency(costs: PlanCosts, original: Any) -> PlanCosts | None:
    """What predicts times; None where nothing was measured on this device."""
    if costs.metric == "latency":
        return costs
    try:
        return PlanCosts(original, "latency")
    except ValueError:
        return None


def plain_model_of(source: Source, fused: bool) -> Any:
    """timm's plain model of the shape of a target's, with fused attention or without."""
    with fused_attention(fused):
        return plain_model(source.target.model).create()


def _presets(space: Space) -> dict[str, Plan]:
    """The presets that the words can spell, with the words' own numbers."""
    own = {spec.word: spec for spec in reversed(space.words)}
    plans = {method: preset_plan(method, space.depth, space.num_patches) for method in PRESETS}
    return {
        method: Plan(tuple(own[spec.word] for spec in plan))
        for method, plan in plans.items()
        if all(spec.word in own and not spec.merged for spec in plan)
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
    given = {"--checkpoint": args.checkpoint, "--image-size": args.image_size, "--data": args.data}
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    folder = f"{source.target.label}-{args.metric}-{args.budget:g}"
    how = ["--metric", args.metric, "--budget", f"{args.budget:g}"]
    return shlex.join(["vitreuse", "search", args.model, *options, *how, "-o", folder])
