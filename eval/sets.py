"""ImageNet's test sets by name: their classes, how many images they have, and what counts as right.

A class goes by its name, a synset (n01440764) or, as in ImageNet-V2, a number; so folders and shards may have fewer
classes than the model, in any order. Synsets, the classes of A and R and the labels of ReaL are timm's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor, nn

from eval.labelled import Labelled
from vitreuse.data import FolderDataset, ShardDataset
from vitreuse.data.labels import Renumbered, are_numbers, listed, numbered_as, places

NUM_CLASSES = 1000
VALIDATION_KEY = re.compile(r"ILSVRC2012_val_(\d{8})")  # in the key of a validation image
# AlexNet's mean error over the severities of each corruption, by which ImageNet-C's errors are divided.
# Paper: Hendrycks & Dietterich, Benchmarking Neural Network Robustness, 1903.12261; github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTED_SPLITS = tuple(f"{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in range(1, 6))
Source = ShardDataset | FolderDataset
_imagenet = cache(ImageNetInfo)  # which reads timm's files


class NamedSet(NamedTuple):
    """A published test set.

    Attributes:
        title: The name that a reader knows it by.
        num_images: How many images are counted.
        rule: How they are counted, where that is not as usual.
        indices: timm's file of the classes that it has, and among which a model may choose; all where None.
    """

    title: str
    num_images: int
    rule: str = ""
    indices: str | None = None

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes of the model that the set has images of."""
        if self.indices is None:
            return tuple(range(NUM_CLASSES))
        return tuple(map(int, (files("timm.data") / "_info" / self.indices).read_text().split()))


SETS = {
    "imagenet": NamedSet("ImageNet", 50_000),
    "real": NamedSet("ImageNet ReaL", 46_837, ", any of an image's labels"),
    "v2": NamedSet("ImageNet-V2", 10_000),
    "a": NamedSet("ImageNet-A", 7_500, ", among its 200 classes", "imagenet_a_indices.txt"),
    "r": NamedSet("ImageNet-R", 30_000, ", among its 200 classes", "imagenet_r_indices.txt"),
    "sketch": NamedSet("ImageNet-Sketch", 50_889),
    "corruptions": NamedSet("ImageNet-C", 50_000),  # each corruption and severity
}


class TestSet(NamedTuple):
    """A split as it is evaluated.

    Attributes:
        title: The title of the published set that it is, if it is one.
        images: Its images under the model's labels.
        classes: Those that the model may choose among.
        class_names: The name of each of the model's classes.
        order: The number that the model itself has for each class of a published set.
        remark: What is to be said of how labels and classes were brought together, if anything is.
    """

    title: str | None
    images: Labelled
    classes: Sequence[int]
    class_names: Sequence[str]
    order: Sequence[int] = range(NUM_CLASSES)
    remark: str | None = None


def named_set(named: NamedSet, dataset: Source, whole: bool = True) -> TestSet:
    """A split that is a published set, for a model of ImageNet's classes.

    Args:
        whole: Whether all images must be there.

    Raises:
        ValueError: A class or a key is none of the set's, or there are more or fewer images than the set has.
    """
    names = tuple(_imagenet().label_descriptions())
    images = _Real(dataset) if named is SETS["real"] else Renumbered(dataset, _classes(named, dataset), names)
    if whole and len(images) != named.num_images:
        raise ValueError(
            f"{dataset.folder} has {len(images):,} images that count, {named.title} has {named.num_images:,}: give the "
            "whole set, or --subset for a part of it."
        )
    title = named.title + named.rule + ("" if len(images) == named.num_images else " (part)")
    return TestSet(title, images, named.classes, names)


def _classes(named: NamedSet, dataset: Source) -> list[int]:
    """The model's class of each class of a split."""
    known = {synset: number for number, synset in enumerate(_imagenet().label_names())}
    if len(dataset.class_names) == NUM_CLASSES:  # fewer numbers may be an order of their own
        known |= {str(number): number for number in range(NUM_CLASSES)}
    classes, own = [known.get(name, -1) for name in dataset.class_names], {*named.classes}
    for name, number in zip(dataset.class_names, classes, strict=True):
        if number not in own:
            raise ValueError(
                f"class {name!r} of {dataset.folder} is none of the {len(own):,} classes of {named.title}: name it by "
                "its synset, such as n01440764, or all 1,000 from 0 to 999, and see that --set is the right one."
            )
    return classes


class _Real:
    """The validation images that ReaL labels, each with all of its labels; the first fills the row up.

    Paper: Beyer et al., Are we done with ImageNet?, 2006.07159.
    """

    def __init__(self, dataset: Source) -> None:
        real_labels = RealLabelsImagenet(range(50_000)).real_labels
        labels = [real_labels[_validation_name(dataset, number)] for number in range(len(dataset))]
        self.dataset, self.numbers = dataset, [number for number, row in enumerate(labels) if row]
        width = max(map(len, labels))
        self.labels = np.array([row + row[:1] * (width - len(row)) for row in labels if row])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> tuple[Any, np.ndarray, str]:
        image, _, key = self.dataset[self.numbers[number]]
        return image, self.labels[number], key


