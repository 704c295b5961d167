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
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    step = min(len(q), block_length(num_queries * num_keys * q.element_size()))
    block = q.new_empty(step, num_queries, num_keys)
    mixed = q.new_empty(len(q), num_queries, head_dim)
    for first in range(0, len(q), step):
        last = min(first + step, len(q))
        logits = block[: last - first]
        if bias is None:
            torch.baddbmm(logits, q[first:last], k[first:last], beta=0, alpha=scale, out=logits)
        else:
            torch.baddbmm(bias, q[first:last], k[first:last], alpha=scale, out=logits)
        torch.softmax(logits, dim=-1, out=logits)
        torch.bmm(logits, v[first:last], out=mixed[first:last])
    return mixed.view(batch, heads, num_queries, head_dim)
