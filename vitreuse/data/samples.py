"""A sample of a data set's images, drawn by a seed, as inputs of a model.

Commands that measure on a few images, or learn from them, take one: similarity, search, convert, export. Training and
evaluation, which see every image, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitreuse.io.errors import DataError


class ImageSample:
    """Some images of a set, the same ones for the same seed, in the order of the set.

    Args:
        dataset: A set of image, label and key, as open_images returns it; a label of -1 is none.
        transform: Makes a model's input of a PIL image.
        num_images: How many; all of a set that has no more.
        seed: Decides which.
        remark: Why the labels are not those of the model, where they are not.

    Attributes:
        class_names: The names of the labels; none where images have no labels, or there is a remark.
    """

    def __init__(
        self, dataset: Any, transform: Callable[..., Tensor], num_images: int, seed: int = 0, remark: str | None = None
    ):
        self.dataset, self.transform, self.seed, self.remark = dataset, transform, seed, remark
        self.class_names: tuple[str, ...] = dataset.class_names if remark is None else ()
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_images]
        self.numbers: list[int] = chosen.sort().values.tolist()

    def apart(self) -> tuple[ImageSample, ImageSample]:
        """Two samples of the same set that share no image: this one and as many others, or halves of a small set.

        Raises:
            DataError: The set has one image.
        """
        total, num_images = len(self.dataset), len(self)
        if total < 2:
            only = f"{self.dataset.folder} has {total} image"
            raise DataError(f"{only}, and none is both learned from and shown: add more.")
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        size = min(num_images, total // 2)
        return self._of(drawn[:size]), self._of(drawn[size : 2 * size])

    def parts(self, *sizes: int) -> list[ImageSample]:
        """Samples of so many of these images each, drawn by the seed, that share none."""
        drawn = torch.tensor(self.numbers)[
            torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + 1))
        ]
        return [self._of(part) for part in drawn[: sum(sizes)].split(sizes)]

    def _of(self, numbers: Tensor) -> ImageSample:
        other = copy(self)
        other.numbers = numbers.sort().values.tolist()
        return other

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (B, channels, rows, columns) and labels (B,), decoded as they are asked for."""
        for first in range(0, len(self), batch_size):
            samples = [self.dataset[number] for number in self.numbers[first : first + batch_size]]
            images = torch.stack([self.transform(sample.image) for sample in samples])
            yield images, torch.tensor([sample.label for sample in samples])

    def inputs(self, batch_size: int) -> Inputs:
        """The inputs of batches without labels, for who goes over them more than once."""
        return Inputs(self, batch_size)


@dataclass(frozen=True)
class Inputs:
    """Inputs (B, channels, rows, columns) of a sample, decoded anew each time that they are iterated over."""

    sample: ImageSample
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.sample.batches(self.batch_size))
