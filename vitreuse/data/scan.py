"""Reading tars from end to end: which files one holds, which samples a shard holds, and where in it they lie.

Python's tarfile takes a tar that is cut between two members, or in a header, for a whole one. What follows the last
member is therefore checked here: a tar ends with a block of zeros.
"""

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vitreuse.data.decode import IMAGE_EXTENSIONS
from vitreuse.data.errors import DataError

BLOCK_BYTES = 512
# WebDataset's rule: the key ends at the first dot of the file name. A folder's name may hold the end of a line.
MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class Shard:
    """One tar of a split, as its index describes it."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


class Member(NamedTuple):
    """One file in a tar."""

    key: str
    extension: str
    offset: int
    size: int


def record_dtype(key_bytes: int) -> np.dtype:
    """Layout of one sample's record in the index; keys are UTF-8, padded to key_bytes."""
    return np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("crc32", "<u4"), ("key", f"S{key_bytes}")])


def scan_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """Reads a whole tar and returns its description and the records of its samples, in order.

    Raises:
        DataError: it is cut short, compressed or no tar, holds no sample, or one without exactly one image and one
            label of 0 or more.
    """
    with open(path, "rb") as file:
        members = _list_members(path, file)
        groups = groupby(members, key=lambda member: member.key)
        samples = [_read_record(path, file, key, list(group)) for key, group in groups]
        num_bytes = os.fstat(file.fileno()).st_size
    if not samples:
        raise DataError(f"shard {path} holds no sample: delete it or write it again.")
    records = np.array(samples, dtype=record_dtype(max(len(sample[-1]) for sample in samples)))
    return Shard(path.name, len(samples), num_bytes, file_sha256(path)), records


def file_sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, as the program sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tar_files(file: BinaryIO, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of an uncompressed tar.

    Args:
        file: holds the tar, or a tar that has it as a member.
        start: where in the file the tar begins; offset_data of what is yielded counts from the file's beginning.
        size: of the tar in bytes; None for all that follows.

    Raises:
        TarError: it is no tar, or cut short.
    """
    stop = os.fstat(file.fileno()).st_size if size is None else start + size
    end = start
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] tarfile keeps 700 bytes for each
            end = info.offset_data + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES
            if info.isreg():
                yield info
    if end + BLOCK_BYTES > stop or os.pread(file.fileno(), BLOCK_BYTES, end) != bytes(BLOCK_BYTES):
        raise tarfile.ReadError(f"no end mark at byte {end - start}")


def _list_members(path: Path, file: BinaryIO) -> list[Member]:
    members: list[Member] = []
    try:
        for info in tar_files(file):
            if match := MEMBER_NAME.fullmatch(info.name):
                members.append(Member(match[1], match[2].lower(), info.offset_data, info.size))
    except tarfile.TarError as error:
        raise DataError(_describe_damage(path, members, str(error))) from error
    return members


def _describe_damage(path: Path, members: list[Member], reason: str) -> str:
    last = f" in or after sample {members[-1].key!r}" if members else ""
    return f"shard {path} is damaged, cut short or no uncompressed tar{last} ({reason}): fetch or write it again."


def _read_record(path: Path, file: BinaryIO, key: str, members: list[Member]) -> tuple[int, int, int, int, bytes]:
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    labels = [member for member in members if member.extension == "cls"]
    for kind, found in (("image", images), ("label (.cls)", labels)):
        if len(found) != 1:
            names = ", ".join(f"{key}.{member.extension}" for member in members)
            raise DataError(
                f"sample {key!r} of shard {path} has {len(found)} files for its {kind} instead of 1 (found {names}): "
                f"write the shard again with a sample's files next to each other."
            )
    image = images[0]
    crc32 = zlib.crc32(_read_member(file, image))
    return image.offset, image.size, _parse_label(path, key, _read_member(file, labels[0])), crc32, os.fsencode(key)


def _read_member(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _parse_label(path: Path, key: str, text: bytes) -> int:
    if not text.strip().isdigit() or int(text) > np.iinfo(np.int32).max:
        shown = text[:20].decode(errors="replace")
        raise DataError(f"sample {key!r} of shard {path} has the label {shown!r}: write a whole number from 0 on.")
    return int(text)
