"""A sample of somebody's images as a model takes them: what redundancy is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreuse.data import DataError, open_images, prepare_source
from vitreuse.inputs import Transform, evaluation_transform, image_mode
from vitreuse.targets import Target


class ImageSample:
    """Some images of a set, the same ones for the same seed, in the order of the set.

    Args:
        dataset: Of image, label and key, as vitreuse.data.open_images returns it; a label of -1 is none.
        transform: From a PIL image to a model's input.
        num_images: How many; all of a set that has no more.
        seed: Of the choice.

    Attributes:
        class_names: Of the set's labels; none where its images have no labels.
    """

    def __init__(self, dataset: Any, transform: Transform, num_images: int, seed: int = 0):
        self.dataset, self.transform = dataset, transform
        self.class_names: tuple[str, ...] = dataset.class_names
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


def sample_images(
    target: Target, model: Any, root: Path | None, num_images: int, split: str = "val", seed: int = 0
) -> ImageSample:
    """A sample of the images of a folder, or by default of the data that a run was trained on.

    Args:
        target: What the model is of: a run crops images as it did while it was evaluated.
        model: The model itself.
        root: Shards, class folders, or images alone; or a folder that has such a one by the name of the split.
        num_images: How many.
        split: The split to look for.
        seed: Of the choice.

    Raises:
        ValueError: There is no folder, no image in it, or no run that would know of one.
    """
    if root is None:
        root = _own_root(target)
    mode = image_mode(model)
    dataset = open_images(root / split if (root / split).is_dir() else root, mode)
    crop_pct = None if target.config is None else target.config.eval.crop_pct
    return ImageSample(dataset, evaluation_transform(model, crop_pct), num_images, seed)


def learning_split(target: Target, root: Path | None, otherwise: str = "val") -> str:
    """The split that a model may learn from, or a plan be chosen on: train where there is one; arguments as above."""
    return "train" if ((root or _own_root(target)) / "train").is_dir() else otherwise


def _own_root(target: Target) -> Path:
    if target.config is None:
        raise DataError(f"{target.label} is no run, which would know its data: give --data DIR with images.")
    if target.config.data.source is not None:
        prepare_source(target.config.data.source, target.config.data.folder)
    return Path(target.config.data.folder)
