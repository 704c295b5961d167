"""``vitreuse tune``: measures this device, so that models choose by its own times."""

import argparse
import sys
from typing import Any

import torch
from rich.console import Group

from vitreuse.attention.costs import (
    COST_NAMES,
    SIZED_NAMES,
    as_costs,
    cost_key,
    read_costs,
    read_rates,
    tuned_costs_path,
)
from vitreuse.attention.policy import is_fused_faster, is_map_faster
from vitreuse.cli.console import add_any_of, add_count, add_device, local_path, positive
from vitreuse.config.recipe import DTYPES
from vitreuse.cost.measure import describe_machine
from vitreuse.cost.tune import MODES, measure_costs, measure_rates, write_costs
from vitreuse.io.process import choose_device
from vitreuse.io.tables import table_of, titled

HELP = "measure which way of computing attention is faster on this device, and keep it for its models and for search"
KEYS = (64, 197, 577, 1025)
READERS = (1, 5)  # reuse layers of an anchor, for which the table shows the choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_any_of(parser, "--dtype", DTYPES, ["float32", "bfloat16"])
    text = f"keys of a query; default: {' '.join(map(str, KEYS))}"
    parser.add_argument("--keys", type=positive, nargs="+", default=KEYS, metavar="M", help=text)
    add_count(parser, "--repeats", 10, "timed calls, of which the fastest counts")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="default: where models look for it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes costs and rates over those of the same device type, dtype and mode in the file."""
    device, path = choose_device(args.device), args.output or tuned_costs_path()
    kept, kept_rates = (read_costs(path), read_rates(path)) if path.exists() else ({}, {})  # before all measurements
    dtypes = [getattr(torch, name) for name in dict.fromkeys(args.dtype)]
    costs = measure_costs(device, dtypes, sorted(set(args.keys)), args.repeats, _say)
    rates = measure_rates(device, dtypes, args.repeats, _say)
    machine = describe_machine(device)
    write_costs(path, machine, {**kept, **costs}, {**kept_rates, **rates})
    points = [point for dtype in dtypes for mode in MODES for point in _points(costs, device, dtype, mode)]
    place = {"file": str(path), "is_default": path == tuned_costs_path()}
    return {**place, "machine": machine, "points": points, "rates": rates}


def _say(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr)


def _points(
    measured: dict[str, list[list[float]]], device: torch.device, dtype: torch.dtype, mode: str
) -> list[dict[str, Any]]:
    """The costs of one dtype and mode, and what a model chooses by them."""
    key = cost_key(device.type, dtype, mode == "train")
    costs = as_costs({key: measured[key]})
    found = []
    for keys, *values in costs[key]:
        num_keys = int(keys)
        condition = costs, key, num_keys
        sized = dict(zip(SIZED_NAMES, values[len(COST_NAMES) :], strict=True))
        carried = {str(readers): "map" if is_map_faster(*condition, readers)[0] else "qk" for readers in READERS}
        found.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "mode": mode,
                "num_keys": num_keys,
                "costs_ns": dict(zip(COST_NAMES, values, strict=False)),
                "sized_costs_ns": sized,
                "attention": "fused" if is_fused_faster(*condition)[0] else "unfused",
                "sizes": min(sized, key=sized.__getitem__),
                "carried_by_readers": carried,
            }
        )
    return found


def render(result: dict[str, Any]) -> Group:
    remarks = ["nanoseconds per head, query and key", f"written to {result['file']}"]
    if not result["is_default"]:
        remarks.append(f"models read {tuned_costs_path()}")
    settings, choices = ("dtype", "mode"), ("auto", *(f"carried to {readers}" for readers in READERS))
    choices = (*choices, "sizes")
    headings = (*settings, "keys", *COST_NAMES, *SIZED_NAMES, *choices)
    return titled("", table_of(headings, map(_cells, result["points"]), (*settings, *choices)), *remarks)


def _cells(point: dict[str, Any]) -> list[str]:
    costs = (f"{cost:.4g}" for cost in (*point["costs_ns"].values(), *point["sized_costs_ns"].values()))
    carried = ({"map": "map", "qk": "(q, k)"}[way] for way in point["carried_by_readers"].values())
    chosen = (point["attention"], *carried, point["sizes"])
    return [point["dtype"], point["mode"], str(point["num_keys"]), *costs, *chosen]
