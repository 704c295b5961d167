"""Runs on one page: accuracy against speed, operations and memory, every layer, every curve, what it was made on.

The page needs no other file: what it shows is JSON, between a style and a script.
"""

from __future__ import annotations

import json
import shlex
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from rich.console import RenderableType

from eval.card import Card
from eval.report import measured
from eval.series import Series, add_runs, read_series, refuse_idle_speed
from vitreuse.cli.console import local_path, positive
from vitreuse.cost.measure import describe_machine
from vitreuse.io.durable import writable_file, write_durably
from vitreuse.io.process import choose_device
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import parse_plan

BATCH_SIZE = 32
HELP = "run folders or cards on one HTML page that needs no network"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    add_runs(parser)
    parser.add_argument("-o", "--output", type=local_path, metavar="FILE", required=True, help="the page to write")
    parser.add_argument("--batch-size", type=positive, help=f"images per timed call; default: {BATCH_SIZE}")
    parser.add_argument("--repeats", type=positive, help="timed calls per model; default: 3 to 30, fewer of many")
    parser.add_argument("--no-speed", action="store_true", help="measure neither speed nor memory")


def run(args: Namespace) -> dict[str, Any]:
    """Writes the page; what was written."""
    start = time.monotonic()
    refuse_idle_speed(args)
    found = read_series(args.runs)
    device = choose_device(args.device)
    writable_file(args.output)
    data = _report(found, device, args)
    data["command"] = shlex.join(["python", "-m", "eval", "report", *map(str, args.runs), *_options(args)])
    html = to_html(data).encode()
    write_durably(args.output, html)
    seconds = round(time.monotonic() - start, 1)
    counts = {"num_runs": sum(len(series.runs) for series in found), "num_experiments": len(found)}
    return {"command": "report", **counts, "output": str(args.output), "bytes": len(html), "seconds": seconds}


def _options(args: Namespace) -> list[str]:
    """What was given beside the runs."""
    given = {"-o": args.output, "--batch-size": args.batch_size, "--repeats": args.repeats}
    given["--device"] = None if args.device == "auto" else args.device
    options = [str(part) for flag, value in given.items() if value is not None for part in (flag, value)]
    return [*options, *(["--no-speed"] if args.no_speed else [])]


def _report(found: Sequence[Series], device: torch.device, args: Namespace) -> dict[str, Any]:
    """What the page shows."""
    cards = {_model_key(series.card): series.card for series in found}
    batch_size = None if args.no_speed else args.batch_size or BATCH_SIZE
    # Fewer calls of many models: a report is built in seconds, however many runs it shows.
    num_repeats = args.repeats or max(3, min(30, 120 // len(cards)))
    with WorkProgress("report", "measurements", len(found) + (len(cards) if batch_size else 0)) as progress:
        models = {key: card.model_config().create(device).eval() for key, card in cards.items()}
        speeds = measured.costs(models, device, batch_size, num_repeats, progress) if batch_size else {}
        shown_models = {key: {**_model(card, models[key]), **speeds.get(key, {})} for key, card in cards.items()}
        del models
        shown = []
        for series in found:
            shown.append({**_experiment(series), "similarity": measured.similarity(series, device)})
            progress.reach(progress.done + 1, "similarity")
    conditions = {"repeats": num_repeats, "profile_repeats": measured.profiled_calls(len(cards))}
    return {
        "machine": describe_machine(device),
        "speed": None if batch_size is None else {"batch_size": batch_size, **conditions},
        "similarity_images": measured.SIMILARITY_IMAGES,
        "models": shown_models,
        "experiments": shown,
    }


def _model_key(card: Card) -> str:
    """Equal for runs of the same network, whatever was learned: it is measured once."""
    return json.dumps(card.model, sort_keys=True)


def _model(card: Card, model: Any) -> dict[str, Any]:
    """One network: its layers, and what they cost.

    Raises:
        ValueError: It has no layers to draw, as what is no ViT.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"{card.name} is a {card.model['name']}, without layers that a report draws: leave it out.")
    plan = parse_plan(card.plan or f"exact*{len(model.blocks)}")
    layers = zip(plan, plan.anchors, strict=True)
    return {
        "name": card.model["name"],
        "plan": card.plan,
        "params": card.params,
        "macs": card.macs,
        "layers": [{"word": spec.word, "text": str(spec), "anchor": anchor} for spec, anchor in layers],
        "layer_macs": measured.layer_macs(model),
    }


def _experiment(series: Series) -> dict[str, Any]:
    """Runs of one experiment."""
    card = series.card
    return {
        "label": series.name,
        "model": _model_key(card),
        "top1": series.mean("top1"),
        "top1_sd": series.top1_sd,
        "data": card.data,
        "n": card.n,
        "set": f"{card.set_digest[:12]} {card.counted or ''}",
        "training": card.facts.get("training"),
        "runs": [{"seed": run.card.seed, "top1": run.card.top1, "facts": run.card.facts} for run in series.runs],
        "num_cards_alone": sum(run.folder is None for run in series.runs),
        "curves": measured.curves(series),
    }


def to_html(data: Any) -> str:
    """The HTML of a report's data.

    Whatever stands in the data stays data: the script shows it as text, and no `<` can end its element early.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {name: Path(__file__).with_name(f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(style=parts["css"], script=parts["js"], data=text)


def render(result: dict[str, Any]) -> RenderableType:
    """What was written, in a line."""
    size = result["bytes"] / 2**10
    return f"{result['output']}: {result['num_runs']} runs, {size:,.0f} KiB, built in {result['seconds']} s\n"
