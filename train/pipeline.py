"""From sample numbers to batches: decoding, augmentation and mixing, each drawn from (seed, epoch, sample) alone."""

from __future__ import annotations

import signal
from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval.labelled import in_shared_memory
from train.augmentation import Transform, transforms_by_epoch
from train.draws import Augmented, Drawn, gather
from train.operations import augmented, erased
from train.order import Draw, RankBatches
from train.randomness import Stream, restored_generators, seed_generators, seed_sequence
from vitreuse.config import Config
from vitreuse.data import DecodeError, Sample
from vitreuse.model.preprocessing import Normalize

Item = tuple[Augmented, int, str, dict[str, str]]  # image, label, key, and what it replaces as in Batch.bad_images


class Batch(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        images: (B, channels, height, width), bytes.
        drawn: What is still to be done to them.
        labels: (B,).
        keys: The keys of the samples.
        bad_images: The sentence about each image that could not be decoded and was replaced, by its key.
    """

    images: Tensor
    drawn: Drawn
    labels: Tensor
    keys: list[str]
    bad_images: dict[str, str]


class OnDevice:
    """What is done to a batch on the rank's device: what was drawn for its images, and what they are normalised by."""

    def __init__(self, settings: dict[str, Any], device: torch.device):
        self.normalize, self.device = Normalize(settings), device

    def __call__(self, batch: Batch) -> Batch:
        """The batch with images that a model takes; an empty one stays so."""
        images = batch.images.to(self.device, non_blocking=True)
        if len(images):
            images = erased(self.normalize(augmented(images, batch.drawn)), batch.drawn)
        return batch._replace(images=images, labels=batch.labels.to(self.device, non_blocking=True))


class TrainingImages(Dataset[Item]):
    """Augmented images by Draw; the same Draw gives the same tensor in any process.

    Args:
        samples: The training set, as open_split returns it.
        transforms: The transform of each epoch, from an image to a tensor; it draws from the global generators.
        seed: The run's seed.
        cache_images: Keep each decoded image, for sets that fit in memory (once per worker).
        max_bad_images: How many others are tried in place of an image that cannot be decoded.
    """

    def __init__(
        self,
        samples: Any,
        transforms: Sequence[Transform],
        seed: int,
        cache_images: bool = False,
        max_bad_images: int = 0,
    ):
        self.samples, self.transforms, self.seed, self.max_bad_images = samples, transforms, seed, max_bad_images
        self._cache: dict[int, Sample] | None = {} if cache_images else None

    def __getitem__(self, draw: Draw) -> Item:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[Item]:
        """A whole batch at once: saving and restoring the generators costs more than augmenting a small image."""
        with restored_generators():
            return [self._augment(draw) for draw in draws]

    def _augment(self, draw: Draw) -> Item:
        (image, label, key), bad_images = self._read_or_replace(draw)
        seed_generators(seed_sequence(self.seed, Stream.SAMPLE, *draw))
        return self.transforms[draw.epoch](image), label, key, bad_images

    def _read_or_replace(self, draw: Draw) -> tuple[Sample, dict[str, str]]:
        """The sample of a draw or the first one that can stand in for it, and what was said about those before."""
        bad_images: dict[str, str] = {}
        for number in self._candidates(draw):
            try:
                return self._read(number), bad_images
            except DecodeError as error:
                bad_images[self.samples.key(number)] = str(error)
        raise DecodeError(next(iter(bad_images.values())))

    def _candidates(self, draw: Draw) -> Iterator[int]:
        """The sample of a draw, then as many others as may be bad; their order is a function of seed and draw alone."""
        yield draw.sample
        rng, tried = np.random.default_rng(seed_sequence(self.seed, Stream.REPLACEMENT, *draw)), {draw.sample}
        while len(tried) < min(1 + self.max_bad_images, len(self.samples)):
            number = int(rng.integers(len(self.samples)))
            if number not in tried:
                tried.add(number)
                yield number

    def _read(self, number: int) -> Sample:
        if self._cache is None:
            return self.samples[number]
        if number not in self._cache:
            self._cache[number] = self.samples[number]
        return self._cache[number]


def training_images(
    config: Config, model: Any, samples: Any, settings: dict[str, Any], on_device: bool = False
) -> TrainingImages:
    """The training set of an experiment, as open_split returns it, augmented for a model of these image_settings."""
    transforms, data = transforms_by_epoch(config, model, settings, on_device), config.data
    return TrainingImages(samples, transforms, config.train.seed, data.cache_images, data.max_bad_images)


def collate(items: list[Item]) -> Batch:
    """A Batch of samples; of none, an empty one. A worker's is in shared memory, and raises where there is no room."""
    return in_shared_memory(_batch(items))


def _batch(items: list[Item]) -> Batch:
    if not items:
        return Batch(torch.empty(0, dtype=torch.uint8), gather([]), torch.empty(0, dtype=torch.long), [], {})
    images, labels, keys, bad_images = zip(*items, strict=True)
    pixels, draws = zip(*images, strict=True)
    by_pixel = torch.stack([image.permute(1, 2, 0) for image in pixels])  # as they lie in memory
    return Batch(
        by_pixel.permute(0, 3, 1, 2), gather(draws), torch.tensor(labels), list(keys), dict(ChainMap(*bad_images))
    )


def ignore_stop_signals(worker: int) -> None:
    """Lets a DataLoader worker outlive the signals that stop a run: torchrun and Ctrl-C send them to every process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def create_loader(images: TrainingImages, batches: RankBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """The batches of one rank, in order, with workers that live as long as the run."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a base seed per epoch: not from the generator of dropout
    )


def create_mixup(config: Config, num_classes: int) -> Mixup | None:
    """timm's Mixup of an experiment, which smooths labels too; None if it mixes nothing."""
    mixup = config.train.mixup
    if mixup is None:
        return None
    labels: dict[str, Any] = {"label_smoothing": config.train.loss.smoothing, "num_classes": num_classes}
    return Mixup(mixup.mixup, mixup.cutmix, prob=mixup.prob, switch_prob=mixup.switch_prob, **labels)


def mixed_in_groups(
    mixup: Mixup, images: Tensor, labels: Tensor, seeds: Sequence[np.random.SeedSequence]
) -> tuple[Tensor, Tensor]:
    """Images (B, channels, rows, columns), which change, and their soft targets (B, classes), mixed group by group.

    Args:
        mixup: Mixes a batch by one draw.
        images: This rank's share of a global batch.
        labels: Their classes (B,).
        seeds: Of each group that the rank has; as many images, each next one, are of as many groups in turns.
    """
    targets = None
    for number, seed in enumerate(seeds):
        part = slice(number, None, len(seeds))
        with restored_generators():
            seed_generators(seed)
            images[part], mixed = mixup(images[part], labels[part])
        targets = mixed.new_empty(len(images), mixed.shape[1]) if targets is None else targets
        targets[part] = mixed
    assert targets is not None
    return images, targets
