"""What there is to build shards from: the images of class folders or tars, by class, none of them read.

A source is one of
    folder/CLASS/NAME.jpg        an ImageFolder
    tar of CLASS/NAME.jpg        the same, packed
    tar of CLASS.tar of NAME.jpg what ImageNet's training set is shipped as
or has splits of these, train/, val/ and test/ under the names that they go by (see splits.py); a folder that holds all
there is may stand before either. Labels number the sorted classes, as torchvision's ImageFolder does. Tars are not
unpacked: an image is a positioned read of the outer one.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vitreuse.data.names import find_lookalike
from vitreuse.data.shards.workers import Workers
from vitreuse.data.splits import Splits, find_labelled, find_splits
from vitreuse.data.tars import TarFolder, open_tar
from vitreuse.data.tree import DiskFolder, Folder, check_classes, left_out_notes, list_below, shortened, skipped_notes
from vitreuse.io.errors import DataError, as_data_error


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a source.

    Attributes:
        source: A folder or a tar.
        place: What the folder of the classes, which may be in a tar, is called in a sentence.
        class_names: The name of each label.
        images: A record an image, class by class: name (CLASS/NAME), offset in the tar (0 in a folder), size,
            mtime_ns of the file that holds it, label.
    """

    source: Path
    place: str
    class_names: tuple[str, ...]
    images: np.ndarray


def list_splits(source: Path, workers: Workers) -> dict[str, Listing]:
    """Lists a source, or each of its splits; what is left out is told.

    Splits share the labels of the first. A test split that is not sorted into classes, as it often is not, is left out.

    Returns:
        The listings by split, by '' where there are no splits.

    Raises:
        DataError: There is no such source, it has no classes, splits and classes cannot be told apart, a class has no
            images or cannot be read, an image is empty, or val or test has a class that train has not.
    """
    if not source.exists():
        raise DataError(f"there is no {source}: name a folder with one folder of images a class, or a tar.")
    root = DiskFolder(str(source)) if source.is_dir() else open_tar(source)
    splits = find_splits(root)
    if splits is None:
        return {"": _list_classes(source, *find_labelled(root, source.name), workers)}
    roots = {split: find_labelled(folder, name) for split, (name, folder) in splits.folders.items()}
    others = [split for split in roots if split != "test"]
    unsorted = ["test"] if others and "test" in roots and not roots["test"][0].level().folders else []
    workers.tell(_describe_splits(root.place, splits, unsorted))
    listings = {split: _list_classes(source, *roots[split], workers) for split in roots if split not in unsorted}
    first = next(iter(listings))
    return {split: _label_as(listings[first].class_names, first, listing) for split, listing in listings.items()}


def read_image(source: Path, name: str, offset: int, size: int) -> bytes:
    """Reads the bytes of an image that was listed.

    Raises:
        DataError: It is gone, or not as long as it was.
    """
    with as_data_error(f"image {name} of {source} cannot be read", "put it back"):
        if source.is_dir():
            data = (source / name).read_bytes()
        else:
            with open(source, "rb") as tar:
                data = os.pread(tar.fileno(), size, offset)
    if len(data) != size:
        way_out = "leave the source as it is until it is built"
        raise DataError(f"image {name} of {source} has {len(data)} bytes instead of {size}: {way_out}.")
    return data


def _describe_splits(place: str, splits: Splits, unsorted: list[str]) -> list[str]:
    """Sentences about what is built under another name than its own, and what is not."""
    renamed = [f"{name} as {split}" for split, (name, _) in splits.folders.items() if name != split]
    left_out = [*splits.left_out, *(f"{splits.folders[split][0]}, not sorted into classes" for split in unsorted)]
    told = [f"{place}: {shortened(renamed)}."] if renamed else []
    return told + left_out_notes(place, left_out) + skipped_notes(place, splits.skipped)


def _list_classes(source: Path, root: Folder, left_out: list[str], workers: Workers) -> Listing:
    """Lists the class folders of a folder."""
    place, (folders, stray, skipped) = root.place, root.level()
    if not folders:
        way_out = "put every image into a folder of its class, as ImageNet's validation set needs too"
        raise DataError(f"{place} is not sorted into class folders, so that images have no label: {way_out}.")
    if stray:
        what = f"{len(stray)} images without a label beside its class folders ({shortened([*stray])})"
        raise DataError(f"{place} has {what}: put each into a folder of its class or take it away.")
    if isinstance(root, TarFolder):
        workers = replace(workers, count=1)  # it was read with its tar: to hand it to processes would take longer
    if isinstance(root, DiskFolder):
        source = Path(root.place)
    parts = workers.map(partial(_list_class, source), [*folders.items()], f"listing {source.name}", "classes")
    records, skipped_below = zip(*parts, strict=True)
    check_classes(place, folders, map(len, records))
    workers.tell(left_out_notes(place, left_out) + skipped_notes(place, sum(skipped_below, skipped)))
    images = _join(place, records)
    if len(folders) == 1:
        workers.tell([f"{place}: one class only, {next(iter(folders))!r}."])
    return Listing(source, place, tuple(folders), images)


def _join(place: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The records of all classes with their labels; refuses empty images."""
    images = np.concatenate(parts)
    images["label"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    empty = [os.fsdecode(name) for name in images["name"][images["size"] == 0].tolist()]
    if len(empty) == 1:
        raise DataError(f"image {empty[0]} of {place} is empty: fetch it again or remove it.")
    if empty:
        what = f"{len(empty)} images of {place} are empty ({shortened(empty)})"
        raise DataError(f"{what}: fetch them again or remove them.")
    return images


def _list_class(source: Path, task: tuple[str, Folder]) -> tuple[np.ndarray, Counter[str]]:
    """The records of a class, their label still to be set, and what is skipped; a list takes ten times the memory."""
    class_name, folder = task
    images, skipped = list_below(folder)
    rows = []
    for below, (offset, size) in images.items():
        name = f"{class_name}/{below}"
        try:
            stat = os.stat(source if size is not None else os.path.join(source, name))
        except OSError as error:
            raise DataError(f"image {name} of {source} cannot be read ({error.strerror}): put it back.") from error
        rows.append((os.fsencode(name), offset, stat.st_size if size is None else size, stat.st_mtime_ns, 0))
    name_bytes = max((len(row[0]) for row in rows), default=1)
    numbers = [("offset", "<i8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("label", "<i4")]
    return np.array(rows, dtype=[("name", f"S{name_bytes}"), *numbers]), skipped


def _label_as(class_names: tuple[str, ...], split: str, listing: Listing) -> Listing:
    """Numbers the classes as they are numbered in another split."""
    labels = {name: label for label, name in enumerate(class_names)}
    if strangers := [name for name in listing.class_names if name not in labels]:
        twin = find_lookalike(strangers[0], class_names)
        if twin is None:
            what = f"{listing.place} has a class {strangers[0]!r} that {split} lacks"
            raise DataError(f"{what}: remove it or add it there.")
        difference = f"{split} has {twin!a}, which differs only in Unicode normalisation"
        raise DataError(f"{listing.place} has a class {strangers[0]!a} and {difference}: rename one.")
    images = listing.images.copy()
    images["label"] = np.array([labels[name] for name in listing.class_names])[images["label"]]
    return replace(listing, class_names=class_names, images=images)
