"""An earlier layer's map applied to this layer's own values."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

# functions that a symbolic trace leaves whole are named by their file, where it finds them
from vitreuse.attention import lowrank, maps, submodules
from vitreuse.attention.base import Attention, AttentionConfig, Carry, split_heads
from vitreuse.attention.lowrank import projected_length, projection_macs, tokens_first
from vitreuse.attention.masks import Mask
from vitreuse.attention.policy import Call, choose_carried
from vitreuse.attention.submodules import is_plain_linear, linear_rows


@torch.fx.wrap
@register_notrace_function
def new_heads_first(projection: Tensor | None, num_reused_heads: int) -> Tensor | None:
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

    makes_map = False

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.kind = config.options.lowrank_projection
        self.tokens_first = self.projected_dim > 0 and tokens_first(config)
        self.per_head = config.options.lowrank_sharing == "none"
        reused = config.spec.number
        self.num_reused_heads = self.num_heads if reused is None else reused
        self.own_dim = (self.num_heads - self.num_reused_heads) * self.head_dim
        factory = {"bias": config.qkv_bias, "device": config.device, "dtype": config.dtype}
        self.qk = nn.Linear(self.dim, 2 * self.own_dim, **factory) if self.own_dim else None
        self.v = nn.Linear(self.dim, self.dim, **factory)
        self.build_output(config, computes_map=self.own_dim > 0)

    @property
    def num_keys(self) -> int:
        if self.projected_dim == 0:
            return self.num_tokens
        return projected_length(self.num_tokens, self.kind, self.projected_dim)

    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        """Attention by the map or (q, k) in ``carry.made``: maps.reattend mixes this layer's values by it."""
        x, mask = self.on_grid(x, grid, mask)
        rows = self.computed_rows(num_queries)
        own = self.own_queries_and_keys(x, rows, carry.key_proj)
        v = self.project_values(x, carry.value_proj)
        layout = self.layout(grid, rows)
        if layout.width > 0:
            mask = Mask(maps.span_bias(carry.span_bias, v, layout))
        made = maps.first_queries(carry.made, rows)
        mixed, made = maps.reattend(made, own, v, mask, layout, self.attn_drop, self.settings)
        key_proj, value_proj = self.handed_projections(carry.key_proj, carry.value_proj)
        handed = carry._replace(made=made, key_proj=key_proj, value_proj=value_proj)
        return self.output(mixed, num_queries), handed._replace(likeness=self.likeness(v, num_queries))

    def own_queries_and_keys(
        self, x: Tensor, rows: int | None, key_proj: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Queries (B, H - K, N, D) and keys (B, H - K, M, D) of the heads that are not reused, None when all are."""
        if self.qk is None:
            return None
        if self.per_head:
            key_proj = submodules.rows_of(key_proj, self.num_reused_heads, self.num_heads)
        if is_plain_linear(self.qk) and (self.tokens_first or rows is not None):
            q = split_heads(linear_rows(self.qk, x if rows is None else x[:, :rows], 0, self.own_dim), self.head_dim)
            k = self._keys_of_rows(self.qk, x, key_proj, (self.own_dim, 2 * self.own_dim))
        else:
            q, k = split_heads(self.qk(x), self.head_dim).chunk(2, dim=1)
            q, k = (q if rows is None else q[:, :, :rows]), self._projected(k, key_proj)
        return self.q_norm(q), self.k_norm(k)

    def project_values(self, x: Tensor, projection: Tensor | None) -> Tensor:
        """Values (B, H, M, D) for the tokens that the anchor's map has as columns."""
        if self.tokens_first and is_plain_linear(self.v):
            return self._keys_of_rows(self.v, x, projection, (0, self.dim))
        return self._projected(split_heads(self.v(x), self.head_dim), projection)

    def _keys_of_rows(self, linear: nn.Linear, x: Tensor, projection: Tensor | None, rows: tuple[int, int]) -> Tensor:
        """Output channels ``rows`` of a plain linear layer for each key, (B, heads, M, D)."""
        if self.tokens_first:
            y = lowrank.linear_of_projected(linear, x, projection, self.kind, self.projected_dim, rows)
            return split_heads(y, self.head_dim)
        return self._projected(split_heads(linear_rows(linear, x, *rows), self.head_dim), projection)

    def _projected(self, y: Tensor, projection: Tensor | None) -> Tensor:
        """Keys or values (B, heads, N, D) of all tokens as those (B, heads, M, D) of the map's columns."""
        return y if self.projected_dim == 0 else lowrank.project_tokens(y, projection, self.kind, self.projected_dim)

    def handed_projections(
        self, key_proj: Tensor | None, value_proj: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """E and F as a later layer needs them: unshared ones follow the heads of the map, new heads first."""
        if self.num_readers == 0:
            return None, None
        if self.per_head and self.qk is not None:
            reused = self.num_reused_heads
            return new_heads_first(key_proj, reused), new_heads_first(value_proj, reused)
        return key_proj, value_proj

    def macs(self, grid: tuple[int, int], num_queries: int, theoretical: bool) -> dict[str, int]:
        num_tokens = self.tokens_of(grid)
        low_rank = self.projected_dim > 0
        num_keys = projected_length(num_tokens, self.kind, self.projected_dim) if low_rank else num_tokens
        projected = num_keys if self.tokens_first else num_tokens
        pairs = self.num_pairs(grid, num_queries, num_keys, theoretical)
        parts = {
            "qkv": self.num_rows(num_queries, num_tokens) * self.dim * self.own_dim
            + projected * self.dim * (self.own_dim + self.dim),
            "logits": pairs * self.own_dim,
            "values": pairs * self.dim,
            "proj": num_queries * self.dim**2,
        }
        if low_rank:
            key_channels = (self.dim if self.tokens_first else self.own_dim) if self.own_dim else 0
            products = projection_macs(num_tokens, self.kind, self.projected_dim)
            parts["token_projection"] = products * (self.dim + key_channels)
        if self.recomputes_map(num_keys, theoretical):
            channels = self.dim + self.num_size_channels(num_keys)
            parts |= {"logits": pairs * channels, "values": pairs * channels}
        return parts

    def recomputes_map(self, num_keys: int, theoretical: bool) -> bool:
        """Whether (q, k) is carried on this device in inference, so that the reused heads' maps are computed again."""
        weight = self.proj.weight
        anchor = self.settings._replace(training=False, num_readers=self.anchor_readers)
        call = Call(weight.device.type, weight.dtype, num_keys, width=self.width, has_sizes=self.has_sizes)
        return not theoretical and choose_carried(call, anchor)[0] == "qk"
