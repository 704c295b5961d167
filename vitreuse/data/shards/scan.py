"""Reading shards from end to end: which samples one holds, and where in it they lie."""

import hashlib
import os
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vitreuse.data.names import IMAGE_EXTENSIONS, is_leftover, kind_of
from vitreuse.data.tars import Node, clean_path, describe_tar_error, tar_members
from vitreuse.data.tree import Span, Unusable
from vitreuse.io.errors import DataError, as_data_error

LABEL, MOST_DIGITS = "cls", 10
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
    """The layout of one sample's record in the index; keys are UTF-8, padded to key_bytes."""
    return np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("crc32", "<u4"), ("key", f"S{key_bytes}")])


def scan_shard(path: Path) -> tuple[Shard, np.ndarray, Counter[str]]:
    """Reads a whole tar; returns its description, the records of its samples, in order, and what is skipped, by kind.

    Raises:
        DataError: It is cut short, compressed or no tar, holds no sample, or one without exactly one image and one
            label of 0 or more.
    """
    with as_data_error(f"shard {path} cannot be read", "fetch it again"), open(path, "rb") as file:
        members, skipped = _list_members(path, file)
        _check_labelled(path, members)
        groups = groupby(members, key=lambda member: member.key)
        samples = [_read_record(path, file, key, list(group)) for key, group in groups]
        num_bytes = os.fstat(file.fileno()).st_size
    if not samples:
        raise DataError(f"shard {path} holds no sample: delete it or write it again.")
    records = np.array(samples, dtype=record_dtype(max(len(sample[-1]) for sample in samples)))
    return Shard(path.name, len(samples), num_bytes, file_sha256(path)), records, skipped


def _check_labelled(path: Path, members: list[Member]) -> None:
    """Refuses a tar of images without any label, which is sorted well and no shard."""
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    if images and not any(member.extension == LABEL for member in members):
        key = images[0].key
        found = ", ".join(f"{key}.{member.extension}" for member in members if member.key == key)
        raise DataError(
            f"shard {path} has no labels: sample {key!r} has 0 files for its label (.cls) and {found}; write a KEY.cls "
            "for each image, the number of its class, or, if folders in it are classes, use vitreuse shards build."
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as the program sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _list_members(path: Path, file: BinaryIO) -> tuple[list[Member], Counter[str]]:
    """The files of samples, in order, and the number of all others by kind; links are what they link to."""
    top, names = Node(), []
    try:
        for info in tar_members(file):
            top.add(info)
            names += [] if info.isdir() else [info.name]
    except tarfile.TarError as error:
        problem, way_out = describe_tar_error(path, error)
        keys = [match[1] for name in names if (match := MEMBER_NAME.fullmatch(name))]
        last = f" in or after sample {keys[-1]!r}" if keys else ""
        raise DataError(f"shard {path} {problem}{last}: {way_out}.") from error
    members, skipped = [], Counter()
    for name in names:
        clean = clean_path(name)
        match, found = MEMBER_NAME.fullmatch(name), top.follow(clean)
        leftover = next(filter(is_leftover, clean.split("/")), None)
        if leftover or not match or not isinstance(found, (Span, Unusable)):
            skipped[kind_of(leftover or posixpath.basename(clean))] += 1
        elif isinstance(found, Span) and found.size is not None:
            members.append(Member(match[1], match[2].lower(), found.offset, found.size))
        elif isinstance(found, Unusable):
            raise DataError(f"{name} of shard {path} {found.reason}.")
    return members, skipped


def _read_record(path: Path, file: BinaryIO, key: str, members: list[Member]) -> tuple[int, int, int, int, bytes]:
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    labels = [member for member in members if member.extension == LABEL]
    for kind, found in (("image", images), ("label (.cls)", labels)):
        if len(found) != 1:
            names = ", ".join(f"{key}.{member.extension}" for member in members)
            raise DataError(
                f"sample {key!r} of shard {path} has {len(found)} files for its {kind} instead of 1 (found {names}): "
                f"write the shard again with a sample's files next to each other."
            )
    image, label = images[0], labels[0]
    text = os.pread(file.fileno(), label.size, label.offset)
    if not text.strip().isdigit() or len(text.strip()) > MOST_DIGITS or int(text) > np.iinfo(np.int32).max:
        shown = text[:20].decode(errors="replace")
        raise DataError(f"sample {key!r} of shard {path} has the label {shown!r}: write a whole number from 0 on.")
    crc32 = zlib.crc32(os.pread(file.fileno(), image.size, image.offset))
    return image.offset, image.size, int(text), crc32, os.fsencode(key)
