"""Windows of a patch grid as tiles with a halo, so that the cost of a span follows the window and not the grid.

A tile of rows x columns queries sees itself and a halo of width // 2 patches around it; a mask cuts this square down
to each query's exact neighbourhood. Neighbourhoods are truncated at the border of the grid.

Shapes: B images, H heads, P prefix tokens, N = P + patches, D head dim, T tiles, Q queries of a tile, K keys of a halo.
"""
from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def tile_size(grid: Tuple[int, int], width: int) -> Tuple[int, int]:
    """Rows and columns of a tile: of two neighbouring sizes the one that pads the grid less, never above the grid."""
    side = max(7, width // 2)
    return _fit(grid[0], side), _fit(grid[1], side)


def _fit(length: int, side: int) -> int:
    padding, larger_padding = -length % side, -length % (side + 1)
    return min(length, side if padding <= larger_padding else side + 1)


def covers_grid(grid: Tuple[int, int], width: int) -> bool:
    """Whether one tile with its halo nearly covers the grid, so that a dense masked map is used instead of tiles.

    The dense map measured 1.3 to 2.3 times faster at shares of 0.77 and 0.86 (16 x 16 and 14 x 14 patches, width 7) and
    slower from 0.44 down (experiments.md).
    """
    dense_share = 0.7  # local, since TorchScript reads no module-level numbers
    rows, columns = tile_size(grid, width)
    halo = min(rows + width - 1, grid[0]) * min(columns + width - 1, grid[1])
    return halo >= dense_share * grid[0] * grid[1]


def tiles_along(length: int, size: int) -> int:
    """Number of tiles of ``size`` that cover ``length``."""
    return (length + size - 1) // size


def neighbourhood(grid: Tuple[int, int], width: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """Dense mask (N, N), True where a query sees a key: prefix rows and columns, and the patches within the span."""
    rows = torch.arange(grid[0], device=device)
    columns = torch.arange(grid[1], device=device)
    near_rows = (rows[:, None] - rows).abs() <= width // 2
    near_columns = (columns[:, None] - columns).abs() <= width // 2
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(near, (num_prefix_tokens, 0, num_prefix_tokens, 0), value=True)


def tile_mask(grid: Tuple[int, int], width: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    """Mask (T, Q, P + K), True where a query of a tile sees a prefix token or a patch of the halo."""
    near_rows, inside_rows = _axis_masks(grid[0], tile_size(grid, width)[0], width, device)
    near_columns, inside_columns = _axis_masks(grid[1], tile_size(grid, width)[1], width, device)
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    inside = (inside_rows[:, None, :, None] & inside_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(near & inside[:, None], (num_prefix_tokens, 0), value=True)


def _axis_masks(length: int, size: int, width: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Along one axis: (queries, halo) within the span, the same in every tile, and (tiles, halo) inside the grid."""
    queries = torch.arange(size, device=device)
    halo = torch.arange(-(width // 2), size + width // 2, device=device)
    near = (queries[:, None] - halo).abs() <= width // 2
    starts = torch.arange(tiles_along(length, size), device=device) * size
    position = starts[:, None] + halo
    return near, (position >= 0) & (position < length)


def to_tiles(patches: Tensor, grid: Tuple[int, int], width: int) -> Tensor:
    """Queries (B, H, rows * columns, D) cut into tiles (B, H, T, Q, D); the last tiles are padded with zeros."""
    rows, columns = tile_size(grid, width)
    padded = F.pad(patches.unflatten(2, grid), (0, 0, 0, -grid[1] % columns, 0, -grid[0] % rows))
    tiles = padded.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, H, tiles, rows, tiles, columns, D)
    return tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def from_tiles(tiles: Tensor, grid: Tuple[int, int], width: int) -> Tensor:
    """Inverse of ``to_tiles``: (B, H, T, Q, D) back to (B, H, rows * columns, D) without the padding."""
    rows, columns = tile_size(grid, width)
    num_rows, num_columns = tiles_along(grid[0], rows), tiles_along(grid[1], columns)
    split = tiles.unflatten(3, (rows, columns)).unflatten(2, (num_rows, num_columns)).transpose(3, 4)
    return split.flatten(4, 5).flatten(2, 3)[:, :, : grid[0], : grid[1]].flatten(2, 3)


def to_halos(tokens: Tensor, grid: Tuple[int, int], width: int, num_prefix_tokens: int) -> Tensor:
    """Keys or values (B, H, N, D) as each tile sees them: (B, H, T, P + K, D), prefix tokens first."""
    rows, columns = tile_size(grid, width)
    half = width // 2
    patches = tokens[:, :, num_prefix_tokens:].unflatten(2, grid)
    padding = (0, 0, half, half + -grid[1] % columns, half, half + -grid[0] % rows)
    windows = F.pad(patches, padding).unfold(2, rows + 2 * half, rows).unfold(3, columns + 2 * half, columns)
    halos = windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5).flatten(2, 3)  # (B, H, T, K, D)
    if num_prefix_tokens == 0:
        return halos
    prefix = tokens[:, :, None, :num_prefix_tokens].expand(-1, -1, halos.shape[2], -1, -1)
    return torch.cat([prefix, halos], dim=3)


def span_pairs(grid: Tuple[int, int], width: int, num_prefix_tokens: int, theoretical: bool) -> int:
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
