"""What healing is worth for a converted model: a short one, measured on images that it never saw.

The recipe of a run of train.heal is the user's to choose; this is AdamW at a constant rate after ten steps of warm-up,
on images as they are and mirrored in turns, with the original as the teacher. It is tried at three rates, each for a
third of the time, and the rate is chosen on the images that plans were tried on. The model itself is left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from vitreuse.compress.fidelity import answer_of_tokens, mean_distance, output_distance
from vitreuse.compress.search.clock import Clock
from vitreuse.io.progress import WorkProgress

RATES = (1e-6, 1e-5, 1e-4)
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Expected:
    """What a short healing did.

    Attributes:
        rate: The learning rate that did best on the images that plans were tried on.
        num_steps: How many steps were made at it.
        seconds: How long they took.
        before: How far the answers were from the original's on images that nothing was chosen on, see output_distance.
        after: The same behind the steps.
    """

    rate: float
    num_steps: int
    seconds: float
    before: float
    after: float


def expected_of_healing(
    original: Any,
    converted: Any,
    fitted: Sequence[Tensor],
    tried: Sequence[Tensor],
    shown: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    minutes: float,
    batch_size: int,
) -> Expected:
    """Heals a converted model for so many minutes at each of three rates in turn.

    Args:
        original: One of ours, in evaluation mode.
        converted: What became of it, which stays as it is.
        fitted: Batches of images (B, channels, rows, columns) to learn from.
        tried: Batches on which the rate is chosen.
        shown: Gives batches of images and labels that nothing was chosen on, from the first on.
        minutes: For all three rates together.
        batch_size: Images of a step.
    """
    images, device = torch.cat(list(fitted)).split(batch_size), next(original.parameters()).device
    pupils = [deepcopy(converted).eval() for _ in RATES]
    starts, steps, seconds = [time.monotonic()], [], 60 * minutes / len(RATES)
    for rate, pupil in zip(RATES, pupils, strict=True):
        with WorkProgress(f"healing at {rate:g}", "seconds", round(seconds)) as progress:
            clock, batches = Clock(starts[-1] + seconds, progress), mirrored_in_turns(images)
            steps.append(_heal(original, pupil, (batch.to(device) for batch in batches), rate, clock))
        starts.append(time.monotonic())
    best = min(range(len(RATES)), key=lambda number: mean_distance(original, pupils[number], tried))
    before, after = (
        mean_distance(original, model, (batch for batch, _ in shown())) for model in (converted, pupils[best])
    )
    return Expected(RATES[best], steps[best], starts[best + 1] - starts[best], before, after)


def _heal(original: Any, pupil: Any, batches: Iterator[Tensor], rate: float, clock: Clock) -> int:
    """Makes steps until time is up, at least one; how many."""
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=rate, weight_decay=0.0)
    warming = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    num_steps = 0
    while num_steps == 0 or not clock.is_over():
        images = next(batches)
        with torch.no_grad():
            wanted = answer_of_tokens(original, original.forward_features(images))
        found = answer_of_tokens(pupil, pupil.forward_features(images))
        output_distance(original, wanted, found).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        warming.step()
        num_steps += 1
    return num_steps


def mirrored_in_turns(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches again and again, every second time mirrored."""
    for turn in count():
        yield from (batch.flip(-1) if turn % 2 else batch for batch in batches)
