"""The whole search: pieces, what each change does, the front by forecast, and from there by real distances."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreuse.compress.damage import check_specs, refuse_other_layers
from vitreuse.compress.redundancy import measure_head_errors
from vitreuse.compress.ridge import refuse_few
from vitreuse.compress.row_sample import NUM_ROWS
from vitreuse.compress.search.clock import Clock
from vitreuse.compress.search.constant import constant_merging
from vitreuse.compress.search.forecast import Forecast, measure_changes, tries
from vitreuse.compress.search.front import Candidate, best_within, pareto_front
from vitreuse.compress.search.pieces import Pieces, fit_pieces
from vitreuse.compress.search.refine import Refiner
from vitreuse.compress.search.space import Space
from vitreuse.compress.search.trials import Trials, begin_trials
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import Plan

NUM_FITTED = 64  # images on which heads are matched and pieces fitted, at most; whole conversions are fitted on all
NUM_STARTS = 5  # candidates of the front that are tried, from the budget down
CLOSE = 0.97  # of the budget, between which and the budget they lie


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        front: The plans that no other beats in cost and forecast damage at once, the cheapest first.
        start: The one of them from which the search went on by real distances, if constant merging was no better.
        chosen: Where it came to, with its cost and its forecast.
        distance: How far its answers are from the original's, over the images on which plans were tried.
        is_best: Whether no combination of changes that was tried makes it better; else time was up.
        forecast: What each change does.
        trials: What tries plans on these images.
    """

    front: list[Candidate]
    start: Candidate
    chosen: Candidate
    distance: float
    is_best: bool
    forecast: Forecast
    trials: Trials


def search(
    original: Any,
    fitted: Iterable[Tensor],
    tried: Iterable[Tensor],
    space: Space,
    costs: PlanCosts,
    budget: float,
    minutes: float = 10.0,
    path: Path | None = None,
    rows: tuple[int | None, int] = (NUM_ROWS, 0),
) -> Found | None:
    """The plan of least damage within a budget; None where no plan of the space meets it.

    Args:
        original: One of ours with exact layers, in evaluation mode.
        fitted: Batches of images (B, channels, rows, columns) that layers are fitted on, gone over several times.
        tried: Batches of others, none of the same photographs, on which plans are tried: thirty images will do.
        space: What a layer may become.
        costs: What that saves.
        budget: The most that the plan may cost, as a share of the exact plan's cost.
        minutes: How long the search by real distances may take, over all starts of it.
        path: A file that takes every trial, so that a search which was killed goes on.
        rows: How many of the rows of maps are looked at, and the seed of their choice, where heads are matched.

    Raises:
        ValueError: The model's layers are not exact, there are too few images, or the file is of another search.
    """
    _refuse_unfit(original, fitted, tried, space)
    if path is not None:
        begin_trials(path, original, fitted, tried, rows if space.reads_maps else None)
    trials = Trials.on(make_pieces(original, fitted, space, rows), tried, path)
    with WorkProgress("trying changes", "changes", len(tries(space))) as progress:
        forecast = measure_changes(trials, space, progress)
    front, most = pareto_front(space, forecast, costs), budget * costs.of(space.exact)
    start, constant = _best_start(front, most, trials), constant_merging(space, costs, most)
    if start is None:
        return None
    begin = min([start.plan] if constant is None else [start.plan, constant], key=trials.distance)
    with WorkProgress("improving", "seconds", round(60 * minutes)) as progress:
        clock = Clock(time.monotonic() + 60 * minutes, progress)
        is_over = partial(_is_over, clock, trials, trials.seconds_saved)
        refiner = Refiner(trials, space, forecast, costs.of, most, is_over, _reported(clock))
        plan, distance, is_best = refiner.refine(begin)
    chosen = Candidate(costs.of(plan), forecast.of(plan), plan)
    return Found(front, start, chosen, distance, is_best, forecast, trials)


def _refuse_unfit(original: Any, fitted: Iterable[Tensor], tried: Iterable[Tensor], space: Space) -> None:
    """Raises ValueError for what cannot be searched, or not on these images."""
    refuse_other_layers(original)
    check_specs(original, space.attention_words)
    refuse_few(sum(map(len, fitted)))
    if not any(map(len, tried)):
        raise ValueError("there are 0 images to try plans on: give some that are not among those that are fitted.")


def _is_over(clock: Clock, trials: Trials, saved_before: float) -> bool:
    """Whether time is up, of which what an earlier start has used is gone."""
    return clock.is_over(trials.seconds_saved - saved_before)


def make_pieces(
    original: Any, fitted: Iterable[Tensor], space: Space, rows: tuple[int | None, int] = (NUM_ROWS, 0)
) -> Pieces:
    """What the plans of a space are put together from, fitted on some images of batches."""
    some, distances = [*_evenly(fitted, sum(map(len, fitted)), NUM_FITTED)], None
    if space.reads_maps:
        with WorkProgress("matching heads", "images", sum(map(len, some))) as progress:
            distances = measure_head_errors(original, some, progress, *rows)
    with WorkProgress("fitting pieces", "layers", space.depth) as progress:
        return fit_pieces(original, some, space.words, space.hidden, distances, progress)


def _evenly(batches: Iterable[Tensor], num_images: int, most: int) -> Iterator[Tensor]:
    """The images of batches, or as many as are wanted, evenly spread over all."""
    chosen = set(torch.linspace(0, num_images - 1, min(num_images, most)).round().int().tolist())
    first = 0
    for images in batches:
        own = [number for number in range(len(images)) if first + number in chosen]
        first += len(images)
        if own:
            yield images[own]


def _best_start(front: Sequence[Candidate], most: float, trials: Trials) -> Candidate | None:
    """The candidate of least real distance among some of a front that lie just within a budget."""
    within = [candidate for candidate in front if CLOSE * most <= candidate.cost <= most][-NUM_STARTS:]
    best = best_within(front, most)
    if best is None:
        return None
    return min([*within, best], key=lambda candidate: trials.distance(candidate.plan))


def _reported(clock: Clock) -> Callable[[Plan, float], None]:
    """Shows a better plan, and its distance from then on beside the clock."""

    def report(plan: Plan, distance: float) -> None:
        clock.said = f"distance {distance:.4g}"
        clock.progress.line(f"{clock.said}, {plan}")

    return report
