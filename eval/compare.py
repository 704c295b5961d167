"""Trained models in one table: accuracy over seeds, which of its differences are more than noise, operations, speed."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from eval.series import (
    Series,
    add_runs,
    check_same_images,
    model_changes,
    read_series,
    recipe_changes,
    refuse_idle_speed,
)
from eval.statistics import LEVEL, NUM_RESAMPLES, difference, holm, verdict
from eval.table import Column, to_csv, to_latex, to_markdown, to_rich
from eval.throughput import Speed, speeds
from vitreuse.cli.console import add_output, positive
from vitreuse.cost.measure import describe_machine, noise_remark
from vitreuse.io.durable import writable_folder, write_durably
from vitreuse.io.file_names import for_picture, to_bytes
from vitreuse.io.process import choose_device
from vitreuse.plan import parse_plan

HELP = "completed runs in one table, with what of their differences is noise; also as files and a plot with -o"
COLUMNS = (
    Column("name", "name"),
    Column("plan", "plan"),
    Column("params_m", "params (M)", ",.2f"),
    Column("macs_m", "MACs (M)", ",.2f"),
    Column("images_per_second", "images/s", ",.0f"),
    Column("peak_memory_mib", "peak MiB", ",.1f"),
    Column("top1_text", "top-1 (%)", ">"),
    Column("num_seeds", "seeds", "d"),
    Column("difference_text", "difference", ">"),
    Column("p_text", "p", ">"),
    Column("verdict", "verdict"),
)
COMPARED = ("difference", "low", "high", "p_bootstrap", "p_mcnemar", "p")
BATCH_SIZE, NUM_REPEATS = 64, 30


def compare(series: Sequence[Series], baseline: Series) -> list[dict[str, Any]]:
    """One row per model, in the order given: what its cards say, and how it differs from the baseline."""
    others = [same for same in series if same is not baseline]
    correct = baseline.correct_images()
    found = [difference(correct, same.correct_images()) for same in others]
    compared = {baseline.name: {**dict.fromkeys(COMPARED), "verdict": "baseline"}}
    for same, one, p in zip(others, found, holm([one.p for one in found]), strict=True):
        compared[same.name] = {**dict(zip(COMPARED, (*one, p), strict=True)), "verdict": verdict(one.points, p)}
    return [{**_described(same, baseline), **compared[same.name]} for same in series]


def _described(same: Series, baseline: Series) -> dict[str, Any]:
    card, other = same.card, baseline.card
    return {
        "name": same.name,
        "model": card.model["name"],
        "plan": card.plan,
        "params": card.params,
        "macs": card.macs,
        "flops": 2 * card.macs,
        "num_seeds": len(same.runs),
        "top1": same.mean("top1"),
        "top1_sd": same.top1_sd,
        "top5": same.mean("top5"),
        "calibration_error": same.mean("calibration_error"),
        "model_changes": "; ".join(model_changes(other, card)),
        "training": "; ".join(filter(None, (run.card.facts.get("training") for run in same.runs))),
        "recipe_changes": "" if same is baseline else "; ".join(recipe_changes(other, card)),
    }


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    add_runs(parser)
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with; default: the first")
    parser.add_argument("--mix-recipes", action="store_true", help="compare models that were trained differently")
    add_output(parser, "write results.md, .csv, .tex, scatter.png and intervals.png")
    parser.add_argument("--no-speed", action="store_true", help="leave speed and memory unmeasured")
    parser.add_argument("--batch-size", type=positive, help=f"images per timed call; default: {BATCH_SIZE}")
    parser.add_argument("--repeats", type=positive, help=f"timed calls per model; default: {NUM_REPEATS}")


def run(args: Namespace) -> dict[str, Any]:
    """The table's rows, written to the output folder too.

    Raises:
        ValueError: A run is not completed, or the runs cannot be compared, or options exclude each other.
    """
    device = choose_device(args.device)
    refuse_idle_speed(args)
    series = read_series(args.runs)
    check_same_images(series)
    baseline = _named(series, args.baseline)
    rows = compare(series, baseline)
    mixed = [f"{row['name']} ({row['recipe_changes']})" for row in rows if row["recipe_changes"]]
    if mixed and not args.mix_recipes:
        raise ValueError(
            f"not trained by the recipe of {baseline.name}: {', '.join(mixed)}; train them alike, or compare them "
            "anyway with --mix-recipes."
        )
    if args.output:  # before the measurements, which take a while
        if find_spec("matplotlib") is None:
            raise ValueError("the scatter plot needs matplotlib: pip install 'vitreuse[plots]', or leave -o out.")
        writable_folder(args.output)
    batch_size, measured = None, {}
    if not args.no_speed:  # with random weights
        batch_size = args.batch_size or BATCH_SIZE
        models = {same.name: same.card.model_config().create().to(device).eval() for same in series}
        measured = speeds(models, device, batch_size, args.repeats or NUM_REPEATS)
    result = {
        "command": "compare",
        "machine": describe_machine(device),
        "batch_size": batch_size,
        "data": series[0].card.data,
        "n": series[0].card.n,
        "rows": [{**row, **measured.get(row["name"], Speed())._asdict()} for row in rows],
    }
    if args.output:
        _write(args.output, result)
    return result


def _named(series: Sequence[Series], name: str | None) -> Series:
    named = {same.name: same for same in series}
    if name is not None and name not in named:
        raise ValueError(f"--baseline {name} is none of the runs' names: {', '.join(named)}.")
    return series[0] if name is None else named[name]


def _baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(row for row in rows if row["verdict"] == "baseline")


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    from eval.figures import Point, intervals_figure, kind_of, scatter_figure  # matplotlib is optional

    rows, caption = result["rows"], _caption(result)
    shown = [_shown(row) for row in rows]
    texts = {
        "results.md": to_markdown(shown, COLUMNS, caption),
        "results.tex": to_latex(shown, COLUMNS, caption),
        "results.csv": to_csv(rows, list(rows[0])),
    }
    for name, text in texts.items():
        write_durably(folder / name, to_bytes(text))
    key, cost = "images_per_second", "throughput (images/s)"
    if result["batch_size"] is None:
        key, cost = "macs_m", "MACs (M)"
    kinds = ["exact" if row["plan"] is None else kind_of(parse_plan(row["plan"])) for row in shown]
    points = [
        Point(for_picture(row["name"]), row[key], row["top1"], row["top1_sd"], kind)
        for row, kind in zip(shown, kinds, strict=True)
    ]
    scatter_figure(points, for_picture(caption), cost).savefig(folder / "scatter.png", dpi="figure")
    left = [*texts, "scatter.png"]
    found = [{**row, "name": _named_plan(row)} for row in rows if row["difference"] is not None]
    if found:
        figure = intervals_figure(found, _named_plan(_baseline(rows)), for_picture(caption))
        figure.savefig(folder / "intervals.png", dpi="figure")
        left.append("intervals.png")
    print(f"{folder}: {', '.join(left)}", file=sys.stderr)


def _named_plan(row: Mapping[str, Any]) -> str:
    return for_picture(row["name"] if row["plan"] is None else f"{row['name']}: {row['plan']}")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the texts of its table, in which a value stands beside its uncertainty."""
    shown = {**row, "params_m": row["params"] / 1e6, "macs_m": row["macs"] / 1e6}
    shown["top1_text"] = f"{row['top1']:.2f}" + ("" if row["top1_sd"] is None else f" ± {row['top1_sd']:.2f}")
    if row["difference"] is None:
        return {**shown, "difference_text": None, "p_text": None}
    shown["difference_text"] = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    return {**shown, "p_text": "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"}


