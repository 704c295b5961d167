"""Image bytes to images of eight bits a channel: PIL's, or tensors."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.functional import pil_to_tensor

from vitreuse.data.errors import DecodeError

READ_MODES = {"RGB": ImageReadMode.RGB, "L": ImageReadMode.GRAY}  # PIL's word and torchvision's
# The file endings that count as images, in shards and in folders.
IMAGE_EXTENSIONS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")


class Sample(NamedTuple):
    """One labelled image, as every data set here returns it."""

    image: Image.Image | Tensor
    label: int
    key: str


# From the content of a file, the PIL mode to convert to and the name of the image's place in an error.
Decoder = Callable[[bytes, str | None, str], Image.Image | Tensor]


def decode_image(data: bytes, mode: str | None, place: str) -> Image.Image:
    """Decodes one image.

    Args:
        data: the content of an image file.
        mode: PIL mode to convert to, such as 'RGB' or 'L'; None keeps the file's own.
        place: names the image in an error, such as "sample 'a' of shard b.tar".

    Raises:
        DecodeError: the bytes are no image, or not a whole one.
    """
    with _decoding(place):
        return _load(Image.open(io.BytesIO(data)), mode)


def decode_tensor(data: bytes, mode: str | None, place: str) -> Tensor:
    """Decodes one image as bytes (channels, rows, columns), the same numbers as decode_image.

    A JPEG that needs no conversion is decoded by torchvision, in four fifths of PIL's time; the rest by PIL.

    Args:
        data, mode, place: as for decode_image.

    Raises:
        DecodeError: the bytes are no image, or not a whole one.
    """
    with _decoding(place):
        image = Image.open(io.BytesIO(data))  # reads the header only
        if image.format == "JPEG" and image.mode in READ_MODES and mode in (None, image.mode):
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            # torchvision.io.decode_jpeg is this operator behind a warning that it will move to another package
            return torch.ops.image.decode_jpeg(content, READ_MODES[image.mode].value, False)
        return pil_to_tensor(_load(image, mode))


@contextmanager
def _decoding(place: str) -> Iterator[None]:
    """Makes one sentence of whatever a decoder says."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise DecodeError(f"{place} has no known image format: write it again or leave it out.") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{place} is no whole image ({reason}): write it again or leave it out.") from error


def _load(image: Image.Image, mode: str | None) -> Image.Image:
    image.load()
    image = _eight_bits(image)
    return image if mode is None else _convert(image, mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits: PIL's own conversion clips at 255, which turns most of the image white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB makes PIL warn
    return image.convert(mode)
