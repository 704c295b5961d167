"""Instruments shared by eval and the `vitreuse` command: interleaved timing, peak memory, top-k counts, the device."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]
QUIET_PERCENT = 20.0  # the spread up to which times are taken for those of a machine that did nothing else


@dataclass(frozen=True)
class Timing:
    """Time per call over num_repeats calls; spread is the interquartile range in percent of the median."""

    median_ms: float
    minimum_ms: float
    spread_percent: float
    num_repeats: int

    def images_per_second(self, batch_size: int) -> float:
        """Throughput at the median time of a call on batch_size images."""
        return 1000 * batch_size / self.median_ms


def noise_remark(spread_percent: float) -> str:
    """What to say of times with this spread at most; nothing where they were quiet."""
    if spread_percent <= QUIET_PERCENT:
        return ""
    return f"Quartiles of times lie {spread_percent:.0f} % apart: measure again while the machine does nothing else."


def time_interleaved(
    calls: Mapping[str, Call], device: torch.device, num_repeats: int = 10, num_warmups: int = 2
) -> dict[str, Timing]:
    """Times of each call, measured in turns so that a drift of the machine hits all of them alike.

    Every other turn runs backwards: no call always follows the same neighbour. The device is synchronised around each.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(num_warmups + num_repeats):
        for name in names[:: 1 if turn % 2 else -1]:
            elapsed_ms = _elapsed_ms(calls[name], device)
            if turn >= num_warmups:
                times_ms[name].append(elapsed_ms)
    return {name: _summary(times) for name, times in times_ms.items()}


def _elapsed_ms(call: Call, device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _summary(times_ms: list[float]) -> Timing:
    median = statistics.median(times_ms)
    low, _, high = statistics.quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else times_ms * 3
    return Timing(median, min(times_ms), 100 * (high - low) / median, len(times_ms))


def inference_call(function: Callable[..., object], *inputs: Tensor) -> Call:
    """One forward pass without gradients, to time."""

    @torch.inference_mode()
    def call() -> None:
        function(*inputs)

    return call


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What no layer can exceed here: multiply-adds of one large product, and bytes read and written by a large copy.

    Both are warm: into memory that is there already, the best of several calls.

    Returns:
        product_gmacs_per_second and copy_gb_per_second.
    """
    side = 8192 if device.type == "cuda" else 2048
    left, right, product = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    source, target = (torch.ones(64 << 20, device=device) for _ in range(2))  # 256 MiB, above every cache
    calls = {
        "product": inference_call(lambda: torch.mm(left, right, out=product)),
        "copy": inference_call(lambda: target.copy_(source)),
    }
    times = {name: timing.minimum_ms / 1000 for name, timing in time_interleaved(calls, device).items()}
    return {
        "product_gmacs_per_second": side**3 / times["product"] / 1e9,
        "copy_gb_per_second": 2 * source.nbytes / times["copy"] / 1e9,
    }


def peak_memory_mib(call: Call, resident: Iterable[Tensor], device: torch.device) -> float:
    """Most bytes that tensors hold during one call: those resident before it, plus the peak of what the call adds.

    On every device: bytes in use, without what the allocator keeps in reserve and without other models on the device.
    On CUDA torch's allocator counts them, kernels' scratch included. On the CPU each tensor's storage is followed from
    the operation that makes it to its end; scratch inside a kernel is not seen, and operations of a compiled call are
    not either. Run the call once before: a first call may fill caches.

    Args:
        resident: Weights, buffers, inputs and optimizer state that exist before the call; each storage counts once.
    """
    storages = _LiveStorages(resident)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        peak = storages.live_bytes + torch.cuda.max_memory_allocated(device) - before
    else:
        with storages:
            call()
        peak = storages.peak_bytes
    return peak / 2**20


def saved_memory_mib(call: Call) -> float:
    """What a forward pass keeps for the backward pass: the storages of all tensors that autograd saves, each once.

    Parameters are among them, and so are their copies in the dtype of autocast.
    """
    with saved_storages() as storages:
        call()
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


@contextmanager
def saved_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages of the tensors that autograd saves inside the block, so far; the block can have no backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that none is freed and its place taken by another

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        yield storages


def peak_process_memory_mib(device: torch.device) -> float:
    """Most memory that this process has used so far: of a CUDA device by torch's allocator, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of all living storages: the given ones, and those that operations make inside the context."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}
        for tensor in resident:
            self._follow(tensor)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # inference mode leaves composite operations whole: their inner tensors count too
                outputs = func.decompose(*args, **kwargs)
            if outputs is not NotImplemented:
                return outputs
        outputs = func(*args, **kwargs)
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:  # a view makes nothing
                self._follow(leaf)
        return outputs


def top_classes(logits: Tensor, k: int = 5) -> Tensor:
    """The k classes of the highest logits, the highest first; all of them where there are fewer.

    A tie goes to the lower class, as argmax does, so the order depends on neither batch nor device. NaN comes first, as
    class -1: no label is that.

    Args:
        logits: (B, classes).

    Returns:
        (B, min(k, classes)), int64.
    """
    values, classes = (part[:, :k] for part in logits.sort(dim=1, descending=True, stable=True))
    return classes.masked_fill(values.isnan(), -1)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, of a CPU with the vector instructions that torch uses, threads, versions and date, which every
    measurement is written down with."""
    name = device_name(device)
    return {
        "device": f"{name} ({_instructions()})" if device.type == "cpu" else name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    """The processor's model name, which only Linux and macOS tell in different places."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    """The vector instructions of this CPU that torch uses, with those for bfloat16 where Linux names them."""
    flags = _cpuinfo("flags").split()
    narrow = [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16")) if flag in flags]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *narrow])


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor under a key; nothing on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
