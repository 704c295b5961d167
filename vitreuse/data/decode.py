"""Image bytes to images of eight bits a channel: PIL's, or tensors."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.functional import pil_to_tensor

from vitreuse.io.errors import DecodeError

READ_MODES = {"RGB": ImageReadMode.RGB, "L": ImageReadMode.GRAY}  # PIL's word and torchvision's
SIXTEEN_BITS = ("PNG", "PPM")  # formats without more, though PIL may hold them in 32
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 258, 262, 0
TOLERANCE = 1e-3  # above 1 and below 0, in floats that were interpolated


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
        data: The content of an image file.
        mode: PIL mode to convert to, such as 'RGB' or 'L'; None keeps the file's own.
        place: What the image is called in an error, such as "sample 'a' of shard b.tar".

    Raises:
        DecodeError: The bytes are no image, or not a whole one.
    """
    with _decoding(place):
        return _load(Image.open(io.BytesIO(data)), mode, place)


def decode_tensor(data: bytes, mode: str | None, place: str) -> Tensor:
    """Decodes one image as bytes (channels, rows, columns): the numbers, arguments and errors of decode_image.

    A JPEG that needs no conversion is decoded by torchvision, in four fifths of PIL's time; the rest by PIL.
    """
    with _decoding(place):
        image = Image.open(io.BytesIO(data))  # reads the header only
        if image.format == "JPEG" and image.mode in READ_MODES and mode in (None, image.mode):
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            # torchvision.io.decode_jpeg is this operator behind a warning that it will move to another package
            return torch.ops.image.decode_jpeg(content, READ_MODES[image.mode].value, False)
        return pil_to_tensor(_load(image, mode, place))


@contextmanager
def _decoding(place: str) -> Iterator[None]:
    """Makes one sentence of whatever a decoder says."""
    try:
        yield
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(f"{place} has no known image format: write it again or leave it out.") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{place} is no whole image ({reason}): write it again or leave it out.") from error


def _load(image: Image.Image, mode: str | None, place: str) -> Image.Image:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, place)
    if mode is not None and image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB makes PIL warn
    return image if mode is None else image.convert(mode)


def _eight_bits(image: Image.Image, place: str) -> Image.Image:
    """Grey of more than 8 bits in 8: PIL clips it at 255, which turns most of an image white, or leaves it black."""
    values = np.asarray(image).astype(np.float64)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})  # of a TIFF
    black, white = 0.0, _find_white(image, tags, values, place)
    if tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO:
        black, white = white, black
    levels = (values - black) * (255 / (white - black))
    return Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))


def _find_white(image: Image.Image, tags: Mapping[int, Any], values: np.ndarray, place: str) -> float:
    """The number that stands for full intensity: of 16 bits, that of the format; else one that leaves no doubt."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    if not np.isfinite(values).all():
        raise DecodeError(f"{place} has NaN or infinity among its values: write it again without.")
    lowest, highest = values.min(), values.max()
    if image.mode == "F" and lowest >= -TOLERANCE and highest <= 1 + TOLERANCE:
        return 1
    is_doubtful = image.mode == "F" and highest < 2  # no image of 0 to 255 is so dark, some of 0 to 1 overshoot
    if lowest >= 0 and highest <= 255 and not is_doubtful:
        return 255
    kind = "floats" if image.mode == "F" else "whole numbers"
    raise DecodeError(
        f"{place} has {kind} from {lowest:g} to {highest:g}, of which it is not certain what is white (it would be of "
        "0 to 255, or of floats from 0 to 1): write it again with 8 or 16 bits."
    )
