"""Which hidden units of an MLP say most of what it says."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vitreuse.model.plan_weights import Units
from vitreuse.plan import Plan


class _Moments:
    """Sums of hidden units (..., F) and of their squares over all tokens, in float64, as a hook gathers them."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, _: Any, args: tuple[Tensor, ...]) -> None:
        hidden = args[0].flatten(0, -2).double()
        self.count += len(hidden)
        self.sums, self.squares = self.sums + hidden.sum(0), self.squares + hidden.square().sum(0)

    def variance(self) -> Tensor:
        return self.squares / self.count - (self.sums / self.count).square()


@torch.inference_mode()
def contributing_units(original: Any, plan: Plan, batches: Iterable[Tensor]) -> Units:
    """By layer of fewer hidden units, those that contribute most: the variance of a unit over the tokens of images
    times the square of its column of fc2. What a unit says of all tokens alike can go into the bias.

    Args:
        original: The model with all units, whose MLPs end in ``fc2``.
        plan: What it is converted into.
        batches: Images (B, channels, rows, columns).
    """
    columns = {layer: block.mlp.fc2 for layer, block in enumerate(original.blocks) if plan[layer].hidden}
    moments = {layer: _Moments() for layer, fc2 in columns.items() if fc2.in_features != plan[layer].hidden}
    with ExitStack() as hooks:
        for layer, moment in moments.items():
            hooks.callback(columns[layer].register_forward_pre_hook(moment.add).remove)
        for images in batches if moments else ():
            original(images.to(columns[next(iter(columns))].weight.device))
    chosen = {}
    for layer, moment in moments.items():
        contribution = moment.variance() * columns[layer].weight.double().square().sum(0)
        strongest = contribution.sort(descending=True, stable=True).indices[: plan[layer].hidden]
        chosen[layer] = strongest.sort().values.tolist()
    return chosen
