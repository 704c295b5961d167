"""MACs and FLOPs per part, by three counts that must agree: closed form, fvcore, torch; and what training takes."""

import re
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor, nn

from eval.table import Column, to_rich, to_rich_upright
from vitreuse.cli.console import MEASURED_DTYPES, add_dtype, positive
from vitreuse.cost.counters import fvcore_macs, norm_operations, torch_flops, training_flops
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.cost.measure import device_name, inference_call, peak_memory_mib, saved_memory_mib
from vitreuse.files.networks import Target, exact_model, resized, resolve_targets
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
        ValueError: Two counts of a part differ.
    """
    config = resized(target.model, image_size_px)
    model: Any = config.create().eval()
    images = example(model, 1)
    counted = {"fvcore_macs": fvcore_macs(model, images), "torch_macs": _torch_macs(model, images)}
    closed = theoretical = macs_by_part(model)
    params, macs_ratio, params_ratio = count_params(model), None, None
    if hasattr(model, "plan"):
        theoretical = macs_by_part(model, theoretical=True)
        exact = exact_model(config, len(model.plan)).create("meta")
        macs_ratio = theoretical[""] / model_macs(exact, theoretical=True)
        params_ratio = params / count_params(exact)
    parts = [
        {"part": part or "total", "macs": macs, "flops": 2 * macs, "theoretical_macs": theoretical[part]}
        | {name: counts.get(part, 0) for name, counts in counted.items()}
        for part, macs in sorted(closed.items(), key=lambda item: item[0] == "")  # the total last
    ]
    _check_agreement(target.label, parts)
    return {
        "name": target.label,
        "image_size_px": list(images.shape[-2:]),
        "params": params,
        "macs": closed[""],
        "flops": 2 * closed[""],
        "theoretical_macs": theoretical[""],
        "macs_with_norms": closed[""] + norm_operations(model, images),
        "training_flops": training_flops(model.train(), example(model, 2)),  # BatchNorm1d takes no single image
        "macs_ratio": macs_ratio,
        "params_ratio": params_ratio,
        **_memory(model.to(device), dtype),
        "parts": parts,
    }


def _memory(model: nn.Module, dtype: str) -> dict[str, float]:
    """Activation memory of one image in MiB, from real passes on the model's device.

    Returns:
        saved_memory_mib: What each further image of a batch makes a training step keep for its backward pass, the
            image included; weights stay float32, products are in dtype.
        inference_memory_mib: The most that one image's forward pass holds at a time beside image and weights, all in
            dtype; kernels' scratch is seen on CUDA alone.
    """
    # batches of 2 and 3: with a single image some copies turn into views
    saved = [saved_memory_mib(partial(_autocast, model.train(), example(model, size), dtype)) for size in (2, 3)]
    placed = model.eval().to(getattr(torch, dtype))
    call = inference_call(placed, example(placed, 1))
    call()  # fills caches
    peak = peak_memory_mib(call, (), next(placed.parameters()).device)
    return {"saved_memory_mib": saved[1] - saved[0], "inference_memory_mib": peak}


def _autocast(model: nn.Module, images: Tensor, dtype: str) -> Tensor:
    """The model's answer with products in a dtype."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(images)


def model_macs(model: nn.Module, theoretical: bool = False, image_size: tuple[int, int] | None = None) -> int:
    """MACs per image of a model: in closed form, or by torch's counter where it has no plan.

    Args:
        theoretical: See count_macs.
        image_size: Rows and columns in pixels; the size the model is built for when None.

    Raises:
        ValueError: The model has a plan and a part without a closed form.
    """
    if hasattr(model, "plan"):
        return sum(count_macs(model, image_size, theoretical).values())
    images = example(model, 1)
    if image_size is not None:
        images = images.new_zeros(*images.shape[:2], *image_size)
    return _torch_macs(model, images)[""]


def macs_by_part(model: nn.Module, theoretical: bool = False) -> dict[str, int]:
    """MACs per image of each layer's ``attn`` and ``mlp``, of the parts beside the layers, and of the model as "".

    They are counted as by model_macs.
    """
    if not hasattr(model, "plan"):
        counted = _torch_macs(model, example(model, 1))
        return {name: macs for name, macs in counted.items() if PART.fullmatch(name)}
    counts, parts = count_macs(model, theoretical=theoretical), defaultdict(int)
    for name, macs in counts.items():
        match = PART.match(name)
        parts[match[0] if match else name] += macs
    return {**parts, "": sum(counts.values())}


def _torch_macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    return {name: flops // 2 for name, flops in torch_flops(model, images).items()}


def _check_agreement(label: str, parts: list[dict[str, Any]]) -> None:
    for row in parts:
        if not row["macs"] == row["fvcore_macs"] == row["torch_macs"]:
            raise ValueError(
                f"{label}: the counts of {row['part']} differ, {row['macs']} MACs by closed form, {row['fvcore_macs']} "
                f"by fvcore and {row['torch_macs']} by torch: one of the rules is wrong."
            )


def add_targets(parser: ArgumentParser, verb: str) -> None:
    """Declares the targets of a command, with the plans and sizes under which it looks at each, by a verb."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="model name, config or run folder")
    parser.add_argument("--plan", nargs="+", default=[], metavar="TEXT", help=f"{verb} each target under these plans")
    parser.add_argument("--image-size", type=positive, nargs="+", metavar="PX", help="default: the model's own")


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    add_targets(parser, "count")
    add_dtype(parser, "memory", MEASURED_DTYPES)


def run(args: Namespace) -> dict[str, Any]:
    """Counts and memory of every target at every image size."""
    targets, device = resolve_targets(args.targets, args.plan, args.image_size or [None]), choose_device(args.device)
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
