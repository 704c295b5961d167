"""Whether one model is better than another, by what their trainings are right on, image by image.

The runs of a model are a bool array (seeds, images); of both models the images are the same and in the same order, the
seeds need not be the same nor as many. Two things vary: which images happen to be in the set, and how a training
happens to turn out. A claim about methods must survive both: Bouthillier et al., Accounting for Variance in Machine
Learning Benchmarks, 2103.03098.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 10_000
NOISE = "within noise"  # the verdict on a difference that nothing can be said of
SMALLEST_P = 1e-12  # what is smaller drowns in rounding and is given as this


class Difference(NamedTuple):
    """How much better than the baseline a model is.

    Attributes:
        points: Mean top-1 minus the baseline's, in percentage points.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_bootstrap: Twice the smaller tail of the resamples: above 0.05 where the interval holds 0.
        p_mcnemar: See mcnemar.
    """

    points: float
    low: float
    high: float
    p_bootstrap: float
    p_mcnemar: float

    @property
    def p(self) -> float:
        """The larger of the two, since a difference must be more than either explains."""
        return max(self.p_bootstrap, self.p_mcnemar)


def difference(baseline: np.ndarray, other: np.ndarray) -> Difference:
    """The other model's top-1 minus the baseline's, with its interval and both tests; the same at every call."""
    resamples = _resampled(baseline, other)
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.count_nonzero(resamples <= 0), np.count_nonzero(resamples >= 0))
    p_bootstrap = min(1.0, 2 * (1 + int(tail)) / (1 + len(resamples)))
    points = 100 * float(other.mean() - baseline.mean())
    return Difference(points, 100 * float(low), 100 * float(high), p_bootstrap, mcnemar(baseline, other))


def _resampled(baseline: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(NUM_RESAMPLES,): what the difference in accuracy could have been with other images and other seeds.

    Images are drawn with replacement, the same for both models: a paired bootstrap. Seeds are too few to draw from:
    drawn too, three of them gave intervals that covered 84 % instead of 95 in a simulation. They vary by Student's t,
    with the variance that they have in common. Their pairing is not used. One seed's training has nothing in common
    with the same seed's of another model but the order of the samples; where that helps both alike, the interval is
    too wide rather than too narrow.
    """
    generator = np.random.default_rng(0)
    num_seeds, n = (len(baseline), len(other)), baseline.shape[1]
    gaps, counts = np.unique(_gaps(baseline, other), return_counts=True)
    resamples = generator.multinomial(n, counts / n, NUM_RESAMPLES) @ gaps / (n * math.prod(num_seeds))
    if sum(num_seeds) > 2:  # one seed each says nothing about others
        scale = math.sqrt(_seed_variance(baseline, other) * sum(1 / number for number in num_seeds))
        resamples += scale * generator.standard_t(sum(num_seeds) - 2, NUM_RESAMPLES)
    return resamples


def _gaps(baseline: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(images,): by how many pairs of seeds the other model is right more often, in whole numbers."""
    return len(baseline) * other.sum(0, dtype=int) - len(other) * baseline.sum(0, dtype=int)


def _seed_variance(*models: np.ndarray) -> float:
    """Variance of accuracy between seeds, common to the models, beyond what chance at each image by itself explains.

    That chance is in the images' own resamples already. The difference of mean squares is unbiased, as in an analysis
    of variance; below 0 it is taken as 0.
    """
    n = models[0].shape[1]
    degrees = sum(len(runs) - 1 for runs in models)
    between = sum(float(np.square(runs.mean(1) - runs.mean()).sum()) for runs in models)
    by_image = sum(float(np.square(runs - runs.mean(0)).sum()) for runs in models) / n**2
    return max(0.0, (between - by_image) / degrees)


def mcnemar(baseline: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test, for several seeds too: could images, equally good at both, fall so?

    With one seed each it is the binomial test on the images that only one of the two is right on. With several, an
    image's weight is by how many seeds it falls to one of them, and its sign is a coin: an image is one observation,
    however many seeds saw it, where discordant pairs summed over the seeds would count it again and again, and a
    majority of the seeds would be another model, which nobody trained. The seeds are taken as they are: what
    others would give is the bootstrap's part.

    The distribution of the weighted sum of coins is exact, from its characteristic function.

    Paper: McNemar, Note on the sampling error of the difference between correlated proportions, 1947; recommended by
        Dietterich, Approximate statistical tests for comparing supervised classification algorithms, 1998.
    """
    gaps = _gaps(baseline, other)
    gaps = gaps // max(1, np.gcd.reduce(gaps))
    weights, counts = np.unique(np.abs(gaps[gaps != 0]), return_counts=True)
    farthest, found = int(weights @ counts), abs(int(gaps.sum()))
    size = 2 * farthest + 1  # sums from -farthest to farthest, the negative ones at the end
    angles = np.outer(np.arange(size) * (2 * math.pi / size), weights)
    probabilities = np.fft.fft((np.cos(angles) ** counts).prod(1)).real / size
    return min(1.0, max(SMALLEST_P, float(probabilities[found : size - found + 1].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family, adjusted so that a wrong rejection anywhere in it has the probability of one alone.

    Paper: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def verdict(points: float, p: float) -> str:
    """The word for a difference."""
    if p > 1 - LEVEL:
        return NOISE
    return "better" if points > 0 else "worse"
