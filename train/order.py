"""Which samples make up each optimizer step: exact epochs, a function of seed and epoch alone.

An epoch is one permutation of the training set, cut into global batches; rank r of W takes every W-th sample of each,
from the r-th on. Numbers of ranks and workers do not enter, so that a run is resumed from its step number alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from train.randomness import Stream, seed_sequence


class Draw(NamedTuple):
    """One use of a training sample; its augmentation is a function of the seed and these three numbers."""

    epoch: int
    sample: int
    copy: int  # 0, or under repeated augmentation which of the sample's copies in this epoch


def epoch_permutation(seed: int, epoch: int, shard_sizes: Sequence[int], window: int | None = None) -> np.ndarray:
    """The sample numbers of one epoch, each once.

    Args:
        seed: The run's.
        epoch: Counted from 0.
        shard_sizes: Samples per shard; sample numbers run through the shards in order.
        window: None permutes all samples. A number permutes the shards, then the samples within each stretch of that
            many, so that reads stay within a few shards at a time.
    """
    rng = np.random.default_rng(seed_sequence(seed, Stream.ORDER, epoch))
    if window is None:
        return rng.permutation(sum(shard_sizes))
    ends = np.cumsum(shard_sizes)
    shards = [np.arange(end - size, end) for size, end in zip(shard_sizes, ends, strict=True)]
    order = np.concatenate([shards[shard] for shard in rng.permutation(len(shards))])
    for start in range(0, len(order), window):
        rng.shuffle(order[start : start + window])
    return order


class RankBatches(Sampler[list[Draw]]):
    """One rank's share of every global batch of an epoch, from a chosen step on.

    The last batch of an epoch may be smaller, and then a rank's share of it may be empty.

    Args:
        seed: The run's.
        shard_sizes: Samples per shard of the training set.
        global_batch_size: Samples per optimizer step, over all ranks.
        window: As for epoch_permutation.
        repeats: Copies of a sample that follow each other, and so go to different ranks. An epoch stays as long as the
            training set, so it holds one sample in `repeats` (DeiT, section 6).
        drop_partial: Whether an epoch ends before its last batch when that is not full.
        rank: This process, of world_size.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        window: int | None = None,
        repeats: int = 1,
        drop_partial: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.seed, self.shard_sizes, self.window, self.repeats = seed, shard_sizes, window, repeats
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        num_samples = sum(shard_sizes)
        self.num_draws = num_samples - num_samples % global_batch_size if drop_partial else num_samples
        self.start_at(epoch=0, step=0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return -(-self.num_draws // self.global_batch_size)

    def start_at(self, epoch: int, step: int) -> None:
        """Lets the next iteration begin in this epoch, at this step of it."""
        self.epoch, self.first_step = epoch, step

    def count(self, step: int) -> int:
        """Samples in the global batch at a step of an epoch."""
        return min(self.global_batch_size, self.num_draws - step * self.global_batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        order = epoch_permutation(self.seed, epoch, self.shard_sizes, self.window)
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.global_batch_size
            positions = range(start + self.rank, start + self.count(step), self.world_size)
            yield [Draw(epoch, int(order[p // self.repeats]), p % self.repeats) for p in positions]
