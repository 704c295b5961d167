"""``vitreuse export MODEL -o DIR``: a trained model as files that others load, checked, and timed where they run."""

import argparse
import json
from typing import Any

import torch
from rich.console import Group
from rich.filesize import decimal
from torch import Tensor

from vitreuse.cli.console import add_any_of, add_count, add_output
from vitreuse.cli.source import add_image_arguments, add_model_arguments, load_model, load_sample, training_note
from vitreuse.compress.fold import fold
from vitreuse.cost.measure import inference_call, time_interleaved
from vitreuse.files.hub import plan_text
from vitreuse.files.model_card import Provenance
from vitreuse.files.networks import Target
from vitreuse.files.programs import FILES, OPSETS, PROGRAMS, export, load_onnx
from vitreuse.io.tables import table_of, titled
from vitreuse.model.preprocessing import example

HELP = "write a trained model as a hub folder, safetensors, a program of torch.export, or ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_output(parser, "for the files; new, empty, or an earlier export", required=True)
    add_any_of(parser, "--format", FILES, ["hub"])
    text = f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]}; default: {OPSETS[-1]}"
    parser.add_argument("--opset", type=int, choices=OPSETS, metavar="N", help=text)
    parser.add_argument("--fold", action="store_true", help="fold what torch and onnx run, see vitreuse fold")
    add_image_arguments(parser, num_images=32, batch_size=8)
    add_count(parser, "--repeats", 10, "timed calls of each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the files and says what they are, how exact, and how fast ONNX is."""
    _refuse_idle(args)
    target, model = load_model(args)
    batches, shown = _batches(args, target, model) if {*args.format} & {*PROGRAMS} else ([], None)
    opset = args.opset or OPSETS[-1]
    accuracy = _accuracy(target) if args.checkpoint is None else None
    known = Provenance(target.label, target.crop_pct, accuracy, training_note(args, target))
    checks = export(model, known, args.output, args.format, batches, args.fold, opset)
    return {
        "name": target.label,
        "plan": plan_text(model),
        "training": known.training,
        "files": _files(args),
        "opset": opset if "onnx" in args.format else None,
        "images": shown,
        "num_images": sum(map(len, batches)),
        "differences": {of: check.difference for of, check in checks.items()},
        "num_left_out": {of: check.num_left_out for of, check in checks.items()},
        "speed": _speed(args, model, batches[0]) if "onnx" in args.format else None,
    }


def _files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What was written: each file once, with the first format that it is of."""
    formats = {args.output / file: of for of in reversed(args.format) for file in FILES[of]}
    return [{"path": str(path), "format": of, "num_bytes": path.stat().st_size} for path, of in sorted(formats.items())]


def _refuse_idle(args: argparse.Namespace) -> None:
    """An argument that only a program or only ONNX reads has no effect elsewhere."""
    for name, given, formats in (
        ("--opset", args.opset, ("onnx",)),
        ("--fold", args.fold, PROGRAMS),
        ("--data", args.data, PROGRAMS),
    ):
        if given and not {*formats} & {*args.format}:
            raise ValueError(f"{name} has no effect without --format {' or '.join(formats)}: leave it out.")


def _batches(args: argparse.Namespace, target: Target, model: Any) -> tuple[list[Tensor], str]:
    """Images to check on, and what they are."""
    if target.config is None and args.data is None:
        return [example(model, args.batch_size)], f"{args.batch_size} random images, for want of --data DIR"
    sample = load_sample(args, target, model, args.split)
    return [images for images, _ in sample.batches(args.batch_size)], f"{len(sample)} images"


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


def render(result: dict[str, Any]) -> Group:
    plan = f", plan {result['plan']}" if result["plan"] else ""
    shown = {of: f"{difference:.1e}" for of, difference in result["differences"].items()}
    rows = ((file["path"], decimal(file["num_bytes"]), shown.get(file["format"], "-")) for file in result["files"])
    table = table_of(("file", "size", "difference"), rows, ("file",))
    return titled(f"{result['name']}{plan}", table, *_remarks(result))


def _remarks(result: dict[str, Any]) -> list[str]:
    """What the programs were checked on, and how fast ONNX is."""
    lines = [] if result["training"] is None else [result["training"]]
    if result["images"] is not None:
        lines.append(f"difference: largest of the logits over their standard deviation, on {result['images']}")
    for of, number in result["num_left_out"].items():
        if number:
            text = f"{number} of {result['num_images']} images, of whose tokens rounding decides which merge"
            lines.append(f"left out of the difference of {of}: {text}")
    if speed := result["speed"]:
        by_label = speed["images_per_second"].items()
        rates = (f"{label} {rate:,.1f} ({speed['speedup'][label]:.2f})" for label, rate in by_label)
        lines.append(f"images/s (over eager, by minimum times): {', '.join(rates)}")
        lines.append(f"float32, batch {speed['batch_size']}, CPU threads: {speed['threads']}, medians of turns")
    return lines
