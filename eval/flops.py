"""MACs and FLOPs per part, by three counts that must agree: closed form, fvcore, torch."""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from torch import nn

from eval.inputs import example
from eval.table import Column, to_rich
from eval.targets import PLAN_KEYWORDS, Target, resized, resolve_targets
from vitreuse.config import ModelConfig
from vitreuse.console import positive
from vitreuse.flops import fvcore_macs, torch_flops
from vitreuse.macs import count_macs

# A layer's attention or MLP, a top-level module, or the whole model.
PART = re.compile(r"blocks\.\d+\.(attn|mlp)|(?!blocks\b)[^.]*")
HELP = "MACs and FLOPs per part, by closed form and by two counters that must agree with it"
COLUMNS = (
    Column("part", "part"),
    Column("macs", "MACs", ",d"),
    Column("fvcore_macs", "by fvcore", ",d"),
    Column("torch_macs", "by torch", ",d"),
    Column("flops", "FLOPs", ",d"),
    Column("theoretical_macs", "theoretical MACs", ",d"),
)
SUMMARY = (
    Column("name", "name"),
    Column("image_size_px", "px", "d"),
    Column("params", "params", ",d"),
    Column("macs", "MACs", ",d"),
    Column("flops", "FLOPs", ",d"),
    Column("theoretical_macs", "theoretical MACs", ",d"),
    Column("macs_ratio", "MACs / exact", ".3f"),
    Column("params_ratio", "params / exact", ".3f"),
)


def count(target: Target, image_size_px: int | None = None) -> dict[str, Any]:
    """Counts of one model per image: in all, per part, and as ratios to the same model with exact attention.

    MACs are those of the products that run, theoretical MACs those of the method (map carried, neighbourhood only);
    ratios quote the latter. A plain timm model has no closed form: its two counters are compared.

    Raises:
        ValueError: two counts of a part differ.
    """
    config = resized(target.model, image_size_px)
    model: Any = config.create().eval()
    images = example(model, 1)
    counted = {"fvcore_macs": fvcore_macs(model, images), "torch_macs": _halved(torch_flops(model, images))}
    result: dict[str, Any] = {"name": target.label, "image_size_px": list(images.shape[-2:])}
    result["params"] = _num_params(model)
    if hasattr(model, "plan"):
        closed, theoretical = _by_part(count_macs(model)), _by_part(count_macs(model, theoretical=True))
        exact = _exact(config, len(model.plan))
        macs_ratio = theoretical[""] / model_macs(exact, theoretical=True)
        ratios = {"macs_ratio": macs_ratio, "params_ratio": result["params"] / _num_params(exact)}
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
    return {**result, **totals, **ratios, "parts": parts}


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


def _exact(config: ModelConfig, depth: int) -> nn.Module:
    """The same model with exact attention in every layer, on the meta device."""
    keywords = {key: value for key, value in config.keywords.items() if key not in PLAN_KEYWORDS}
    return replace(config, plan=f"exact*{depth}", keywords=keywords).create("meta")


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="model name, config or run folder")
    parser.add_argument("--plan", nargs="+", default=[], metavar="TEXT", help="count each target under these plans")
    parser.add_argument("--image-size", type=positive, nargs="+", metavar="PX", help="default: the model's own")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of every target at every image size."""
    targets = resolve_targets(args.targets, args.plan)
    models = [count(target, size) for target in targets for size in args.image_size or [None]]
    return {"command": "flops", "models": models}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    models = result["models"]
    return Group(*(to_rich(model["parts"], COLUMNS, model["name"]) for model in models), to_rich(models, SUMMARY))
