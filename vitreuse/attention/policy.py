"""Which way attention is computed, and why: the one decision.

A layer asks ``choose`` when it runs; reports, throughput and the costs of a plan ask it for conditions that are only
supposed (Attention.way). All go by measured costs where there are such (costs.py).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from vitreuse.attention.costs import COST_NAMES, Costs, cost_at, cost_key

TIE = 1.05  # how much slower the fused kernel may be and still be taken
HALVES = (torch.float16, torch.bfloat16)
SHORT_ROW = 128  # keys of a map that is worth carrying on any device


class Conditions(NamedTuple):
    """The circumstances for which a model is asked how it would compute attention, without being run."""

    device: torch.device
    dtype: torch.dtype  # of the queries, under autocast the one computed in
    training: bool
    batch_size: int = 1
    compiled: bool = False


class Settings(NamedTuple):
    """What decides how a layer's attention is computed, beside its inputs."""

    scale: float  # of the logits
    training: bool
    fused: bool  # whether timm's switch allows a fused kernel
    costs: Costs
    backend: str  # what an anchor hands on, one of plan.options.REUSE_BACKENDS
    num_readers: int  # reuse layers that read what is handed on
    num_maps: int  # of the model that are alive at the same time in training
    num_keys: int  # of the grid that the layer is built for


class Call(NamedTuple):
    """What the choice depends on in one call of attention, or in one that is only supposed."""

    device_type: str
    dtype: torch.dtype
    num_keys: int
    num_logits: int | None = None  # of all images and heads; None where a trace has not fixed them
    width: int = 0  # of a window of patches, 0 for all keys
    is_tiled: bool = False  # whether the window runs as tiles
    dropout: float | None = 0.0  # the rate in this mode; None where the dropout must be called
    in_blocks: bool = False  # whether blocks of the map can stay in a CPU's cache: in eager inference
    is_traced: bool = False  # by torch.jit, as counters do: they know plain products alone
    has_sizes: bool = False  # whether keys stand for several tokens


class Way(NamedTuple):
    """How a layer mixes its values, and what it hands on to reuse layers.

    Attributes:
        kernel: "map" of a layer that makes a map to carry or reads one, "fused" under torch's kernel, "blocked" where a
            few heads of the map exist at a time, "tiles" under windows that are cut into tiles, which exist a few
            images at a time where "blocked" would, and "unfused" where all of the map does.
        why: The reason.
        carried: "map" or "qk" of an anchor, None of other layers.
        why_carried: The reason.
        sizes: How the fused kernel is told that keys stand for several tokens: by a "bias" on the logits or one more
            "channel"; None where it is not.
        why_sizes: The reason.
    """

    kernel: str
    why: str = ""
    carried: str | None = None
    why_carried: str = ""
    sizes: str | None = None
    why_sizes: str = ""


READS_MAP = Way("map")


def choose(call: Call, settings: Settings) -> Way:
    """The way of a layer that is handed no map: one that computes its own, or is handed queries and keys."""
    carried, why_carried = choose_carried(call, settings) if settings.num_readers else (None, "")
    kernel, why = ("map", "") if carried == "map" else _choose_kernel(call, settings)
    sizes, why_sizes = choose_sizes(call, settings) if call.has_sizes and kernel == "fused" else (None, "")
    return Way(kernel, why, carried, why_carried, sizes, why_sizes)


def choose_carried(call: Call, settings: Settings) -> tuple[str, str]:
    """What an anchor hands on, "map" or "qk", and why: by dropout, the option, a window, the costs, then the memory.

    Dropout on the map cannot be applied to one that a fused kernel recomputes, so with dropout the map is carried. No
    fused kernel recomputes a window, so that its map is carried on the CPU, and elsewhere where it is small.
    """
    if call.dropout:
        return "map", f"attn_drop_rate={call.dropout:g}"
    if settings.backend != "auto":
        return settings.backend, f"reuse_backend={settings.backend}"
    if call.width:
        is_short = call.device_type in ("cpu", "meta") or call.width**2 <= SHORT_ROW
        return ("map" if is_short else "qk"), "windows have no fused kernel"
    key = cost_key(call.device_type, call.dtype, settings.training)
    is_faster, why = is_map_faster(settings.costs, key, call.num_keys, settings.num_readers, call.has_sizes)
    if is_faster and not _fits_in_memory(call, settings.num_maps if settings.training else 1):
        return "qk", "maps would fill over a quarter of the memory"
    return ("map" if is_faster else "qk"), why


