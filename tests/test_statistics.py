"""Intervals and tests: against numbers worked out by hand, and against simulated models of which the truth is known."""

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics import SMALLEST_P, difference, holm, mcnemar, verdict

NUM_IMAGES, NUM_SEEDS = 2000, 5


def simulated(
    rng: np.random.Generator, gap: float, num_seeds: int = NUM_SEEDS, seed_sd: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Two models, (seeds, images) bool, of about 81 %: images are hard for both alike, seeds differ, and so do models.

    Args:
        gap: How much better the second one is, in log odds.
    """
    ease = rng.normal(4, 4, NUM_IMAGES)
    found = []
    for better in (0.0, gap):
        own = ease + rng.normal(0, 1, NUM_IMAGES) + rng.normal(0, seed_sd, (num_seeds, 1)) + better
        found.append(rng.random((num_seeds, NUM_IMAGES)) < 1 / (1 + np.exp(-own)))
    return found[0], found[1]


def repeated(gap: float, number: int, **settings) -> list:
    rng = np.random.default_rng(0)
    return [difference(*simulated(rng, gap, **settings)) for _ in range(number)]


def test_a_planted_difference_of_three_points_is_found():
    """Where the seeds of either model lie 0.9 points apart: nineteen times in twenty."""
    found = repeated(0.54, 60)
    assert np.mean([one.points for one in found]) == pytest.approx(3.0, abs=0.2)
    words = [verdict(one.points, one.p) for one in found]
    assert words.count("better") >= 55 and "worse" not in words


def test_a_planted_zero_difference_is_called_noise():
    """Both tests together are wrong less often than one in twenty times."""
    words = [verdict(one.points, one.p) for one in repeated(0.0, 200)]
    assert words.count("within noise") >= 190


@pytest.mark.parametrize("num_seeds", [2, 5])
@pytest.mark.parametrize("seed_sd", [0.15, 1.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(num_seeds, seed_sd):
    holds = [one.low <= 0 <= one.high for one in repeated(0.0, 200, num_seeds=num_seeds, seed_sd=seed_sd)]
    assert np.mean(holds) >= 0.91  # of 0.95, by chance below 0.92 once in forty times


def test_chance_at_each_image_is_counted_once():
    """Seeds that differ by it alone: the interval is as wide as the differences scatter, where twice made 1.3 times."""
    found = repeated(0.0, 150, seed_sd=0.0)
    half_width = np.mean([one.high - one.low for one in found]) / 2
    assert half_width == pytest.approx(1.96 * np.std([one.points for one in found]), rel=0.15)


def test_seeds_that_vary_more_widen_the_interval():
    narrow, wide = (np.mean([one.high - one.low for one in repeated(0.0, 20, seed_sd=sd)]) for sd in (0.15, 1.0))
    assert wide > 2 * narrow


def test_the_same_runs_are_no_different():
    runs = simulated(np.random.default_rng(1), 0.0)[0]
    found = difference(runs, runs)
    assert (found.points, found.p_mcnemar, verdict(found.points, found.p)) == (0.0, 1.0, "within noise")


def test_it_is_the_same_at_every_call_and_turns_with_its_sides():
    one, other = simulated(np.random.default_rng(2), 0.5)
    found, again, turned = difference(one, other), difference(one, other), difference(other, one)
    assert found == again
    assert turned.points == -found.points and turned.p_mcnemar == found.p_mcnemar
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=0.1)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 8), (10, 10), (40, 12), (5, 90)])
def test_with_one_seed_it_is_mcnemars_exact_test(only_first, only_second):
    first = np.zeros((1, 300), bool)
    second = first.copy()
    first[0, :only_first] = True
    second[0, only_first : only_first + only_second] = True
    first[0, 200:], second[0, 200:] = True, True
    discordant = only_first + only_second
    expected = binomtest(only_first, discordant).pvalue if discordant else 1.0
    assert mcnemar(first, second) == pytest.approx(max(expected, SMALLEST_P), rel=1e-6)


def test_with_several_seeds_each_image_is_one_coin():
    """Images that fall to the second by three seeds, by one, and to the first by one: +-3 +-1 +-1 is 3 off 6 in 8."""
    first = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]], bool)
    second = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1]], bool)
    assert mcnemar(first, second) == pytest.approx(6 / 8)
    more_seeds = [np.tile(runs, (3, 1)) for runs in (first, second)]
    assert mcnemar(*more_seeds) == pytest.approx(6 / 8)


def test_another_number_of_seeds_is_allowed():
    one, other = simulated(np.random.default_rng(3), 0.95)
    found = difference(one[:3], other)
    assert found.points == pytest.approx(100 * (other.mean() - one[:3].mean()))
    assert found.low < found.points < found.high


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("points", "p", "word"), [(1, 0.05, "better"), (-1, 0.01, "worse"), (1, 0.051, "within noise")]
)
def test_the_word_for_a_difference(points, p, word):
    assert verdict(points, p) == word
