"""Windows of a patch grid as tiles with a halo, so that the cost of a span follows the window and not the grid.

A tile of rows x columns queries sees itself and a halo of width // 2 patches around it; a mask cuts this square down
to each query's exact neighbourhood. Neighbourhoods are truncated at the border of the grid.

Shapes: B images, H heads, P prefix tokens, N = P + patches, D head dim, T tiles, Q queries of a tile, K keys of a halo.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

DENSE_SHARE = 0.44  # of the grid under a tile's halo, from which on a dense map is faster


def tile_size(grid: tuple[int, int], width: int) -> tuple[int, int]:
    """Rows and columns of a tile: of two neighbouring sizes the one that pads the grid less, never above the grid."""
    side = max(7, width // 2)
    return _fit(grid[0], side), _fit(grid[1], side)


def _fit(length: int, side: int) -> int:
    padding, larger_padding = -length % side, -length % (side + 1)
    return min(length, side if padding <= larger_padding else side + 1)


def covers_grid(grid: tuple[int, int], width: int) -> bool:
    """Whether one tile with its halo covers so much of the grid that a dense masked map is faster than tiles.

    On a CPU it is from a share of 0.44 up: 21 x 21 patches and width 7 (experiments.md).
    """
    rows, columns = tile_size(grid, width)
    halo = min(rows + width - 1, grid[0]) * min(columns + width - 1, grid[1])
    return halo >= DENSE_SHARE * grid[0] * grid[1]


def tiles_along(length: int, size: int) -> int:
    """Number of tiles of ``size`` that cover ``length``."""
    return (length + size - 1) // size


def neighbourhood_bias(
    grid: tuple[int, int], width: int, num_prefix_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Dense bias (N, N): 0 where a query sees a key, prefix tokens and patches within the span, and -inf elsewhere."""
    rows = _bias(torch.arange(grid[0], device=device), torch.arange(grid[0], device=device), width, dtype)
    columns = _bias(torch.arange(grid[1], device=device), torch.arange(grid[1], device=device), width, dtype)
    return F.pad(_over_both_axes(rows, columns), (num_prefix_tokens, 0, num_prefix_tokens, 0))


def tile_bias(
    grid: tuple[int, int], width: int, num_prefix_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Bias (T, Q, P + K): 0 where a query of a tile sees a prefix token or a patch of the halo, and -inf elsewhere.

    Without prefix tokens a padded query, which is cut off later, sees no key at all: it is shown all of them, since the
    gradient of a row of -inf is NaN.
    """
    near_rows, inside_rows = _axis_biases(grid[0], tile_size(grid, width)[0], width, dtype, device)
    near_columns, inside_columns = _axis_biases(grid[1], tile_size(grid, width)[1], width, dtype, device)
    near = F.pad(_over_both_axes(near_rows, near_columns), (num_prefix_tokens, 0))
    inside = F.pad(_over_both_axes(inside_rows, inside_columns), (num_prefix_tokens, 0))
    bias = near + inside[:, None]
    if num_prefix_tokens > 0:
        return bias
    return bias.masked_fill(bias.isinf().all(dim=-1, keepdim=True), 0.0)


def _axis_biases(length: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis: (queries, halo) of the span, the same in every tile, and (tiles, halo) of the grid's border."""
    halo = torch.arange(-(width // 2), size + width // 2, device=device)
    near = _bias(torch.arange(size, device=device), halo, width, dtype)
    position = torch.arange(tiles_along(length, size), device=device)[:, None] * size + halo
    outside = (position < 0) | (position >= length)
    return near, torch.zeros_like(outside, dtype=dtype).masked_fill(outside, float("-inf"))


def _bias(queries: Tensor, keys: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(queries, keys): 0 where two positions of an axis are within the span, -inf elsewhere."""
    far = (queries[:, None] - keys).abs() > width // 2
    return torch.zeros_like(far, dtype=dtype).masked_fill(far, float("-inf"))


def _over_both_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Biases (a, b) and (c, d) of two axes as the one (a * c, b * d) of the plane."""
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def to_tiles(tokens: Tensor, grid: tuple[int, int], width: int, num_prefix_tokens: int) -> Tensor:
    """Queries (B, H, N, D) of the patches cut into tiles (B, H, T, Q, D); beyond the border any patch stands in."""
    rows, columns = tile_size(grid, width)
    index = _tile_index(grid, (rows, columns), 0, tokens.device)
    return _gather(tokens, index + num_prefix_tokens)


def to_halos(tokens: Tensor, grid: tuple[int, int], width: int, num_prefix_tokens: int) -> Tensor:
    """Keys or values (B, H, N, D) as each tile sees them: (B, H, T, P + K, D), prefix tokens first; beyond the border
    any patch stands in, which the bias hides."""
    index = _tile_index(grid, tile_size(grid, width), width // 2, tokens.device)
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(index.shape[0], -1)
    return _gather(tokens, torch.cat([prefix, index + num_prefix_tokens], dim=1))


def from_tiles(tiles: Tensor, grid: tuple[int, int], width: int) -> Tensor:
    """Inverse of ``to_tiles``: (B, H, T, Q, D) back to the patches (B, H, rows * columns, D)."""
    rows, columns = tile_size(grid, width)
    row = torch.arange(grid[0], device=tiles.device)[:, None]
    column = torch.arange(grid[1], device=tiles.device)
    tile = row // rows * tiles_along(grid[1], columns) + column // columns
    inside = row % rows * columns + column % columns
    return tiles.flatten(2, 3).index_select(2, (tile * (rows * columns) + inside).flatten())


def _tile_index(grid: tuple[int, int], size: tuple[int, int], halo: int, device: torch.device) -> Tensor:
    """Numbers (T, rows * columns) of the patches of each tile with a halo around it, clamped to the grid."""
    rows = _positions(grid[0], size[0], halo, device)
    columns = _positions(grid[1], size[1], halo, device)
    return (rows[:, None, :, None] * grid[1] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _positions(length: int, size: int, halo: int, device: torch.device) -> Tensor:
    """Positions along one axis that each tile and its halo cover, clamped to the grid: (tiles, positions)."""
    starts = torch.arange(tiles_along(length, size), device=device) * size
    return (starts[:, None] + torch.arange(-halo, size + halo, device=device)).clamp(0, length - 1)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, H, N, D) in the order of (T, L) numbers: (B, H, T, L, D)."""
    return tokens.index_select(2, index.flatten()).unflatten(2, (index.shape[0], index.shape[1]))


def span_pairs(grid: tuple[int, int], width: int, num_prefix_tokens: int, theoretical: bool) -> int:
    """Query-key pairs of one map: of the exact neighbourhoods, or of the products that run for them."""
    num_patches = grid[0] * grid[1]
    num_tokens = num_prefix_tokens + num_patches
    prefix_rows = num_prefix_tokens * num_tokens
    if theoretical:
        seen = _neighbours(grid[0], width // 2) * _neighbours(grid[1], width // 2)
        return prefix_rows + num_patches * num_prefix_tokens + seen
    if covers_grid(grid, width):
        return num_tokens**2
    rows, columns = tile_size(grid, width)
    num_tiles = tiles_along(grid[0], rows) * tiles_along(grid[1], columns)
    keys = num_prefix_tokens + (rows + width - 1) * (columns + width - 1)
    return prefix_rows + num_tiles * rows * columns * keys


def _neighbours(length: int, half: int) -> int:
    """Sum over the positions of an axis of the positions within ``half``, truncated at both ends."""
    return sum(min(i, half) + 1 + min(length - 1 - i, half) for i in range(length))
