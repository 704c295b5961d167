"""Speed against the best plain ViT: images/s, latency and memory, all candidates measured in turns in one run."""

import os
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from torch import Tensor, nn
from torch.nn import functional as F

from eval import profile
from eval.flops import add_targets, model_macs
from eval.table import Column, Row, to_csv, to_rich
from vitreuse.attention.policy import Conditions
from vitreuse.cli.console import MEASURED_DTYPES, add_any_of, add_count, local_path, positive
from vitreuse.config import ModelConfig
from vitreuse.cost.backends import fused_attention, summary
from vitreuse.cost.measure import (
    Call,
    Timing,
    describe_machine,
    inference_call,
    machine_limits,
    noise_remark,
    peak_memory_mib,
    time_interleaved,
)
from vitreuse.cost.tune import MODES
from vitreuse.files.networks import Target, plain_model, resized, resolve_targets
from vitreuse.io.durable import writable_file, write_durably
from vitreuse.io.file_names import to_bytes
from vitreuse.io.process import choose_device
from vitreuse.model.preprocessing import example, image_settings

HELP = "speed and memory, against timm's plain model with fused and with unfused attention"
COLUMNS = (
    Column("name", "name"),
    Column("image_size_px", "px", "d"),
    Column("dtype", "dtype"),
    Column("mode", "mode"),
    Column("batch_size", "batch", "d"),
    Column("backend", "attention"),
    Column("images_per_second", "images/s", ",.1f"),
    Column("spread_percent", "spread (%)", ".1f"),
    Column("median_ms", "median (ms)", ",.1f"),
    Column("minimum_ms", "minimum (ms)", ",.1f"),
    Column("latency_ms", "latency (ms)", ",.1f"),
    Column("peak_memory_mib", "memory (MiB)", ",.0f"),
    Column("speedup", "speed-up", ".3f"),
    Column("predicted", "predicted", ".3f"),
    Column("realised_over_predicted", "realised / predicted", ".3f"),
)


class Speed(NamedTuple):
    """A model in inference: throughput, how much the times of its calls differ, memory; None where not measured."""

    images_per_second: float | None = None
    spread_percent: float | None = None
    peak_memory_mib: float | None = None


def speeds(models: Mapping[str, nn.Module], device: torch.device, batch_size: int, repeats: int) -> dict[str, Speed]:
    """The speed of each model by its name, all from one interleaved measurement."""
    images = {name: example(model, batch_size) for name, model in models.items()}
    calls = {name: inference_call(model, images[name]) for name, model in models.items()}
    timings = time_interleaved(calls, device, repeats)
    found = {}
    for name, model in models.items():
        memory = peak_memory_mib(calls[name], [*model.parameters(), *model.buffers(), images[name]], device)
        found[name] = Speed(timings[name].images_per_second(batch_size), timings[name].spread_percent, memory)
    return found


class Condition(NamedTuple):
    """What all candidates of one comparison share; without an image size each model keeps the one it was built for."""

    image_size_px: int | None
    dtype: str
    mode: str
    batch_size: int
    device: torch.device


class Candidate(NamedTuple):
    """A model on the device, as it is called: eager or compiled."""

    label: str
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    macs: int  # per image, theoretical
    backend: str  # which way of computing attention its layers take
    is_baseline: bool

    @property
    def image_size_px(self) -> list[int]:
        """Rows and columns."""
        return list(image_settings(self.model)["input_size"][-2:])


def measure(targets: list[Target], condition: Condition, num_repeats: int, with_compiled: bool = False) -> list[Row]:
    """Rows of every target, each followed by those of its plain models: every number of this condition.

    A target and its plain models take turns in a run of their own, so that its rows do not depend on what else is
    listed. The speed-up is a ratio of minimum times, the least disturbed by whatever else the machine does, to the best
    of the plain models; images/s is at the median time. Predicted is the ratio of MACs, the plain model's over those of
    the method (theoretical). A target that is a plain model itself has no speed-up.
    """
    plain_models = {target.label: plain_model(resized(target.model, condition.image_size_px)) for target in targets}
    rows = []
    for target in targets:
        candidates = list(_candidates(target, plain_models, condition))
        if with_compiled:
            candidates += [_compiled(candidate, condition) for candidate in candidates]
        rows += [{**row, "measured_with": target.label} for row in _rows(candidates, condition, num_repeats)]
        if with_compiled:
            torch.compiler.reset()  # what was compiled for one run would keep its models alive in the next
    return rows


