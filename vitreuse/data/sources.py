"""Data sets that come with a package and are written as shards on first use."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitreuse.data.shards.folder import EncodedSample, write_shards
from vitreuse.data.shards.index import HEADER_FILE, load_index
from vitreuse.io.errors import DataError, as_data_error

DIGITS_CLASSES = tuple("0123456789")
DIGITS_SAMPLES = {"train": 1437, "val": 360}
DIGITS_SPLIT_SEED = 0
POINTER_SAMPLES = {"train": 20_000, "val": 2000}
POINTER_SEEDS = {"train": 0, "val": 1}


def prepare_source(name: str, root: str | Path) -> None:
    """Writes a built-in data set as ROOT/train and ROOT/val, unless it is there.

    Each split appears when it is whole, and processes that start together do not disturb each other.

    Args:
        name: 'digits', scikit-learn's 1,797 scanned handwritten digits of 8 x 8 pixels, 360 of them held out; or
            'pointer_chain', four of these on 16 x 16 pixels, where the first names the place of the one that names the
            place of the label.
        root: The folder of the data set.

    Raises:
        DataError: The name is unknown, a package not installed, or a folder cannot be written or holds other data.
    """
    if name not in SOURCES:
        raise DataError(f"no built-in data set {name!r}: choose {', '.join(SOURCES)}, or name a folder of your own.")
    source = _SOURCES[name]
    for split, num_samples in source.num_samples.items():
        folder = Path(root) / split
        if not (folder / HEADER_FILE).exists():
            with as_data_error(f"{name} cannot be written to {folder}", "name another folder"):
                try:
                    write_shards(source.read(split), folder, DIGITS_CLASSES, source.samples_per_shard[split])
                except DataError:
                    if not (folder / HEADER_FILE).exists():  # else another process was first
                        raise
        index = load_index(folder)
        if index.class_names != DIGITS_CLASSES or len(index) != num_samples:
            raise DataError(f"{folder} holds {len(index)} samples that are not the {name}: name another folder.")


def _read_digits(split: str) -> Iterator[EncodedSample]:
    """The images of a split, one by one."""
    numbers, images, labels = _load_digits(split)
    for number in numbers:
        yield EncodedSample(f"digits-{number:04d}", _encode(images[number]), "png", int(labels[number]))


def _read_pointer_chain(split: str) -> Iterator[EncodedSample]:
    """Images of four digits of a split, side by side in two rows; a key has their numbers in reading order.

    A digit names a place, from 0 to 3, by its value modulo 4. The first names the place of a second, and this the place
    of the label: pointer value retrieval, arXiv 2107.12580, for which an image has to be read three times over.
    """
    numbers, images, labels = _load_digits(split)
    random = np.random.RandomState(POINTER_SEEDS[split])  # whose numbers stay the same in later versions of numpy
    for places in numbers[random.randint(len(numbers), size=(POINTER_SAMPLES[split], 4))]:
        first, second, third, fourth = images[places]
        named = places[labels[places[0]] % 4]
        named = places[labels[named] % 4]
        key = "-".join(("pointer", *(f"{number:04d}" for number in places)))
        yield EncodedSample(key, _encode(np.block([[first, second], [third, fourth]])), "png", int(labels[named]))


def _load_digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits of a split, stratified by class and in an order of its own; images (B, 8, 8) and labels of all."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("digits come with scikit-learn: install it with pip install 'vitreuse[digits]'.") from error
    images, labels = load_digits(return_X_y=True)
    train, val = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_SAMPLES["val"], stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return np.asarray({"train": train, "val": val}[split]), pixels, np.asarray(labels)


def _encode(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


class _Source(NamedTuple):
    """A built-in data set: what yields the samples of a split, how many they are, and how many go into a shard."""

    read: Callable[[str], Iterator[EncodedSample]]
    num_samples: dict[str, int]
    samples_per_shard: dict[str, int]


_SOURCES = {
    "digits": _Source(_read_digits, DIGITS_SAMPLES, {"train": 400, "val": 200}),
    "pointer_chain": _Source(_read_pointer_chain, POINTER_SAMPLES, {"train": 4000, "val": 1000}),
}
SOURCES = tuple(_SOURCES)
