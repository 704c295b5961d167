"""Where random numbers come from: a stream for each purpose under one seed, and the generators that draw by it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What randomness is for; each purpose has a stream of its own under one seed."""

    ORDER = 0
    SAMPLE = 1
    STEP = 2
    REPLACEMENT = 3
    MIXUP = 4


def seed_sequence(seed: int, stream: Stream, *key: int) -> np.random.SeedSequence:
    """The source of randomness for one purpose and key: an epoch, a draw, or a step and rank.

    Nothing is handed on from step to step: a checkpoint holds no generator, and any number of ranks may resume it.
    """
    return np.random.SeedSequence(seed, spawn_key=(stream, *key))


def seed_generators(source: np.random.SeedSequence, device: torch.device | None = None) -> None:
    """Seeds random, numpy and torch's CPU generator, and that of a CUDA device if one is given."""
    words = source.generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed would touch every device
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(words[2])


@contextmanager
def restored_generators() -> Iterator[None]:
    """Puts random, numpy and torch's CPU generator back as they were.

    timm's and torchvision's transforms draw from all three. Unrestored, decoding in the rank itself (0 workers) would
    move what the model draws next.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
