"""Files that a crash leaves as they were or whole, never half-written, and that one process writes at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

TEMPORARY_FILES = ".*.tmp"  # glob pattern of what durable_file leaves where its process is killed


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` at the end: temporary name, fsync, rename.

    Raises:
        OSError: It cannot be written, on a full disk say; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save_tensors(value: Any, file: BinaryIO) -> None:
    """torch.save, but a full disk stays an OSError: its writer of archives raises a RuntimeError about positions."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Writes a whole file, see ``durable_file``."""
    with durable_file(path) as file:
        file.write(content)


def refuse_filled(folder: Path) -> None:
    """Refuses a place for a new folder where something is already.

    Raises:
        ValueError: It is a file, or a folder that is not empty.
    """
    if folder.is_dir() and (held := next(folder.iterdir(), None)) is not None:
        raise ValueError(f"{folder} holds {held.name} already: give a folder that is new or empty.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder that is new or empty.")


@contextmanager
def durable_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears as ``path`` at the end, whole: temporary name, fsync, rename.

    Raises:
        ValueError: Something is there already.
        OSError: It cannot be written.
    """
    refuse_filled(path)
    temporary = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.absolute().parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock file against other processes inside the block.

    A POSIX lock: forked workers do not share it, and a dead process does not keep it.

    Raises:
        BlockingIOError: Another process holds it, and it is not to wait.
        OSError: The file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def nearest_folder(path: Path) -> Path:
    """The path itself if it is a folder, else the nearest one above it: where it would be made."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
