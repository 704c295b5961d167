"""Which rows of attention maps are looked at, where all of them would be too many.

A map has a row for each token. What is measured on maps is a mean or a sum over rows, so that some rows of each image,
drawn by a seed, tell it without bias: those of all prefix tokens, which matter most and are few, and of patches drawn
without replacement, each of which stands for as many as were not drawn.

Shapes: B images, N tokens, R rows looked at, P prefix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NUM_ROWS = 256  # of patches, per image: all of 16 x 16


@dataclass(frozen=True)
class RowSample:
    """The rows that are looked at in the maps of some images, whichever layer makes them.

    Attributes:
        order: (B, patches), the patches of each image in the order in which they are drawn.
        num_prefix_tokens: P, whose rows are looked at always.
        num_rows: How many patches are drawn; all where a map has no more.
    """

    order: Tensor
    num_prefix_tokens: int
    num_rows: int

    def rows(self, num_tokens: int) -> Tensor:
        """Numbers (B, R) of the rows of a map of N tokens, ascending, prefix tokens first.

        After a merge there are fewer tokens than in the first layer: of those that are left the first are drawn.
        """
        left = self.order[self.order < num_tokens - self.num_prefix_tokens].view(len(self.order), -1)
        drawn = left[:, : self.num_rows].sort().values + self.num_prefix_tokens
        prefix = torch.arange(self.num_prefix_tokens, device=drawn.device).expand(len(drawn), -1)
        return torch.cat([prefix, drawn], dim=1)

    def counts(self, num_tokens: int) -> Tensor:
        """How many rows of a map of N tokens each of those that are looked at stands for: (R,), of sum N, float32."""
        num_patches = num_tokens - self.num_prefix_tokens
        num_drawn = min(self.num_rows, num_patches)
        counts = torch.ones(self.num_prefix_tokens + num_drawn, device=self.order.device)
        counts[self.num_prefix_tokens :] = num_patches / max(1, num_drawn)
        return counts

    def mean(self, of_rows: Tensor, num_tokens: int) -> Tensor:
        """An estimate of the mean over all N rows (...) by those that are looked at (..., R), without bias."""
        return of_rows @ self.counts(num_tokens).to(of_rows) / num_tokens

    def to(self, device: torch.device) -> RowSample:
        """The same on another device."""
        return replace(self, order=self.order.to(device))


def draw_rows(
    num_images: int, num_patches: int, num_prefix_tokens: int, num_rows: int | None, generator: torch.Generator
) -> RowSample:
    """A sample for the next images, each with its own rows, whatever the batch; all rows where num_rows is None."""
    order = torch.stack([torch.randperm(num_patches, generator=generator) for _ in range(num_images)])
    return RowSample(order, num_prefix_tokens, num_patches if num_rows is None else num_rows)


def count_rows(model: Any, num_rows: int | None) -> tuple[int, int]:
    """How many rows of a map of a ViT's first layer are looked at, and how many it has, on images of the built size.

    Raises:
        ValueError: num_rows is less than one.
    """
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}: give 1 or more rows of patches per image, or None for all.")
    num_patches = model.patch_embed.num_patches
    looked_at = num_patches if num_rows is None else min(num_rows, num_patches)
    return model.num_prefix_tokens + looked_at, model.num_prefix_tokens + num_patches
