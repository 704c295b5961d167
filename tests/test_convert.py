"""Trained models converted into plans: heads matched, tokens pooled, weights moved."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitreuse.attention.lowrank import grid_pooling
from vitreuse.heads import match_heads, order_of_heads, rows_of_heads


def test_heads_are_matched_at_the_least_sum():
    distances = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    best = min(itertools.permutations(range(5), 3), key=lambda own: sum(distances[i, own[i]] for i in range(3)))
    assert match_heads(distances) == list(best)
    assert list(best) != distances.argmin(1).tolist()  # not each for itself


def test_heads_that_read_come_first():
    assert order_of_heads([3, 0], 5) == [3, 0, 1, 2, 4]
    assert rows_of_heads([2, 0, 1], 2).tolist() == [4, 5, 0, 1, 2, 3]


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), num_prefix_tokens=st.integers(0, 3), data=st.data())
def test_grid_pooling_averages_every_patch_once(rows, columns, num_prefix_tokens, data):
    num_cells = data.draw(st.integers(1, rows * columns))
    pooled = grid_pooling((rows, columns), num_prefix_tokens, num_prefix_tokens + num_cells)
    prefix, cells = pooled.split([num_prefix_tokens, num_cells])
    assert torch.equal(prefix, torch.eye(num_prefix_tokens, num_prefix_tokens + rows * columns))
    weights = cells[:, num_prefix_tokens:]
    assert torch.allclose(weights.sum(1), torch.ones(num_cells))
    assert ((weights > 0).sum(0) == 1).all()
    inside = (weights > 0).unflatten(1, (rows, columns))
    assert all((cell.any(1)[:, None] & cell.any(0)).equal(cell) for cell in inside)  # a rectangle


def test_grid_pooling_makes_square_cells():
    inside = (grid_pooling((14, 14), 1, 50) > 0)[1:, 1:].unflatten(1, (14, 14))
    assert all((cell.any(1).sum(), cell.any(0).sum()) == (2, 2) for cell in inside)


def test_grid_pooling_of_no_more_rows_than_prefix_tokens_is_a_mean():
    assert torch.allclose(grid_pooling((3, 3), 1, 1), torch.full((1, 10), 0.1))
