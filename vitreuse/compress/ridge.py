"""Ridge regression by normal equations that are summed up batch by batch: memory does not grow with the images.

Shapes: R rows, F features, the last of them constant where there is a bias, C outputs; B images, N tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-5, 3))
ASIDE = 4  # every fourth image is not fitted: it decides


@dataclass(frozen=True)
class NormalEquations:
    """All that least squares need to know of features and errors: sums over rows, in float64.

    Attributes:
        gram: (F, F), of the features with each other.
        cross: (F, C), of the features with the errors.
        energy: The sum of the squared errors.
        num_penalized: How many features a penalty holds back: all but the constant one.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    num_penalized: int

    @classmethod
    def of(
        cls, features: Tensor, errors: Tensor, weights: Tensor, has_bias: bool, dtype: torch.dtype = torch.float64
    ) -> NormalEquations:
        """Those of rows: features (R, F) without the constant one, errors (R, C), how much each row counts (R,); the
        dtype is that of the products, which are float64 for what is solved."""
        root = weights.to(dtype).sqrt()[:, None]
        errors, design = errors.to(dtype) * root, features.to(dtype) * root
        if has_bias:
            design = torch.cat([design, root], dim=1)
        gram, cross = (design.T @ design).double(), (design.T @ errors).double()
        return cls(gram, cross, float(errors.square().sum()), features.shape[1])

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Those of the rows of both."""
        gram, cross = self.gram + other.gram, self.cross + other.cross
        return NormalEquations(gram, cross, self.energy + other.energy, self.num_penalized)

    def covariance(self) -> Tensor:
        """The covariance of the features but the constant one; their summed products where there is no constant
        one, (F, F)."""
        products = self.gram[: self.num_penalized, : self.num_penalized]
        if len(self.gram) == self.num_penalized:
            return products
        sums, count = self.gram[-1, :-1], self.gram[-1, -1]
        return (products - torch.outer(sums, sums) / count) / count

    def solve(self, strength: float) -> Tensor:
        """The update (F, C) of least squared error and size; the bias may be of any size.

        A strength of 1 weighs the square of an update as much as the mean square of a feature does.
        """
        penalty = torch.zeros_like(self.gram[0])
        penalized = self.gram.diagonal()[: self.num_penalized]
        penalty[: self.num_penalized] = strength * penalized.mean()
        damped = self.gram + penalty.diag()
        factor, failed = torch.linalg.cholesky_ex(damped)
        return torch.linalg.pinv(damped) @ self.cross if failed else torch.cholesky_solve(self.cross, factor)

    def error(self, update: Tensor) -> float:
        """The sum of the squared errors that an update (F, C) leaves."""
        return self.energy + float((update * (self.gram @ update - 2 * self.cross)).sum())


def row_weights(tokens: Tensor, sizes: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """How much the error of each token counts, (B, N): of a patch as many times as it stands for patches, and of prefix
    tokens together as much as of all patches."""
    weights = torch.ones(tokens.shape[:2], device=tokens.device) if sizes is None else sizes
    prefix, patches = weights.split([num_prefix_tokens, weights.shape[1] - num_prefix_tokens], dim=1)
    together = patches.sum(1, keepdim=True) / max(1, num_prefix_tokens)
    return torch.cat([together.expand_as(prefix), patches], dim=1)


class Rows(NamedTuple):
    """What is fitted of some images: features (B, N, F), errors (B, N, C), how much each counts (B, N)."""

    features: Tensor
    errors: Tensor
    weights: Tensor


def equations_of(batches: Iterable[Rows], has_bias: bool) -> NormalEquations:
    """The normal equations of all rows of batches, of at least one."""
    rows = (NormalEquations.of(*(values.flatten(0, 1) for values in batch), has_bias=has_bias) for batch in batches)
    return reduce(operator.add, rows)


def images_of(batch: Any) -> Tensor:
    """The images (B, channels, rows, columns) of a batch, which they are or which begins with them."""
    return batch if isinstance(batch, Tensor) else batch[0]


def images_apart(batches: Iterable[Any]) -> Iterator[tuple[Tensor, bool]]:
    """Of batches (B, ...) the images that are fitted, and of all every fourth, which is kept aside, each by themselves
    and with whether they are.

    Raises:
        ValueError: There are fewer than four images, when they are all given.
    """
    first = 0
    for images in map(images_of, batches):
        is_aside = torch.arange(first, first + len(images)) % ASIDE == ASIDE - 1
        first += len(images)
        for aside in (False, True):
            if (is_aside == aside).any():
                yield images[is_aside == aside], aside
    refuse_few(first)


def refuse_few(num_images: int) -> None:
    """Raises ValueError where none of the images would be kept aside."""
    if num_images < ASIDE:
        raise ValueError(f"{num_images} images are too few: one of {ASIDE} decides, so give {ASIDE} or more.")


@dataclass(frozen=True)
class Fit:
    """An update (F, C), the strength of its ridge, and the squared errors without it and with it on other rows."""

    update: Tensor
    strength: float
    before: float
    after: float


def best_fit(fitted: NormalEquations, aside: NormalEquations, strengths: Sequence[float] = STRENGTHS) -> Fit | None:
    """The update whose strength leaves the least error on rows that were kept aside; None where none helps there."""
    updates = {strength: fitted.solve(strength) for strength in strengths}
    strength = min(strengths, key=lambda each: aside.error(updates[each]))
    after = aside.error(updates[strength])
    return Fit(updates[strength], strength, aside.energy, after) if after < aside.energy else None
