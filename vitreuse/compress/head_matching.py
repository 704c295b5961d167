"""Which heads of a layer read the maps of which heads of an earlier one, and the order in which they then stand."""

from __future__ import annotations

import torch
from torch import Tensor

from vitreuse.plan import Plan


def match_heads(distances: Tensor) -> list[int]:
    """For each head to be read, the head of the reading layer that it suits: the assignment of the least sum.

    Args:
        distances: (read, own), between each head that can be read and each of the layer's own; no fewer of its own.

    Returns:
        For each row its column, no column twice.
    """
    from scipy.optimize import linear_sum_assignment  # here, for it takes as long as all of vitreuse

    return linear_sum_assignment(distances.double().cpu().numpy())[1].tolist()


def order_of_heads(matched: list[int], num_heads: int) -> list[int]:
    """The layer's own heads in a new order: those that read others first, as matched, then the rest as they were."""
    return [*matched, *(head for head in range(num_heads) if head not in matched)]


def rows_of_heads(order: list[int], head_dim: int) -> Tensor:
    """Channels (C,) in which the heads stand in a new order."""
    return (torch.tensor(order)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def match_plan(plan: Plan, num_heads: int, distances: Tensor | None) -> dict[int, list[int]]:
    """By reuse layer, for each map that the layer reads, the head of its own that the map suits, each head once.

    A map passes through the layers as attention/reuse.py hands it on; it is known here by the layer and head that it
    has in the original.
    """
    matches: dict[int, list[int]] = {}
    handed: list[tuple[int, int]] = []
    for layer, spec in enumerate(plan):
        if spec.word == "reuse":
            read = handed[: num_heads if spec.number is None else spec.number]
            matches[layer] = [*range(len(read))]
            if distances is not None and read:
                matches[layer] = match_heads(torch.stack([distances[anchor, layer, head] for anchor, head in read]))
            own = order_of_heads(matches[layer], num_heads)[len(read) :]
            handed = [*((layer, head) for head in own), *read]
        elif spec.makes_map:
            handed = [(layer, head) for head in range(num_heads)]
    return matches
