"""``vitreuse fold NAME``: what each step of folding a model gains on this device, and what it changes."""

import argparse
from typing import Any

import torch
from rich.console import Group

from vitreuse.cli.console import add_count, add_device, add_dtype, add_image_size, add_plan
from vitreuse.compress.fold import DEFAULT_STEPS, STEPS, fold
from vitreuse.config import ModelConfig
from vitreuse.cost.measure import inference_call, time_interleaved
from vitreuse.files.hub import plan_text
from vitreuse.io.process import choose_device
from vitreuse.io.tables import table_of, titled
from vitreuse.model.preprocessing import example

HELP = "measure each step of vitreuse.fold, alone and all together"
NEEDS = {"centring": ("norm_affine",)}  # steps that do nothing without others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a model name, ours or timm's")
    add_plan(parser)
    add_image_size(parser)
    add_device(parser)
    add_dtype(parser, "times")
    add_count(parser, "--batch-size", 8, "images per call")
    add_count(parser, "--repeats", 10, "timed calls of each")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times of the model and of its folded copies, from turns that all took in one run."""
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    model = _model(args).to(device).eval()
    images = example(model, args.batch_size)
    logits = model(images)
    folded = {label: fold(model, steps) for label, steps in _step_sets().items()}
    errors = {label: float((copy(images) - logits).abs().max() / logits.std()) for label, copy in folded.items()}
    candidates = {"unfolded": model, **folded}
    calls = {label: inference_call(copy.to(dtype), images.to(dtype)) for label, copy in candidates.items()}
    timings = time_interleaved(calls, device, args.repeats)
    unfolded_ms = timings["unfolded"].minimum_ms
    return {
        "name": args.name,
        "plan": plan_text(model),
        "image_size_px": list(images.shape[-2:]),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "steps": [
            {
                "step": label,
                "minimum_ms": timing.minimum_ms,
                "speedup": unfolded_ms / timing.minimum_ms,
                "relative_difference": errors.get(label),
            }
            for label, timing in timings.items()
        ],
    }


def _model(args: argparse.Namespace) -> Any:
    """The model in float32, with no bias, norm or scale that an identity would leave out of the proof."""
    keywords = {} if args.image_size is None else {"img_size": args.image_size}
    model: Any = ModelConfig(name=args.name, plan=args.plan, keywords=keywords).create()
    fold(model, ())  # refuses a model that cannot be folded, before anything else is asked of it
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _step_sets() -> dict[str, tuple[str, ...]]:
    """The steps to apply by label: none (a plain model's layers in a plan's form), each, all, the default."""
    alone = [(*NEEDS.get(step, ()), step) for step in STEPS]
    together = {"all steps": tuple(STEPS), "default steps": DEFAULT_STEPS}
    return {"no step": (), **{" + ".join(steps): steps for steps in alone}, **together}


def render(result: dict[str, Any]) -> Group:
    rows, columns = result["image_size_px"]
    title = f"{result['name']} at {rows} x {columns} px in {result['dtype']}, batch {result['batch_size']}"
    remarks = (
        f"speed-up: minimum time of the unfolded model over its own, on {result['device']}, CPU threads: "
        f"{result['threads']}",
        "difference: largest of the logits over their standard deviation, float32, random weights",
    )
    headings = ("step", "minimum (ms)", "speed-up", "difference")
    return titled(title, table_of(headings, map(_cells, result["steps"]), ("step",)), *remarks)


def _cells(step: dict[str, Any]) -> list[str]:
    difference = step["relative_difference"]
    shown = "-" if difference is None else f"{difference:.1e}"
    return [step["step"], f"{step['minimum_ms']:.2f}", f"{step['speedup']:.3f}", shown]
