"""Every plan of the tests' table on the device, forward and backward, against the CPU; five of them compiled whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import CASES, Case, images
from torch import Tensor, nn

LIMITS = {"float32": 1e-3, "bfloat16": 0.1}  # of the largest difference, relative to the largest number
COMPILED = ("reuse", "lowrank headwise linear reused", "span dense reused", "merge in every layer", "linear distilled")


def check(setting: Any) -> list[dict[str, Any]]:
    """A row for each plan and precision, with the largest difference of a logit or gradient, and for each compiled."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    whole = COMPILED[:2] if setting.is_small else COMPILED
    cases = {name: CASES[name] for name in COMPILED} if setting.is_small else CASES
    rows = [compared(name, case, precision, setting.device) for name, case in cases.items() for precision in LIMITS]
    return rows + [compiled(name, CASES[name], setting.device) for name in whole]


def compared(name: str, case: Case, precision: str, device: str) -> dict[str, Any]:
    """How far a plan's logits and gradients are from those of the CPU in float32."""
    model = case.build().float().eval()
    x = images(case.grid, dtype=torch.float32)
    expected, found = answered(model, x, "float32"), answered(copy.deepcopy(model).to(device), x.to(device), precision)
    apart = max(_apart(theirs, ours) for theirs, ours in zip(expected, found, strict=True))
    merges = precision != "float32" and case.num_merged > 0  # rounding chooses other pairs, and nothing is comparable
    is_wrong = not apart < float("inf") if merges else not apart <= LIMITS[precision]
    wrong = f"{name} in {precision} is {apart:.2g} apart" if is_wrong else None
    return {"plan": case.plan, "name": name, "precision": precision, "apart": apart, "wrong": wrong}


def answered(model: nn.Module, x: Tensor, precision: str) -> list[Tensor]:
    """The logits of images, and every gradient of a sum of them, on the CPU in float32."""
    with torch.autocast(x.device.type, getattr(torch, precision), enabled=precision != "float32"):
        said = model(x)
    logits = sum(said) if isinstance(said, tuple) else said
    logits.float().sin().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().float().cpu() for tensor in (logits, *grads)]


def compiled(name: str, case: Case, device: str) -> dict[str, Any]:
    """How far a plan compiled as one graph is from itself."""
    model = case.build().float().eval().to(device)
    x = images(case.grid, dtype=torch.float32).to(device)
    with torch.no_grad():
        apart = _apart(model(x), torch.compile(model, fullgraph=True)(x))
    torch.compiler.reset()
    wrong = f"{name}, compiled, is {apart:.2g} apart" if not apart <= LIMITS["float32"] else None
    return {"plan": case.plan, "name": name, "precision": "float32, compiled", "apart": apart, "wrong": wrong}


def _apart(expected: Tensor, found: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
