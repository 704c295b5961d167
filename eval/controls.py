"""The models that a plan must beat: controls of the same MACs, parameters and latency, each written as a config."""

import os
import sys
from argparse import ArgumentParser, Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import RenderableType

from eval.control_models import Control, controls, on_meta
from eval.flops import model_macs
from eval.table import Column, to_rich
from vitreuse.cli.console import MEASURED_DTYPES, add_count, add_dtype, add_output, local_path
from vitreuse.config import ModelConfig
from vitreuse.cost.macs import count_params
from vitreuse.cost.measure import describe_machine, inference_call, time_interleaved
from vitreuse.files.networks import load_experiment
from vitreuse.io.durable import writable_folder, write_durably
from vitreuse.io.file_names import printable
from vitreuse.io.process import choose_device
from vitreuse.model.preprocessing import example
from vitreuse.plan import EXACT
from vitreuse.plan.options import PlanOptions

HELP = "configs of the models that a plan must beat at equal MACs, parameters or latency"
COLUMNS = (
    Column("control", "control"),
    Column("quantity", "equal"),
    Column("plan", "plan"),
    Column("size", "size"),
    Column("target", "target", ",.10g"),
    Column("reached", "reached", ",.10g"),
    Column("difference_percent", "difference (%)", "+.2f"),
    Column("file", "file"),
)
MOST_SEARCHES = 3
CLOSE = 0.02  # the share of a latency by which two measurements of it differ
Measure = Callable[[Sequence[ModelConfig]], list[float]]  # one quantity of several models


class Match(NamedTuple):
    """The model of a control that is closest to the target in one quantity."""

    control: Control
    quantity: str
    model: ModelConfig
    target: float
    reached: float

    @property
    def difference_percent(self) -> float:
        """How much more than the target it has."""
        return 100 * (self.reached / self.target - 1)


def closest(control: Control, quantity: str, measure: Measure) -> Match:
    """The closest of a control's models, found by bisection; target and neighbours are then measured together.

    A busy moment can mislead a search by latency: it starts again where its end is neither close nor beside the target.
    """

    def over_target(size: int) -> float:
        target, reached = measure([control.target, control.at(size)])
        return reached / target

    for _ in range(MOST_SEARCHES):
        index = bisect_left(control.sizes, 1.0, key=over_target)
        models = [control.at(size) for size in control.sizes[max(index - 1, 0) : index + 1]]
        target, *reached = measure([control.target, *models])
        value, model = min(zip(reached, models, strict=True), key=lambda pair: abs(pair[0] - target))
        starts_below = index == 0 or reached[0] <= target
        ends_above = index == len(control.sizes) or target <= reached[-1]
        if (starts_below and ends_above) or abs(value - target) < CLOSE * target:
            break
    return Match(control, quantity, model, target, value)


def _counted(count: Callable[[Any], int], models: Sequence[ModelConfig]) -> list[float]:
    return [count(on_meta(model)) for model in models]


def _latency_ms(models: Sequence[ModelConfig], device: torch.device, dtype: str, num_repeats: int) -> list[float]:
    """Minimum inference time of one image for each model, all taking turns, to a tenth of a microsecond."""
    placed = [model.create().to(device, getattr(torch, dtype)).eval() for model in models]
    calls = {str(number): inference_call(model, example(model, 1)) for number, model in enumerate(placed)}
    return [round(timing.minimum_ms, 4) for timing in time_interleaved(calls, device, num_repeats).values()]


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("config", type=local_path, metavar="CONFIG", help="experiment whose plan makes a claim")
    add_output(parser, "write a config for every control")
    add_dtype(parser, "latency", MEASURED_DTYPES)
    add_count(parser, "--repeats", 30, "timed calls per model")


def run(args: Namespace) -> dict[str, Any]:
    """The closest model of every control in every quantity, written to the output folder too."""
    device, path = choose_device(args.device), args.config
    experiment = load_experiment(path)
    config, resolution = _checked(experiment.model, path), experiment.train.resolution
    measures: dict[str, Measure] = {
        "macs": partial(_counted, partial(model_macs, theoretical=True)),
        "params": partial(_counted, count_params),
        "latency_ms": partial(_latency_ms, device=device, dtype=args.dtype, num_repeats=args.repeats),
    }
    wanted = [*controls(config, path.stem, 0 if resolution is None else resolution.from_px)]
    if args.output:
        _refuse_written(writable_folder(args.output), path.stem, wanted)
    matches = []
    for control in wanted:
        print(f"looking for {control.name}: {control.meaning}", file=sys.stderr)
        matches += [closest(control, quantity, measures[quantity]) for quantity in control.quantities]
    result = {"command": "controls", "machine": describe_machine(device), "dtype": args.dtype, "config": str(path)}
    result |= {"num_repeats": args.repeats, "rows": _rows(matches, config, path.stem)}
    if args.output:
        _write(args.output, path, result)
    return result