def _rows(candidates: Sequence[Candidate], condition: Condition, num_repeats: int) -> list[dict[str, Any]]:
    """The rows of one run, in which the candidates take turns."""
    device, calls = condition.device, {item.label: _make_call(item, condition) for item in candidates}
    timings = time_interleaved({label: call for label, (call, _) in calls.items()}, device, num_repeats)
    latencies: dict[str, Timing] = {}
    if condition.mode == "inference":
        singles = {item.label: inference_call(item.forward, example(item.model, 1)) for item in candidates}
        latencies = time_interleaved(singles, device, num_repeats)
    baselines = [item for item in candidates if item.is_baseline]
    is_compared = len(baselines) < len(candidates)
    best = min(baselines, key=lambda item: timings[item.label].minimum_ms) if is_compared else None
    # what counts memory sees nothing of compiled code on a CPU
    hidden = {item.label for item in candidates if item.forward is not item.model and device.type == "cpu"}
    return [
        {
            "name": item.label,
            "image_size_px": item.image_size_px,
            "dtype": condition.dtype,
            "mode": condition.mode,
            "batch_size": condition.batch_size,
            "backend": item.backend,
            "images_per_second": timings[item.label].images_per_second(condition.batch_size),
            **asdict(timings[item.label]),
            "latency_ms": latencies[item.label].median_ms if latencies else None,
            "peak_memory_mib": None if item.label in hidden else peak_memory_mib(*calls[item.label], device),
            "theoretical_macs": item.macs,
            **_speedup(item, best, timings),
        }
        for item in candidates
    ]


