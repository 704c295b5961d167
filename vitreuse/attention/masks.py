"""What is added to the logits of a map: a mask that a caller gives, or the sizes of keys that stand for several tokens.

Shapes: B images, H heads, N queries, M keys, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which keys a query sees, as torch's scaled_dot_product_attention takes it; of a window its ``span_bias``."""

    attn_mask: Tensor | None = None  # True for what is seen, or a number added to the logits
    is_causal: bool = False
    sizes: Tensor | None = None  # (B, M), how many tokens each key stands for, whose logarithm is added to the logits

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self.attn_mask is not None or self.is_causal


NO_MASK = Mask()


def mask_bias(mask: Mask, logits: Tensor) -> Tensor | None:
    """What a mask adds to logits (..., N, M) of the first N queries."""
    if mask.is_causal:
        return logits.new_full(logits.shape[-2:], float("-inf")).triu_(1)
    attn_mask = first_rows(mask.attn_mask, logits.shape[-2])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return torch.zeros_like(attn_mask, dtype=logits.dtype).masked_fill_(~attn_mask, float("-inf"))
    return attn_mask


def first_rows(attn_mask: Tensor | None, num_rows: int) -> Tensor | None:
    """The part of a mask (..., N, M), (..., 1, M) or (M,) that the first ``num_rows`` queries need."""
    if attn_mask is None or attn_mask.ndim < 2 or attn_mask.shape[-2] == 1:
        return attn_mask
    return attn_mask[..., :num_rows, :]


def log_sizes(mask: Mask, like: Tensor) -> Tensor | None:
    """What sizes add to logits, (B, 1, 1, M) in the dtype of ``like``; None where each key is one token."""
    return None if mask.sizes is None else mask.sizes.log().to(like.dtype)[:, None, None]


def over_heads(bias: Tensor, q: Tensor) -> Tensor:
    """A bias (B, 1, 1, M) for each of the flat heads of queries (B, H, N, D): (B * H, 1, M)."""
    return bias.expand(-1, q.shape[1], -1, -1).flatten(0, 1)


def checked(mask: Mask, v: Tensor) -> Mask:
    """A mask in the dtype of the logits, unless it is a boolean one.

    Raises:
        ValueError: A mask and causal attention were asked for together, which torch refuses too.
    """
    if mask.attn_mask is None:
        return mask
    if mask.is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other: put what is causal into attn_mask.")
    return mask if mask.attn_mask.dtype == torch.bool else Mask(mask.attn_mask.to(v.dtype))
