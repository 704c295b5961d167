"""Folders of images, on a disk or in a tar, as one kind of tree; every reader of images goes through it.

A tree is read a level at a time. Links are followed, wherever they lead but back to a folder that they are in.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from vitreuse.data.names import IDLE_WORDS, IMAGE_EXTENSIONS, is_image_name, is_leftover, kind_of, refuse_lookalikes
from vitreuse.io.errors import DataError, as_data_error


class Span(NamedTuple):
    """Where a file's bytes lie in the file that holds it; a size of None is a file of its own."""

    offset: int
    size: int | None


class Unusable(NamedTuple):
    """Something that cannot be read, with the reason and the way out."""

    reason: str


class Folder(Protocol):
    """A folder of a tree; ``place`` names it in a sentence."""

    @property
    def place(self) -> str: ...

    def level(self) -> "Level":
        """What lies directly in it.

        Raises:
            DataError: It cannot be read, or something in it may hold images and cannot be.
        """
        ...


class Level(NamedTuple):
    """The folders and images directly in a folder, sorted by name; what is skipped is counted by kind."""

    folders: dict[str, Folder]
    images: dict[str, Span]
    skipped: Counter[str]


Entry = Folder | Span | Unusable | None  # None: neither file nor folder, such as a socket
WHOLE_FILE = Span(0, None)
LEADS_BACK = "leads back to a folder that it is in, whose images would be read again"  # a link that is refused


def read_level(place: str, names: Iterable[str], look: Callable[[str], Entry]) -> Level:
    """Sorts what lies in a folder into folders, images and what is skipped.

    Args:
        place: The place of the folder.
        names: The names of all that lies in it.
        look: Says what one of them is, of those that no system left behind.

    Raises:
        DataError: An image, or what may be a folder of images, is Unusable.
    """
    level = Level({}, {}, Counter())
    for name in sorted(names):
        found = None if is_leftover(name) else look(name)
        if isinstance(found, Unusable) and (is_image_name(name) or not os.path.splitext(name)[1]):  # maybe a folder
            raise DataError(f"{name} of {place} {found.reason}.")
        if isinstance(found, Span) and is_image_name(name):
            level.images[name] = found
        elif found is None or isinstance(found, (Span, Unusable)):
            level.skipped[kind_of(name) if found or is_leftover(name) else "pipe, socket or device"] += 1
        else:
            level.folders[name] = found
    return level


def list_below(folder: Folder) -> tuple[dict[str, Span], Counter[str]]:
    """All images below a folder by their path from it, in torchvision's order, and what is skipped there, by kind.

    Raises:
        DataError: A part of it cannot be read.
    """
    levels = sorted(_levels(folder), key=lambda found: found[0])
    images = {f"{below}/{name}".lstrip("/"): span for below, level in levels for name, span in level.images.items()}
    return images, sum((level.skipped for _, level in levels), Counter())


def holds_images(folder: Folder) -> bool:
    """Whether there is an image anywhere below a folder."""
    return any(level.images for _, level in _levels(folder))


def _levels(folder: Folder) -> Iterator[tuple[str, Level]]:
    """The levels of a folder and of all below it, with their paths from it."""
    waiting = [("", folder)]
    while waiting:
        below, folder = waiting.pop()
        level = folder.level()
        yield below, level
        waiting += [(f"{below}/{name}".lstrip("/"), inner) for name, inner in level.folders.items()]


def find_class_root(folder: Folder, name: str) -> tuple[Folder, list[str]]:
    """The folder of the class folders, and what is left out on the way to it.

    It is the folder of this name, or one in it that holds all images, as archives do.

    A folder that is alone with images of its own is a class, but not if it is called images or as the one that it is
    in: Kaggle's archives have test/test/1.jpg. Then there are no classes.

    Raises:
        DataError: A folder that is alone may be a class, or hold classes.
    """
    level, left_out = folder.level(), []
    while not level.images and (only := find_only_filled(level)):
        inner = level.folders[only]
        inner_level, others = inner.level(), [other for other in level.folders if other != only]
        if inner_level.images and only != name and only.lower() not in IDLE_WORDS:
            if len(inner_level.folders) > 1:
                images, folders = shortened([*inner_level.images]), shortened([*inner_level.folders])
                way_out = "take the images away, or put each into a folder of its class"
                raise DataError(f"{inner.place} has images ({images}) beside folders ({folders}): {way_out}.")
            break
        if others and len(inner_level.folders) == 1:  # a class with a deeper folder, beside others yet to be filled
            break
        folder, level, name = inner, inner_level, only
        left_out += others
    return folder, left_out


def find_only_filled(level: Level) -> str | None:
    """The name of the only folder in which there are images; None where more have some, or none."""
    filled = list(islice((name for name, folder in level.folders.items() if holds_images(folder)), 2))
    return filled[0] if len(filled) == 1 else None


def check_classes(place: str, folders: Mapping[str, Folder], num_images: Iterable[int]) -> None:
    """Refuses class folders whose names look the same, or that have no images."""
    refuse_lookalikes(place, folders)
    empty = [name for name, number in zip(folders, num_images, strict=True) if not number]
    if empty:
        more = f", one of {len(empty)} such classes ({shortened(empty)})" if len(empty) > 1 else ""
        endings = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"class folder {folders[empty[0]].place} has no images ({endings}){more}: fill or remove it.")


def skipped_notes(place: str, skipped: Counter[str]) -> list[str]:
    """A sentence about what was skipped, if anything was."""
    kinds = shortened([f"{number} {kind}" for kind, number in skipped.most_common()])
    return [f"{place}: {skipped.total()} files or folders that are no images are left out: {kinds}."] if kinds else []


def left_out_notes(place: str, names: list[str]) -> list[str]:
    """A sentence about folders and images that were left out, if any were."""
    return [f"{place}: left out: {shortened(names)}."] if names else []


def shortened(names: list[str], limit: int = 20) -> str:
    """Names as a list in a sentence, of many the first."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@dataclass(frozen=True)
class DiskFolder:
    """A folder on a disk.

    Attributes:
        place: Its path, links in it as they stand.
        trail: The real paths of the folders from which links led here.
    """

    place: str
    trail: tuple[str, ...] = ()

    def level(self) -> Level:
        with as_data_error(f"folder {self.place} cannot be read", "make it readable, or take it away"):
            os.stat(os.path.join(self.place, "."))  # without the right to search, names are listed and no file is read
            with os.scandir(self.place) as entries:
                found = {entry.name: entry for entry in entries}
            return read_level(self.place, found, lambda name: self._look(found[name]))

    def _look(self, entry: os.DirEntry[str]) -> Entry:
        try:
            if entry.is_dir():
                return DiskFolder(entry.path, self._trail_through(entry))
            if entry.is_file():
                return WHOLE_FILE
        except OSError as error:
            if not entry.is_symlink():
                raise
            return Unusable(f"is a link to {os.readlink(entry.path)} ({error.strerror}): mend or remove it")
        if entry.is_symlink():
            return Unusable(f"is a link to {os.readlink(entry.path)}, which is not there: mend or remove it")
        return None

    def _trail_through(self, entry: os.DirEntry[str]) -> tuple[str, ...]:
        if not entry.is_symlink():
            return self.trail
        target, trail = os.path.realpath(entry.path), (*self.trail, os.path.realpath(self.place))
        if any(os.path.commonpath((target, passed)) == target for passed in trail):
            raise DataError(f"the link {entry.path} to {target} {LEADS_BACK}: remove it.")
        return trail
