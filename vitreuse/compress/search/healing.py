"""A converted model healed for some minutes, and what that is worth, measured on images that it never saw.

The recipe of a run of train.heal is the user's to choose; this is AdamW at a rate that falls to 0 by the end, after ten
steps of warm-up, on images as they are and mirrored in turns, with the original as the teacher. Three rates are tried,
each for a tenth of the time, and the one that does best on the images that plans were tried on goes on for all of it.
What makes the answers worse on these is not kept. The model itself is left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
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
SHORT = 0.1  # of the time, for which each rate is tried
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Regained:
    """What a short healing did.

    Attributes:
        rate: The learning rate that did best on the images that it was chosen on.
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


@torch.inference_mode(False)
def heal_for(
    original: Any,
    converted: Any,
    fitted: Iterable[Tensor],
    tried: Iterable[Tensor],
    minutes: float,
    batch_size: int,
) -> Pupil:
    """A copy of a converted model, healed for so many minutes at the best of three rates, after a trial of each; as it
    was where that takes it no nearer to the original.

    Args:
        original: One of ours, in evaluation mode.
        converted: What became of it, which stays as it is.
        fitted: Batches of images (B, channels, rows, columns) to learn from, which are gone over again and again.
        tried: Batches on which the rate is chosen.
        minutes: At the best rate.
        batch_size: Images of a step, at most.

    Raises:
        ValueError: A model is not in float32, in which small steps are not lost.
    """
    for model in (converted, original):
        if (dtype := next(model.parameters()).dtype) != torch.float32:
            raise ValueError(f"a model is in {dtype}: heal in float32, as model.float().")
    pupils = [Pupil(original, converted, rate, mirrored_in_turns(fitted, batch_size)) for rate in RATES]
    for pupil in pupils:
        pupil.heal(60 * minutes * SHORT)
    best = min(pupils, key=lambda pupil: mean_distance(original, pupil.model, tried))
    pupils.clear()  # with what their optimizers keep
    best.heal(60 * minutes * (1 - SHORT))
    if not mean_distance(original, best.model, tried) < mean_distance(original, converted, tried):
        best.model = _trainable(converted)
    return best


def regained(original: Any, converted: Any, pupil: Pupil, shown: Iterable[Tensor]) -> Regained:
    """What a healing did, on batches of images that nothing was chosen on."""
    before, after = (mean_distance(original, model, shown) for model in (converted, pupil.model))
    return Regained(pupil.rate, pupil.num_steps, pupil.seconds, before, after)


class Pupil:
    """A copy of a converted model that learns from the original at a rate.

    Attributes:
        model: The copy.
        rate: The learning rate.
        num_steps: How many steps were made.
        seconds: How long they took.
    """

    def __init__(self, original: Any, converted: Any, rate: float, batches: Iterator[Tensor]) -> None:
        self.original, self.model, self.rate, self._batches = original, _trainable(converted), rate, batches
        self.num_steps, self.seconds = 0, 0.0
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)

    def heal(self, seconds: float) -> None:
        """Makes steps until time is up, at least one."""
        begun = time.monotonic()
        with WorkProgress(f"healing at {self.rate:g}", "seconds", round(seconds)) as progress:
            clock = Clock(begun + seconds, progress)
            self._step(self.rate)
            while not clock.is_over():
                self._step(self.rate * max(0.0, 1 - (time.monotonic() - begun) / seconds))
        self.seconds += time.monotonic() - begun

    def _step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.num_steps + 1) / WARMUP_STEPS)
        images = next(self._batches).to(next(self.original.parameters()).device)
        with torch.no_grad():
            wanted = answer_of_tokens(self.original, self.original.forward_features(images))
        found = answer_of_tokens(self.model, self.model.forward_features(images))
        output_distance(self.original, wanted, found).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_steps += 1


def _trainable(converted: Any) -> Any:
    """A copy in evaluation mode, all of whose parameters are trained, whatever those of the model are."""
    return deepcopy(converted).eval().requires_grad_()


def mirrored_in_turns(batches: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The images of batches again and again, so many at a time at most, every second time mirrored."""
    for turn in count():
        for images in batches:
            yield from (part.flip(-1) if turn % 2 else part for part in images.split(batch_size))
