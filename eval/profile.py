"""Where the time of a model goes: per layer, part and kind of operation, beside the multiply-adds of that part."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from eval.table import Column
from vitreuse.macs import count_macs

PREFIX = "part: "
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
    "attention": ("scaled_dot_product", "flash_attention"),
    "products": ("mm", "conv", "linear"),
    "softmax": ("softmax",),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "silu"),
    "copies": ("copy", "clone", "cat", "contiguous", "to_copy"),
}


def profile_parts(model: nn.Module, call: Callable[[], object], batch_size: int, num_repeats: int) -> list[dict]:
    """Milliseconds per call by part (a layer's norm1, attn, norm2, mlp, or a top-level module) and kind of operation.

    Time is that of the operations themselves, on the device where they run, without what Python spends between them.
    MACs, where the model has a closed form, are those of its part, beside the part's products.
    """
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _labelled(model), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(num_repeats):
            call()
    times_ms: dict[tuple[str, str], float] = defaultdict(float)
    for event in profiler.events() or ():
        part = _part_of(event)
        own_us = event.self_device_time_total or event.self_cpu_time_total
        if part is not None and own_us and not event.name.startswith(PREFIX):
            times_ms[part, _kind_of(event.name)] += own_us / 1000 / num_repeats
    return _rows(times_ms, _macs_by_part(model), batch_size)


@contextmanager
def _labelled(model: Any) -> Iterator[None]:
    """Names each part in the profile while it runs."""
    parts = {name: module for name, module in model.named_children() if name != "blocks"}
    for i, block in enumerate(model.blocks):
        parts.update({f"blocks.{i}.{name}": module for name, module in block.named_children()})
    hooks = []
    for name, module in parts.items():
        label = record_function(PREFIX + name)
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: label.__enter__() and None))
        hooks.append(module.register_forward_hook(lambda *_, label=label: label.__exit__(None, None, None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _part_of(event: Any) -> str | None:
    """The part that an operation ran in; the model where it ran in none, None for a part's label itself."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return "between parts"


def _kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), "element-wise")


def _macs_by_part(model: Any) -> dict[str, int]:
    """MACs of one image by part; none for a model without a plan."""
    if not hasattr(model, "plan"):
        return {}
    parts: dict[str, int] = defaultdict(int)
    for name, macs in count_macs(model).items():
        parts[".".join(name.split(".")[:3])] += macs
    return parts


def _rows(times_ms: dict[tuple[str, str], float], macs: dict[str, int], batch_size: int) -> list[dict[str, Any]]:
    """One row per part and kind, in the order of the model, and their total."""
    total_ms, total_macs = sum(times_ms.values()), sum(macs.values())
    rows = []
    for (part, kind), ms in times_ms.items():
        has_macs = kind in ("products", "attention") and part in macs
        rows.append(
            {
                "part": part,
                "kind": kind,
                "ms": ms,
                "time_percent": 100 * ms / total_ms,
                "macs_percent": 100 * macs[part] / total_macs if has_macs else None,
                "gmacs_per_second": batch_size * macs[part] / ms / 1e6 if has_macs else None,
            }
        )
    total = {"part": "total", "kind": "", "ms": total_ms, "time_percent": 100.0, "macs_percent": None}
    rate = batch_size * total_macs / total_ms / 1e6 if total_macs else None
    return [*rows, {**total, "gmacs_per_second": rate}]
