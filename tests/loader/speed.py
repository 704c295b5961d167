"""Images a second on one core, in turns with timm's loader: 500 x 375 JPEGs, random crop to 224 px, flip, normalise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader

from tests.loader.recipe import create_trainer
from vitreuse.model.preprocessing import image_settings

LEAST_RATIO, LEAST_RELIEF = 1.3, 1.4  # 1.37 to 1.67 of timm's, by processor: most of both is decoding
DEIT = "auto_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25"
NUM_PHOTOGRAPHS, NUM_CLASSES, BATCH_SIZE = 256, 8, 32
FEWEST_ROUNDS, MOST_ROUNDS = 8, 48  # of two seconds: others on the machine may disturb us for half a minute
SIZE = (500, 375)  # as most of ImageNet's


def is_faster(root: Path) -> tuple[bool, str]:
    """Whether training gets images LEAST_RATIO times as fast as from timm's loader.

    No workers: beside the rank on one core they would measure how the system switches between processes. timm's loader
    normalises an image at a time or, in its prefetcher, a batch at a time: whichever is faster counts.
    """
    write_photographs(root / "train")
    with one_core():
        rounds, (ours, *theirs) = best_rates(contestants(root), LEAST_RATIO)
    ratio = ours / max(theirs)
    rates = f"{ours:.0f} images/s, timm's loader {theirs[0]:.0f}, with its prefetcher {theirs[1]:.0f}"
    return ratio >= LEAST_RATIO, f"{rates}, best of {rounds} rounds: {ratio:.2f} times, {LEAST_RATIO} needed"


def is_relieved(root: Path) -> tuple[bool, str]:
    """Whether workers get on LEAST_RELIEF times as fast with deit_300's images where colours are left to the device."""
    write_photographs(root / "train")
    makers = [partial(_loaded, root, where) for where in ("device", "workers")]
    with one_core():
        rounds, (device, workers) = best_rates(makers, LEAST_RELIEF)
    ratio = device / workers
    rates = f"{device:.0f} images/s where the device does colours, {workers:.0f} where workers do"
    return ratio >= LEAST_RELIEF, f"{rates}, best of {rounds} rounds: {ratio:.2f} times, {LEAST_RELIEF} needed"


def _loaded(root: Path, where: str) -> Iterable[Any]:
    """An epoch's batches as workers leave them."""
    recipe = [f"train.crop={{{DEIT}}}", f"train.augment_on={where}"]
    trainer = create_trainer(root, 224, NUM_CLASSES, 0, BATCH_SIZE, *recipe)
    trainer.batches.start_at(0, 0)
    return trainer.loader


def write_photographs(folder: Path) -> None:
    """Writes class folders of JPEGs: pieces of scikit-learn's two photographs."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(NUM_PHOTOGRAPHS):
        photograph = photographs[number % len(photographs)]
        height = photograph.height * rng.uniform(0.6, 1)
        width = height * SIZE[0] / SIZE[1]
        left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        piece = photograph.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        path = folder / str(number % NUM_CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.save(path, quality=95)


@contextmanager
def one_core() -> Iterator[None]:
    """Runs the block on one CPU."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(usable)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def contestants(root: Path) -> list[Callable[[], Iterable[Any]]]:
    """What makes an epoch's batches: ours, timm's loader, and timm's with its prefetcher."""
    trainer = create_trainer(root, 224, NUM_CLASSES, 0, BATCH_SIZE)
    settings = image_settings(trainer.model)
    loaders = [
        create_loader(
            create_dataset("", root=str(root / "train")),
            settings["input_size"],
            BATCH_SIZE,
            is_training=True,
            use_prefetcher=use_prefetcher,
            color_jitter=None,
            auto_augment=None,
            interpolation=settings["interpolation"],
            mean=settings["mean"],
            std=settings["std"],
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        for use_prefetcher in (False, True)
    ]
    ours_normalised = [lambda: map(trainer.on_device, trainer.remaining_batches())]  # as theirs are
    return [*ours_normalised, *(loader.__iter__ for loader in loaders)]


def best_rates(contestants: list[Callable[[], Iterable[Any]]], least: float) -> tuple[int, list[float]]:
    """Rounds taken, and images a second of each in its best one.

    They take turns, and go on while the first is not so many times as fast as the others: best rates only rise, all of
    them, towards what an undisturbed machine gives.
    """
    best = [0.0] * len(contestants)
    for number in range(1, MOST_ROUNDS + 1):
        best = [max(rate, _rate(make())) for rate, make in zip(best, contestants, strict=True)]
        if number >= FEWEST_ROUNDS and best[0] >= least * max(best[1:]):
            break
    return number, best


def _rate(batches: Iterable[Any]) -> float:
    start = time.perf_counter()
    num_images = sum(len(batch[0]) for batch in batches)
    return num_images / (time.perf_counter() - start)
