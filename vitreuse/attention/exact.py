"""Full softmax attention, timm's own, with its map or (q, k) handed on when a later layer reuses it."""

from torch import Tensor, nn

from vitreuse.attention import maps
from vitreuse.attention.base import Attention, AttentionConfig, Carry, split_heads
from vitreuse.attention.masks import Mask
from vitreuse.attention.submodules import is_plain_linear, linear_rows

# queries, keys, values, key_proj, value_proj
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class ExactAttention(Attention):
    """Softmax attention of every token to every token.

    Shape: x (B, N, C) to (B, num_queries, C).
    Exact when: always; keys, initialisation and outputs are timm's.
    Cost: 4 N C^2 + 2 N^2 C multiply-adds an image.
    Paper: Dosovitskiy et al., 2020 (arXiv 2010.11929).
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=config.qkv_bias, device=config.device, dtype=config.dtype)
        self.build_output(config, computes_map=True)

    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        """Attention by the layer's own queries, keys and values; low-rank and span layers inherit it."""
        x, mask = self.on_grid(x, grid, mask)
        rows = self.computed_rows(num_queries)
        q, k, v, key_proj, value_proj = self.project(x, rows, grid, carry.layerwise_proj)
        layout, bias = self.layout(grid, rows), carry.span_bias
        if layout.width > 0:
            bias = maps.span_bias(bias if self.takes_span_bias else None, v, layout)
            mask = Mask(bias)
        k = self.k_norm(k)
        mixed, made = maps.attend(self.q_norm(q), k, v, mask, layout, self.attn_drop, self.settings)
        handed = carry._replace(made=made, key_proj=key_proj, value_proj=value_proj, span_bias=bias)
        return self.output(mixed, num_queries), handed._replace(likeness=self.likeness(k, num_queries))

    def project(self, x: Tensor, rows: int | None, grid: tuple[int, int], layerwise_proj: Tensor | None) -> Inputs:
        """Queries (B, H, rows, D) of the first rows, keys and values (B, H, N, D); no token projections."""
        if rows is None or not is_plain_linear(self.qkv):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
            return (q if rows is None else q[:, :, :rows]), k, v, None, None
        q = split_heads(linear_rows(self.qkv, x[:, :rows], 0, self.dim), self.head_dim)
        k, v = split_heads(linear_rows(self.qkv, x, self.dim, 3 * self.dim), self.head_dim).chunk(2, dim=1)
        return q, k, v, None, None

    def macs(self, grid: tuple[int, int], num_queries: int, theoretical: bool) -> dict[str, int]:
        num_tokens = self.tokens_of(grid)
        pairs = self.num_pairs(grid, num_queries, num_tokens, theoretical)
        channels = self.dim + (0 if theoretical else self.num_size_channels(num_tokens))
        return {
            "qkv": (self.num_rows(num_queries, num_tokens) + 2 * num_tokens) * self.dim**2,
            "logits": pairs * channels,
            "values": pairs * channels,
            "proj": num_queries * self.dim**2,
        }
