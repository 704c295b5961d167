"""What augmentation draws for an image and leaves to the device, drawn by timm's and torchvision's own classes.

They are handed something that stands for an image and notes what is done to it: so the draws are the same numbers of
the same generators, wherever they are carried out (train.operations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugMixAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from train.auto_augment import colour_transform, keep_bits, operations_of
from vitreuse.config import ConfigError, CropConfig

Box = tuple[int, int, int, int]  # the first row and the one after the last, the first column and the one after the last
JITTERED = ("brightness", "contrast", "color")  # in the order of ColorJitter's numbers; hue is never changed


class Step(NamedTuple):
    """An operation of train.operations, and its arguments."""

    operation: str
    arguments: tuple[float, ...]


class Draws(NamedTuple):
    """What is still to be done to an image: a flip, then the steps; once it is normalised, noise in boxes."""

    is_flipped: bool
    steps: Sequence[Step]
    boxes: Sequence[Box]
    noise: Sequence[Tensor]  # (channels, rows, columns) of each box


NOTHING = Draws(False, (), (), ())


class Augmented(NamedTuple):
    """An image of bytes (channels, rows, columns), and what is still to be done to it."""

    image: Tensor
    draws: Draws = NOTHING


class Group(NamedTuple):
    """The images of a batch that an operation is done to at the same time."""

    operation: str
    rows: np.ndarray  # (n,)
    arguments: np.ndarray  # (n, number of arguments)


class Drawn(NamedTuple):
    """What is still to be done to the images of a batch.

    Attributes:
        is_flipped: (B,).
        groups: Operations in their order.
        boxes: (B, 4); of an image of which nothing is erased, empty.
        noise: Of all boxes, one after the other.
    """

    is_flipped: np.ndarray
    groups: list[Group]
    boxes: np.ndarray
    noise: Tensor


def gather(draws: Sequence[Draws]) -> Drawn:
    """The draws of the images of a batch, those of an operation together."""
    groups = []
    for place in range(max((len(own.steps) for own in draws), default=0)):
        steps = {row: own.steps[place] for row, own in enumerate(draws) if place < len(own.steps)}
        for operation in sorted({step.operation for step in steps.values()}):
            rows = [row for row, step in steps.items() if step.operation == operation]
            arguments = np.array([steps[row].arguments for row in rows], dtype=np.float32)
            groups.append(Group(operation, np.array(rows), arguments))
    boxes = [own.boxes[0] if own.boxes else (0, 0, 0, 0) for own in draws]
    noise = [part.flatten() for own in draws for part in own.noise]
    is_flipped = np.array([own.is_flipped for own in draws], dtype=bool)
    return Drawn(is_flipped, groups, np.array(boxes).reshape(-1, 4), torch.cat(noise) if noise else torch.empty(0))


class NotedImage:
    """Stands for a PIL image of so many columns and rows in timm's operations, and notes what is done to it."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.steps = size, list[Step]()

    def note(self, operation: str, *arguments: float) -> NotedImage:
        """Notes a step, of which the image itself is the result."""
        self.steps.append(Step(operation, arguments))
        return self

    def transform(
        self, size: tuple[int, int], method: int, matrix: Sequence[float], resample: int, fillcolor: Sequence[int]
    ) -> NotedImage:
        """Image.transform by an affine map."""
        kind = "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"
        return self.note(f"affine {kind}", *matrix, *fillcolor)

    def rotate(self, degrees: float, resample: int, fillcolor: Sequence[int]) -> NotedImage:
        """Image.rotate about the centre, counter-clockwise."""
        angle, (x, y) = -math.radians(degrees), (side / 2 for side in self.size)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
        return self.transform(self.size, Image.Transform.AFFINE, matrix, resample, fillcolor)

    def filter(self, blur: Any) -> NotedImage:
        """Image.filter by PIL's GaussianBlur."""
        return self.note("blur", blur.radius)


def _note(operation: str, image: NotedImage, *arguments: float, **_: Any) -> NotedImage:
    return image.note(operation, *arguments)


def _note_desaturate(image: NotedImage, factor: float, **_: Any) -> NotedImage:
    return image.note("color", min(1.0, max(0.0, 1 - factor)))


# timm's functions that hand the image to PIL's modules; what calls its methods needs no stand-in
NOTED: dict[Callable[..., Any], Callable[..., NotedImage]] = {
    auto_augment.auto_contrast: partial(_note, "autocontrast"),
    auto_augment.brightness: partial(_note, "brightness"),
    auto_augment.color: partial(_note, "color"),
    auto_augment.contrast: partial(_note, "contrast"),
    auto_augment.desaturate: _note_desaturate,
    auto_augment.equalize: partial(_note, "equalize"),
    auto_augment.invert: partial(_note, "invert"),
    auto_augment.sharpness: partial(_note, "sharpness"),
    auto_augment.solarize: partial(_note, "solarize"),
    auto_augment.solarize_add: partial(_note, "solarize_add"),
    keep_bits: partial(_note, "posterize"),
}


def noted_colours(crop: CropConfig, settings: dict[str, Any]) -> Callable[[], list[Step]]:
    """What draws timm's policy and colour jitter of an experiment, for images of the model's image settings.

    Raises:
        ConfigError: The policy is none of timm's, or one that mixes several images of one.
    """
    _, rows, columns = settings["input_size"]
    parts = colour_transform(crop, settings).transforms
    if any(isinstance(part, AugMixAugment) for part in parts):
        mixes = f"train.crop.auto_augment {crop.auto_augment!r} mixes several versions of an image"
        raise ConfigError(f"{mixes}, which workers alone do: leave train.augment_on out, or set it to workers.")
    for op in (op for part in parts for op in operations_of(part)):
        op.aug_fn = NOTED.get(op.aug_fn, op.aug_fn)

    def draw() -> list[Step]:
        image = NotedImage((columns, rows))
        for part in parts:
            _jitter(part, image) if isinstance(part, ColorJitter) else part(image)
        return image.steps

    return draw


def _jitter(jitter: Any, image: NotedImage) -> None:
    """Notes what torchvision's ColorJitter draws."""
    order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for number in order.tolist():
        if number < len(JITTERED) and factors[number] is not None:
            image.note(JITTERED[number], factors[number])


class NotedErasing:
    """Draws what timm's RandomErasing does to an image of a size (channels, rows, columns): boxes, and their noise."""

    dtype = torch.float32

    def __init__(self, size: Sequence[int]):
        self._size, self.boxes, self.noise = torch.Size(size), list[Box](), list[Tensor]()

    def size(self) -> torch.Size:
        """Of the image that it stands for."""
        return self._size

    def __setitem__(self, where: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = where
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))
        self.noise.append(noise)

    def draw(self, erasing: RandomErasing) -> NotedErasing:
        """Lets timm erase."""
        erasing(self)
        return self
