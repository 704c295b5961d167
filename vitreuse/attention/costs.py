"""What each way of computing attention costs: four measured times per device, dtype and mode, which policy.py compares.

Costs are nanoseconds per head, query and key, at 64 channels a head:
    fused    attention by torch's fused kernel
    unfused  attention by two products and a softmax, without keeping the map
    make     the map
    apply    a map times values
and, unless they were measured before there were such, of keys that stand for several tokens:
    bias     attention by the fused kernel, sizes added to the logits
    channel  the same, sizes in one more channel of queries and keys
cost/costs.json has those measured for the project; ``vitreuse tune`` measures a device of yours. Both
hold rates too, nanoseconds per multiply-add of the products outside attention, by which plan_costs.py predicts times:
    mlp      of a layer's MLP, with its norm, GELU and sum
    linear   of the projections into and out of attention, with their norm and sum
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

COST_NAMES = ("fused", "unfused", "make", "apply")
SIZED_NAMES = ("bias", "channel")
RATE_NAMES = ("mlp", "linear")
Rates = dict[str, list[tuple[int, float, float]]]  # as costs, of channels of a token and the two rates; inference alone
Point = tuple[float, ...]  # keys of a query, then the four costs, or six
Costs = dict[str, list[Point]]  # by device type, dtype and mode, such as "cpu bfloat16 inference"
SHIPPED_COSTS = Path(__file__).parents[1] / "cost" / "costs.json"


def tuned_costs_path() -> Path:
    """Where ``vitreuse tune`` leaves what it measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # as it stands where there is no home
    return Path(cache) / "vitreuse" / "costs.json"


def _sources() -> list[Path]:
    """The files of costs that can be read; a later one lies over an earlier one."""
    return [path for path in (SHIPPED_COSTS, tuned_costs_path()) if os.access(path, os.R_OK)]


def load_costs() -> Costs:
    """The shipped costs, and over them what vitreuse tune measured, on this machine or another of the same home."""
    return {key: points for path in _sources() for key, points in read_costs(path).items()}


def read_costs(path: Path) -> Costs:
    """The costs in a file.

    Raises:
        ValueError: It holds none.
    """
    try:
        return as_costs(json.loads(path.read_text(encoding="utf-8"))["costs"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no costs: move it away, and vitreuse tune writes it anew.") from error


def measured_on(key: str) -> str:
    """The device and the date of the costs that load_costs has of a key."""
    newest = [path for path in _sources() if key in read_costs(path)][-1]
    machine = read_machines(newest)[key]
    return f"{machine['device']}, {machine['date']}"


def read_machines(path: Path) -> dict[str, dict[str, Any]]:
    """On which machine, and when, the costs of each key of a file were measured; older files are of one machine."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    machine: dict[str, Any] = found.get("machine", {})
    return found.get("machines", dict.fromkeys(found["costs"], machine))


def load_rates() -> Rates:
    """Rates by device type, dtype and mode, each of the file that load_costs takes the costs from."""
    newest = {key: path for path in _sources() for key in read_costs(path)}
    return {key: points for path in _sources() for key, points in read_rates(path).items() if newest.get(key) == path}


def read_rates(path: Path) -> Rates:
    """The rates in a file of costs, by keys that its costs have; a file may have been written before there were any.

    Raises:
        ValueError: They are damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("rates", {})
        return {key: [(int(dim), mlp, linear) for dim, mlp, linear in points] for key, points in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no rates: move it away, and vitreuse tune writes it anew.") from error


def as_costs(found: Mapping[str, Sequence[Sequence[float]]]) -> Costs:
    """Costs, as a file holds them, with the types that cost_at takes.

    Raises:
        ValueError: A key has no points, or they have neither the four costs nor those of sizes too.
    """
    if not all(found.values()):
        raise ValueError("a key has no points")
    lengths = [{len(point) - 1 for point in points} for points in found.values()]
    if any(num not in ({len(COST_NAMES)}, {len(COST_NAMES) + len(SIZED_NAMES)}) for num in lengths if num):
        raise ValueError("points have other costs")
    return {key: [(int(keys), *costs) for keys, *costs in points] for key, points in found.items()}


def cost_key(device_type: str, dtype: torch.dtype, training: bool) -> str:
    """The name under which costs are kept; the meta device stands for the CPU, and other dtypes for float32."""
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32")
    return f"{'cpu' if device_type == 'meta' else device_type} {name} {'train' if training else 'inference'}"


def cost_at(points: list[Point], num_keys: int) -> tuple[float, ...]:
    """The costs at a number of keys: linear between the measured ones, those of the nearest beyond them."""
    below = points[0]
    for above in points:
        if above[0] >= num_keys:
            share = 1.0 if above[0] <= below[0] else max(0.0, (num_keys - below[0]) / (above[0] - below[0]))
            return tuple(low + share * (high - low) for low, high in zip(below[1:], above[1:], strict=True))
        below = above
    return below[1:]
