"""Which heads of one layer stand for which of another."""

from __future__ import annotations

import torch
from torch import Tensor


def match_heads(distances: Tensor) -> list[int]:
    """For each head to be read, the head of the reading layer that it suits: the assignment of the least sum.

    Args:
        distances: (read, own), between each head that can be read and each of the layer's own; no fewer of its own.

    Returns:
        For each row its column, no column twice.

    Raises:
        ValueError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError("matching heads needs SciPy: install it with pip install 'vitreuse[convert]'.") from error
    return linear_sum_assignment(distances.double().cpu().numpy())[1].tolist()


def order_of_heads(matched: list[int], num_heads: int) -> list[int]:
    """The layer's own heads in a new order: those that read others first, as matched, then the rest as they were."""
    return [*matched, *(head for head in range(num_heads) if head not in matched)]


def rows_of_heads(order: list[int], head_dim: int) -> Tensor:
    """Channels (C,) in which the heads stand in a new order."""
    return (torch.tensor(order)[:, None] * head_dim + torch.arange(head_dim)).flatten()
