"""``vitreuse search MODEL --data DIR --budget SHARE``: the plan of least damage to a trained model within a budget."""

import argparse
import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vitreuse.cli.console import add_dtype, add_output
from vitreuse.cli.source import Source, add_source_arguments, as_argument, load_sample, load_source, prepare_folder
from vitreuse.cost.plan_costs import METRICS
from vitreuse.data import find_split
from vitreuse.data.samples import Images
from vitreuse.files.hub import save_hub_folder
from vitreuse.io.durable import LOCK_FILE, exclusive_lock, refuse_filled, write_durably
from vitreuse.verbs.search import Searched, SearchOptions, search, table
from vitreuse.verbs.words import SearchWords

HELP = "find the plan that does a trained model the least damage at a share of its cost, and convert the model into it"
render = table
ARGUMENTS = ("checkpoint", "image_size", "data", "split", "images", "seed", "batch_size", "rows", "device")
ARGUMENTS += ("metric", "dtype", "budget", "words", "minutes")  # all that decide what is found
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
    add_dtype(parser, "inference that is timed", default=None)
    meaning = (
        "what a layer may become: words of the plan language, -R for tokens that merge by steps of R, /H for hidden "
        "units by steps of H; default: exact,reuse,lowrank:64,span:7,none,linear,skip, with steps of a 32nd of the "
        "patches and an eighth of the hidden units, less for few patches"
    )
    parser.add_argument("--words", type=as_argument(SearchWords.parse), metavar="TEXT", help=meaning)
    meaning = "how long plans may be improved by running them, 0 to take the best of the front; default: %(default)g"
    parser.add_argument("--minutes", type=minutes, default=10.0, metavar="M", help=meaning)
    meaning = (
        "measure what healing this long regains, on copies: a tenth of it at each of three learning rates, then on to "
        "all of it at the best one; default: not at all"
    )
    parser.add_argument("--heal-minutes", type=minutes, default=0.0, metavar="M", help=meaning)
    add_output(parser, "write the converted model, search.json, front.png, and trials.jsonl, by which a search goes on")


def share(text: str) -> float:
    """A budget, from the command line."""
    return _number(
        text, lambda number: 0 < number <= 1, "share of an exact model's cost: give a number above 0, up to 1"
    )


def minutes(text: str) -> float:
    return _number(text, lambda number: 0 <= number < math.inf, "time in minutes: give a number, 0 or more")


def _number(text: str, is_right: Callable[[float], bool], wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not is_right(number):
        raise argparse.ArgumentTypeError(f"{text} is no {wanted}")
    return number


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The front of plans, the chosen one, measured beside others, and with -o the model converted into it."""
    if args.rows is not None and args.words and not any(spec.word == "reuse" for spec in args.words.specs):
        raise ValueError("--rows has no effect on words without reuse: leave it out.")
    source = load_source(args)
    prepare_folder(args.output)
    with _held(args.output):
        return _search(args, source)


@contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """Holds the folder of a search, if there is one, against another one.

    Raises:
        ValueError: It is filled with something else, or another search writes there.
    """
    if folder is None:
        yield
        return
    if not (folder / TRIALS).exists():
        refuse_filled(folder)
    try:
        with exclusive_lock(folder / LOCK_FILE):
            yield
    except BlockingIOError:
        raise ValueError(f"{folder} is being written by another search: wait for it, or give another -o DIR.") from None


def _search(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    trials = None if args.output is None else args.output / TRIALS
    options = SearchOptions(getattr(torch, args.dtype or "float32"), source.num_rows, trials)
    shown, aim = _other_split(args, source), (args.budget, args.metric, args.minutes, args.words)
    found = search(source.model, source.images, *aim, args.seed, shown, options)
    split = f"other images of {source.split}" if shown is None else "val"
    found = replace(found, facts={**found.facts, **_about(args, source, found, split)})
    if args.output is not None:
        _write(found, source, args)
    return found.facts


def _other_split(args: argparse.Namespace, source: Source) -> Images | None:
    """Images of the split val to measure on, where those to choose on are of train; else None."""
    if source.split != "train" or args.data is None or find_split(args.data, "val") is None:
        return None
    images = Images(load_sample(args, source.target, source.model, "val"), args.batch_size)
    (shown,) = images.parts(min(len(images), max(1, len(source.sample) // 4)), seed=args.seed)
    return shown


def _about(args: argparse.Namespace, source: Source, found: Searched, shown_split: str) -> dict[str, Any]:
    """What the command knows beside what was found, and what healing regains where that is asked for."""
    images = found.facts["images"]
    healing = {"healing": asdict(found.expected_of_healing(args.heal_minutes))} if args.heal_minutes else {}
    return {
        "name": source.target.label,
        "training": source.training,
        "images": {"fitted": images["fitted"], "tried": images["tried"], f"shown, {shown_split}": images["shown"]},
        "split": source.split,
        "output": None if args.output is None else str(args.output),
        "command": _next_command(args, source),
        **healing,
    }


def _write(found: Searched, source: Source, args: argparse.Namespace) -> None:
    """Leaves the converted model and what was found; of an earlier search in the folder only its trials stay."""
    for file in RESULTS:
        (args.output / file).unlink(missing_ok=True)
    save_hub_folder(found.model, args.output, source.training)
    write_durably(args.output / "front.png", found.picture())
    write_durably(args.output / "search.json", json.dumps(found.facts).encode())


def _next_command(args: argparse.Namespace, source: Source) -> str:
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
