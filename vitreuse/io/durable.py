"""Files that a crash leaves as they were or whole, never half-written, and that one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vitreuse.io.process import print_note

NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of what a file system lacks
LOCK_FILE = ".lock"  # of a folder that one process fills at a time
TEMPORARY_FILES = ".*.tmp"  # glob pattern of what durable_file leaves where its process is killed


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` at the end: temporary name, fsync, rename.

    A link leads to the file that is replaced; what is no file, such as a device or a pipe, is written into.

    Raises:
        OSError: It cannot be written, on a full disk say; what was there before is untouched.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
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


def writable_folder(folder: Path) -> Path:
    """The folder, made where it was not, in which files can be made.

    Raises:
        OSError: It cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OSError(f"nothing can be written in {folder} ({reason}): choose another place.") from error


def writable_file(path: Path) -> Path:
    """The path of a file that can be written, in a folder that is made where it was not.

    Raises:
        OSError: It is a folder, or nothing can be written in the one that it is in.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder: give a file in it.")
    if not path.exists() or path.is_file():  # and no device or pipe
        writable_folder(path.parent)
    return path


def refuse_filled(folder: Path) -> None:
    """Refuses a place for a new folder where something is already, but for a lock.

    Raises:
        ValueError: It is a file, or a folder that is not empty.
    """
    if folder.is_dir() and (held := next((path for path in folder.iterdir() if path.name != LOCK_FILE), None)):
        raise ValueError(f"{folder} holds {held.name} already: give a folder that is new or empty.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder that is new or empty.")


@contextmanager
def durable_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears as ``path`` at the end, whole: temporary name, fsync, rename.

    A link leads to the folder that is filled.

    Raises:
        ValueError: Something is there already, or it is the folder that this process is in.
        OSError: It cannot be written.
    """
    refuse_filled(path)
    path = path.resolve()
    if path == Path.cwd():
        raise ValueError(f"{path} is the folder that you are in, which cannot be replaced: name a new one in it.")
    if (path / LOCK_FILE).exists():
        raise ValueError(f"{path} holds {LOCK_FILE} of another command: give a folder that is new or empty.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names where its file system can, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_KNOWN or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock file against other processes inside the block.

    A POSIX lock: forked workers do not share it, and a dead process does not keep it. Where a file system has none, a
    note says so and nothing is held.

    Raises:
        BlockingIOError: Another process holds it, and it is not to wait.
        OSError: The file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NOT_KNOWN:
                raise
            print_note(f"{path.parent} lies on a file system without locks: let one process at a time write there.")
        yield
    finally:
        os.close(descriptor)


def nearest_folder(path: Path) -> Path:
    """The path itself if it is a folder, else the nearest one above it: where it would be made."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
