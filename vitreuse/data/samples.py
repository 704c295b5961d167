"""Some of a data set's images, as a model takes them: what redundancy is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vitreuse.model.class_names import Names
from vitreuse.model.preprocessing import Transform


class ImageSample:
    """Some images of a set, the same ones for the same seed, in the order of the set.

    Args:
        dataset: Of image, label and key, as vitreuse.data.open_images returns it; a label of -1 is none.
        transform: From a PIL image to a model's input.
        num_images: How many; all of a set that has no more.
        seed: Of the choice.
        remark: Why its labels are not those of the model, where they are not.

    Attributes:
        class_names: Of the set's labels; none where its images have none, or there is a remark.
    """

    def __init__(self, dataset: Any, transform: Transform, num_images: int, seed: int = 0, remark: str | None = None):
        self.dataset, self.transform = dataset, transform
        self.remark = remark
        self.class_names: Names = dataset.class_names if remark is None else ()
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_images]
        self.numbers: list[int] = chosen.sort().values.tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (B, channels, rows, columns) and labels (B,), decoded as they are asked for."""
        for first in range(0, len(self), batch_size):
            samples = [self.dataset[number] for number in self.numbers[first : first + batch_size]]
            images = torch.stack([self.transform(sample.image) for sample in samples])
            yield images, torch.tensor([sample.label for sample in samples])
