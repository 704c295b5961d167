"""The index of a folder of WebDataset shards: where each sample's image lies, and what it must be.

A split is a folder of plain tars with members KEY.png (or another image) and KEY.cls, and beside them
    index.json   format, class names, and of each shard the name, samples, bytes and SHA-256
    index.npy    one record a sample, in the order of the shards: the image's offset and size in its
                 shard, label, CRC-32 of the image, key
With it any sample is one read away, so that order, resume and distributed evaluation need no streaming state. The
records are mapped, not read: the DataLoader workers of a machine share one copy.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitreuse.data.names import is_leftover
from vitreuse.data.shards.scan import Shard, record_dtype, scan_shard
from vitreuse.data.shards.workers import THIS_PROCESS, Workers
from vitreuse.data.tree import skipped_notes
from vitreuse.io.durable import durable_file, write_durably
from vitreuse.io.errors import DataError, as_data_error
from vitreuse.io.file_names import is_name

HEADER_FILE = "index.json"
RECORDS_FILE = "index.npy"
FORMAT = "vitreuse-index-1"
MOST_NUMBERED = 1_000_000  # classes that have no names


class Record(NamedTuple):
    """Where one sample's image lies in its shard, and what it must be."""

    offset: int
    size: int
    label: int
    crc32: int
    key: str


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one split, numbered through its shards in order."""

    folder: Path
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    records: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def shard_starts(self) -> list[int]:
        """The number of the first sample of each shard."""
        return list(accumulate((shard.num_samples for shard in self.shards[:-1]), initial=0))

    def locate(self, number: int) -> tuple[Path, Record]:
        """The shard and the record of a sample, for 0 <= number < len."""
        shard = self.shards[bisect_right(self.shard_starts, number) - 1]
        offset, size, label, crc32, key = self.records[number].item()
        return self.folder / shard.name, Record(offset, size, label, crc32, os.fsdecode(key))

    def shard_records(self, shard_number: int) -> np.ndarray:
        """The records of one shard."""
        start = self.shard_starts[shard_number]
        return self.records[start : start + self.shards[shard_number].num_samples]


def build_index(folder: str | Path, class_names: Sequence[str] | None = None, workers: Workers = THIS_PROCESS) -> Index:
    """Reads every shard of a folder and writes its index.

    Args:
        folder: A folder of WebDataset tars; any writer's will do.
        class_names: The name of each label; by default those of the index that is there, else the numbers.
        workers: The processes that read.

    Raises:
        DataError: There are no shards, a shard is damaged or empty, a sample has no image or no label, a label has no
            name, or a key occurs twice. Nothing is written then.
    """
    folder = Path(folder)
    paths = list_shards(folder)
    if not paths:
        raise DataError(f"no shards (*.tar) in {folder}: name a folder that holds some.")
    if (folder / HEADER_FILE).exists() and (class_names is None or describe_foreign(folder)):
        class_names = _read_header(folder)[0]
    shards, parts, skipped = zip(*workers.map(scan_shard, paths, f"indexing {folder.name}"), strict=True)
    workers.tell(skipped_notes(str(folder), sum(skipped, Counter())))
    dtype = record_dtype(max(part.dtype["key"].itemsize for part in parts))  # the widest key sets the width of all
    records = np.concatenate([part.astype(dtype) for part in parts])
    if class_names is None:
        largest = records[records["label"].argmax()]
        if largest["label"] > MOST_NUMBERED:
            raise DataError(
                f"the sample {os.fsdecode(bytes(largest['key']))!r} has the label {largest['label']}, and labels "
                f"without names are numbers of classes, {MOST_NUMBERED:,} at most: number the classes from 0."
            )
        class_names = [str(label) for label in range(int(largest["label"]) + 1)]
    index = Index(folder, tuple(class_names), shards, records)
    _check_classes(index)
    for twins in find_twins(records["key"]):
        (path, record), (other, _) = map(index.locate, twins)
        raise DataError(f"key {record.key!r} occurs in shard {path} and again in {other.name}: make keys unique.")
    write_index(index)
    return load_index(folder)


def list_shards(folder: Path) -> list[Path]:
    """The tars of a folder, without those that a system left behind, such as macOS's ._NAME.tar.

    Raises:
        DataError: The folder cannot be read.
    """
    with as_data_error(f"folder {folder} cannot be read", "name one that can"):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not is_leftover(name))
    return [folder / name for name in names if not (folder / name).is_dir()]


def load_index(folder: str | Path) -> Index:
    """Opens the index of a folder and compares it with the shards that are there, by name and size.

    Raises:
        DataError: There is no index, it cannot be read, or it does not fit the shards.
    """
    index = read_index(Path(folder))
    for problem in find_mismatches(index):
        raise DataError(problem)
    return index


def read_index(folder: Path) -> Index:
    """Opens the index of a folder without a look at the shards.

    Raises:
        DataError: There is no index, it cannot be read, or a label in it has no name.
    """
    if not (folder / HEADER_FILE).is_file():
        raise DataError(f"{folder} has no {HEADER_FILE}: write it with {index_call(folder)}.")
    class_names, shards, records_crc32 = _read_header(folder)
    index = Index(folder, class_names, shards, _map_records(folder, records_crc32))
    if (counted := sum(shard.num_samples for shard in shards)) != len(index.records):
        raise DataError(
            f"{folder / HEADER_FILE} counts {counted} samples and {RECORDS_FILE} has {len(index.records)}: fetch both "
            f"again, or write them with {index_call(folder)}."
        )
    _check_classes(index)
    return index


def find_mismatches(index: Index) -> Iterator[str]:
    """A sentence for each shard that is missing, has another size than the index says, or is unknown to it."""
    way_out = f"fetch or write it again, or index what is there with {index_call(index.folder)}"
    for number, shard in enumerate(index.shards):
        try:
            num_bytes = os.stat(index.folder / shard.name).st_size
        except FileNotFoundError:
            yield f"shard {shard.name} is missing from {index.folder}: {way_out}."
            continue
        if num_bytes != shard.num_bytes:
            sizes = f"has {num_bytes} bytes, its index says {shard.num_bytes}"
            records = index.shard_records(number)
            lost = records["key"][records["offset"] + records["size"] > num_bytes].tolist()
            cut_off = f" ({len(lost)} samples from {os.fsdecode(lost[0])!r} on are cut off)" if lost else ""
            yield f"shard {index.folder / shard.name} {sizes}{cut_off}: {way_out}."
    known = {shard.name for shard in index.shards}
    for path in list_shards(index.folder):
        if path.name not in known:
            yield f"shard {path} is not in the index: take it away, or index it with {index_call(index.folder)}."


def index_call(folder: Path | str) -> str:
    """The command that writes the index of a folder, for the end of a sentence."""
    return f"vitreuse shards index {folder}"


def _check_classes(index: Index) -> None:
    """Refuses a name that no table of classes could hold or that tells no class, and a label that has no name."""
    for label, name in enumerate(index.class_names):
        if not isinstance(name, str) or not is_name(name):
            raise DataError(
                f"{index.folder / HEADER_FILE} names class {label} {name!r}, which is no text: correct it there, or "
                "give build_index other class_names."
            )
    num_classes = len(index.class_names)
    for number in np.flatnonzero(index.records["label"] >= num_classes):
        path, record = index.locate(int(number))
        raise DataError(
            f"sample {record.key!r} of shard {path} has label {record.label}, but there are {num_classes} class names: "
            f"correct it, or give build_index at least {record.label + 1} class_names."
        )


def find_twins(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """The numbers of each two samples that have the same key."""
    order = np.argsort(keys, kind="stable")
    for place in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]):
        yield int(order[place]), int(order[place + 1])


def write_index(index: Index) -> None:
    """Writes both files durably; the header, which vouches for the records, comes last."""
    header = {
        "format": FORMAT,
        "class_names": index.class_names,
        "records_crc32": zlib.crc32(index.records.data),
        "shards": [asdict(shard) for shard in index.shards],
    }
    with durable_file(index.folder / RECORDS_FILE) as file:
        np.save(file, index.records, allow_pickle=False)
    write_durably(index.folder / HEADER_FILE, (json.dumps(header, indent=1) + "\n").encode())


def _read_header(folder: Path) -> tuple[tuple[str, ...], tuple[Shard, ...], int]:
    """The class names, the shards and the CRC-32 of the records."""
    path = folder / HEADER_FILE
    if foreign := describe_foreign(folder):
        way_out = "and write the images as class folders or WebDataset tars elsewhere"
        if list_shards(folder):
            way_out = f"link the tars beside it into a folder of their own and run {index_call('THAT_FOLDER')}"
        raise DataError(f"{path} is {foreign} and no index of vitreuse's: leave it, {way_out}.")
    content = _header(folder)
    try:
        header = json.loads(content)
        shards = tuple(Shard(**shard) for shard in header["shards"])
        if not all(isinstance(shard.num_samples, int) for shard in shards):
            raise TypeError("num_samples of a shard is no whole number")
        return tuple(header["class_names"]), shards, header["records_crc32"]
    except (ValueError, KeyError, TypeError) as error:
        way_out = (
            f"fetch it again, or move it away and write it with {index_call(folder)} --class-names FILE, since it "
            "alone has the names of the classes"
        )
        raise DataError(f"{path} is no index ({error}): {way_out}.") from error


def _header(folder: Path) -> bytes:
    with as_data_error(f"{folder / HEADER_FILE} cannot be read", "make it readable"):
        return (folder / HEADER_FILE).read_bytes()


def describe_foreign(folder: Path) -> str | None:
    """What a folder's index.json is instead of an index in this format; None if it is one, or no JSON.

    Raises:
        DataError: It cannot be read.
    """
    content = _header(folder)
    try:
        header = json.loads(content)
    except ValueError:
        return None
    keys = {*header} if isinstance(header, dict) else set()
    if header_format := header.get("format") if keys >= {"format"} else None:
        return None if header_format == FORMAT else f"of the format {header_format!r} instead of {FORMAT!r}"
    if keys >= {"version", "shards"}:
        return "an index of MosaicML's streaming (MDS)"
    if keys & {"wids_version", "shardlist"}:
        return "an index of WebDataset's wids"
    return f"another program's file (it has {', '.join(sorted(map(str, keys))[:5]) or type(header).__name__})"


def _map_records(folder: Path, crc32: int) -> np.ndarray:
    path = folder / RECORDS_FILE
    try:
        records = np.load(path, mmap_mode="r")
        if zlib.crc32(records.data) != crc32:
            raise ValueError(f"not the records that {HEADER_FILE} vouches for")
        return records
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}): write it again with {index_call(folder)}.") from error
