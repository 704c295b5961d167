"""Memory of the processes that make batches of 100,000 samples, epoch after epoch."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
from PIL import Image

from tests.loader.recipe import create_trainer
from vitreuse.data import EncodedSample, write_shards

MOST_GROWTH_MIB = 2.0  # a Python object kept or unshared for each sample would be 5 and more
NUM_SAMPLES, NUM_CLASSES, SIDE_PX, BATCH_SIZE, NUM_WORKERS, EPOCHS = 100_000, 10, 32, 100, 2, 3


def stays_flat(root: Path) -> tuple[bool, str]:
    """Whether the rank and its workers use together no more memory after the last epoch than after the first."""
    classes = [str(label) for label in range(NUM_CLASSES)]
    write_shards(_samples(), root / "train", classes, samples_per_shard=1000)
    trainer = create_trainer(root, SIDE_PX, NUM_CLASSES, NUM_WORKERS, BATCH_SIZE)
    sizes = []
    for _ in range(EPOCHS):
        trainer.counters.step += sum(1 for _ in trainer.remaining_batches())
        gc.collect()  # at a moment of its own choice it would copy the rank's pages in some epoch
        workers = [process.pid for process in active_children() if process.pid]
        assert len(workers) == NUM_WORKERS
        sizes.append(sum(map(anonymous_mib, [os.getpid(), *workers])))
    growth = (sizes[-1] - sizes[0]) / NUM_WORKERS
    shown = ", ".join(f"{size:.1f}" for size in sizes)
    text = f"{shown} MiB after each epoch of {NUM_SAMPLES:,} samples, the rank and {NUM_WORKERS} workers"
    return growth <= MOST_GROWTH_MIB, f"{text}: {growth:.1f} MiB a worker more, {MOST_GROWTH_MIB} allowed"


def _samples() -> Iterator[EncodedSample]:
    rng = np.random.default_rng(0)
    images = [_encode(rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)) for _ in range(10 * NUM_CLASSES)]
    for number in range(NUM_SAMPLES):
        image = number % len(images)
        yield EncodedSample(f"sample-{number:06d}", images[image], "jpg", image % NUM_CLASSES)


def _encode(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def anonymous_mib(pid: int) -> float:
    """A process's share of its memory that is no file's: a page that forked processes share is divided among them."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:")) / 1024