def _caption(result: Mapping[str, Any]) -> str:
    return " ".join([*_accuracy_notes(result), *_change_notes(result["rows"]), *_speed_notes(result)])


def _accuracy_notes(result: Mapping[str, Any]) -> Iterator[str]:
    """How the accuracies and their differences were found."""
    rows = result["rows"]
    seeds = [row["num_seeds"] for row in rows]
    spread = "; ± is the standard deviation over seeds" if max(seeds) > 1 else ""
    yield f"Top-1 on the {result['n']:,} images of {result['data']}{spread}."
    if len(rows) == 1:
        return
    between = " and of the variance between seeds" if max(seeds) > 1 else ""
    yield (
        f"Difference to {_baseline(rows)['name']} in points with its {100 * LEVEL:.0f} % interval, from "
        f"{NUM_RESAMPLES:,} paired resamples of the images{between}. p is the larger of the "
        f"bootstrap's and of McNemar's exact test, after Holm for {len(rows) - 1} comparisons; above {1 - LEVEL:.2f} a "
        "difference is within noise."
    )
    yield from _seed_notes(rows)


def _seed_notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is not known where a model has one seed."""
    baseline, single = _baseline(rows), [row for row in rows if row["num_seeds"] == 1]
    others = ", ".join(row["name"] for row in single if row is not baseline)
    alone = "how other seeds would do is unknown, the words are on these trained models alone."
    if len(single) == len(rows):
        yield f"One seed each: {alone}"
    elif baseline in single:
        yield f"One seed ({baseline['name']}) tells no variance between seeds: that of the other model is taken."
        if others:
            yield f"One seed each of {baseline['name']} and {others}: {alone}"
    elif others:
        yield f"One seed ({others}) tells no variance between seeds: that of {baseline['name']} is taken."


def _change_notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What differs between the models beside their plans."""
    for key, what in (("recipe_changes", "recipe"), ("model_changes", "model")):
        found = [f"{row['name']} ({row[key]})" for row in rows if row[key]]
        if found:
            yield f"Another {what} than that of {_baseline(rows)['name']}: {', '.join(found)}."
    for row in rows:
        if row["training"]:
            yield f"{row['name']}: {row['training']}."


def _speed_notes(result: Mapping[str, Any]) -> Iterator[str]:
    """How and where the speeds were measured."""
    if result["batch_size"] is None:
        return
    machine, spread = result["machine"], max(row["spread_percent"] for row in result["rows"])
    yield (
        f"Speed: inference in float32, batch {result['batch_size']}, median over turns that all models took in one "
        f"run, interquartile range up to {spread:.0f} %. {machine['device']}, CPU threads: {machine['threads']}, "
        f"torch {machine['torch']}, timm {machine['timm']}, {machine['date']}."
    )
    if remark := noise_remark(spread):
        yield remark


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    return to_rich([_shown(row) for row in result["rows"]], COLUMNS, _caption(result))
