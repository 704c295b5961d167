"""MACs and FLOPs per part, by three counts that must agree: closed form, fvcore, torch; and what training takes."""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor, nn

from eval.table import Column, to_rich, to_rich_upright
from vitreuse.cli.console import MEASURED_DTYPES, add_dtype, positive
from vitreuse.cost.counters import fvcore_macs, norm_operations, torch_flops, training_flops
from vitreuse.cost.macs import count_macs
from vitreuse.cost.measure import Call, device_name, inference_call, peak_memory_mib, saved_memory_mib
from vitreuse.export.networks import Target, exact_model, resized, resolve_targets
from vitreuse.io.process import choose_device
from vitreuse.model.preprocessing import example

# A layer's attention or MLP, a top-level module, or the whole model.
PART = re.compile(r"blocks\.\d+\.(attn|mlp)|(?!blocks\b)[^.]*")
HELP = "MACs and FLOPs per part, by closed form and two counters that must agree; FLOPs and memory of training"
COLUMNS = (
    Column("part", "part"),
    Column("macs", "MACs", ",d"),
    Column("fvcore_macs", "by fvcore", ",d"),
    Column("torch_macs", "by torch", ",d"),
    Column("flops", "FLOPs", ",d"),
    Column("theoretical_macs", "theoretical MACs", ",d"),
)
SUMMARY = (
    Column("name", "per image"),
    Column("image_size_px", "px", "d"),
    Column("params", "params", ",d"),
    Column("macs", "MACs", ",d"),
    Column("flops", "FLOPs", ",d"),
    Column("theoretical_macs", "theoretical MACs", ",d"),
    Column("macs_with_norms", "MACs as in timm's tables", ",d"),
    Column("macs_ratio", "MACs / exact", ".3f"),
    Column("params_ratio", "params / exact", ".3f"),
    Column("training_flops", "training FLOPs", ",d"),
    Column("saved_memory_mib", "saved (MiB)", ",.2f"),
    Column("inference_memory_mib", "inference (MiB)", ",.2f"),
)


def count(target: Target, image_size_px: int | None, dtype: str, device: torch.device) -> dict[str, Any]:
    """Counts of one model per image: in all, per part, and as ratios to the same model with exact attention.

    MACs are those of the products that run, theoretical MACs those of the method (map carried, neighbourhood only);
    ratios quote the latter. A plain timm model has no closed form: its two counters are compared. Training FLOPs are
    those of the forward and the backward pass, see training_flops.

    Raises:
        ValueError: two counts of a part differ.
    """
    config = resized(target.model, image_size_px)
    model: Any = config.create().eval()
    images = example(model, 1)
    counted = {"fvcore_macs": fvcore_macs(model, images), "torch_macs": _halved(torch_flops(model, images))}
    result: dict[str, Any] = {"name": target.label, "image_size_px": list(images.shape[-2:])}
    result["params"] = num_params(model)
    norms = norm_operations(model, images)
    if hasattr(model, "plan"):
        closed, theoretical = _by_part(count_macs(model)), _by_part(count_macs(model, theoretical=True))
        exact = exact_model(config, len(model.plan)).create("meta")
        macs_ratio = theoretical[""] / model_macs(exact, theoretical=True)
        ratios = {"macs_ratio": macs_ratio, "params_ratio": result["params"] / num_params(exact)}
    else:
        closed = theoretical = {name: macs for name, macs in counted["torch_macs"].items() if PART.fullmatch(name)}
        ratios = {"macs_ratio": None, "params_ratio": None}
    parts = [
        {"part": part or "total", "macs": macs, "flops": 2 * macs, "theoretical_macs": theoretical[part]}
        | {name: counts.get(part, 0) for name, counts in counted.items()}
        for part, macs in sorted(closed.items(), key=lambda item: item[0] == "")  # the total last
    ]
    _check_agreement(target.label, parts)
    totals = {"macs": closed[""], "flops": 2 * closed[""], "theoretical_macs": theoretical[""]}
    totals |= {"macs_with_norms": closed[""] + norms, "training_flops": training_flops(model.train(), images)}
    return {**result, **totals, **ratios, **memory(model.to(device), dtype), "parts": parts}


