"""The table of the data sets that are known by name, and what writes one as shards unless it is there."""

import io
from collections.abc import Callable, Iterator
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitreuse.data.shards.folder import EncodedSample, write_shards
from vitreuse.data.shards.index import HEADER_FILE, load_index
from vitreuse.data.sources import digits, fashion_mnist
from vitreuse.io.errors import DataError, as_data_error


def prepare_source(name: str, root: str | Path, origin: Path | None = None) -> None:
    """Writes a built-in data set as ROOT/train and ROOT/val, unless it is there.

    Each split appears when it is whole, and processes that start together do not disturb each other.

    Args:
        name: 'digits', scikit-learn's 1,797 scanned handwritten digits of 8 x 8 pixels, 360 of them held out;
            'pointer_chain', four of these on 16 x 16 pixels, where the first names the place of the one that names the
            place of the label; or 'fashion_mnist', 70,000 pictures of clothes of 28 x 28 pixels, whose 10,000 for
            testing are val.
        root: The folder of the data set.
        origin: Where the files of fashion_mnist are, see fashion_mnist.places.

    Raises:
        DataError: The name is unknown, a package not installed, a file missing or another one, a folder cannot be
            written or holds other data, or nothing would be read from the origin.
    """
    if name not in SOURCES:
        raise DataError(f"no built-in data set {name!r}: choose {', '.join(SOURCES)}, or name a folder of your own.")
    source, root = _SOURCES[name], Path(root)
    missing = [split for split in source.num_samples if not (root / split / HEADER_FILE).exists()]
    if origin is not None and not (missing and source.has_files):
        why = f"{root} has the {name} already" if source.has_files else f"the {name} come with a package"
        raise DataError(f"{why}, so that nothing would be read from {origin}: leave it out.")
    for split, num_samples in source.num_samples.items():
        folder = root / split
        if split in missing:
            with as_data_error(f"{name} cannot be written to {folder}", "name another folder"):
                try:
                    samples = starmap(_encode, source.read(split, root, origin))
                    write_shards(samples, folder, source.class_names, source.samples_per_shard[split])
                except DataError:
                    if not (folder / HEADER_FILE).exists():  # else another process was first
                        raise
        index = load_index(folder)
        if index.class_names != source.class_names or len(index) != num_samples:
            raise DataError(f"{folder} holds {len(index)} samples that are not the {name}: name another folder.")


def _encode(key: str, pixels: np.ndarray, label: int) -> EncodedSample:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return EncodedSample(key, content.getvalue(), "png", label)


class _Source(NamedTuple):
    """A built-in data set: what yields key, grey pixels and label of each image of a split, and what is written of it.

    ``read`` is given the split, the root and the origin, of which only a source that has files has a use.
    """

    read: Callable[[str, Path, Path | None], Iterator[tuple[str, np.ndarray, int]]]
    class_names: tuple[str, ...]
    num_samples: dict[str, int]
    samples_per_shard: dict[str, int]
    has_files: bool = False


_SOURCES = {
    "digits": _Source(digits.read_digits, digits.CLASSES, digits.DIGITS_SAMPLES, {"train": 400, "val": 200}),
    "pointer_chain": _Source(
        digits.read_pointer_chain, digits.CLASSES, digits.POINTER_SAMPLES, {"train": 4000, "val": 1000}
    ),
    "fashion_mnist": _Source(
        fashion_mnist.read_split, fashion_mnist.CLASSES, fashion_mnist.SAMPLES, {"train": 10_000, "val": 5000}, True
    ),
}
SOURCES = tuple(_SOURCES)
