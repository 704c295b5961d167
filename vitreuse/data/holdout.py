"""Images to learn from and others set apart to measure on, of which no split of the data says which they are."""

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
    """Some of the images of a data set, in its order and in its shards; with its labels or with none.

    Args:
        dataset: As open_images or open_split returns it.
        numbers: Of the images.
        is_labelled: Whether the labels and the names of classes are kept.
    """

    def __init__(self, dataset: Any, numbers: np.ndarray, is_labelled: bool = False) -> None:
        self.dataset, self.numbers, self.is_labelled = dataset, np.sort(numbers), is_labelled
        self.folder, self.notes, self.is_sharded = dataset.folder, dataset.notes, dataset.is_sharded
        self.class_names = dataset.class_names if is_labelled else ()
        ends = np.searchsorted(self.numbers, np.cumsum(dataset.shard_sizes))
        self.shard_sizes = np.diff(ends, prepend=0).tolist()
        self.digest = hashlib.sha256(dataset.digest.encode() + self.numbers.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Sample:
        """The image of a number, with a label of -1 where there are none; raises as the data set does."""
        sample = self.dataset[int(self.numbers[number])]
        return sample if self.is_labelled else sample._replace(label=-1)

    def class_sizes(self) -> list[int]:
        """How many images each class has; none where there are no labels."""
        return np.bincount(self.labels(), minlength=len(self.class_names)).tolist() if self.class_names else []

    def labels(self) -> np.ndarray:
        """The label of each image, as the data set has it."""
        return self.dataset.labels()[self.numbers]

    def key(self, number: int) -> str:
        """The key of an image, without a look at it."""
        return self.dataset.key(int(self.numbers[number]))


def split_apart(dataset: Any, num_held_out: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of images to learn from, and of so many others to measure on, drawn by a seed."""
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    return drawn[num_held_out:], drawn[:num_held_out]


def hold_out(dataset: Any, same: Any, share: float, seed: int) -> tuple[Part, Part]:
    """The images of a labelled data set to learn from, and a share of it to choose by, which ``same`` reads.

    The draw depends on the seed and the number of images.

    Raises:
        DataError: One of the two would have no image.
    """
    number = round(share * len(dataset))
    if not 0 < number < len(dataset):
        raise DataError(
            f"data.holdout {share:g} sets {number} of the {len(dataset)} training images apart: give another share."
        )
    learned, held_out = split_apart(dataset, number, seed)
    return Part(dataset, learned, is_labelled=True), Part(same, held_out, is_labelled=True)


def open_without_labels(root: Path, mode: str | None, decode: Decoder = decode_image) -> tuple[Part, Part]:
    """The images of a folder to learn from, read by ``decode``, and PIL images to measure on, which are none of these.

    They are those of its splits train and val; where there is no val, one image in ten is held out of train, or of all.
    The draw depends on the number of images alone.

    Raises:
        DataError: There are fewer than two images, or what is there is damaged.
    """
    place, val = find_split(root, "train") or root, find_split(root, "val")
    images, same = open_images(place, mode, decode), open_images(val or place, mode)
    if images.folder != same.folder:
        return Part(images, np.arange(len(images))), Part(same, np.arange(len(same)))
    if len(images) < 2:
        raise DataError(f"{place} has {len(images)} image, and one is held out to measure on: give it more.")
    learned, held_out = split_apart(images, max(1, len(images) // HELD_OUT))
    same.notes.append(f"{place} has no images set apart: {len(held_out)} of its {len(images)} are held out.")
    return Part(images, learned), Part(same, held_out)