def _validation_name(dataset: Source, number: int) -> str:
    """The name under which timm has the labels of an image."""
    found = VALIDATION_KEY.search(dataset.key(number))
    if found is None or not 1 <= int(found[1]) <= 50_000:
        raise ValueError(
            f"{dataset.key(number)!r} of {dataset.folder} is no validation image of ImageNet, by whose names ReaL's "
            "labels go: keep names such as ILSVRC2012_val_00000001.JPEG."
        )
    return f"{found[0]}.JPEG"


def matched_set(dataset: Source, names: Sequence[str], model: str) -> TestSet:
    """A split without a name, under the labels that a model has for its classes by their names.

    Args:
        names: Names of the model's classes.
        model: What an error calls the model.

    Raises:
        ValueError: A class is none of the model's.
    """
    way_out = "rename them, or give --by-number if the labels are the model's whatever the names say"
    images = numbered_as(dataset, names, model, way_out)
    num_matched = len(dataset.class_names)
    remark = None if images is dataset else f"labels by the names of {num_matched} of the model's {len(names)} classes"
    return TestSet(None, images, range(len(names)), names, remark=remark)


def plain_set(dataset: Source, num_classes: int, is_own: bool) -> TestSet:
    """A split whose labels are the model's, without a name.

    Class folders are numbered in order, so each class needs one. Shards carry their labels, and may lack a class; but
    those of ImageNet that do were numbered without it.

    Args:
        is_own: Whether it is of the data that the model was trained on.

    Raises:
        ValueError: Its labels would be another model's.
    """
    names = dataset.class_names
    by_order = isinstance(dataset, FolderDataset) or {*names} <= {*_imagenet().label_names()}
    if by_order and len(names) != num_classes:
        kind = "class folders" if isinstance(dataset, FolderDataset) else "of ImageNet's classes"
        raise ValueError(
            f"{dataset.folder} has {len(names)} {kind} and the model {num_classes} classes: numbered in order, "
            "each class needs one; --set goes by the names of ImageNet's classes."
        )
    numbers = [int(name) for name in names if name.isdecimal()]
    if not is_own and len(numbers) == len(names) == NUM_CLASSES and numbers != sorted(numbers):
        raise ValueError(
            f"the classes of {dataset.folder} are numbers in the order of text, {', '.join(names[:4])}: --set v2 (or "
            "another) takes them for ImageNet's; for an order of your own name them from 0000 on."
        )
    return TestSet(None, dataset, range(num_classes), names, remark=None if is_own else "labels by number")


def imagenet_order(names: Sequence[str], model: str) -> list[int]:
    """The number that a model has for each of ImageNet's classes, by their names, synsets or timm's descriptions.

    Args:
        names: Names of the model's classes; their numbers alone are taken for ImageNet's.
        model: What an error calls the model.

    Raises:
        ValueError: A class of ImageNet is none of the model's.
    """
    if are_numbers(names):
        return [*range(NUM_CLASSES)]
    for classes in ([*_imagenet().label_names()], [*_imagenet().label_descriptions()]):
        order = [number for number in places(classes, names) if number is not None]
        if len(order) == NUM_CLASSES:
            return order
    raise ValueError(
        f"--set is for ImageNet's classes and {model} has {listed(names)}: leave it out, or give --by-number if they "
        "are ImageNet's in timm's order."
    )


class Among(nn.Module):
    """A model, where it is, that may answer with these of ImageNet's classes only: all other logits are -inf.

    Args:
        classes: Those that it may answer with.
        order: The model's own number of each class.
    """

    def __init__(self, model: nn.Module, classes: Sequence[int], order: Sequence[int] = range(NUM_CLASSES)) -> None:
        super().__init__()
        self.model, device = model, next(model.parameters()).device
        self.order = torch.tensor(order, device=device)
        self.others = torch.ones(NUM_CLASSES, dtype=torch.bool, device=device)
        self.others[list(classes)] = False

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.order].masked_fill(self.others, -torch.inf)


def corrupted_splits(folder: Path, whole: bool = True) -> list[str]:
    """The CORRUPTION/SEVERITY folders: the 15 corruptions and 5 severities of ImageNet-C, or all that are there.

    Raises:
        ValueError: One is missing.
    """
    found = sorted(str(path.relative_to(folder)) for path in folder.glob("*/[0-9]") if path.is_dir())
    missing = [split for split in CORRUPTED_SPLITS if split not in found]
    if not found or (whole and missing):
        raise ValueError(
            f"{folder} has no {missing[0]}/: ImageNet-C is a folder a corruption with a folder a severity; --subset "
            "evaluates those that are there."
        )
    return [*CORRUPTED_SPLITS] if whole else found


def mean_corruption_error(top1: dict[str, float]) -> float | None:
    """mCE in percent from the top-1 of each corrupted split; None where they are not all of ImageNet-C's."""
    if {*top1} != {*CORRUPTED_SPLITS}:
        return None
    return mean(
        mean(100 - top1[f"{corruption}/{severity}"] for severity in range(1, 6)) / alexnet
        for corruption, alexnet in ALEXNET_ERRORS.items()
    )
