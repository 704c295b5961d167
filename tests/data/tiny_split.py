"""Small splits on disk: tiny images whose pixels tell them apart, in shards of uneven sizes."""

import io

import numpy as np
from PIL import Image

from vitreuse.data import EncodedSample, build_index, write_shard

SHARD_SIZES = [5, 1, 7]
CLASS_NAMES = ("cat", "dog", "emu")


def encode(image, file_format="PNG"):
    content = io.BytesIO()
    image.save(content, file_format)
    return content.getvalue()


def make_image(number, mode="RGB"):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(256, size=(5, 7, 3), dtype=np.uint8)).convert(mode)


def make_samples(count, start=0):
    return [
        EncodedSample(f"s{number:03d}", encode(make_image(number)), "png", number % len(CLASS_NAMES))
        for number in range(start, start + count)
    ]


def write_split(folder, samples, shard_sizes):
    """Writes shards of the given sizes and their index."""
    folder.mkdir(parents=True)
    remaining = iter(samples)
    for number, size in enumerate(shard_sizes):
        write_shard([next(remaining) for _ in range(size)], folder / f"shard-{number:06d}.tar")
    build_index(folder, CLASS_NAMES)


def read_all(dataset):
    return [dataset[number] for number in range(len(dataset))]
