"""Images to learn from and others to measure on, where no label is read: they need neither classes nor splits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vitreuse.data.datasets import open_images
from vitreuse.data.decode import Decoder, Sample, decode_image
from vitreuse.data.splits import find_split
from vitreuse.io.errors import DataError

HELD_OUT = 10  # one image in so many


class Part(Dataset[Sample]):
    """Some of the images of a data set, in its order; none of its labels.

    Args:
        dataset: As open_images returns it.
        numbers: Of the images.
    """

    def __init__(self, dataset: Any, numbers: np.ndarray) -> None:
        self.dataset, self.numbers = dataset, np.sort(numbers)
        self.folder, self.notes, self.class_names = dataset.folder, dataset.notes, ()
        self.shard_sizes = [len(numbers)]
        self.digest = hashlib.sha256(dataset.digest.encode() + self.numbers.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Sample:
        """The image of a number, with a label of -1; raises as the data set does."""
        return self.dataset[int(self.numbers[number])]._replace(label=-1)

    def class_sizes(self) -> list[int]:
        """How many images each class has: there are none."""
        return []

    def key(self, number: int) -> str:
        """The key of an image, without a look at it."""
        return self.dataset.key(int(self.numbers[number]))


def split_apart(dataset: Any, num_held_out: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of images to learn from, and of so many others to measure on, drawn by a seed."""
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    return drawn[num_held_out:], drawn[:num_held_out]


def open_without_labels(root: Path, mode: str | None, decode: Decoder = decode_image) -> tuple[Part, Part]:
    """The images of a folder to learn from, read by ``decode``, and PIL images to measure on, which are none of these.

    They are those of its splits train and val; where there is no val, one image in ten is held out of train, or of all.
    The draw depends on the number of images alone.

    Raises:
        DataError: There are fewer than two images, or what is there is damaged.
    """
    place, val = find_split(root, "train") or root, find_split(root, "val")
    images, same = open_images(place, mode, decode), open_images(val or place, mode)
    if val is not None and val != place:
        return Part(images, np.arange(len(images))), Part(same, np.arange(len(same)))
    if len(images) < 2:
        raise DataError(f"{place} has {len(images)} image, and one is held out to measure on: give it more.")
    learned, held_out = split_apart(images, max(1, len(images) // HELD_OUT))
    same.notes.append(f"{place} has no images set apart: {len(held_out)} of its {len(images)} are held out.")
    return Part(images, learned), Part(same, held_out)
