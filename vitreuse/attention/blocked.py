"""Unfused attention of a few heads at a time, so that their logits stay in the cache; for inference.

Shapes: B images, H heads, N queries, M keys, D head dim.
"""
from typing import Optional

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20


def block_length(item_bytes: int) -> int:
    """How many items of a map, heads or images, make a block: as many as fit into BLOCK_BYTES, or one."""
    return max(1, BLOCK_BYTES // item_bytes)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Optional[Tensor]) -> Tensor:
    """Mixed values (B, H, N, D) of queries (B, H, N, D), keys and values (B, H, M, D); the bias is (N, M).

    The same function as softmax(q k^T * scale + bias) v at once, whose logits of all heads and images are written to
    fresh memory and read again.
    """
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    num_maps = block_length(num_queries * num_keys * q.element_size())
    num_images, num_heads = min(max(1, num_maps // heads), batch), min(num_maps, heads)
    memory = q.new_empty(num_images, num_heads, num_queries, num_keys)
    mixed = q.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)  # as the next layer reads it
    for image in range(0, batch, num_images):
        for head in range(0, heads, num_heads):
            part = (slice(image, image + num_images), slice(head, head + num_heads))
            mixed[part] = _attention(q[part], k[part], v[part], scale, bias, memory)
    return mixed


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Optional[Tensor], memory: Tensor) -> Tensor:
    """Mixed values of one block, whose logits are written to ``memory``, as large or larger."""
    shape = q.shape[:2]
    logits = memory[: shape[0], : shape[1]].flatten(0, 1)
    queries, keys, values = (x.flatten(0, 1).contiguous() for x in (q, k, v))  # with strides products take 5 % longer
    beta = 0 if bias is None else 1
    torch.baddbmm(logits if bias is None else bias, queries, keys.transpose(1, 2), beta=beta, alpha=scale, out=logits)
    torch.softmax(logits, dim=-1, out=logits)
    return torch.bmm(logits, values).unflatten(0, shape)
