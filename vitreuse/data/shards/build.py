"""Building a folder of shards from images: in parallel, resumable, and the same bytes for the same source and settings.

Work goes on beside FOLDER, which appears under its name only when it is whole:
    .FOLDER.building/.lock             held by the process that builds
                     FOLDER/build.json what is being built: settings, and a digest of the source's listing
                            *.tar      each written durably, so one that is there is whole
                            index.*    last
A build that was killed, at whatever moment, goes on with the shards that are missing. build.json stays in FOLDER: the
same command again finds that it is done.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vitreuse.data.decode import decode_image
from vitreuse.data.listing import Listing, list_splits, read_image
from vitreuse.data.shards.folder import EncodedSample, write_shard
from vitreuse.data.shards.index import build_index, find_twins
from vitreuse.data.shards.workers import THIS_PROCESS, Workers
from vitreuse.data.tree import shortened
from vitreuse.io.durable import TEMPORARY_FILES, exclusive_lock, sync, write_durably
from vitreuse.io.errors import DataError, as_data_error

PLAN_FILE = "build.json"
FORMAT = "vitreuse-build-1"
OF_META = re.compile(rb"__[^/]*__/")  # what names that WebDataset's readers leave out begin with


@dataclass(frozen=True)
class BuildSettings:
    """What decides the bytes of the shards, beside the source.

    Attributes:
        samples_per_shard: The size of every shard but the last.
        resize_px: Images whose shorter side is longer are shrunk to it; None keeps every file as it is.
        quality: The quality of the JPEGs that shrunk images become.
        seed: Decides the order of the samples.

    Raises:
        DataError: A number is out of range.
    """

    samples_per_shard: int = 1000
    resize_px: int | None = None
    quality: int = 95
    seed: int = 0

    def __post_init__(self):
        if self.samples_per_shard < 1:
            raise DataError(f"samples_per_shard is {self.samples_per_shard}, it must be at least 1: 1000 is usual.")
        if self.resize_px is not None and self.resize_px < 1:
            raise DataError(f"resize_px is {self.resize_px}, it must be at least 1: 256 is usual.")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}, it must be from 1 to 100: 95 is usual.")
        if self.seed < 0:
            raise DataError(f"seed is {self.seed}, it must be at least 0: 0 is usual.")


class ShardTask(NamedTuple):
    """One shard to write: its samples are these images of the source, in this order."""

    path: Path
    source: Path
    images: np.ndarray
    settings: BuildSettings


def build_shards(
    source: str | Path, folder: str | Path, settings: BuildSettings, workers: Workers = THIS_PROCESS
) -> list[Path]:
    """Builds indexed shards, in which each class is spread over all shards.

    A sample's key is CLASS/NAME without the ending, dots in NAME as underscores. Its image keeps its bytes, EXIF
    orientation included, unless it is shrunk; then it becomes a JPEG of the pixels as they were stored, without EXIF.

    Args:
        source: Class folders, a folder with splits of them, or a tar of either: see listing.py.
        folder: A place for the shards; of splits, for one folder of shards each, by the names train, val and test.
        settings: What to write.
        workers: The processes that write.

    Returns:
        The folders of shards.

    Raises:
        DataError: The source cannot be used or changed meanwhile, images would have the same key, images cannot be
            read or, to be shrunk, decoded, the folder holds something else or cannot be written, it is being built by
            another process, or was begun from another source or with other settings. All such images are counted, and
            the first of them named.
    """
    listings = list_splits(Path(source), workers)
    for listing in listings.values():
        _check_keys(listing)
    folders = {split: Path(folder) / split for split in listings}
    problems: list[str] = []
    for split, listing in listings.items():
        way_out = "see to that and run the same command again, it goes on where it stopped"
        with as_data_error(f"{folders[split]} cannot be written", way_out):
            problems += _build_split(folders[split].resolve(), listing, settings, workers)
    if problems:
        raise DataError("; ".join(problems) + ".")
    return list(folders.values())


def _build_split(folder: Path, listing: Listing, settings: BuildSettings, workers: Workers) -> list[str]:
    """Builds a folder of shards, or says what is wrong with images that cannot be used, for which it is not built."""
    order = np.random.default_rng(settings.seed).permutation(len(listing.images))
    digest = hashlib.sha256(json.dumps(listing.class_names).encode() + listing.images.tobytes()).hexdigest()
    plan = {"format": FORMAT, **asdict(settings), "num_images": len(listing.images), "listing_sha256": digest}
    with _staging(folder) as staged:
        if _is_built(folder, plan):
            return []
        _begin(staged, plan)
        problems = _write_missing(staged, listing.source, listing.images[order], settings, workers)
        if problems:
            shutil.rmtree(staged)  # whatever is done about them makes another build of it
            return [_summarise(problems, listing)]
        build_index(staged, listing.class_names, workers)
        os.rename(staged, folder)
        sync(folder.parent)
    return []


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """The path of a folder to become FOLDER, for this process alone; what surrounds it goes when it is gone."""
    surroundings = folder.with_name(f".{folder.name}.building")
    surroundings.mkdir(parents=True, exist_ok=True)
    staged = surroundings / folder.name
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(surroundings / ".lock"))
        except BlockingIOError as error:
            raise DataError(f"{folder} is being built by another process: wait for it to end.") from error
        try:
            yield staged
        finally:
            if not staged.exists():
                shutil.rmtree(surroundings, ignore_errors=True)


def _is_built(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder is there and is what the plan says; refuses one that is something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = _read_plan(folder)
    if found == plan:
        return True
    difference = f"was built otherwise ({_describe_changes(found, plan)})" if found else f"has no {PLAN_FILE}"
    raise DataError(f"{folder} is not empty and {difference}: choose a new or empty folder.")


def _begin(staged: Path, plan: dict[str, Any]) -> None:
    """Notes what is to be built; refuses it where something else was begun."""
    staged.mkdir(exist_ok=True)
    begun = _read_plan(staged)
    if not begun:
        write_durably(staged / PLAN_FILE, (json.dumps(plan, indent=1) + "\n").encode())
    elif begun != plan:
        changes = _describe_changes(begun, plan)
        raise DataError(f"{staged.parent} holds a build that was begun otherwise ({changes}): remove it to start anew.")
    for path in staged.glob(TEMPORARY_FILES):
        path.unlink()


def _read_plan(folder: Path) -> dict[str, Any]:
    """The plan that was noted when a folder was begun; nothing where nothing was."""
    path = folder / PLAN_FILE
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): remove {folder} to build it again.") from error


def _describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} {str(old.get(name))[:16]}, now {str(new[name])[:16]}" for name in names)


def _write_missing(
    staged: Path, source: Path, images: np.ndarray, settings: BuildSettings, workers: Workers
) -> dict[str, str]:
    """Writes the shards that are not there; tells of each image that cannot be used, by its name, in a sentence."""
    starts = range(0, len(images), settings.samples_per_shard)
    tasks = [
        ShardTask(staged / f"shard-{number:06d}.tar", source, images[start : start + starts.step], settings)
        for number, start in enumerate(starts)
    ]
    missing = [task for task in tasks if not task.path.exists()]
    sizes = [len(task.images) for task in missing]
    done = len(images) - sum(sizes)
    written = workers.map(_write_shard, missing, f"writing {staged.name}", "images", sizes, done)
    return {name: sentence for problems in written for name, sentence in problems.items()}


def _write_shard(task: ShardTask) -> dict[str, str]:
    """Writes a shard, or none and tells of each image that cannot be used, by its name, in a sentence."""
    problems: dict[str, str] = {}
    try:
        write_shard(_read_samples(task, problems), task.path)
    except DataError:
        if not problems:
            raise
    return problems


def _read_samples(task: ShardTask, problems: dict[str, str]) -> Iterator[EncodedSample]:
    """Reads the samples of a shard and notes what cannot be used; fails at its end if anything was noted."""
    for raw_name, offset, size, _, label in task.images.tolist():
        name = os.fsdecode(raw_name)
        try:
            data, extension = _read_image(task, name, offset, size)
        except DataError as error:
            problems[name] = str(error)
        else:
            yield EncodedSample(os.fsdecode(_make_key(raw_name)), data, extension, label)
    if problems:
        raise DataError(f"{len(problems)} images of {task.path} cannot be used.")


def _read_image(task: ShardTask, name: str, offset: int, size: int) -> tuple[bytes, str]:
    """The bytes of an image as they go into a shard, and their ending: shrunk where its shorter side is too long."""
    resize_px, place = task.settings.resize_px, f"image {name} of {task.source}"
    data, ending = read_image(task.source, name, offset, size), name.rpartition(".")[2].lower()
    if resize_px is None:
        return data, ending
    image = decode_image(data, None, place)
    if min(image.size) <= resize_px:
        return data, ending
    if image.mode not in ("L", "RGB"):  # what a JPEG cannot hold, or not without doubt, such as CMYK
        image = decode_image(data, "RGB", place)
    width, height = (round(side * resize_px / min(image.size)) for side in image.size)
    content = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(content, "JPEG", quality=task.settings.quality)
    return content.getvalue(), "jpg"


def _summarise(problems: dict[str, str], listing: Listing) -> str:
    """The problems with images, in the order of their names, without the end of the sentence."""
    told = [problems[name].rstrip(".") for name in sorted(problems)]
    if len(told) == 1:
        return told[0]
    told = [part.replace(f" of {listing.source}", "") for part in told]
    return f"{len(told)} images of {listing.source} cannot be used: {shortened(told)}"


def _make_key(name: bytes) -> bytes:
    """CLASS/NAME without its ending, and without the dots at which WebDataset would end the key."""
    folder, slash, file_name = name.rpartition(b"/")
    return folder + slash + file_name.rpartition(b".")[0].replace(b".", b"_")


def _check_keys(listing: Listing) -> None:
    names = listing.images["name"]
    if hidden := next((name for name in names.tolist() if OF_META.match(name)), None):
        raise DataError(
            f"{os.fsdecode(hidden)} of {listing.place} would be left out by WebDataset's readers, which take __NAME__/ "
            "for what has no samples: rename it."
        )
    twins = list(find_twins(np.array([_make_key(name) for name in names.tolist()])))
    if twins:
        pairs = [" and ".join(os.fsdecode(names[number].item()) for number in pair) for pair in twins]
        number = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
        raise DataError(f"{shortened(pairs)} of {listing.place} would have the same key{number}: rename one of each.")
