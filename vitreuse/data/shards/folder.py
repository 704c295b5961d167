"""Folders of shards: writing them, looking for damage, summing them up."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitreuse.data.shards.index import Index, build_index, find_mismatches, load_index, read_index
from vitreuse.data.shards.scan import file_sha256, scan_shard
from vitreuse.data.shards.workers import THIS_PROCESS, Workers
from vitreuse.io.durable import durable_file
from vitreuse.io.errors import DataError, as_data_error


class EncodedSample(NamedTuple):
    """One labelled image as it goes into a shard: the content of an image file and its ending, such as 'png'."""

    key: str
    image: bytes
    extension: str
    label: int


@dataclass(frozen=True)
class SplitInfo:
    """What a folder of shards holds."""

    folder: str
    num_samples: int
    num_classes: int
    num_shards: int
    num_bytes: int
    smallest_shard: int
    largest_shard: int


def write_shards(
    samples: Iterable[EncodedSample], folder: str | Path, class_names: Sequence[str], samples_per_shard: int
) -> Index:
    """Writes samples as WebDataset shards with an index. The same samples give the same bytes.

    The folder appears under its name only when it is whole, so an interrupted run leaves nothing that looks usable.

    Raises:
        DataError: The folder exists and is not empty, there are no samples or to be none in a shard, or build_index
            refuses them.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}, it must be at least 1: a thousand is usual.")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    batches = iter(lambda: list(islice(remaining, samples_per_shard)), [])
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        staged = Path(scratch) / folder.name
        staged.mkdir()
        for number, batch in enumerate(batches):
            write_shard(batch, staged / f"shard-{number:06d}.tar")
        build_index(staged, class_names)
        with as_data_error(f"{folder} cannot be written", "choose a new or empty folder"):
            os.rename(staged, folder)
    return load_index(folder)


def write_shard(samples: Iterable[EncodedSample], path: Path) -> None:
    """Writes one WebDataset tar durably: KEY.cls and KEY.EXTENSION for each sample."""
    from webdataset.writer import TarWriter  # takes a second to import, for which readers need not wait

    with durable_file(path) as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, sample.extension: sample.image, "cls": str(sample.label).encode()})


def verify_shards(folder: str | Path, workers: Workers = THIS_PROCESS) -> list[str]:
    """A sentence for each problem that comparing every byte of a folder's shards with its index finds."""
    try:
        index = read_index(Path(folder))
    except DataError as error:
        return [str(error)]
    problems = list(find_mismatches(index))
    paths = [index.folder / shard.name for shard in index.shards]
    present = [number for number, path in enumerate(paths) if path.exists()]
    checksums = workers.map(file_sha256, [paths[number] for number in present], f"verifying {index.folder.name}")
    for number, sha256 in zip(present, checksums, strict=True):
        if sha256 != index.shards[number].sha256:
            problems += _compare_shard(paths[number], index.shard_records(number))
    return problems


def shards_info(folder: str | Path) -> SplitInfo:
    """Sums up a folder of indexed shards.

    Raises:
        DataError: As load_index does.
    """
    index = load_index(folder)
    sizes = [shard.num_samples for shard in index.shards]
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    return SplitInfo(str(folder), len(index), len(index.class_names), len(sizes), num_bytes, min(sizes), max(sizes))


def _compare_shard(path: Path, expected: np.ndarray) -> list[str]:
    """A sentence for each sample in which a shard with a wrong checksum differs from its index, or one about it all."""
    try:
        _, found, _ = scan_shard(path)
    except DataError as error:
        return [str(error)]
    if len(found) != len(expected):
        return [f"shard {path} has {len(found)} samples, its index says {len(expected)}: fetch or write it again."]
    changed = expected["key"][found.astype(expected.dtype) != expected]
    if not len(changed):
        return [f"shard {path} differs from its index outside the images and labels: fetch it again or index it again."]
    names = (repr(os.fsdecode(key.item())) for key in changed)
    return [f"sample {name} of shard {path} is not what was indexed: fetch or write it again." for name in names]
