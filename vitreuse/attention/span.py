"""A square neighbourhood of patches per query: the sparse layers of mixed spans."""

from vitreuse.attention.exact import ExactAttention


class SpanAttention(ExactAttention):
    """Softmax attention of every patch to a width x width neighbourhood of patches and to all prefix tokens.

    Prefix tokens (class, distillation, registers) see everything. Neighbourhoods are truncated at the border.

    Shape: x (B, N, C) to (B, num_queries, C); any grid, non-square ones and those that no tile divides included.
    Exact when: the span covers the grid, width >= 2 max(rows, columns) - 1.
    Differs from the paper: its sparse layers are causal windows of text; here windows are two-dimensional.
    Cost: tiles.py; linear in N for a fixed width.
    Raises: ValueError for an attn_mask, and for fewer tokens than the grid has.
    Paper: Zhang et al., 2023, MASFormer (arXiv 2310.12442).
    """
