"""Which way of computing attention each layer of a model takes under given conditions, and why.

Asks the functions that attention/maps.py asks when the model runs, without running it: for the tokens that the model is
built for and without a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitreuse.attention import Attention, ReuseAttention, maps
from vitreuse.attention.costs import cost_at, cost_key, is_fused_faster


@dataclass(frozen=True)
class Conditions:
    """What decides beside the model; dtype is that of the queries, under autocast the one computed in."""

    device: torch.device
    dtype: torch.dtype
    training: bool
    batch_size: int = 1
    compiled: bool = False


@dataclass(frozen=True)
class LayerBackend:
    """How one layer mixes its values, and what it hands on to reuse layers.

    ``kernel`` is "map" of a layer that makes or reads a carried map, "fused" under torch's kernel, "blocked" where a
    few heads of the map exist at a time, "tiles" under windows and "unfused" where all of it does. ``carried`` is
    "map" or "qk" of an anchor, None of other layers.
    """

    kernel: str
    why: str
    carried: str | None = None
    why_carried: str = ""


def layer_backends(model: Any, conditions: Conditions) -> list[LayerBackend | None]:
    """One per layer; None where a layer has no attention, or one of another package's."""
    found: list[LayerBackend | None] = []
    class_rows = model.num_class_rows if model.reads_class_rows else None
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        if not block.has_attention or not isinstance(attn, Attention):
            found.append(None)
            continue
        width = 0 if layer == len(model.blocks) - 1 and class_rows is not None else attn.width
        anchor = model.plan.anchors[layer]
        handed = None if anchor is None else found[anchor]
        if handed is not None and handed.carried == "map":
            found.append(LayerBackend("map", ""))
        else:
            found.append(_computed(attn, width, conditions))
    return found


def summary(model: Any, conditions: Conditions) -> str:
    """The ways that occur in a model, such as "map + blocked"."""
    layers = [layer for layer in layer_backends(model, conditions) if layer is not None]
    words = ["qk"] * any(layer.carried == "qk" for layer in layers) + [layer.kernel for layer in layers]
    return " + ".join(dict.fromkeys(words)) or "none"


def sentence(model: Any, conditions: Conditions) -> str:
    """One line for a log: what was chosen and why, costs in nanoseconds per head, query and key."""
    name = str(conditions.dtype).removeprefix("torch.")
    parts = _grouped([layer for layer in layer_backends(model, conditions) if layer is not None])
    mode = "training" if conditions.training else "inference"
    return f"attention on {conditions.device.type} in {name}, {mode}: {', '.join(parts) or 'none'}"


def _grouped(layers: Sequence[LayerBackend]) -> list[str]:
    """What is carried, then what computes the other layers, each with the number of layers and the reason."""
    names = {"map": "map", "qk": "(q, k)"}
    carried = Counter((layer.carried, layer.why_carried) for layer in layers if layer.carried is not None)
    kernels = Counter((layer.kernel, layer.why) for layer in layers if layer.kernel != "map")
    texts = [f"{names[way]} carried by {_counted(count, 'anchor')} ({why})" for (way, why), count in carried.items()]
    return texts + [f"{way} in {_counted(count, 'layer')} ({why})" for (way, why), count in kernels.items()]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _computed(attn: Attention, width: int, conditions: Conditions) -> LayerBackend:
    """The way of a layer that is handed no map: one that computes its own, or is handed (q, k)."""
    q = _queries(attn, conditions)
    num_keys = attn.num_keys
    kernel, why = _kernel(attn, q, width, num_keys, conditions)
    if attn.num_readers == 0 or isinstance(attn, ReuseAttention):
        return LayerBackend(kernel, why)
    carried, why_carried = _carried(attn, q, width, num_keys)
    return LayerBackend("map" if carried == "map" else kernel, why, carried, why_carried)


def _queries(attn: Attention, conditions: Conditions) -> Tensor:
    """A tensor with the properties of the layer's queries (B, H, N, D) and the memory of one number."""
    num_tokens = attn.num_prefix_tokens + attn.grid[0] * attn.grid[1]
    number = torch.empty((), device=conditions.device, dtype=conditions.dtype)
    q = number.expand(conditions.batch_size, attn.num_heads, num_tokens, attn.head_dim)
    return q.requires_grad_(conditions.training)


def _carried(attn: Attention, q: Tensor, width: int, num_keys: int) -> tuple[str, str]:
    """What an anchor hands on, and why."""
    training = q.requires_grad
    dropout = attn.attn_drop.p if training else 0.0
    settings = attn.settings._replace(training=training)
    carries_map = maps.carries_map(settings, q.device.type, q.dtype, num_keys, width, dropout)
    if dropout > 0.0:
        return "map", f"attn_drop_rate={dropout:g}"
    if attn.reuse_backend != "auto":
        return attn.reuse_backend, f"reuse_backend={attn.reuse_backend}"
    if width > 0:
        return ("map" if carries_map else "qk"), "windows have no fused kernel"
    if carries_map and not maps.fits_in_memory(q, num_keys, attn.num_maps if training else 1):
        return "qk", "maps would fill over a quarter of the memory"
    return ("map" if carries_map else "qk"), _compared(attn, q, num_keys)


def _compared(attn: Attention, q: Tensor, num_keys: int) -> str:
    """The costs of a map and its readers against those of attention in each of these layers."""
    key = cost_key(q.device.type, q.dtype, q.requires_grad)
    if key not in attn.costs:
        return f"nothing measured for {key}"
    fused, unfused, make, apply = cost_at(attn.costs[key], num_keys)
    uses = attn.num_readers + 1
    return f"{make:.2f} + {uses} x {apply:.2f} against {uses} x {min(fused, unfused):.2f} ns a pair"


def _kernel(attn: Attention, q: Tensor, width: int, num_keys: int, conditions: Conditions) -> tuple[str, str]:
    """What mixes the values where no map is carried, and why."""
    key = cost_key(q.device.type, q.dtype, q.requires_grad)
    is_fused = attn.fused_attn and is_fused_faster(attn.costs, q.device.type, q.dtype, q.requires_grad, num_keys)
    if maps.Layout(attn.grid, width, attn.num_prefix_tokens).is_tiled:
        return "tiles", f"span of {width}"
    way = "blocked" if maps.is_blockable(q) and not conditions.compiled else "unfused"
    if width > 0:
        return way, f"span of {width}"
    if not attn.fused_attn:
        return way, "timm's fused attention is off"
    if key not in attn.costs:
        return "fused", f"nothing measured for {key}"
    fused, unfused, _, _ = cost_at(attn.costs[key], num_keys)
    costs = (fused, unfused) if is_fused else (unfused, fused)
    return ("fused" if is_fused else way), f"{costs[0]:.2f} against {costs[1]:.2f} ns a pair"
