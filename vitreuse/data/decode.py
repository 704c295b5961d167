"""Image bytes to PIL images of eight bits a channel."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitreuse.data.errors import DecodeError

# The file endings that count as images, in shards and in folders.
IMAGE_EXTENSIONS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")


class Sample(NamedTuple):
    """One labelled image, as every data set here returns it."""

    image: Image.Image
    label: int
    key: str


def decode_image(data: bytes, mode: str | None, place: str) -> Image.Image:
    """Decodes one image.

    Args:
        data: the content of an image file.
        mode: PIL mode to convert to, such as 'RGB' or 'L'; None keeps the file's own.
        place: names the image in an error, such as "sample 'a' of shard b.tar".

    Raises:
        DecodeError: the bytes are no image, or not a whole one.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = _eight_bits(image)
        return image if mode is None else _convert(image, mode)
    except UnidentifiedImageError as error:
        raise DecodeError(f"{place} has no known image format: write it again or leave it out.") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{place} is no whole image ({reason}): write it again or leave it out.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits: PIL's own conversion clips at 255, which turns most of the image white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB makes PIL warn
    return image.convert(mode)
