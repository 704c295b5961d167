"""A sample of somebody's images as a model takes them: what redundancy is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreuse.class_names import Names, names_of, numbered_as
from vitreuse.data import DataError, choose_split, find_split, open_images, prepare_source
from vitreuse.inputs import Transform, evaluation_transform, image_mode
from vitreuse.targets import Target


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


def sample_images(
    target: Target, model: Any, root: Path | None, num_images: int, split: str = "val", seed: int = 0
) -> ImageSample:
    """A sample of the images of a folder, or by default of the data that a run was trained on.

    Args:
        target: What the model is of: a run crops images as it did while it was evaluated.
        model: The model itself.
        root: Shards, class folders, or images alone; or a folder that has splits of these.
        num_images: How many.
        split: The split to look for.
        seed: Of the choice.

    Raises:
        ValueError: There is no folder, no image in it, or no run that would know of one.
    """
    if root is None:
        root = _own_root(target)
    dataset = open_images(choose_split(root, split), image_mode(model))
    crop_pct = None if target.config is None else target.config.eval.crop_pct
    dataset, remark = _under_labels_of(model, dataset, target.label)
    return ImageSample(dataset, evaluation_transform(model, crop_pct), num_images, seed, remark)


def _under_labels_of(model: Any, dataset: Any, label: str) -> tuple[Any, str | None]:
    """A set under the labels that a model has for its classes, by name; or the set itself, and why it cannot be."""
    names = names_of(model)
    if names is None or not dataset.class_names:
        return dataset, None
    try:
        return numbered_as(dataset, names, label, "no top-1 is measured on them"), None
    except ValueError as error:
        return dataset, str(error)


def learning_split(target: Target, root: Path | None, otherwise: str = "val") -> str:
    """The split that a model may learn from, or a plan be chosen on: train where there is one; arguments as above."""
    return otherwise if find_split(root or _own_root(target), "train") is None else "train"


def _own_root(target: Target) -> Path:
    if target.config is None:
        raise DataError(f"{target.label} is no run, which would know its data: give --data DIR with images.")
    if target.config.data.source is not None:
        prepare_source(target.config.data.source, target.config.data.folder)
    return Path(target.config.data.folder)
