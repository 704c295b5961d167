"""No attention: the control that every method must beat."""

import torch
from torch import Tensor

from vitreuse.attention.base import AttentionConfig, Carry, CarryingAttention
from vitreuse.attention.masks import Mask


class NoAttention(CarryingAttention):
    """No attention: the layer is its MLP alone, the control that every method must beat.

    Its block skips it; the carry passes it by.

    Cost: none.
    Source: attention removed from whole layers, as the lambda-ViT study does.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.num_prefix_tokens = config.num_prefix_tokens
        self.place(config.plan, config.layer)

    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        return torch.zeros_like(x if num_queries is None else x[:, :num_queries]), carry

    def macs(self, grid: tuple[int, int], num_queries: int, theoretical: bool) -> dict[str, int]:
        """No products."""
        return {}
