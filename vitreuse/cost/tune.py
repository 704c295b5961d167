"""Measures what the cost model of attention/costs.py needs to know of a device, and the rates of all else.

Shapes: B images, H heads, N queries, M keys, D = 64 channels a head, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention.costs import COST_NAMES, RATE_NAMES, SIZED_NAMES, cost_key
from vitreuse.attention.maps import (
    Layout,
    apply_map,
    blocked_attention,
    fused_attention,
    padded_attention,
    softmax_map,
)
from vitreuse.attention.masks import Mask
from vitreuse.cost.measure import Call, inference_call, time_interleaved
from vitreuse.io.durable import write_durably

HEADS, HEAD_DIM = 6, 64
MIN_QUERIES = 197  # fewer keys than these are those of a low-rank layer, not of a smaller image
PAIRS_PER_CALL, QUERIES_PER_CALL = 2_000_000, 32_768  # over all images: enough work to time, little enough to fit
MODES = ("inference", "train")
CHANNELS = (192, 384, 768, 1024)  # at which rates are measured: tiny to large
TOKENS_PER_CALL = 8 * MIN_QUERIES  # of 8 images
Points = Mapping[str, Sequence[Sequence[float]]]  # by device, dtype and mode


def measure_costs(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    keys: Sequence[int],
    num_repeats: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[list[float]]]:
    """Costs in nanoseconds per head, query and key, by device, dtype, mode and number of keys, see costs.py.

    Args:
        device: Where.
        dtypes: Which dtypes.
        keys: Numbers of keys, ascending.
        num_repeats: Timed calls; the fastest counts.
        progress: Told what is measured next.
    """
    costs: dict[str, list[list[float]]] = {}
    for dtype in dtypes:
        for mode in MODES:
            key = cost_key(device.type, dtype, mode == "train")
            costs[key] = []
            for num_keys in keys:
                progress(f"{key}, {num_keys} keys")
                queries = max(num_keys, MIN_QUERIES)
                pairs = queries * num_keys
                num_images = max(1, min(PAIRS_PER_CALL // pairs, QUERIES_PER_CALL // queries))
                calls = _calls(device, dtype, num_images, num_keys, mode == "train")
                timings = time_interleaved(calls, device, num_repeats)
                scale = 1e6 / (num_images * HEADS * pairs)
                names = (*COST_NAMES, *SIZED_NAMES)
                costs[key].append([num_keys, *(_rounded(timings[name].minimum_ms * scale) for name in names)])
    return costs


def measure_rates(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    num_repeats: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[list[float]]]:
    """Nanoseconds per multiply-add in inference, by device, dtype and mode, and number of channels, see costs.py.

    Args:
        device: Where.
        dtypes: Which dtypes.
        num_repeats: Timed calls; the fastest counts.
        progress: Told what is measured next.
    """
    rates: dict[str, list[list[float]]] = {}
    for dtype in dtypes:
        key = cost_key(device.type, dtype, training=False)
        rates[key] = []
        for dim in CHANNELS:
            progress(f"{key}, {dim} channels")
            timings = time_interleaved(_layer_calls(device, dtype, dim), device, num_repeats)
            macs = {"mlp": 8 * TOKENS_PER_CALL * dim**2, "linear": 4 * TOKENS_PER_CALL * dim**2}
            rates[key].append([dim, *(_rounded(timings[name].minimum_ms * 1e6 / macs[name]) for name in RATE_NAMES)])
    return rates


def _rounded(cost: float) -> float:
    """A cost to four significant digits, however small it is."""
    return float(f"{cost:.4g}")


def write_costs(path: Path, machines: Mapping[str, dict[str, Any]], costs: Points, rates: Points) -> None:
    """Writes costs and rates as JSON, a line per point, and on which machine those of each key were measured, so that a
    crash leaves the old file or the new one."""
    units = {
        "unit": "nanoseconds per head, query and key; each line: keys, " + ", ".join((*COST_NAMES, *SIZED_NAMES)),
        "unit of rates": "nanoseconds per multiply-add; each line: channels, " + ", ".join(RATE_NAMES),
        "machines": machines,
    }
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in units.items())
    text = f'{{\n{head}  "costs": {_as_lines(costs)},\n  "rates": {_as_lines(rates)}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())


def _as_lines(points_by_key: Points) -> str:
    keys = ",\n".join(
        f"    {json.dumps(key)}: [\n" + ",\n".join(f"      {json.dumps(point)}" for point in points) + "\n    ]"
        for key, points in points_by_key.items()
    )
    return f"{{\n{keys}\n  }}"


@torch.inference_mode()
def _layer_calls(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, Call]:
    """A call for each rate: a layer's MLP, and its attention without the attention."""
    sizes: Any = {"embed_dim": dim, "num_heads": dim // HEAD_DIM, "depth": 1}
    model: Any = timm.create_model("vit_reuse_tiny_patch16_224", plan="exact", **sizes)
    layer = model.to(device, dtype).eval().blocks[0]
    x = torch.randn(1, TOKENS_PER_CALL, dim, device=device, dtype=dtype)
    return {"mlp": inference_call(partial(_mlp, layer), x), "linear": inference_call(partial(_projections, layer), x)}


def _mlp(layer: Any, x: Tensor) -> Tensor:
    return x + layer.mlp(layer.norm2(x))


def _projections(layer: Any, x: Tensor) -> Tensor:
    """A layer's projections without its attention: values, no more contiguous than mixed ones, are projected back."""
    return x + layer.attn.proj(layer.attn.qkv(layer.norm1(x)).chunk(3, dim=-1)[2])


def _calls(device: torch.device, dtype: torch.dtype, num_images: int, num_keys: int, training: bool) -> dict[str, Call]:
    """A call for each cost, forward alone or forward and backward."""
    q, k, v = (
        torch.randn(num_images, length, HEADS, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
        for length in (max(num_keys, MIN_QUERIES), num_keys, num_keys)
    )
    weights = softmax_map(q, k, HEAD_DIM**-0.5)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "fused": (F.scaled_dot_product_attention, (q, k, v)),
        "unfused": (_unfused, (q, k, v)),
        "make": (_make, (q, k)),
        "apply": (_apply, (weights, v)),
        "bias": (partial(_sized, fused_attention), (q, k, v)),
        "channel": (partial(_sized, padded_attention), (q, k, v)),
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


def _sized(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to keys that stand for several tokens."""
    sizes = torch.full((k.shape[0], k.shape[2]), 2.0, device=k.device)
    return attention(q, k, v, Mask(sizes=sizes), 0.0, HEAD_DIM**-0.5)


def _make(q: Tensor, k: Tensor) -> Tensor:
    return softmax_map(q, k, HEAD_DIM**-0.5)


def _apply(weights: Tensor, v: Tensor) -> Tensor:
    return apply_map(weights, None, v, Layout((0, 0), 0, 0))


def _unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As maps.attend computes it: in blocks where no gradient needs the map, on the CPU."""
    if q.device.type == "cpu" and not q.requires_grad:
        return blocked_attention(q, k, v, HEAD_DIM**-0.5, None)
    return _apply(_make(q, k), v)
