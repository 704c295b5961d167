"""One file per kind of layer. A new kind is a file here, a word in the plan language and an entry in this table."""

from vitreuse.attention.base import EMPTY_CARRY, Attention, AttentionConfig, Carry
from vitreuse.attention.exact import ExactAttention
from vitreuse.attention.lowrank import LowRankAttention
from vitreuse.attention.none import NoAttention
from vitreuse.attention.reuse import ReuseAttention
from vitreuse.attention.span import SpanAttention

ATTENTION = {
    "exact": ExactAttention,
    "reuse": ReuseAttention,
    "lowrank": LowRankAttention,
    "span": SpanAttention,
    "none": NoAttention,
    "skip": NoAttention,
}

__all__ = [
    "ATTENTION",
    "EMPTY_CARRY",
    "Attention",
    "AttentionConfig",
    "Carry",
    "ExactAttention",
    "LowRankAttention",
    "NoAttention",
    "ReuseAttention",
    "SpanAttention",
]
