"""A device's own times, by which models choose how they compute attention, and which predict latencies of plans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group

from vitreuse.attention.costs import (
    COST_NAMES,
    SIZED_NAMES,
    Costs,
    Rates,
    as_costs,
    cost_key,
    read_costs,
    read_machines,
    read_rates,
    tuned_costs_path,
)
from vitreuse.attention.policy import is_fused_faster, is_map_faster
from vitreuse.cost.measure import describe_machine
from vitreuse.cost.tune import CHANNELS, MODES, measure_costs, measure_rates, write_costs
from vitreuse.io.durable import writable_folder
from vitreuse.io.process import choose_device
from vitreuse.io.progress import WorkProgress
from vitreuse.io.tables import Shown, table_of, titled

DTYPES = (torch.float32, torch.bfloat16)
KEPT = (*DTYPES, torch.float16)  # whose costs have names of their own
KEYS = (64, 197, 577, 1025)
READERS = (1, 5)  # reuse layers of an anchor, for which the table shows the choice


@dataclass(frozen=True, eq=False, repr=False)
class Tuned(Shown):
    """What was measured of a device.

    Attributes:
        file: Where it was written.
        facts: The costs in nanoseconds per head, query and key, the rates in nanoseconds per multiply-add, and what
            models choose by them, as the command has it under --json.
    """

    file: Path
    facts: dict[str, Any]

    def table(self) -> Group:
        return table(self.facts)


def tune(
    device: str | torch.device = "auto",
    dtypes: Sequence[torch.dtype] = DTYPES,
    keys: Sequence[int] = KEYS,
    repeats: int = 10,
    file: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Measures attention and layers on a device, and keeps their times for the models that are created from then on.

    Args:
        device: 'auto' for a GPU where there is one.
        dtypes: Which are measured: float32, bfloat16 or float16.
        keys: Numbers of keys of a query. What the file has of other numbers, dtypes and devices stays.
        repeats: Timed calls, of which the fastest counts.
        file: Where they are written, by default where models look for them.

    Raises:
        ValueError: There is no such device, nothing to measure on it, or the file holds something else.
        OSError: The file cannot be read or written.
    """
    _refuse_odd(dtypes, keys)
    place, path = choose_device(str(device)), tuned_costs_path() if file is None else Path(file)
    kept = _read(path) if path.exists() else _Kept({}, {}, {})  # before all measurements
    writable_folder(path.parent)
    keys = sorted({*keys})
    with WorkProgress("measuring", "points", len(dtypes) * (len(MODES) * len(keys) + len(CHANNELS))) as progress:
        done = count()

        def tell(what: str) -> None:
            progress.reach(next(done), what)

        costs = measure_costs(place, dtypes, keys, repeats, tell)
        rates = measure_rates(place, dtypes, repeats, tell)
        progress.reach(next(done))
    machine = describe_machine(place)
    machines = {**kept.machines, **dict.fromkeys(costs, machine)}
    write_costs(path, machines, {**kept.costs, **_merged(kept.costs, costs)}, {**kept.rates, **rates})
    points = [point for dtype in dtypes for mode in MODES for point in _points(costs, place, dtype, mode)]
    where = {"file": str(path), "is_default": path == tuned_costs_path()}
    return Tuned(path, {**where, "machine": machine, "points": points, "rates": rates})


def _refuse_odd(dtypes: Sequence[torch.dtype], keys: Sequence[int]) -> None:
    """Raises ValueError for dtypes of which no costs are kept, and where no number of keys is above 0."""
    if not dtypes or not {*dtypes} <= {*KEPT}:
        named = ", ".join(map(str, KEPT))
        raise ValueError(
            f"dtypes are {', '.join(map(str, dtypes)) or 'none'}: give some of {named}, of which costs are kept."
        )
    if not keys or min(keys) < 1:
        raise ValueError(f"numbers of keys are {', '.join(map(str, keys)) or 'none'}: give some above 0.")


class _Kept(NamedTuple):
    """What a file of costs has already."""

    machines: dict[str, dict[str, Any]]
    costs: Costs
    rates: Rates


def _read(path: Path) -> _Kept:
    costs, rates = read_costs(path), read_rates(path)
    return _Kept(read_machines(path), costs, rates)


def _merged(kept: Costs, measured: dict[str, list[list[float]]]) -> dict[str, list[Sequence[float]]]:
    """Measured points, and between them those of a file for other numbers of keys, where it has the same costs."""
    merged: dict[str, list[Sequence[float]]] = {}
    for key, points in measured.items():
        others = (point for point in kept.get(key, ()) if len(point) == len(points[0]))
        by_number = {point[0]: point for point in (*others, *points)}
        merged[key] = [by_number[number] for number in sorted(by_number)]
    return merged


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


def table(result: dict[str, Any]) -> Group:
    """The costs, a row per number of keys, and what models choose by them."""
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
