"""Measures what the cost model of attention/choice.py needs to know of a device.

Shapes: B images, H heads, N queries, M keys, D = 64 channels a head.
"""
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention.blocked import blocked_attention
from vitreuse.attention.choice import COST_NAMES, cost_key
from vitreuse.attention.maps import apply_map, softmax_map
from vitreuse.durable import write_durably
from vitreuse.measure import Call, inference_call, time_interleaved

HEADS, HEAD_DIM = 6, 64
MIN_QUERIES = 197  # fewer keys than these are those of a low-rank layer, not of a smaller image
PAIRS_PER_CALL = 2_000_000  # queries x keys over all images: enough work to time, little enough to fit
MODES = ("inference", "train")


def measure_costs(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    keys: Sequence[int],
    num_repeats: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[list[float]]]:
    """Costs in nanoseconds per head, query and key, by device, dtype, mode and number of keys, see choice.py.

    Args:
        device: where.
        dtypes: which dtypes.
        keys: numbers of keys, ascending.
        num_repeats: timed calls; the fastest counts.
        progress: told what is measured next.
    """
    costs: dict[str, list[list[float]]] = {}
    for dtype in dtypes:
        for mode in MODES:
            key = cost_key(device.type, dtype, mode == "train")
            costs[key] = []
            for num_keys in keys:
                progress(f"{key}, {num_keys} keys")
                pairs = max(num_keys, MIN_QUERIES) * num_keys
                num_images = max(1, PAIRS_PER_CALL // pairs)
                calls = _calls(device, dtype, num_images, num_keys, mode == "train")
                timings = time_interleaved(calls, device, num_repeats)
                scale = 1e6 / (num_images * HEADS * pairs)
                costs[key].append([num_keys, *(_rounded(timings[name].minimum_ms * scale) for name in COST_NAMES)])
    return costs


def _rounded(cost: float) -> float:
    """To four digits, of which a fast device's small numbers have as many."""
    return float(f"{cost:.4g}")


def write_costs(path: Path, machine: dict[str, Any], costs: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Writes costs as JSON, a line per point, so that a crash leaves the old file or the new one."""
    keys = ",\n".join(
        f"    {json.dumps(key)}: [\n" + ",\n".join(f"      {json.dumps(point)}" for point in points) + "\n    ]"
        for key, points in costs.items()
    )
    unit = "nanoseconds per head, query and key; each line: keys, " + ", ".join(COST_NAMES)
    head = f'{{\n  "unit": {json.dumps(unit)},\n  "machine": {json.dumps(machine)},\n  "costs": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, f"{head}{keys}\n  }}\n}}\n".encode())


def _calls(
    device: torch.device, dtype: torch.dtype, num_images: int, num_keys: int, training: bool
) -> dict[str, Call]:
    """A call for each cost, forward alone or forward and backward."""
    q, k, v = (
        torch.randn(num_images, length, HEADS, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
        for length in (max(num_keys, MIN_QUERIES), num_keys, num_keys)
    )
    weights = softmax_map(q, k, HEAD_DIM**-0.5, None, False)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "fused": (F.scaled_dot_product_attention, (q, k, v)),
        "unfused": (_unfused, (q, k, v)),
        "make": (_make, (q, k)),
        "apply": (_apply, (weights, v)),
    }
    return {name: _call(function, inputs, training) for name, (function, inputs) in functions.items()}


def _call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], training: bool) -> Call:
    if not training:
        return inference_call(function, *inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    gradient = torch.randn_like(function(*leaves))

    def forward_and_backward() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return forward_and_backward


def _make(q: Tensor, k: Tensor) -> Tensor:
    return softmax_map(q, k, HEAD_DIM**-0.5, None, False)


def _apply(weights: Tensor, v: Tensor) -> Tensor:
    return apply_map(weights, None, v, (0, 0), 0, 0, 0.0)


def _unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As maps.attend computes it: in blocks where no gradient needs the map, on the CPU."""
    if q.device.type == "cpu" and not q.requires_grad:
        return blocked_attention(q, k, v, HEAD_DIM**-0.5, None)
    return _apply(_make(q, k), v)
