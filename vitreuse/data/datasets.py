"""Map-style data sets over indexed shards and over folders of images: any sample, in any order, from any process."""

import hashlib
import os
import weakref
import zlib
from collections import Counter
from collections.abc import Collection
from functools import lru_cache, partial
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from torch.utils.data import Dataset

from vitreuse.data.decode import Decoder, Sample, decode_image
from vitreuse.data.remote import fetch_shard, locate, open_index
from vitreuse.data.shards.index import HEADER_FILE, Index, describe_foreign, index_call, list_shards, load_index
from vitreuse.data.splits import find_labelled, find_split
from vitreuse.data.tree import DiskFolder, Level, check_classes, left_out_notes, list_below, skipped_notes
from vitreuse.io.errors import DataError, DecodeError, as_data_error
from vitreuse.io.process import max_open_files
from vitreuse.io.urls import refuse_unallowed_url, url_kind

CACHE_ROOT = "data/cache"


class ShardDataset(Dataset[Sample]):
    """The samples of a folder of indexed shards, numbered through the shards in order.

    A sample is one positioned read: no seek pointer is shared with forked workers. Spawned workers open the index
    again instead of receiving it.

    Args:
        folder: The folder of the tars and their index.
        mode: PIL mode to convert images to; None keeps the mode they were stored in.
        decode: decode_image for PIL images, decode_tensor for tensors of bytes.
        url: URL of the files, with {} for a name, if the folder is a cache: what it lacks is fetched at its first use.

    Attributes:
        is_sharded: Whether the samples are in shards.
        class_names: The name of each label.
        shard_sizes: The number of samples of each shard.
        digest: SHA-256 of the index, which holds those of shards and samples: equal ones have the same samples.
        notes: Sentences about what was left out or taken for the split.

    Raises:
        DataError: The index is missing or does not fit the shards.
    """

    is_sharded = True

    def __init__(
        self, folder: str | Path, mode: str | None = None, decode: Decoder = decode_image, url: str | None = None
    ):
        self.folder, self.url = Path(folder), url
        self.mode, self.decode = mode, decode
        self._index = load_index(self.folder) if url is None else open_index(url, self.folder)
        opener = _OpenShard if url is None else partial(_open_fetched, url, self._index)
        self._open_shard = lru_cache(maxsize=max_open_files() // 4)(opener)  # two sets, and as much for all else
        self.class_names = self._index.class_names
        self.shard_sizes = [shard.num_samples for shard in self._index.shards]
        self.digest = hashlib.sha256((self.folder / HEADER_FILE).read_bytes()).hexdigest()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: SupportsIndex) -> Sample:
        """Reads and decodes one sample.

        Raises:
            DecodeError: Its bytes differ from those indexed, or are no whole image.
            DataError: Its shard is gone, or cannot be opened or fetched.
        """
        path, record = self._index.locate(range(len(self))[number])
        place = f"sample {record.key!r} of shard {path}"
        with as_data_error(f"{place} cannot be read", "fetch the shard again"):
            data = self._open_shard(path).read(record.offset, record.size)
        if zlib.crc32(data) != record.crc32:
            check = f"vitreuse shards verify {self.folder}"
            raise DecodeError(f"{place} is not what was indexed: {check} lists all that differ.")
        return Sample(self.decode(data, self.mode, place), record.label, record.key)

    def key(self, number: int) -> str:
        """The key of a sample, for 0 <= number < len, without a look at its image."""
        return self._index.locate(number)[1].key

    def class_sizes(self) -> list[int]:
        """How many images each class has."""
        return np.bincount(self.labels(), minlength=len(self.class_names)).tolist()

    def labels(self) -> np.ndarray:
        """The label of each sample, without a look at its image."""
        return self._index.records["label"]

    def close(self) -> None:
        """Closes the open shards; a later read opens them again."""
        self._open_shard.cache_clear()

    def __reduce__(self):
        return type(self), (self.folder, self.mode, self.decode, self.url)


