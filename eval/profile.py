"""Where the time of a model goes: per layer, part and kind of operation, beside the multiply-adds of that part."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from eval.table import Column
from vitreuse.cost.macs import count_macs
from vitreuse.cost.measure import Call

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else torch's profiler prints each start, and that there is no GPU
PREFIX = "part: "
Key = tuple[str, str]  # part and kind
COLUMNS = (
    Column("part", "part"),
    Column("kind", "kind"),
    Column("ms", "ms", ".3f"),
    Column("time_percent", "time (%)", ".1f"),
    Column("macs_percent", "MACs (%)", ".1f"),
    Column("gmacs_per_second", "GMACs/s", ",.1f"),
)
# Words in the name of an operation and the kind it is of; the first that fits decides.
KINDS = {
    "attention": ("scaled_dot_product", "attention_forward", "attention_backward"),
    "products": ("mm", "conv", "linear"),
    "softmax": ("softmax",),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "silu"),
    "rows": ("index", "gather", "scatter"),
    "selection": ("sort", "::max", "cumsum"),
    "copies": ("copy", "clone", "cat", "contiguous", "to_copy"),
}


def profile_parts(model: nn.Module, call: Call, batch_size: int, num_repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per call by part (a layer's norm1, attn, norm2, mlp, or a top-level module) and kind of operation.

    Time is that of the operations themselves, on the device where they run, without what Python spends between them.
    MACs, where the model has a closed form, stand beside the kind that they run as.
    """
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _labelled(model), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(num_repeats):
            call()
    times_ms: dict[Key, float] = defaultdict(float)
    is_cuda = next(model.parameters()).is_cuda
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CPU or event.name.startswith(PREFIX):
            continue  # a kernel's time is that of the operation that started it, too
        part, own_us = _part_of(event), event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if own_us:
            times_ms[part, _kind_of(event.name)] += own_us / 1000 / num_repeats
    return _rows(times_ms, _macs_by_part(model, times_ms.keys()), batch_size)


@contextmanager
def _labelled(model: Any) -> Iterator[None]:
    """Names each part in the profile while it runs."""
    parts = {name: module for name, module in model.named_children() if name != "blocks"}
    layers: Any = getattr(model, "blocks", ())
    for i, block in enumerate(layers):
        parts.update({f"blocks.{i}.{name}": module for name, module in block.named_children()})
    with ExitStack() as hooks:
        for name, module in parts.items():
            label = record_function(PREFIX + name)
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, label=label: label.__enter__() and None))
            hooks.enter_context(module.register_forward_hook(lambda *_, label=label: label.__exit__(None, None, None)))
        yield


def _part_of(event: Any) -> str:
    """The part that an operation ran in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return "between parts"


def _kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), "other")


def _macs_by_part(model: Any, kinds: Collection[Key]) -> dict[Key, int]:
    """MACs of one image by part and kind, a map's in the fused kernel where there is one; none without a plan."""
    if not hasattr(model, "plan"):
        return {}
    found: dict[Key, int] = defaultdict(int)
    for name, macs in count_macs(model).items():
        part = ".".join(name.split(".")[:3])
        is_fused = name.endswith((".logits", ".values")) and (part, "attention") in kinds
        found[part, "attention" if is_fused else "products"] += macs
    return found


def _rows(times_ms: dict[Key, float], macs: dict[Key, int], batch_size: int) -> list[dict[str, Any]]:
    """One row per part and kind, in the order of the model, and their total."""
    total = "total", ""
    times_ms = {**times_ms, total: sum(times_ms.values())}
    macs = {**macs, total: sum(macs.values())} if macs else {}
    return [
        {
            "part": part,
            "kind": kind,
            "ms": ms,
            "time_percent": 100 * (ms / times_ms[total]),
            "macs_percent": 100 * macs[part, kind] / macs[total] if (part, kind) in macs else None,
            "gmacs_per_second": batch_size * macs[part, kind] / ms / 1e6 if (part, kind) in macs else None,
        }
        for (part, kind), ms in times_ms.items()
    ]
