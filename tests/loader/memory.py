"""Memory of the workers that decode 100,000 samples, epoch after epoch."""

from __future__ import annotations

import gc
import io
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
    """Whether no worker uses more memory after the last epoch than after the first."""
    classes = [str(label) for label in range(NUM_CLASSES)]
    write_shards(_samples(), root / "train", classes, samples_per_shard=1000)
    trainer = create_trainer(root, SIDE_PX, NUM_CLASSES, NUM_WORKERS, BATCH_SIZE)
    by_epoch = []
    for _ in range(EPOCHS):
        trainer.counters.step += sum(1 for _ in trainer.remaining_batches())
        gc.collect()  # copies the rank's pages in the first epoch: later it would leave the workers larger shares
        pids = sorted(process.pid for process in active_children() if process.pid)
        by_epoch.append([anonymous_mib(pid) for pid in pids])
    by_worker = list(zip(*by_epoch, strict=True))
    assert len(by_worker) == NUM_WORKERS
    growth = max(sizes[-1] - sizes[0] for sizes in by_worker)
    shown = " and ".join("/".join(f"{size:.1f}" for size in sizes) for sizes in by_worker)
    text = f"{NUM_WORKERS} workers of {shown} MiB after each epoch of {NUM_SAMPLES:,} samples"
    return growth <= MOST_GROWTH_MIB, f"{text}: {growth:.1f} MiB more, {MOST_GROWTH_MIB} allowed"


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