def _choose_kernel(call: Call, settings: Settings) -> tuple[str, str]:
    """What mixes the values where no map is carried, and why."""
    unfused = "blocked" if call.in_blocks else "unfused"
    if call.width:
        return ("tiles" if call.is_tiled else unfused), f"span of {call.width}"
    if call.dropout is None:
        return unfused, "the dropout on the map is watched or replaced"
    if not settings.fused:
        return unfused, "timm's fused attention is off"
    if call.is_traced:
        return unfused, "counters know plain products"
    key = cost_key(call.device_type, call.dtype, settings.training)
    is_faster, why = is_fused_faster(settings.costs, key, call.num_keys, call.has_sizes)
    return ("fused" if is_faster else unfused), why


def choose_sizes(call: Call, settings: Settings) -> tuple[str, str]:
    """How the fused kernel is told the sizes of keys, "bias" or "channel", and why.

    Where nothing was measured a bias, but in half precision on a GPU a channel: flash kernels, which take no bias, are
    of half precision, and the other fused kernel takes no 65 channels.
    """
    key = cost_key(call.device_type, call.dtype, settings.training)
    measured = sized_costs(settings.costs, key, call.num_keys)
    if measured is None:
        is_flash = call.device_type not in ("cpu", "meta") and call.dtype in HALVES
        return ("channel" if is_flash else "bias"), f"nothing measured of sizes for {key}"
    bias, channel = measured
    way, better, worse = ("bias", bias, channel) if bias <= channel else ("channel", channel, bias)
    return way, f"{better:.2f} against {worse:.2f} ns a pair"


def sized_costs(costs: Costs, key: str, num_keys: int) -> tuple[float, float] | None:
    """What the fused kernel costs with sizes as a bias, and as a channel; None where that was not measured."""
    if key not in costs or len(costs[key][0]) == 1 + len(COST_NAMES):
        return None
    *_, bias, channel = cost_at(costs[key], num_keys)
    return bias, channel


def is_fused_faster(costs: Costs, key: str, num_keys: int, has_sizes: bool = False) -> tuple[bool, str]:
    """Whether one layer's attention should use the fused kernel, and why; where nothing was measured it should.

    Near ties go to the fused kernel: in a whole model it is ahead by what it does not write to memory.
    """
    if key not in costs:
        return True, f"nothing measured for {key}"
    fused, unfused = _own_costs(costs, key, num_keys, has_sizes)
    is_faster = fused <= TIE * unfused
    better, worse = (fused, unfused) if is_faster else (unfused, fused)
    return is_faster, f"{better:.2f} against {worse:.2f} ns a pair"


def _own_costs(costs: Costs, key: str, num_keys: int, has_sizes: bool) -> tuple[float, float]:
    """What attention costs by the fused kernel and without it, which sizes cost nothing: a product adds them."""
    fused, unfused, *_ = cost_at(costs[key], num_keys)
    return min(sized_costs(costs, key, num_keys) or (fused,)) if has_sizes else fused, unfused


def is_map_faster(costs: Costs, key: str, num_keys: int, num_readers: int, has_sizes: bool = False) -> tuple[bool, str]:
    """Whether an anchor should hand its map, rather than (q, k), to so many reuse layers, and why.

    Where nothing was measured only a short row is carried: on paper, reading a longer one on a GPU costs more than
    recomputing it.
    """
    if key not in costs:
        return num_keys <= SHORT_ROW, f"nothing measured for {key}"
    _, _, make, apply, *_ = cost_at(costs[key], num_keys)
    uses, own = num_readers + 1, min(_own_costs(costs, key, num_keys, has_sizes))
    why = f"{make:.2f} + {uses} x {apply:.2f} against {uses} x {own:.2f} ns a pair"
    return make + uses * apply <= uses * own, why


def _fits_in_memory(call: Call, num_maps: int) -> bool:
    """Whether the maps that are alive together take at most a quarter of the device's memory.

    A rule of the device and not of what is free at the moment, so that a run that is resumed rounds as it did.
    """
    if call.num_logits is None:
        return True
    return 4 * num_maps * call.num_logits * call.dtype.itemsize <= memory_bytes(call.device_type)


@torch.compiler.assume_constant_result
def memory_bytes(device_type: str) -> int:
    """Memory of the current device of a type; what is not known is taken for 16 GiB."""
    if device_type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device_type == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory
    return 16 << 30
