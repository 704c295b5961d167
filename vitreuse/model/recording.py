"""What the attentions of a model do in a forward pass, seen from outside: the one place that looks inside a model.

Fused kernels never show their maps, so whoever wants one computes it again from what an attention was given. Works on
timm's layers and on ours; nothing is changed but hooks, which are gone at the end of the block.

Shapes: B images, N tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from vitreuse.attention import ReuseAttention
from vitreuse.attention.base import split_heads


class AttentionCall(NamedTuple):
    """One call of an attention: its arguments, tokens (B, N, C) first, and the tokens that it gave back."""

    inputs: tuple[Any, ...]
    output: Tensor


class Heads(NamedTuple):
    """Queries, keys and values (B, H, N, D) of an attention, queries and keys normalised."""

    q: Tensor
    k: Tensor
    v: Tensor


@contextmanager
def recorded_attention(model: Any) -> Iterator[dict[int, AttentionCall]]:
    """Fills what it gives, by layer, with the newest call of each attention inside the block; no entry without one."""
    calls: dict[int, AttentionCall] = {}

    def record(layer: int, inputs: tuple[Any, ...], output: Any) -> None:
        calls[layer] = AttentionCall(inputs, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hook = block.attn.register_forward_hook(lambda _, *call, layer=layer: record(layer, *call))
            hooks.callback(hook.remove)
        yield calls


def project_heads(attn: Any, x: Tensor) -> Heads:
    """What an attention of timm's or ours makes of tokens (B, N, C), before any projection along the tokens.

    A reuse layer has queries and keys of those heads alone that it does not reuse, none of a map that it reuses whole.
    """
    if not isinstance(attn, ReuseAttention):
        q, k, v = split_heads(attn.qkv(x), attn.head_dim).chunk(3, dim=1)
        return Heads(attn.q_norm(q), attn.k_norm(k), v)
    v = split_heads(attn.v(x), attn.head_dim)
    if attn.qk is None:
        return Heads(v[:, :0], v[:, :0], v)
    q, k = split_heads(attn.qk(x), attn.head_dim).chunk(2, dim=1)
    return Heads(attn.q_norm(q), attn.k_norm(k), v)
