"""What there is to build shards from: the images of class folders or tars, by class, none of them read.

A source is one of
    folder/CLASS/NAME.jpg        an ImageFolder
    tar of CLASS/NAME.jpg        the same, packed; folders that all images share may stand before CLASS
    tar of CLASS.tar of NAME.jpg what ImageNet's training set is shipped as
Labels number the sorted classes, as torchvision's ImageFolder does. Tars are not unpacked: an image is a positioned
read of the outer one.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitreuse.data.errors import DataError
from vitreuse.data.folders import is_image_name, list_classes, list_images
from vitreuse.data.scan import tar_files
from vitreuse.data.workers import Workers

SPLITS = ("train", "val")


class File(NamedTuple):
    """A file of a source: its name below the source, and which bytes it is of which version of a file on the disk."""

    name: str
    offset: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source.

    Attributes:
        source: a folder or a tar.
        class_names: name of each label.
        images: a record an image, class by class: name (CLASS/NAME), offset in the tar (0 in a folder), size,
            mtime_ns of the file that holds it, label.
    """

    source: Path
    class_names: tuple[str, ...]
    images: np.ndarray


def list_splits(source: Path, workers: Workers) -> dict[str, Listing]:
    """Lists a source, or the splits of a folder that has nothing else or both: 'train' and 'val'.

    Splits share the labels of the first.

    Returns:
        The listings by split, by '' where there are no splits.

    Raises:
        DataError: there is no such source, it has no classes, a class has no images, an image is empty, or val has a
            class that train has not.
    """
    found = list_classes(source) if source.is_dir() else []
    splits = [split for split in SPLITS if split in found]
    if not splits or len(splits) < min(len(SPLITS), len(found)):
        return {"": list_source(source, workers)}
    listings = {split: list_source(source / split, workers) for split in splits}
    class_names = listings[splits[0]].class_names
    return {split: _label_as(class_names, listing) for split, listing in listings.items()}


def list_source(source: Path, workers: Workers) -> Listing:
    """Lists a folder of class folders or a tar.

    Raises:
        DataError: there is no such source, it has no classes, a class has no images, or an image is empty.
    """
    if not source.exists():
        raise DataError(f"there is no {source}: name a folder with one folder of images a class, or a tar.")
    parts = _list_folder(source, workers) if source.is_dir() else _list_tar(source, workers)
    if not parts:
        way_out = "put every image into a folder of its class, as ImageNet's validation set needs too"
        raise DataError(f"{source} is not sorted into class folders, so that images have no label: {way_out}.")
    class_names = tuple(sorted(parts))
    images = np.concatenate([parts[name] for name in class_names])
    images["label"] = np.repeat(np.arange(len(class_names)), [len(parts[name]) for name in class_names])
    for number in np.flatnonzero(images["size"] == 0)[:1]:
        name = os.fsdecode(images["name"][number].item())
        raise DataError(f"image {name} of {source} is empty: fetch it again or remove it.")
    return Listing(source, class_names, images)


def read_image(source: Path, name: str, offset: int, size: int) -> bytes:
    """Reads the bytes of an image that was listed.

    Raises:
        DataError: it is gone, or not as long as it was.
    """
    try:
        if source.is_dir():
            data = (source / name).read_bytes()
        else:
            with open(source, "rb") as tar:
                data = os.pread(tar.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"image {name} of {source} cannot be read ({error.strerror}): put it back.") from error
    if len(data) != size:
        way_out = "leave the source as it is until it is built"
        raise DataError(f"image {name} of {source} has {len(data)} bytes instead of {size}: {way_out}.")
    return data


def _label_as(class_names: tuple[str, ...], listing: Listing) -> Listing:
    """Numbers the classes as they are numbered elsewhere."""
    labels = {name: label for label, name in enumerate(class_names)}
    for name in listing.class_names:
        if name not in labels:
            raise DataError(f"{listing.source} has a class {name!r} that {SPLITS[0]} lacks: remove it or add it there.")
    images = listing.images.copy()
    images["label"] = np.array([labels[name] for name in listing.class_names])[images["label"]]
    return replace(listing, class_names=class_names, images=images)


def _as_records(files: Iterable[File]) -> np.ndarray:
    """Packs files as image records, their label still to be set; a list of them takes ten times the memory."""
    rows = [(os.fsencode(name), *place, 0) for name, *place in files]
    name_bytes = max(len(row[0]) for row in rows)
    numbers = [("offset", "<i8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("label", "<i4")]
    return np.array(rows, dtype=[("name", f"S{name_bytes}"), *numbers])


def _list_folder(folder: Path, workers: Workers) -> dict[str, np.ndarray]:
    class_names = list_classes(folder)
    parts = workers.map(partial(_list_class_folder, folder), class_names, f"listing {folder.name}", "classes")
    return dict(zip(class_names, parts, strict=True))


def _list_class_folder(folder: Path, class_name: str) -> np.ndarray:
    names = list_images(folder, class_name)
    stats = (os.stat(folder / name) for name in names)
    return _as_records(File(name, 0, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True))


def _list_tar(tar: Path, workers: Workers) -> dict[str, np.ndarray]:
    files = _list_members(tar, str(tar), 0, None)
    tars = [file for file in files if file.name.endswith(".tar")]
    images = [file for file in files if is_image_name(posixpath.basename(file.name))]
    if tars and images:
        raise DataError(f"{tar} has both images ({images[0].name}) and tars ({tars[0].name}): leave one kind out.")
    if images:
        return {name: _as_records(members) for name, members in _group_by_class(images).items()}
    class_names = [_class_of(file) for file in tars]
    if len(set(class_names)) < len(class_names):
        raise DataError(f"{tar} has two tars of the same name in different folders: name them by class.")
    parts = workers.map(partial(_list_class_tar, tar), tars, f"listing {tar.name}", "classes")
    return dict(zip(class_names, parts, strict=True))


def _list_class_tar(tar: Path, member: File) -> np.ndarray:
    """Lists a tar inside a tar."""
    members = _list_members(tar, f"{member.name} in {tar}", member.offset, member.size)
    images = [file for file in members if is_image_name(posixpath.basename(file.name))]
    if not images:
        raise DataError(f"{member.name} in {tar} has no images: fill or remove it.")
    return _as_records(image._replace(name=f"{_class_of(member)}/{image.name}") for image in images)


def _list_members(tar: Path, place: str, start: int, size: int | None) -> list[File]:
    """Lists the files of a tar or of a tar inside it, but none that is hidden or in a hidden folder."""
    with open(tar, "rb") as file:
        mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        try:
            members = [
                File(posixpath.normpath(f"/{info.name}").lstrip("/"), info.offset_data, info.size, mtime_ns)
                for info in tar_files(file, start, size)
            ]
        except tarfile.TarError as error:
            reason = f"is damaged, cut short or no uncompressed tar ({error})"
            raise DataError(f"{place} {reason}: fetch it again, or unpack it.") from error
    return [member for member in members if "/." not in f"/{member.name}"]


def _group_by_class(images: list[File]) -> dict[str, list[File]]:
    """Sorts images by the first folder that not all of them are in; empty if some are in none."""
    folders = {posixpath.dirname(image.name) for image in images}
    shared = posixpath.commonpath(folders)
    if shared in folders:
        return {}
    classes: dict[str, list[File]] = {}
    for image in images:
        name = image.name[len(shared) :].lstrip("/")
        classes.setdefault(name.partition("/")[0], []).append(image._replace(name=name))
    return classes


def _class_of(member: File) -> str:
    return posixpath.basename(member.name).removesuffix(".tar")
