"""Data sets that come with a package and are written as shards on first use."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vitreuse.data.errors import DataError
from vitreuse.data.index import HEADER_FILE, load_index
from vitreuse.data.shards import EncodedSample, write_shards

SOURCES = ("digits",)
DIGITS_CLASSES = tuple("0123456789")
DIGITS_SAMPLES = {"train": 1437, "val": 360}
DIGITS_SAMPLES_PER_SHARD = {"train": 400, "val": 200}
DIGITS_SPLIT_SEED = 0


def prepare_source(name: str, root: str | Path) -> None:
    """Writes a built-in data set as ROOT/train and ROOT/val, unless it is there.

    Each split appears when it is whole, and processes that start together do not disturb each other.

    Args:
        name: 'digits', scikit-learn's 1,797 scanned handwritten digits of 8 x 8 pixels, 360 of them held out.
        root: folder of the data set.

    Raises:
        DataError: unknown name, package not installed, a folder that cannot be written, or one that holds other data.
    """
    if name not in SOURCES:
        raise DataError(f"no built-in data set {name!r}: choose {', '.join(SOURCES)}, or name a folder of your own.")
    for split in DIGITS_SAMPLES:
        folder = Path(root) / split
        if not (folder / HEADER_FILE).exists():
            _write_split(split, folder)
        _check_split(split, folder)


def _write_split(split: str, folder: Path) -> None:
    try:
        write_shards(_read_digits(split), folder, DIGITS_CLASSES, DIGITS_SAMPLES_PER_SHARD[split])
    except OSError as error:
        raise DataError(f"digits cannot be written to {folder} ({error.strerror}): name another folder.") from error
    except DataError:
        if not (folder / HEADER_FILE).exists():  # else another process was first
            raise


def _check_split(split: str, folder: Path) -> None:
    index = load_index(folder)
    if index.class_names != DIGITS_CLASSES or len(index) != DIGITS_SAMPLES[split]:
        raise DataError(f"{folder} holds {len(index)} samples that are not the digits: name another folder.")


def _read_digits(split: str) -> Iterator[EncodedSample]:
    """Yields the images of a split, stratified by class and in an order of its own."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("digits come with scikit-learn: install it with pip install 'vitreuse[digits]'.") from error
    images, labels = load_digits(return_X_y=True)
    numbers = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_SAMPLES["val"], stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    for number in numbers[list(DIGITS_SAMPLES).index(split)]:
        pixels = np.rint(images[number].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        yield EncodedSample(f"digits-{number:04d}", content.getvalue(), "png", int(labels[number]))
