"""An earlier layer's map applied to this layer's own values."""
from typing import Dict, Optional, Tuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.attention.base import (
    Attention,
    AttentionConfig,
    Carry,
    linear_params,
    rows_of,
    split_heads,
    with_all_tokens,
    without_mask,
)
from vitreuse.attention.lowrank import projected_heads, projected_length, projection_macs, tokens_first
from vitreuse.attention.maps import carries_map, reattend, span_bias


@torch.fx.wrap
@register_notrace_function
def new_heads_first(projection: Optional[Tensor], num_reused_heads: int) -> Optional[Tensor]:
    """A token projection per head in the order of the handed-on map's heads: those computed here, then reused ones."""
    return None if projection is None else projection.roll(-num_reused_heads, 0)


class ReuseAttention(Attention):
    """Values of this layer mixed by the map of an earlier one; a partial layer computes the maps of its other heads.

    Of H heads the first K read the first K heads of what was handed on, the other H - K the layer's own maps, which
    are computed as the anchor's are: over the same span, or the same k projected tokens. What is handed on has the
    new heads first. Gradients flow through the map to the layer that made it. Dropout on the map is drawn afresh.

    Shape: x (B, N, C) to (B, num_queries, C); ``attn.qk`` holds the rows of q, then k, of the H - K computed heads.
    Exact when: K = 0 (``reuse:0``), given the anchor's kind.
    Differs from the paper: the map may be low-rank or windowed; (q, k) may be carried and the map recomputed.
    Cost: full reuse of an exact map 2 N C^2 + N^2 C multiply-adds an image, against 4 N C^2 + 2 N^2 C.
    Raises: ValueError when nothing was handed on; for an attn_mask over a span or low-rank anchor.
    Paper: Bhojanapalli et al., 2021, Reuse Transformer (arXiv 2110.06821); full reuse in every lazy block:
        Ying et al., 2021, LazyFormer (arXiv 2102.12702).
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        assert config.anchor is not None
        self.anchor_word = config.anchor.word
        self.width = config.anchor.number or 0 if self.anchor_word == "span" else 0
        self.projected_dim = config.anchor.number or 0 if self.anchor_word == "lowrank" else 0
        self.kind = config.lowrank_projection
        self.tokens_first = tokens_first(config)
        self.per_head = config.lowrank_sharing == "none"
        reused = config.spec.number
        self.num_reused_heads = self.num_heads if reused is None else reused
        self.own_dim = (self.num_heads - self.num_reused_heads) * self.head_dim
        factory = {"bias": config.qkv_bias, "device": config.device, "dtype": config.dtype}
        self.qk = nn.Linear(self.dim, 2 * self.own_dim, **factory) if self.own_dim else None
        self.v = nn.Linear(self.dim, self.dim, **factory)
        self.build_output(config, computes_map=self.own_dim > 0)

    def forward(
        self,
        x: Tensor,
        carry: Carry,
        grid: Optional[Tuple[int, int]] = None,
        num_queries: Optional[int] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Tuple[Tensor, Carry]:
        if grid is None:
            grid = self.grid
        if self.anchor_word != "exact":
            x = with_all_tokens(self.anchor_word, x, grid, self.num_prefix_tokens)
            attn_mask = without_mask(self.anchor_word, attn_mask, is_causal)
            is_causal = False
        rows = self.computed_rows(num_queries)
        own_q, own_k = self.own_queries_and_keys(x, rows, carry.key_proj)
        v = self.project(x, self.v.weight, self.v.bias, carry.value_proj)
        if self.width > 0 and rows is None:
            attn_mask = span_bias(carry.span_bias, v, grid, self.width, self.num_prefix_tokens)
        mixed, weights, prefix_weights, q, k = reattend(
            carry.weights,
            carry.prefix_weights,
            carry.q,
            carry.k,
            own_q,
            own_k,
            v,
            self.scale,
            self.num_reused_heads,
            rows,
            grid,
            self.width,
            self.num_prefix_tokens,
            attn_mask,
            is_causal,
            self.dropout_p(),
            self.fused_attn,
            self.costs,
            self.num_readers > 0,
        )
        key_proj, value_proj = self.handed_projections(carry.key_proj, carry.value_proj)
        handed = Carry(weights, prefix_weights, q, k, key_proj, value_proj, carry.layerwise_proj, carry.span_bias)
        return self.output(mixed, num_queries), handed

    def own_queries_and_keys(
        self, x: Tensor, rows: Optional[int], key_proj: Optional[Tensor]
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Queries and keys (B, H - K, N, D) of the heads that are not reused, None when all are."""
        if self.qk is None:
            return None, None
        queries = x if rows is None else x[:, :rows]
        weight, bias = self.qk.weight, self.qk.bias
        q = F.linear(queries, weight[: self.own_dim], rows_of(bias, 0, self.own_dim))
        if self.per_head:
            key_proj = rows_of(key_proj, self.num_reused_heads, self.num_heads)
        k = self.project(x, weight[self.own_dim :], rows_of(bias, self.own_dim, 2 * self.own_dim), key_proj)
        return self.q_norm(split_heads(q, self.head_dim)), self.k_norm(k)

    def project(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], projection: Optional[Tensor]) -> Tensor:
        """Keys or values (B, heads, M, D) for the tokens that the anchor's map has as columns."""
        if self.projected_dim == 0:
            return split_heads(F.linear(x, weight, bias), self.head_dim)
        return projected_heads(
            x, weight, bias, projection, self.kind, self.projected_dim, self.tokens_first, self.head_dim
        )

    def handed_projections(
        self, key_proj: Optional[Tensor], value_proj: Optional[Tensor]
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """E and F as a later layer needs them: unshared ones follow the heads of the map, new heads first."""
        if self.num_readers == 0:
            return None, None
        if self.per_head and self.qk is not None:
            reused = self.num_reused_heads
            return new_heads_first(key_proj, reused), new_heads_first(value_proj, reused)
        return key_proj, value_proj

    def macs(self, grid: Tuple[int, int], num_queries: int, theoretical: bool) -> Dict[str, int]:
        num_tokens = self.num_prefix_tokens + grid[0] * grid[1]
        low_rank = self.projected_dim > 0
        num_keys = projected_length(num_tokens, self.kind, self.projected_dim) if low_rank else num_tokens
        projected = num_keys if low_rank and self.tokens_first else num_tokens
        pairs = self.num_pairs(grid, num_queries, num_keys, theoretical)
        parts = {
            "qkv": self.num_rows(num_queries, num_tokens) * self.dim * self.own_dim
            + projected * self.dim * (self.own_dim + self.dim),
            "logits": pairs * (self.dim if self.recomputes_map(num_keys, theoretical) else self.own_dim),
            "values": pairs * self.dim,
            "proj": num_queries * self.dim**2,
        }
        if low_rank:
            key_channels = (self.dim if self.tokens_first else self.own_dim) if self.own_dim else 0
            products = projection_macs(num_tokens, self.kind, self.projected_dim)
            parts["token_projection"] = products * (self.dim + key_channels)
        return parts

    def recomputes_map(self, num_keys: int, theoretical: bool) -> bool:
        """Whether (q, k) is carried on this device in inference, so that the reused heads' maps are computed again."""
        weight = self.proj.weight
        return not theoretical and not carries_map(
            self.reuse_backend,
            self.costs,
            weight.device.type,
            weight.dtype,
            False,
            num_keys,
            self.width,
            self.anchor_readers,
            0.0,
        )

    def num_params(self) -> int:
        own = 0 if self.qk is None else linear_params(self.qk)
        return own + linear_params(self.v) + self.num_output_params()
