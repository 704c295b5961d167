"""Tokens merged into others that are like them: fewer rows for all that follows, without a word trained.

Patch tokens alternate between set A, the first of them, and set B; prefix tokens (class, distillation, registers) are
in neither and never merge. Each token of A is tied to the token of B that is most like it, and the r strongest ties are
merged into the tokens of B; all that are left keep their order. Of equals the first is taken, on every device.

After ToMe (Bolya et al., 2022, arXiv 2210.09461), where tokens do not keep their order.

Shapes: B images, N tokens, H heads, D head dim, C channels, r merged tokens, N0 tokens of the first layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Merging(NamedTuple):
    """Which tokens of some images merge into which.

    Attributes:
        kept: (B, N - r), the tokens that are left, by their places before, in order.
        merged: (B, r), those that are not.
        into: (B, r), the places after of those that they become part of.
        moved: (B, N), the place after of every token.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor
    moved: Tensor


def choose_merging(keys: Tensor, num_prefix_tokens: int, num_merged: int) -> Merging:
    """The r strongest ties of tokens by the cosine of their keys (B, H, N, D), the mean over heads, in float32."""
    likeness = F.normalize(keys.float().mean(1)[:, num_prefix_tokens:], dim=-1)
    ties = likeness[:, ::2] @ likeness[:, 1::2].mT  # of each token of A with each of B
    partner = ties.argmax(-1)  # the first of equals, as torch promises
    strength = ties.gather(-1, partner[..., None])[..., 0]
    strongest = strength.sort(dim=-1, descending=True, stable=True).indices[:, :num_merged]
    merged = num_prefix_tokens + 2 * strongest
    tied = num_prefix_tokens + 2 * partner.gather(1, strongest) + 1
    return _merging(merged, tied, keys.shape[2])


def _merging(merged: Tensor, tied: Tensor, num_tokens: int) -> Merging:
    """The places before and after of tokens of which those that merge, and into which, are known."""
    num_kept = num_tokens - merged.shape[1]
    stays = torch.ones(len(merged), num_tokens, dtype=torch.int64, device=merged.device).scatter_(1, merged, 0)
    moved = stays.cumsum(1) - 1
    into = moved.gather(1, tied)
    slots = torch.where(stays.bool(), moved, num_kept)  # what goes is written behind what is kept, and cut off
    places = torch.arange(num_tokens, device=merged.device).expand(len(merged), -1)
    kept = places.new_zeros(len(merged), num_kept + 1).scatter_(1, slots, places)[:, :num_kept]
    return Merging(kept, merged, into, moved.scatter(1, merged, into))


def merge(x: Tensor, sizes: Tensor, merging: Merging) -> tuple[Tensor, Tensor]:
    """Tokens (B, N - r, C) and their sizes (B, N - r): each is the mean, weighted by sizes, of what it is made of.

    A token d that others become part of moves by the sum of (x_a - x_d) s_a / s: only the r rows that merge are computed.
    """
    kept, gone, gone_sizes = _rows(x, merging.kept), _rows(x, merging.merged), sizes.gather(1, merging.merged)
    sizes = sizes.gather(1, merging.kept).scatter_add(1, merging.into, gone_sizes)
    share = (gone_sizes / sizes.gather(1, merging.into))[..., None].to(x.dtype)
    change = (gone - _rows(kept, merging.into)) * share
    return kept.scatter_add(1, merging.into[..., None].expand(-1, -1, x.shape[-1]), change), sizes


def unmerge(x: Tensor, places: Tensor) -> Tensor:
    """All tokens (B, N0, C) of merged ones (B, N, C), each that of the place (B, N0) where it went."""
    return _rows(x, places)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, n, C) of x by numbers (B, n)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