def _checked(config: ModelConfig, path: Path) -> ModelConfig:
    """The model with its plan spelled out.

    Raises:
        ValueError: There is nothing to control, or no control could be trained.
    """
    model: Any = config.create("meta")
    if not hasattr(model, "plan"):
        raise ValueError(f"{path}: {config.name} has no plan to control: name one that 'vitreuse models' lists.")
    if {*model.plan} == {EXACT}:
        raise ValueError(f"{path}: plan '{model.plan}' is exact everywhere, a control itself: give one that is not.")
    if config.weights is not None:
        raise ValueError(
            f"{path}: starts from {config.weights}, which fits no model of another size: give a config without "
            "model.weights."
        )
    return replace(config, plan=str(model.plan))


def _rows(matches: Iterable[Match], config: ModelConfig, stem: str) -> list[dict[str, Any]]:
    """The matches as JSON; a model that several of them share has one file, the config's own model none."""
    rows: list[dict[str, Any]] = []
    files: list[tuple[ModelConfig, str | None]] = [(config, None)]
    for match in matches:
        control = match.control
        row = {"control": control.name, "meaning": control.meaning, "quantity": match.quantity}
        row |= {"plan": match.model.plan, "keywords": _changed_keywords(config, match.model)}
        row |= {"target_name": control.target_name, "target": match.target, "reached": match.reached}
        files.append((match.model, _file(stem, control, match.quantity)))
        file = next(file for model, file in files if model == match.model)
        rows.append({**row, "difference_percent": match.difference_percent, "file": file})
    return rows


def _file(stem: str, control: Control, quantity: str) -> str:
    """The name of the config of a control that comes closest in a quantity."""
    ending = "" if len(control.sizes) == 1 else f"_{quantity.removesuffix('_ms')}"
    return f"{stem}_{control.name}{ending}.yaml"


def _changed_keywords(config: ModelConfig, model: ModelConfig) -> dict[str, Any]:
    """What a control says over its base; what only other plans have use for goes back to its default."""
    idle = {key: getattr(PlanOptions, key) for key in config.keywords if key not in model.keywords}
    return {key: value for key, value in {**idle, **model.keywords}.items() if config.keywords.get(key) != value}


def _refuse_written(folder: Path, stem: str, wanted: Iterable[Control]) -> None:
    """Raises ValueError where a config of one of these controls is there, which may be of other measurements."""
    for control in wanted:
        for quantity in control.quantities:
            path = folder / _file(stem, control, quantity)
            if path.exists():
                raise ValueError(f"{path} is there already: move it, or give another folder to -o.")


def _write(folder: Path, base: Path, result: Mapping[str, Any]) -> None:
    """Writes the configs."""
    files = dict.fromkeys(row["file"] for row in result["rows"] if row["file"])
    texts = {folder / file: printable(_yaml(folder / file, base, result)).encode() for file in files}
    for path, text in texts.items():
        write_durably(path, text)


def _yaml(path: Path, base: Path, result: Mapping[str, Any]) -> str:
    """A control's config: what it is and what it matches, then its difference to the base."""
    rows = [row for row in result["rows"] if row["file"] == path.name]
    meanings = " or ".join(dict.fromkeys(row["meaning"] for row in rows))
    lines = [f"# Source: control of {base.name}: {meanings}.", f"# Command: python -m train {path}"]
    lines += dict.fromkeys(f"# {_sentence(row)}" for row in rows)
    if any(row["quantity"] == "latency_ms" for row in rows):
        lines.append(f"# Hardware: {_hardware(result)}; latency is {_conditions(result)}.")
    model: dict[str, Any] = {"plan": rows[0]["plan"]}
    if rows[0]["keywords"]:
        model["keywords"] = rows[0]["keywords"]
    tree = {"base": os.path.relpath(base.resolve(), path.parent.resolve()), "model": model}
    return "\n".join([*lines, yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)])


def _sentence(row: Mapping[str, Any]) -> str:
    heading, unit = {"macs": ("MACs", ""), "params": ("Params", ""), "latency_ms": ("Latency", " ms")}[row["quantity"]]
    return (
        f"{heading}: {row['target']:,.10g}{unit} in {row['target_name']}, {row['reached']:,.10g}{unit} here, "
        f"{row['difference_percent']:+.2f} %."
    )


def _hardware(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['device']}, CPU threads: {machine['threads']}, torch {machine['torch']}, {machine['date']}"


def _conditions(result: Mapping[str, Any]) -> str:
    return f"that of one image in {result['dtype']}, the minimum of {result['num_repeats']} turns"


def render(result: dict[str, Any]) -> RenderableType:
    """The result as a table for the terminal."""
    caption = (
        "wider and deeper against the exact model, all others against the config's. "
        f"Latency (ms) is {_conditions(result)}; {_hardware(result)}."
    )
    rows = [{**row, "size": ", ".join(f"{k} {v}" for k, v in row["keywords"].items())} for row in result["rows"]]
    return to_rich(rows, COLUMNS, caption)
