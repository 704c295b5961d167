"""Which of a folder's folders are splits and not classes: train, val and test, by the names that people give them."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from vitreuse.data.names import SPLITS, name_splits, split_named
from vitreuse.data.tree import DiskFolder, Folder, Level, find_class_root, find_only_filled, holds_images, shortened
from vitreuse.io.errors import DataError

NUM_PEEKED = 8  # class folders in which splits are looked for: a set has them in all of its classes or in none


class Splits(NamedTuple):
    """The splits of a data set, and what else is beside them.

    Attributes:
        folders: The name and the folder of each split, in the order of SPLITS.
        left_out: The names of other folders and of images.
        skipped: The number of other files by kind.
    """

    folders: dict[str, tuple[str, Folder]]
    left_out: list[str]
    skipped: Counter[str]


def find_splits(folder: Folder) -> Splits | None:
    """The splits of a data set, in the folder or in the one that holds all there is; None where it has classes.

    Folders are splits by their names (see names.py): if all have such names, or at least two and some hold folders. One
    class among others may be called train.

    Raises:
        DataError: Two folders are the same split, it is not clear whether they are splits or classes, or classes hold
            splits.
    """
    level = folder.level()
    named = name_splits(level.folders)
    if not named:
        return _find_deeper(folder, level)
    others = [name for name in level.folders if name not in named]
    filled = [name for name in others if holds_images(level.folders[name])]
    if filled and not _are_splits(folder, level, named, filled):
        return None
    folder_names = {split: name for name, split in named.items()}
    for name, split in named.items():
        if (other := folder_names[split]) != name:
            raise DataError(f"{folder.place} has {name} and {other}, which both are {split}: move one away.")
    folders = {split: (name, level.folders[name]) for split in SPLITS if (name := folder_names.get(split))}
    return Splits(folders, [*others, *level.images], level.skipped)


def _are_splits(folder: Folder, level: Level, named: dict[str, str], others: list[str]) -> bool:
    """Whether folders with names of splits are such, beside others that hold images too."""
    are_flat = all(level.folders[name].level().images for name in named)
    if are_flat == (len({*named.values()}) > 1):
        kinds = f"{shortened([*named])}, as splits are called, beside {shortened(others)}"
        way_out = "rename what is a class, move what is none of them, or name the folder of one split"
        raise DataError(f"{folder.place} has {kinds}, so that splits and classes cannot be told apart: {way_out}.")
    return not are_flat


def _find_deeper(folder: Folder, level: Level) -> Splits | None:
    """The splits one folder deeper; None where there are none."""
    only = None if level.images else find_only_filled(level)
    if only is not None:
        inner = level.folders[only]
        splits = find_splits(inner)
        if splits is None or _is_archive_of_one(inner, splits):
            return None
        return splits._replace(left_out=[*(name for name in level.folders if name != only), *splits.left_out])
    for name, inner in islice(level.folders.items(), NUM_PEEKED):
        named = name_splits(inner.level().folders)
        if len({*named.values()}) > 1:
            others = [other for other in level.folders if other != name] or [*level.images]
            kinds = f"the splits {shortened([*named])} below {name}, beside {shortened(others)}"
            way_out = "name the one folder that has splits, or sort the classes into splits, not splits into classes"
            raise DataError(f"{folder.place} has {kinds}: {way_out}.")
    return None


def _is_archive_of_one(folder: Folder, splits: Splits) -> bool:
    """Whether a folder that is alone has one split of class folders, as archives of a split do, or is a class."""
    flat = [name for name, split in splits.folders.values() if split.level().images]
    return len(splits.folders) == 1 and (not flat or bool(folder.level().images))


def find_labelled(folder: Folder, name: str) -> tuple[Folder, list[str]]:
    """The folder of the class folders of one split, or of a data set that has none, and what is left out before it.

    Raises:
        DataError: It has splits, which would be taken for classes.
    """
    root, left_out = find_class_root(folder, name)
    if splits := find_splits(root):
        names = shortened([name for name, _ in splits.folders.values()])
        raise DataError(f"{root.place} has splits ({names}), not classes: name the folder of one of them.")
    return root, left_out


def find_split(root: Path, split: str) -> Path | None:
    """The folder of a split under its name or, for train, val and test, another that it is known by; None without.

    Raises:
        DataError: As find_splits does.
    """
    known = split_named(split)
    if (root / split).is_dir() and (known is None or not DiskFolder(str(root / split)).level().images):
        return root / split
    splits = find_splits(DiskFolder(str(root))) if known and root.is_dir() else None
    if splits is None or known not in splits.folders:
        return None
    return Path(splits.folders[known][1].place)


def choose_split(root: Path, split: str) -> Path:
    """The folder to read images from: that of the split, or the root itself where it has none.

    Raises:
        DataError: The root has splits, but not this one.
    """
    folder = find_split(root, split)
    if folder is None and root.is_dir() and (splits := find_splits(DiskFolder(str(root)))):
        names = shortened([name for name, _ in splits.folders.values()])
        raise DataError(f"{root} has the splits {names} and no {split}: choose one of them with --split.")
    return folder or root
