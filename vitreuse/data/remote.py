"""Shards behind URLs: each file is fetched whole, once a machine, and then read as a local one.

CACHE_ROOT/URL-DIGEST/SPLIT/
    index.json index.npy    there when both are whole
    *.tar                   each fetched when it is first read, and there when it is what the index says
    .*.lock                 held by the process that fetches a file, for which the others wait
    .*.fetching/            what it has of the file so far
What is there is never fetched again: new data behind an old URL need another cache, or this one removed.
"""

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitreuse.data.shards.index import HEADER_FILE, RECORDS_FILE, Index, describe_foreign, read_index
from vitreuse.data.shards.scan import Shard, file_sha256
from vitreuse.io.durable import durable_file, exclusive_lock, sync
from vitreuse.io.errors import DataError, as_data_error
from vitreuse.io.urls import url_kind

PAUSES_S = (1.0, 5.0)  # before each further try
FINAL = ("exit 22", "exit 28")  # curl's for a refusal such as 404 and for a time-out, which it has tried again itself
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*")  # it becomes part of a path, and of a shell's command
_THREADS = threading.Lock()  # a lock file does not part the threads of a process


class _Broken(Exception):
    """A URL gives nothing, not all, or something else; the text is the reason."""


def locate(root: str, split: str, cache_root: str | Path) -> tuple[str, Path]:
    """The URL of a split's files, with {} for their name, and the folder that they are fetched into.

    Args:
        root: The URL of a data set; {} in it stands for SPLIT/NAME, which else is its end.
        split: 'train', 'val' or any other folder of it.
        cache_root: The folder for all that is fetched.

    Raises:
        DataError: A command has no place for the name.
    """
    kind = str(url_kind(root))
    if kind == "pipe" and "{}" not in root:
        raise DataError(f"{root!r} has no {{}}: write it where the command takes a file, as in 'pipe:cat /data/{{}}'.")
    pattern = kind + root[len(kind) :] if "{}" in root else f"{kind}{root[len(kind) :].rstrip('/')}/{{}}"
    digest = hashlib.sha256(pattern.encode()).hexdigest()[:12]
    name = re.sub("[^A-Za-z0-9.]+", "-", pattern)[:60]
    return pattern.replace("{}", f"{split}/{{}}"), Path(cache_root) / f"{name}{digest}" / split


def open_index(url: str, folder: Path) -> Index:
    """The index of a split, fetched if it is not there.

    Raises:
        DataError: It cannot be fetched or written, or is no index of shards with plain names.
    """
    if not (folder / HEADER_FILE).exists():
        with _fetching(folder, HEADER_FILE) as staged:
            if not (folder / HEADER_FILE).exists():  # else another process was first
                _fetch(url, HEADER_FILE, staged)
                if foreign := describe_foreign(staged):
                    what = f"the {HEADER_FILE} that {url} gives is {foreign} and no index of vitreuse's"
                    way_out = "put shards that vitreuse shards index has indexed into a place of their own"
                    raise DataError(f"{what}: {way_out}.")
                _fetch(url, RECORDS_FILE, staged)
                _check_index(url, staged)
                for name in (RECORDS_FILE, HEADER_FILE):  # the header, which vouches for the records, comes last
                    os.replace(staged / name, folder / name)
                sync(folder)
    return read_index(folder)


def fetch_shard(url: str, folder: Path, shard: Shard) -> None:
    """Fetches a shard that is not there.

    Raises:
        DataError: It cannot be fetched or written, or is not what the index says.
    """
    if _is_there(folder, shard):
        return
    with _fetching(folder, shard.name) as staged:
        if not _is_there(folder, shard):
            _fetch(url, shard.name, staged, shard)
            os.replace(staged / shard.name, folder / shard.name)
            sync(folder)


def _is_there(folder: Path, shard: Shard) -> bool:
    try:
        return os.stat(folder / shard.name).st_size == shard.num_bytes
    except FileNotFoundError:
        return False


@contextmanager
def _fetching(folder: Path, name: str) -> Iterator[Path]:
    """A new folder for a file that is fetched, for this process alone: others wait, and find the file there."""
    staged = folder / f".{name}.fetching"
    with as_data_error(f"{folder} cannot be written", "see to that, or choose another data.cache_root"):
        folder.mkdir(parents=True, exist_ok=True)
        with _THREADS, exclusive_lock(folder / f".{name}.lock", wait=True):
            shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
            staged.mkdir()
            try:
                yield staged
            finally:
                shutil.rmtree(staged, ignore_errors=True)


def _fetch(url: str, name: str, folder: Path, shard: Shard | None = None) -> None:
    """Fetches a file into a folder, and compares it with what the index says, if it is a shard."""
    url = url.replace("{}", name)
    for pause in (*PAUSES_S, None):
        try:
            with durable_file(folder / name) as file:
                file.writelines(_chunks(url))
            num_bytes = (folder / name).stat().st_size
            if shard is not None and num_bytes != shard.num_bytes:
                raise _Broken(f"{num_bytes} bytes, its index says {shard.num_bytes}")
            if shard is not None and file_sha256(folder / name) != shard.sha256:
                raise _Broken("its SHA-256 is not what its index says")
            return
        except _Broken as broken:
            if pause is None or str(broken) in FINAL:
                command = url.removeprefix("pipe:") if url.startswith("pipe:") else f"curl -fL {url}"
                raise DataError(f"{url} cannot be fetched ({broken}): see what `{command}` gives.") from broken
        time.sleep(pause)


def _chunks(url: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen  # takes a second to import, for which readers of local data need not wait

    try:
        stream = gopen(url)  # no context manager: where writing fails, its exit would raise an error of its own
        while chunk := stream.read(1 << 20):
            yield chunk
        stream.close()
    except (OSError, ValueError) as error:
        exit_code = re.search(r"exit -?\d+", str(error))
        raise _Broken(exit_code[0] if exit_code else str(error)) from error


def _check_index(url: str, folder: Path) -> None:
    try:
        index = read_index(folder)
    except DataError as error:
        raise DataError(f"{url} gives no whole {HEADER_FILE} and {RECORDS_FILE}: write them there again.") from error
    for shard in index.shards:
        if not SAFE_NAME.fullmatch(shard.name):
            rule = "names of letters, digits and _.+=@- alone are fetched"
            raise DataError(f"the index that {url} gives names a shard {shard.name!r}: {rule}.")