def _speedup(item: Candidate, best: Candidate | None, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """How much faster than the best plain model it is, and would be by its MACs; nothing where there is none."""
    keys = ("baseline", "speedup", "predicted", "realised_over_predicted")
    if best is None:
        return dict.fromkeys(keys)
    speedup, predicted = timings[best.label].minimum_ms / timings[item.label].minimum_ms, best.macs / item.macs
    return dict(zip(keys, (best.label, speedup, predicted, speedup / predicted), strict=True))


def _candidates(target: Target, plain_models: Mapping[str, ModelConfig], condition: Condition) -> Iterator[Candidate]:
    """The target, unless it is a plain model itself, then its plain model, fused and unfused."""
    config, plain = resized(target.model, condition.image_size_px), plain_models[target.label]
    if config != plain:
        model = _place(config, condition)
        backend = _backend(model, condition, plain="fused")
        yield Candidate(target.label, model, model, model_macs(model, theoretical=True), backend, False)
    label = _baseline_label(plain, plain_models.values())
    for attention in ("fused", "unfused"):
        with fused_attention(attention == "fused"):
            model = _place(plain, condition)
        yield Candidate(f"{label}, {attention}", model, model, model_macs(model), attention, True)


def _backend(model: nn.Module, condition: Condition, plain: str, compiled: bool = False) -> str:
    """Which ways of computing attention the layers take; that of a plain model is given."""
    if not hasattr(model, "plan"):
        return plain
    dtype, is_training = getattr(torch, condition.dtype), condition.mode == "train"
    return summary(model, Conditions(condition.device, dtype, is_training, condition.batch_size, compiled))


def _compiled(item: Candidate, condition: Condition) -> Candidate:
    """The same model compiled for each batch size alone, with the same weights."""
    forward: Any = torch.compile(item.model, dynamic=False)
    backend = _backend(item.model, condition, plain=item.backend, compiled=True)
    return item._replace(label=f"{item.label}, compiled", forward=forward, backend=backend)


def _baseline_label(plain: ModelConfig, plain_models: Iterable[ModelConfig]) -> str:
    """The plain model's name, with its keywords where another of the same name is measured too."""
    alone = all(other == plain for other in plain_models if other.name == plain.name)
    return plain.name if alone else f"{plain.name}({', '.join(f'{k}={v}' for k, v in plain.keywords.items())})"


def _place(config: ModelConfig, condition: Condition) -> nn.Module:
    """The model as it is timed: training keeps float32 weights and computes under autocast."""
    model = config.create().to(condition.device)
    return model.train() if condition.mode == "train" else model.eval().to(getattr(torch, condition.dtype))


def _make_call(item: Candidate, condition: Condition) -> tuple[Call, list[Tensor]]:
    """The call to time, and the tensors that are there before it."""
    model, images = item.model, example(item.model, condition.batch_size)
    if condition.mode == "inference":
        return inference_call(item.forward, images), [*model.parameters(), *model.buffers(), images]
    labels = torch.zeros(condition.batch_size, dtype=torch.int64, device=condition.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.autocast(condition.device.type, torch.bfloat16, enabled=condition.dtype == "bfloat16"):
            loss = F.cross_entropy(item.forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    state = [value for values in optimizer.state.values() for value in values.values()]
    return step, [*model.parameters(), *model.buffers(), images, *state]


def profiles(targets: Sequence[Target], condition: Condition, num_repeats: int) -> list[dict[str, Any]]:
    """Where the time of each target goes, eager and in inference; a plain one is seen fused and unfused."""
    found, limits = [], machine_limits(condition.device, getattr(torch, condition.dtype))
    for target in targets:
        plain = plain_model(resized(target.model, condition.image_size_px))
        candidates = list(_candidates(target, {target.label: plain}, condition))
        for item in [item for item in candidates if not item.is_baseline] or candidates:
            call, _ = _make_call(item, condition)
            parts = profile.profile_parts(item.model, call, condition.batch_size, num_repeats)
            facts = {"name": item.label, "image_size_px": item.image_size_px, "dtype": condition.dtype, **limits}
            found.append({**facts, "parts": parts})
    return found


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    add_targets(parser, "measure")
    add_any_of(parser, "--dtype", MEASURED_DTYPES, ["float32"])
    add_any_of(parser, "--mode", MODES, ["inference"])
    add_count(parser, "--batch-size", 32, "images per call")
    add_count(parser, "--repeats", 10, "timed calls per candidate")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own number")
    parser.add_argument("--compile", action="store_true", help="measure every model compiled by torch.compile too")
    parser.add_argument("--profile", action="store_true", help="show where the time of each target goes, too")
    parser.add_argument("--csv", type=local_path, metavar="FILE", help="write the rows there too")


def run(args: Namespace) -> dict[str, Any]:
    """Rows for every combination of image size, dtype and mode."""
    if args.profile and "inference" not in args.mode:
        raise ValueError("--profile shows where the time of inference goes: add inference to --mode, or leave it out.")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if args.compile and shutil.which(compiler) is None:  # torch would fail with a long traceback
        raise ValueError(
            f"--compile needs a C++ compiler and there is no {compiler!r}: install it, name another in CXX, or leave "
            "--compile out."
        )
    if args.csv:
        writable_file(args.csv)
    if args.threads:
        torch.set_num_threads(args.threads)
    targets = resolve_targets(args.targets, args.plan, args.image_size or [None])
    device = choose_device(args.device)
    result: dict[str, Any] = {"command": "throughput", "machine": describe_machine(device), "rows": [], "profiles": []}
    settings: Any = product(args.image_size or [None], args.dtype, args.mode)
    for size, dtype, mode in settings:
        condition = Condition(size, dtype, mode, args.batch_size, device)
        shown = "their own size" if size is None else f"{size} px"
        print(f"measuring {mode} in {dtype} at {shown}", file=sys.stderr)
        result["rows"] += measure(targets, condition, args.repeats, args.compile)
        if args.profile and mode == "inference":
            result["profiles"] += profiles(targets, condition, args.repeats)
    if args.csv:
        write_durably(args.csv, to_bytes(to_csv(result["rows"], list(result["rows"][0]))))
    return result


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    caption = "speed-up: minimum time of the best plain model over its own; predicted: by MACs. "
    alone = sorted({row["measured_with"] for row in result["rows"] if row["speedup"] is None})
    if alone:
        claims = caption if any(row["speedup"] is not None for row in result["rows"]) else ""
        caption = f"no speed-up: {', '.join(alone)} is what others are measured against. {claims}"
    caption += ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    if remark := noise_remark(max(row["spread_percent"] for row in result["rows"])):
        caption += f". {remark}"
    profiled = [to_rich(found["parts"], profile.COLUMNS, _profile_caption(found)) for found in result["profiles"]]
    return Group(to_rich(result["rows"], COLUMNS, caption), *profiled)


def _profile_caption(found: dict[str, Any]) -> str:
    rows, columns = found["image_size_px"]
    product, copied = found["product_gmacs_per_second"], found["copy_gb_per_second"]
    return (
        f"{found['name']} at {rows} x {columns} px in {found['dtype']}, time of the operations alone; a large product "
        f"reaches {product:,.0f} GMACs/s here, a copy {copied:.1f} GB/s"
    )
