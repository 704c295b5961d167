"""What it would cost a head to mix its values by another head's map: the error of its layer's output.

Unlike a distance between maps it does not count differences where values are alike or are hardly read.

Shapes: L layers, B images, H heads, N tokens, C channels, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse.attention.base import split_heads
from vitreuse.attention.submodules import rows_of
from vitreuse.console import WorkProgress
from vitreuse.similarity import Batches, attention_maps, evaluated, few_at_a_time


@torch.inference_mode()
def measure_head_errors(model: Any, batches: Batches, progress: WorkProgress) -> Tensor:
    """Squared error of a layer's attention, a mean over images, when one head reads the map of an earlier layer's head.

    Only the rows count that the model reads: of a last layer under token pooling those of the class tokens.

    Args:
        model: With exact attention in all layers, as shape.exact_copy makes it; its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.

    Returns:
        (L, L, H, H): at [anchor, layer, i, j] head j of a layer reads the map of head i of the anchor layer; 0 where
        the anchor does not come before the layer.

    Raises:
        ValueError: There are no images.
    """
    num_layers, num_heads = len(model.blocks), model.blocks[0].attn.num_heads
    errors, count = torch.zeros(num_layers, num_layers, num_heads, num_heads, dtype=torch.float64), 0
    with evaluated(model):
        for images in few_at_a_time(model, batches):
            errors += _errors(model, images).double().cpu()
            count += len(images)
            progress.reach(count)
    return (errors / count).float()


def _errors(model: Any, images: Tensor) -> Tensor:
    """The sum over images, rows and channels."""
    tokens: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0])) for block in model.blocks
    ]
    try:
        maps = [made.weights for made in attention_maps(model, images) if made is not None]
    finally:
        for hook in hooks:
            hook.remove()
    errors = images.new_zeros(len(maps), len(maps), maps[0].shape[1], maps[0].shape[1])
    for layer, block in enumerate(model.blocks):
        values = _values(block, tokens[layer])
        rows = model.num_class_rows if block is model.blocks[-1] and model.reads_class_rows else None
        own = maps[layer][:, :, :rows] @ values
        for anchor in range(layer):
            read = torch.einsum("binm,bjmd->bijnd", maps[anchor][:, :, :rows], values)
            errors[anchor, layer] = (read - own[:, None]).square().sum((0, 3, 4))
    return errors


def _values(block: Any, x: Tensor) -> Tensor:
    """A layer's values (B, H, N, D), turned so that they are as long as what the output projection makes of them."""
    attn = block.attn
    start, stop = 2 * attn.dim, 3 * attn.dim
    v = split_heads(F.linear(x, attn.qkv.weight[start:stop], rows_of(attn.qkv.bias, start, stop)), attn.head_dim)
    columns = attn.proj.weight.unflatten(1, (attn.num_heads, attn.head_dim)).transpose(0, 1)  # (H, C, D)
    scale = getattr(block.ls1, "gamma", None)
    turned = torch.linalg.qr(columns if scale is None else scale[:, None] * columns).R  # |R v| = |W v|
    return v @ turned.mT
