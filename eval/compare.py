"""Trained runs in one table and one scatter plot: accuracy, operations and speed, the speeds measured in one go."""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType

from eval.flops import model_macs
from eval.inputs import example
from eval.table import Column, to_csv, to_markdown, to_rich
from eval.targets import Target, final_record, resolve_targets
from vitreuse.console import choose_device, local_path, positive
from vitreuse.measure import describe_machine, inference_call, peak_memory_mib, time_interleaved

HELP = "run folders in one table, as Markdown, CSV and a scatter plot with -o"
COLUMNS = (
    Column("name", "name"),
    Column("plan", "plan"),
    Column("params", "params", ",d"),
    Column("macs", "MACs", ",d"),
    Column("flops", "FLOPs", ",d"),
    Column("images_per_second", "images/s", ",.0f"),
    Column("spread_percent", "spread (%)", ".1f"),
    Column("peak_memory_mib", "memory (MiB)", ",.1f"),
    Column("top1", "top-1 (%)", ".2f"),
)


def compare(targets: Sequence[Target], device: torch.device, batch_size: int, num_repeats: int) -> list[dict[str, Any]]:
    """One row per run, in the order given; every speed from the same interleaved measurement, in inference.

    Top-1 is what the run measured at its end, exactly and on its own validation set.

    Raises:
        ValueError: a target is no completed run.
    """
    records = [final_record(target) for target in targets]
    models = {target.label: target.load().to(device).eval() for target in targets}
    images = {label: example(model, batch_size) for label, model in models.items()}
    calls = {label: inference_call(model, images[label]) for label, model in models.items()}
    timings = time_interleaved(calls, device, num_repeats)
    rows = []
    for target, record in zip(targets, records, strict=True):
        model, timing = models[target.label], timings[target.label]
        resident = [*model.parameters(), *model.buffers(), images[target.label]]
        macs = model_macs(model)
        rows.append(
            {
                "name": target.label,
                "plan": str(model.plan) if hasattr(model, "plan") else None,
                "params": sum(parameter.numel() for parameter in model.parameters()),
                "macs": macs,
                "flops": 2 * macs,
                "images_per_second": timing.images_per_second(batch_size),
                "spread_percent": timing.spread_percent,
                "peak_memory_mib": peak_memory_mib(calls[target.label], resident, device),
                "top1": record["top1"],
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="RUN", help="run folder of a completed training")
    parser.add_argument(
        "-o", "--output", type=local_path, metavar="DIR", help="write results.md, results.csv, scatter.png"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="images per timed call; default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=30, help="timed calls per run; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table's rows, written to the output folder too."""
    device = choose_device(args.device)
    if args.output:  # before the measurements, which take a while
        if find_spec("matplotlib") is None:
            raise ValueError("the scatter plot needs matplotlib: pip install 'vitreuse[plots]', or leave -o out.")
        args.output.mkdir(parents=True, exist_ok=True)
    rows = compare(resolve_targets(args.targets), device, args.batch_size, args.repeats)
    result = {"command": "compare", "machine": describe_machine(device), "batch_size": args.batch_size, "rows": rows}
    if args.output:
        _write(args.output, result)
    return result


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    from eval.scatter import Point, scatter_figure  # matplotlib is optional

    rows, caption = result["rows"], _caption(result)
    points = [Point(row["name"], row["images_per_second"], row["top1"]) for row in rows]
    texts = {"results.md": to_markdown(rows, COLUMNS, caption), "results.csv": to_csv(rows, list(rows[0]))}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    scatter_figure(points, caption).savefig(folder / "scatter.png", dpi="figure")


def _caption(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"Inference in float32, batch {result['batch_size']}, median over turns that all models took in one run; "
        f"spread is the interquartile range. {machine['device']}, CPU threads: {machine['threads']}, "
        f"torch {machine['torch']}, timm {machine['timm']}, {machine['date']}."
    )


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    return to_rich(result["rows"], COLUMNS, _caption(result))
