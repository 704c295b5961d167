"""Which hidden units of an MLP say most of what all of them say.

Once the second matrix is fitted again, the units that stay take over what is a linear function of them of those that
go. So the units are chosen one by one: always the one of which most is left that those before cannot say, its remaining
variance times the square of its column. This is a Cholesky decomposition with pivots, of which all numbers of units are
beginnings.

Shapes: B images, N tokens, C channels, F hidden units, R rows of all images and tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from vitreuse.attention import EMPTY_CARRY
from vitreuse.compress.recording import inputs_of
from vitreuse.compress.ridge import NormalEquations, images_of, row_weights
from vitreuse.io.spool import Spool
from vitreuse.model.plan_weights import Units
from vitreuse.plan import Plan

_State = tuple[Tensor, tuple[int, int] | None]  # tokens (B, N, C), and their grid where it is not the built one

DAMPING = 1e-3  # of the mean variance of a unit, added to each: what is never seen apart counts as this much apart


def unit_ranking(covariance: Tensor, columns: Tensor) -> list[int]:
    """The units from the first that is chosen to the last.

    Args:
        covariance: (F, F), of the units over tokens of images, or their products where no bias takes a mean.
        columns: (F,), the square of each unit's column of the second matrix.
    """
    num_units = len(columns)
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(num_units).to(covariance)
    factor, left = torch.zeros_like(damped), damped.diagonal().clone()
    is_chosen, chosen = torch.zeros(num_units, dtype=torch.bool, device=left.device), []
    for number in range(num_units):
        unit = int((left * columns).masked_fill(is_chosen, -1.0).argmax())
        said = damped[:, unit] - factor[:, :number] @ factor[unit, :number]  # with what the units before cannot say
        factor[:, number] = said / left[unit].sqrt()
        left = (left - factor[:, number].square()).clamp_min(0.0)
        is_chosen[unit] = True
        chosen.append(unit)
    return chosen


@torch.inference_mode()
def contributing_units(original: Any, plan: Plan, batches: Iterable[Tensor]) -> Units:
    """By layer of fewer hidden units, those that stay, in their order.

    Args:
        original: The model with all units, one of ours, whose MLPs end in ``fc2``.
        plan: What it is converted into.
        batches: Images (B, channels, rows, columns). Their tokens lie in a temporary folder, so that memory does not
            grow with them.
    """
    fewer = {layer for layer, spec in enumerate(plan) if spec.hidden}
    fewer = {layer for layer in fewer if original.blocks[layer].mlp.fc2.in_features != plan[layer].hidden}
    if not fewer:
        return {}
    device, chosen = next(original.parameters()).device, {}
    with Spool() as states:
        for images in map(images_of, batches):
            states.append(original.embed(images.to(device)))
        for layer, block in enumerate(original.blocks[: max(fewer) + 1]):
            if layer in fewer:
                equations = reduce(operator.add, map(partial(_products, block), states))
                ranking = unit_ranking(equations.covariance(), block.mlp.fc2.weight.double().square().sum(0))
                chosen[layer] = sorted(ranking[: plan[layer].hidden])
            states.replace(partial(_behind, block))
    return chosen


def _behind(block: Any, state: _State) -> _State:
    """The tokens behind a layer."""
    tokens, grid = state
    return block(tokens, EMPTY_CARRY, grid)[0], grid


def _products(block: Any, state: _State) -> NormalEquations:
    """Normal equations of the hidden units of a layer and no errors, in float32: units are ranked by them, and nothing
    is solved."""
    tokens, grid = state
    with inputs_of(block.mlp.fc2) as hidden:
        block(tokens, EMPTY_CARRY, grid)
    weights, features = row_weights(hidden[0], None, block.attn.num_prefix_tokens), hidden[0].flatten(0, 1)
    has_bias = block.mlp.fc2.bias is not None
    return NormalEquations.of(features, features[:, :0], weights.flatten(), has_bias, torch.float32)