class _OpenShard:
    """A file descriptor that lives as long as somebody holds this object, evicted from a cache or not."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


def _open_fetched(url: str, index: Index, path: Path) -> _OpenShard:
    fetch_shard(url, index.folder, next(shard for shard in index.shards if shard.name == path.name))
    return _OpenShard(path)


class FolderDataset(Dataset[Sample]):
    """The images of one folder a class, in torchvision's order: classes and paths sorted, labels numbered by class.

    Unlike torchvision, what is hidden or left behind by a system is no class and no image (see names.py), and what
    cannot be read is refused. Paths are kept in one array, which forked workers share; a list would be copied into each
    of them page by page.

    Args:
        folder: The folder of the class folders.
        mode, decode: As for a ShardDataset.
        is_labelled: False for images without classes: all those below the folder, each with the label -1.

    Attributes:
        is_sharded: Whether the samples are in shards.
        class_names: The names of the class folders; none without classes.
        shard_sizes: One entry, the number of samples.
        digest: SHA-256 of the paths in order; what the files hold is not looked at.
        notes: Sentences about what was left out.

    Raises:
        DataError: There are no class folders, one has no images, or a folder cannot be read.
    """

    is_sharded = False

    def __init__(
        self, folder: str | Path, mode: str | None = None, decode: Decoder = decode_image, is_labelled: bool = True
    ):
        self.folder = Path(folder)
        self.mode, self.decode = mode, decode
        root = DiskFolder(str(folder))
        classes, stray, skipped = root.level() if is_labelled else Level({"": root}, {}, Counter())
        paths: list[bytes] = []
        sizes: list[int] = []
        for name, inner in classes.items():
            images, skipped_below = list_below(inner)
            paths += [os.fsencode(f"{name}/{path}".lstrip("/")) for path in images]
            sizes.append(len(images))
            skipped += skipped_below
        check_classes(str(folder), classes, sizes)
        self.class_names = tuple(classes) if is_labelled else ()
        self._labels = np.repeat(np.arange(len(sizes)) if is_labelled else [-1], sizes)
        self._paths = np.array(paths)
        self.shard_sizes = [len(paths)]
        self.digest = hashlib.sha256(self._paths.data).hexdigest()
        self.notes = skipped_notes(str(folder), skipped) + left_out_notes(str(folder), [*stray])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: SupportsIndex) -> Sample:
        """Reads and decodes one image; its key is its path below the folder.

        Raises:
            DecodeError: It is no whole image.
            DataError: It is gone or cannot be opened.
        """
        number = range(len(self))[number]
        key = self.key(number)
        path = self.folder / key
        with as_data_error(f"image {path} cannot be read", "put it back"):
            data = path.read_bytes()
        return Sample(self.decode(data, self.mode, f"image {path}"), int(self._labels[number]), key)

    def key(self, number: int) -> str:
        """The key of a sample, for 0 <= number < len, without a look at its image."""
        return os.fsdecode(self._paths[number].item())

    def class_sizes(self) -> list[int]:
        """How many images each class has."""
        return np.bincount(self._labels, minlength=len(self.class_names)).tolist() if self.class_names else []

    def labels(self) -> np.ndarray:
        """The label of each image, without a look at it; -1 without classes."""
        return self._labels


def open_split(
    root: str | Path,
    split: str,
    mode: str | None = None,
    decode: Decoder = decode_image,
    cache_root: str | Path = CACHE_ROOT,
    allow: Collection[str] = (),
) -> ShardDataset | FolderDataset:
    """Opens ROOT/SPLIT, which holds indexed WebDataset shards or one folder of images a class.

    Args:
        root: The folder of a data set, or the URL of one of shards: see remote.py.
        split: 'train', 'val' or any other folder in it.
        mode, decode: As for a ShardDataset.
        cache_root: A folder for what is fetched from URLs.
        allow: The kinds of URL that may be fetched, such as 'https'; 'pipe' runs a shell.

    Raises:
        ConfigError: The root is a URL of another kind.
        DataError: There is neither, or what is there is damaged or cannot be fetched.
    """
    refuse_unallowed_url("data", str(root), allow)
    if url_kind(str(root)) is not None:
        url, folder = locate(str(root), split, cache_root)
        return ShardDataset(folder, mode, decode, url)
    place = Path(root) / split
    folder = place if place.is_dir() else find_split(Path(root), split)
    if folder is None:
        found = ", ".join(list_classes(Path(root))) if Path(root).is_dir() else ""
        needed = f"{split}/ with indexed shards or class folders"
        raise DataError(f"no folder {place}: {root} has {found or 'no folders'} and needs {needed}.")
    dataset = _open_labelled(folder, mode, decode)
    if dataset is None:
        raise DataError(f"{folder} has neither shards (*.tar and {HEADER_FILE}) nor class folders: put either there.")
    if folder != place:
        dataset.notes.append(f"{folder} is read as {split}.")
    return dataset


def open_images(
    folder: str | Path, mode: str | None = None, decode: Decoder = decode_image
) -> ShardDataset | FolderDataset:
    """Opens a folder of indexed shards, of class folders, or of images alone, whose labels are -1.

    Raises:
        DataError: There is none of these, or what is there is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: give one that has images.")
    dataset = _open_labelled(folder, mode, decode)
    if dataset is not None:
        return dataset
    root, _ = find_labelled(DiskFolder(str(folder)), folder.name)
    if not root.level().images:
        raise DataError(f"{folder} has neither shards, nor class folders, nor images: give a folder that has.")
    return FolderDataset(root.place, mode, decode, is_labelled=False)


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders in the order of their labels.

    Raises:
        DataError: The folder cannot be read.
    """
    return [*DiskFolder(str(folder)).level().folders]


def _open_labelled(folder: Path, mode: str | None, decode: Decoder) -> ShardDataset | FolderDataset | None:
    """The shards or class folders in a folder; None where there are none."""
    classes = list_classes(folder)
    if (folder / HEADER_FILE).exists() and not (classes and describe_foreign(folder)):
        return ShardDataset(folder, mode, decode)
    root, left_out = find_labelled(DiskFolder(str(folder)), folder.name)
    if root.level().folders:
        dataset = FolderDataset(root.place, mode, decode)
        dataset.notes += left_out_notes(str(folder), left_out)
        return dataset
    if not root.level().images and (num_tars := len(list_shards(folder))):
        raise DataError(f"{folder} has {num_tars} tars and no {HEADER_FILE}: write it with {index_call(folder)}.")
    return None
