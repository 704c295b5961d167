"""The few images that a model is measured on, or learns from, as its inputs: similarity, search, convert, export.

Images is what all of these go over, whatever somebody has: a tensor, a data set, a loader. ImageSample is what their
commands have, some images of a folder, drawn by a seed. Training and evaluation, which see every image, take neither.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from vitreuse.io.errors import DataError
from vitreuse.model.class_names import has_classes

BATCH_SIZE = 32
FORMS = {3: "images (channels, rows, columns)", 4: "batches (B, channels, rows, columns)"}  # by dimensions
SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


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

    def _of(self, numbers: Tensor) -> ImageSample:
        other = copy(self)
        other.numbers = numbers.sort().values.tolist()
        return other

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """An input (channels, rows, columns) and its label, decoded as it is asked for."""
        sample = self.dataset[self.numbers[place]]
        return self.transform(sample.image), sample.label

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (B, channels, rows, columns) and labels (B,)."""
        return Images(self, batch_size).labelled()


class Images:
    """Images in batches (B, channels, rows, columns), which can be gone over again and again, in the same order.

    Args:
        source: A tensor of images; a data set or list of images (channels, rows, columns), or of tuples that begin with
            one; or what gives batches, or tuples that begin with one, each time that it is gone over, as a DataLoader
            does. Images are normalised as the model's were.
        batch_size: Images of a batch, whatever those of the source are.

    Attributes:
        numbers: Which of the source's images these are.
        dtype: What batches are given as; None for the source's own.
        class_names: The names of the labels, where the source says them; else labels are not looked at.

    Raises:
        DataError: The source can be gone over once alone, or never in the same order; or gives no such images.
    """

    def __init__(self, source: Any, batch_size: int = BATCH_SIZE):
        self.source, self.batch_size = source, batch_size
        self.dtype: torch.dtype | None = None
        self.class_names: tuple[str, ...] = tuple(getattr(source, "class_names", ()))
        self._has_batches = _gives_batches(source)
        total = sum(len(_image(batch, 4)) for batch in source) if self._has_batches else len(source)
        self.numbers: Sequence[int] = range(total)

    def parts(self, *sizes: int, seed: int = 0) -> list[Images]:
        """So many of these images each, drawn by the seed, that share none."""
        drawn = torch.tensor(self.numbers)[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + 1))]
        found = []
        for part in drawn[: sum(sizes)].split(sizes):
            found.append(copy(self))
            found[-1].numbers = part.sort().values.tolist()
        return found

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.labelled())

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches with their labels (B,), -1 where they are not looked at.

        Raises:
            DataError: Images are of several sizes.
        """
        singles = self._singles()
        while few := list(islice(singles, self.batch_size)):
            images, labels = zip(*few, strict=True)
            shapes = dict.fromkeys(_size(image) for image in images)
            if len(shapes) > 1:
                raise DataError(f"images are of several sizes, {' and '.join([*shapes][:2])}: resize them to one.")
            yield torch.stack(images).to(self.dtype), torch.tensor(labels)

    def _singles(self) -> Iterator[tuple[Tensor, int]]:
        """Each image (channels, rows, columns) and its label."""
        if not self._has_batches:
            for number in self.numbers:
                item = self.source[number]
                yield _image(item, 3), int(item[1]) if self.class_names else -1
            return
        chosen, first = set(self.numbers), 0
        for batch in self.source:
            images = _image(batch, 4)
            for place, image in enumerate(images):
                if first + place in chosen:
                    yield image, int(batch[1][place]) if self.class_names else -1
            first += len(images)


def images_for(model: Any, images: Any, batch_size: int = BATCH_SIZE) -> Images:
    """Images as a model takes them, in its dtype, of whatever Images takes; of Images the same ones.

    Raises:
        DataError: As Images does; or there are none, or the model does not take their size.
    """
    found = copy(images) if isinstance(images, Images) else Images(images, batch_size)
    if not len(found):
        raise DataError("there are no images: give at least one.")
    if isinstance(model, VisionTransformer):
        _refuse_size(model, next(found._singles())[0])
    found.dtype = next(model.parameters()).dtype
    return found


def _refuse_size(model: Any, image: Tensor) -> None:
    """Raises DataError for an image that a ViT does not take."""
    embed, given = model.patch_embed, _size(image)
    channels, size = embed.proj.in_channels, image.shape[1:]
    if not model.dynamic_img_size:
        wanted = _size(image.new_empty(channels, *embed.img_size))
        if given != wanted:
            raise DataError(
                f"images are {given} and the model takes {wanted}: resize them, or give img_size=... to it."
            )
    if len(image) != channels:
        raise DataError(f"images are {given} and the model takes {channels} channels: convert them.")
    rows, columns = embed.patch_size
    if not embed.dynamic_img_pad and (size[0] % rows or size[1] % columns):
        raise DataError(f"images are {given}, no whole patches of {rows} x {columns} pixels: resize them.")


def are_classes(images: Images, model: Any) -> bool:
    """Whether the labels of images are the classes of a model."""
    return has_classes(model) and len(images.class_names) == model.num_classes


def num_shown(total: int) -> int:
    """How many of some images are kept apart, to measure on them what was made by the others: an eighth."""
    return max(1, total // 8)


def _gives_batches(source: Any) -> bool:
    """Whether a source gives batches, not single images.

    Raises:
        DataError: As Images does.
    """
    samplers = (getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None))
    if any(isinstance(sampler, SHUFFLING) for sampler in samplers):
        raise DataError(
            "a loader that shuffles gives other images each time, and they are kept apart by their order: "
            "give shuffle=False."
        )
    if isinstance(source, Tensor):
        _image(source, 4)
        return False
    if isinstance(source, Mapping):
        raise DataError("images are a dictionary: give the tensor, or the data set, that is in it.")
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, IterableDataset):
        return bool(len(source)) and _image(source[0], 3, 4).ndim == 4
    if not isinstance(source, Iterable):
        raise DataError(f"images are a {type(source).__name__}: give a tensor, a Dataset, a DataLoader or a list.")
    if iter(source) is source:
        raise DataError("a generator gives its images once, and they are gone over several times: give a list of them.")
    for batch in source:
        _image(batch, 4)
        break
    return True


def _image(item: Any, *num_dims: int) -> Tensor:
    """The image, or batch of images, that an item is, or begins with.

    Raises:
        DataError: It is something else.
    """
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor):
        raise DataError(f"images are {type(image).__name__}s: give tensors, such as by a data set's transform.")
    if image.ndim not in num_dims:
        raise DataError(f"images are {_size(image)}: give {' or '.join(FORMS[number] for number in num_dims)}.")
    if not image.is_floating_point():
        raise DataError(f"images are of {image.dtype}: give floats, normalised as the model's images were.")
    return image


def _size(image: Tensor) -> str:
    return " x ".join(map(str, image.shape))
