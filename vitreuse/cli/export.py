"""``vitreuse export MODEL -o DIR``: a trained model as files that others load, checked, and timed where they run."""

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from vitreuse.cli.console import add_any_of, add_count, add_output
from vitreuse.cli.source import add_image_arguments, add_model_arguments, load_model, load_sample, training_note
from vitreuse.compress.fold import fold
from vitreuse.cost.measure import inference_call, time_interleaved
from vitreuse.data.samples import Images
from vitreuse.files.model_card import Provenance
from vitreuse.files.networks import Target
from vitreuse.files.programs import FILES, OPSETS, PROGRAMS, load_onnx
from vitreuse.model.preprocessing import example
from vitreuse.verbs.export import READERS, export, table

HELP = "write a trained model as a hub folder, safetensors, a program of torch.export, or ONNX"
render = table
# What the arguments are where they are left out, and the formats that read them.
DEFAULTS = {"fold": False, "images": 32, "split": "val", "seed": 0, "batch_size": 8, "repeats": 10}
READ_BY = {"opset": READERS["opset"], "fold": READERS["folds"], "repeats": ("onnx",)}
READ_BY |= dict.fromkeys(("data", "images", "split", "seed", "batch_size"), READERS["images"])
CHOOSING = ("images", "split", "seed")  # images of --data or of the run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_output(parser, "for the files; new, empty, or an earlier export", required=True)
    add_any_of(parser, "--format", FILES, ["hub"])
    text = f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]}; default: {OPSETS[-1]}"
    parser.add_argument("--opset", type=int, choices=OPSETS, metavar="N", help=text)
    parser.add_argument("--fold", action="store_true", help="fold what torch and onnx run, see vitreuse fold")
    add_image_arguments(parser, DEFAULTS["images"], DEFAULTS["batch_size"])
    add_count(parser, "--repeats", DEFAULTS["repeats"], "timed calls of each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the files and says what they are, how exact, and how fast ONNX is."""
    _refuse_idle(args)
    target, model = load_model(args)
    _refuse_own_folder(args, target)
    images, shown = _images(args, target, model) if {*args.format} & {*PROGRAMS} else (None, None)
    accuracy = _accuracy(target) if args.checkpoint is None and args.image_size is None else None
    known = Provenance(target.label, accuracy, training_note(args, target))
    found = export(model, args.output, args.format, images, args.fold, args.opset, known)
    speed = _speed(args, model, next(iter(images))) if images is not None and "onnx" in args.format else None
    return {**found.facts, "images": shown, "speed": speed}


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raises ValueError for an argument that only a program or only ONNX reads, where neither is written."""
    for name, formats in READ_BY.items():
        if _is_given(args, name) and not {*formats} & {*args.format}:
            raise ValueError(f"{_flag(name)} has no effect without --format {' or '.join(formats)}: leave it out.")


def _is_given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) != DEFAULTS.get(name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_own_folder(args: argparse.Namespace, target: Target) -> None:
    """Raises ValueError where what is exported would be written over what it is read from."""
    read = [folder for folder in (args.checkpoint and args.checkpoint.parent, target.hub_dir, target.run_dir) if folder]
    if any(folder.resolve() == args.output.resolve() for folder in read):
        raise ValueError(f"{args.output} holds the weights that are exported: choose another -o DIR.")


def _images(args: argparse.Namespace, target: Target, model: Any) -> tuple[Images, str]:
    """Images to check on, and what they are."""
    if target.config is None and args.data is None:
        if idle := [_flag(name) for name in CHOOSING if _is_given(args, name)]:
            raise ValueError(f"{idle[0]} has no effect without images: give --data DIR, or leave it out.")
        random = Images(example(model, args.batch_size), args.batch_size)
        return random, f"{args.batch_size} random images, for want of --data DIR"
    sample = load_sample(args, target, model, args.split)
    return Images(sample, args.batch_size), f"{len(sample)} images"


def _accuracy(target: Target) -> str | None:
    """What a completed run's card says of its last evaluation."""
    path = target.run_dir and target.run_dir / "card.json"
    if path is None or not path.is_file():
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    return f"{card['top1']:.2f} % of the {card['n']:,} images of {card['data']}"


def _speed(args: argparse.Namespace, model: Any, images: Tensor) -> dict[str, Any]:
    """Images per second of the model and of its ONNX file, from turns on the same threads; ratios of minimum times."""
    predict = load_onnx((args.output / FILES["onnx"][0]).read_bytes())
    candidates = {"eager": model, **({"folded eager": fold(model)} if args.fold else {}), "onnxruntime": predict}
    calls = {label: inference_call(function, images) for label, function in candidates.items()}
    timings = time_interleaved(calls, torch.device("cpu"), args.repeats)
    eager_ms = timings["eager"].minimum_ms
    return {
        "batch_size": len(images),
        "threads": torch.get_num_threads(),
        "images_per_second": {label: timing.images_per_second(len(images)) for label, timing in timings.items()},
        "speedup": {label: eager_ms / timing.minimum_ms for label, timing in timings.items()},
    }
