"""Speed against the best plain ViT: images/s, latency and memory, all candidates measured in turns in one run."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from timm.layers.config import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from eval.flops import model_macs
from eval.inputs import example, image_settings
from eval.machine import describe_machine
from eval.table import Column, to_csv, to_rich
from eval.targets import Target, choose_device, plain_model, positive, resized, resolve_targets
from vitreuse.config import ModelConfig
from vitreuse.measure import Call, peak_memory_mib, time_interleaved

HELP = "speed and memory, against timm's plain model with fused and with unfused attention"
DTYPES = ("float32", "bfloat16")
MODES = ("inference", "train")
COLUMNS = (
    Column("name", "name"),
    Column("image_size_px", "px", "d"),
    Column("dtype", "dtype"),
    Column("mode", "mode"),
    Column("batch_size", "batch", "d"),
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


@dataclass(frozen=True)
class Condition:
    """What all candidates of one comparison share; without an image size each model keeps the one it was built for."""

    image_size_px: int | None
    dtype: str
    mode: str
    batch_size: int
    device: torch.device


@dataclass(frozen=True)
class Candidate:
    """A model on the device; its family is the plain model that it and others are measured against."""

    label: str
    family: str
    model: nn.Module
    macs: int  # per image, theoretical
    is_baseline: bool


def measure(targets: Sequence[Target], condition: Condition, num_repeats: int) -> list[dict[str, Any]]:
    """One row per target and per baseline: every number of this condition, speed-ups to the best baseline.

    The speed-up is a ratio of minimum times, the least disturbed by whatever else the machine does; images/s is at the
    median time. Predicted is the ratio of MACs, the plain model's over those of the method (theoretical).
    """
    candidates = list(_candidates(targets, condition))
    calls = {item.label: _make_call(item.model, condition) for item in candidates}
    timings = time_interleaved({label: call for label, (call, _) in calls.items()}, condition.device, num_repeats)
    latencies = _latencies(candidates, condition, num_repeats)
    rows = []
    for item in candidates:
        rivals = [other for other in candidates if other.is_baseline and other.family == item.family]
        best = min(rivals, key=lambda rival: timings[rival.label].minimum_ms)
        speedup = timings[best.label].minimum_ms / timings[item.label].minimum_ms
        rows.append(
            {
                "name": item.label,
                "image_size_px": image_settings(item.model)["input_size"][-1],
                "dtype": condition.dtype,
                "mode": condition.mode,
                "batch_size": condition.batch_size,
                "images_per_second": timings[item.label].images_per_second(condition.batch_size),
                **asdict(timings[item.label]),
                "latency_ms": latencies.get(item.label),
                "peak_memory_mib": peak_memory_mib(*calls[item.label], condition.device),
                "theoretical_macs": item.macs,
                "baseline": best.label,
                "speedup": speedup,
                "predicted": best.macs / item.macs,
                "realised_over_predicted": speedup * item.macs / best.macs,
            }
        )
    return rows


def _candidates(targets: Sequence[Target], condition: Condition) -> Iterator[Candidate]:
    """Every target that is not a plain model itself, then each of their plain models, fused and unfused."""
    plain_models: dict[str, ModelConfig] = {}
    for target in targets:
        config = resized(target.model, condition.image_size_px)
        plain = plain_model(config)
        family = plain.name + str(sorted(plain.keywords.items()))
        plain_models[family] = plain
        if config != plain:
            model = _place(config, condition)
            yield Candidate(target.label, family, model, model_macs(model, theoretical=True), False)
    for family, plain in plain_models.items():
        label = _baseline_label(plain, plain_models)
        for attention in ("fused", "unfused"):
            with fused_attention(attention == "fused"):
                model = _place(plain, condition)
            yield Candidate(f"{label}, {attention}", family, model, model_macs(model), True)


def _baseline_label(plain: ModelConfig, plain_models: dict[str, ModelConfig]) -> str:
    """The plain model's name, with its keywords where another of the same name is measured too."""
    alone = [other.name for other in plain_models.values()].count(plain.name) == 1
    return plain.name if alone else f"{plain.name}({', '.join(f'{k}={v}' for k, v in plain.keywords.items())})"


def _place(config: ModelConfig, condition: Condition) -> nn.Module:
    """The model as it is timed: training keeps float32 weights and computes under autocast."""
    model = config.create().to(condition.device)
    if condition.mode == "train":
        return model.train()
    return model.eval().to(getattr(torch, condition.dtype))


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    """timm's choice of attention for the models made inside: it is read at construction, and is global."""
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enabled)
    try:
        yield
    finally:
        set_fused_attn(*before)


def _make_call(model: nn.Module, condition: Condition) -> tuple[Call, list[Tensor]]:
    """The call to time, and the tensors that are there before it."""
    images = example(model, condition.batch_size)
    if condition.mode == "inference":
        return inference_call(model, images), [*model.parameters(), *model.buffers(), images]
    labels = torch.zeros(condition.batch_size, dtype=torch.int64, device=condition.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.autocast(condition.device.type, torch.bfloat16, enabled=condition.dtype == "bfloat16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    state = [value for values in optimizer.state.values() for value in values.values()]
    return step, [*model.parameters(), *model.buffers(), images, *state]


def inference_call(model: nn.Module, images: Tensor) -> Call:
    """One forward pass without gradients."""

    @torch.inference_mode()
    def forward() -> None:
        model(images)

    return forward


def _latencies(candidates: Sequence[Candidate], condition: Condition, num_repeats: int) -> dict[str, float]:
    """Median inference time of one image by label; none in training."""
    if condition.mode == "train":
        return {}
    calls = {item.label: inference_call(item.model, example(item.model, 1)) for item in candidates}
    timings = time_interleaved(calls, condition.device, num_repeats)
    return {label: timing.median_ms for label, timing in timings.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="model name, config or run folder")
    parser.add_argument("--image-size", type=positive, nargs="+", metavar="PX", help="default: the model's own")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["inference"], help="default: inference")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per call; default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=10, help="timed calls per candidate; default: %(default)s")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own number")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows for every combination of image size, dtype and mode."""
    if args.threads:
        torch.set_num_threads(args.threads)
    targets = resolve_targets(args.targets)
    device = choose_device(args.device)
    rows: list[dict[str, Any]] = []
    for condition in (
        Condition(size, dtype, mode, args.batch_size, device)
        for size in args.image_size or [None]
        for dtype in args.dtype
        for mode in args.mode
    ):
        size = "their own size" if condition.image_size_px is None else f"{condition.image_size_px} px"
        print(f"measuring {condition.mode} in {condition.dtype} at {size}", file=sys.stderr)
        rows += measure(targets, condition, args.repeats)
    if args.csv:
        args.csv.write_text(to_csv(rows, list(rows[0])), encoding="utf-8")
    return {"command": "throughput", "machine": describe_machine(device), "rows": rows}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    caption = "speed-up: minimum time of the best plain model over its own; predicted: by MACs. "
    return to_rich(result["rows"], COLUMNS, caption + ", ".join(f"{k} {v}" for k, v in result["machine"].items()))