def memory(model: nn.Module, dtype: str) -> dict[str, float]:
    """Activation memory of one image in MiB, from real passes on the model's device.

    Returns:
        saved_memory_mib: what each further image of a batch makes a training step keep for its backward pass, the
            image included; weights stay float32, products are in dtype.
        inference_memory_mib: the most that one image's forward pass holds at a time beside image and weights, all in
            dtype; kernels' scratch is seen on CUDA alone.
    """
    # batches of 2 and 3: with a single image some copies turn into views
    saved = [saved_memory_mib(_training_forward(model.train(), example(model, size), dtype)) for size in (2, 3)]
    placed = model.eval().to(getattr(torch, dtype))
    call = inference_call(placed, example(placed, 1))
    call()  # fills caches
    peak = peak_memory_mib(call, (), next(placed.parameters()).device)
    return {"saved_memory_mib": saved[1] - saved[0], "inference_memory_mib": peak}


def _training_forward(model: nn.Module, images: Tensor, dtype: str) -> Call:
    def call() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            model(images)

    return call


def model_macs(model: nn.Module, theoretical: bool = False, image_size: tuple[int, int] | None = None) -> int:
    """MACs per image of a model: in closed form, or by torch's counter where it has no plan.

    Args:
        theoretical: see count_macs.
        image_size: rows and columns in pixels; the size the model is built for when None.

    Raises:
        ValueError: the model has a plan and a part without a closed form.
    """
    if hasattr(model, "plan"):
        return sum(count_macs(model, image_size, theoretical).values())
    images = example(model, 1)
    if image_size is not None:
        images = images.new_zeros(*images.shape[:2], *image_size)
    return torch_flops(model, images)[""] // 2


def macs_by_part(model: nn.Module) -> dict[str, int]:
    """MACs per image of the products that run: of each layer's ``attn`` and ``mlp`` and of the parts beside the layers.

    Raises:
        ValueError: the model has a plan and a part without a closed form.
    """
    if hasattr(model, "plan"):
        return {part: macs for part, macs in _by_part(count_macs(model)).items() if part}
    counted = _halved(torch_flops(model, example(model, 1)))
    return {part: macs for part, macs in counted.items() if part and PART.fullmatch(part)}


def _halved(flops: Mapping[str, int]) -> dict[str, int]:
    return {name: count // 2 for name, count in flops.items()}


def _by_part(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts summed by part, and over the model as ""."""
    parts: dict[str, int] = defaultdict(int)
    for name, macs in counts.items():
        match = PART.match(name)
        parts[match[0] if match else name] += macs
    return {**parts, "": sum(counts.values())}


def _check_agreement(label: str, parts: list[dict[str, Any]]) -> None:
    for row in parts:
        if not row["macs"] == row["fvcore_macs"] == row["torch_macs"]:
            raise ValueError(
                f"{label}: the counts of {row['part']} differ, {row['macs']} MACs by closed form, {row['fvcore_macs']} "
                f"by fvcore and {row['torch_macs']} by torch: one of the rules is wrong."
            )


def num_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="model name, config or run folder")
    parser.add_argument("--plan", nargs="+", default=[], metavar="TEXT", help="count each target under these plans")
    parser.add_argument("--image-size", type=positive, nargs="+", metavar="PX", help="default: the model's own")
    add_dtype(parser, "memory", MEASURED_DTYPES)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts and memory of every target at every image size."""
    targets, device = resolve_targets(args.targets, args.plan), choose_device(args.device)
    models = [count(target, size, args.dtype, device) for target in targets for size in args.image_size or [None]]
    return {"command": "flops", "device": device_name(device), "dtype": args.dtype, "models": models}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    models = result["models"]
    caption = (
        "timm's tables add 5 a number for LayerNorm; training: forward and backward pass; saved: kept for "
        f"the backward pass; inference: the most at a time. Memory in {result['dtype']}, {result['device']}."
    )
    tables = (to_rich(model["parts"], COLUMNS, model["name"]) for model in models)
    return Group(*tables, to_rich_upright(models, SUMMARY, caption))
