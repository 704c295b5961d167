"""Fashion-MNIST (arXiv 1708.07747) from its four idx files, as Debian and torchvision keep them: no network."""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vitreuse.io.errors import DataError, as_data_error

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SAMPLES = {"train": 60_000, "val": 10_000}
SIDE_PX = 28
FILES = {"train": "train-{}-ubyte", "val": "t10k-{}-ubyte"}
# SHA-256 of the files without gzip, whose own bytes differ: Debian's leave out the name and time of torchvision's.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION = Path("FashionMNIST/raw")  # below the root that a user gives to torchvision


def read_split(split: str, root: Path, origin: Path | None) -> Iterator[tuple[str, np.ndarray, int]]:
    """The images of a split in the order of its files: a key, pixels (28, 28) and the label.

    Raises:
        DataError: No place has one, or a file is missing, damaged or another than Fashion-MNIST's.
    """
    num_samples, file = SAMPLES[split], FILES[split]
    images_name, labels_name = file.format("images-idx3"), file.format("labels-idx1")
    folder = next((place for place in places(root, origin) if _find(place, images_name)), None)
    if folder is None:
        looked = " and ".join(map(str, places(root, origin)))
        raise DataError(
            f"no {images_name}, with or without .gz, in {looked}: install Debian's dataset-fashion-mnist, let "
            f"torchvision put FashionMNIST into {root.parent}, or name a folder by "
            f"vitreuse shards fashion_mnist {root} --from FOLDER."
        )
    images = read_idx(folder, images_name, (num_samples, SIDE_PX, SIDE_PX))
    labels = read_idx(folder, labels_name, (num_samples,))
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        yield f"{file.partition('-')[0]}-{number:05d}", pixels, int(label)


def places(root: Path, origin: Path | None = None) -> tuple[Path, Path]:
    """The folders in which the files are looked for, the first before the second.

    Those are an origin and torchvision's folder below it, or without one Debian's, and torchvision's beside the root.
    """
    return (DEBIAN, root.parent / TORCHVISION) if origin is None else (origin, origin / TORCHVISION)


def read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of an idx file, gzipped or not, as an array of the shape that it must have.

    Raises:
        DataError: It is missing, cannot be read, is cut off, has another shape, or another digest than DIGESTS has.
    """
    path = _find(folder, name)
    if path is None:
        raise DataError(f"{folder} has no {name}, with or without .gz: put all four files of Fashion-MNIST there.")
    again = "fetch it again, or name another folder"
    with as_data_error(f"{path} cannot be read", again):
        content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked ({error}): {again}.") from error
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 0x08, len(shape), *shape)  # 8: of bytes
    if not content.startswith(header):
        found = content[: len(header)].hex() or "nothing"
        size = " x ".join(map(str, shape))
        raise DataError(f"{path} begins with {found}, an idx file of {size} bytes with {header.hex()}: {again}.")
    num_bytes, expected = len(content) - len(header), math.prod(shape)
    if num_bytes != expected:
        raise DataError(f"{path} has {num_bytes:,} bytes behind its header, which promises {expected:,}: {again}.")
    digest = hashlib.sha256(content).hexdigest()
    if digest != DIGESTS[name]:
        other = f"has the digest {digest[:12]}, Fashion-MNIST's {DIGESTS[name][:12]}"
        raise DataError(f"{path} {other} (MNIST's files have the same names): {again}.")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    """The file in a folder, as it is or gzipped."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
