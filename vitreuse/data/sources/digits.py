"""Scikit-learn's scanned digits, alone and four to an image: they come with a package."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vitreuse.io.errors import DataError

CLASSES = tuple("0123456789")
DIGITS_SAMPLES = {"train": 1437, "val": 360}
DIGITS_SPLIT_SEED = 0
POINTER_SAMPLES = {"train": 20_000, "val": 2000}
POINTER_SEEDS = {"train": 0, "val": 1}


def read_digits(split: str, *_: Path | None) -> Iterator[tuple[str, np.ndarray, int]]:
    """The images of a split, one by one: a key, pixels (8, 8) and the label."""
    numbers, images, labels = _load_digits(split)
    for number in numbers:
        yield f"digits-{number:04d}", images[number], int(labels[number])


def read_pointer_chain(split: str, *_: Path | None) -> Iterator[tuple[str, np.ndarray, int]]:
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
        yield key, np.block([[first, second], [third, fourth]]), int(labels[named])


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
