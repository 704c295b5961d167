"""A data set to train on in seconds: small grey pictures of three classes, told apart by their darkest pixels."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vitreuse.data import EncodedSample, write_shards

CLASS_NAMES = ("a", "b", "c")


def write_pictures(root: Path, num_train: int, num_val: int, per_shard: int) -> None:
    """Writes ROOT/train and ROOT/val; the last shard of each may be smaller."""
    for split, number in {"train": num_train, "val": num_val}.items():
        write_shards(_pictures(split, number), root / split, CLASS_NAMES, per_shard)


def _pictures(split: str, number: int) -> Iterator[EncodedSample]:
    rng = np.random.default_rng(len(split))
    for i in range(number):
        content = io.BytesIO()
        Image.fromarray(rng.integers(60 * (i % 3), 255, (8, 8), dtype=np.uint8)).save(content, "PNG")
        yield EncodedSample(f"{split}-{i}", content.getvalue(), "png", i % 3)
