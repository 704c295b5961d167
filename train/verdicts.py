"""What `--doctor` makes of what it has found: a verdict on each subject, with the value, the limit and the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.filesize import decimal

from eval.distributed import Ranks
from vitreuse.config import Config
from vitreuse.cost.measure import device_name
from vitreuse.data import usable_cpus

OK, WARNING, WRONG = "ok", "warning", "wrong"
NUM_ROUNDS = 5  # of timed batches, each one batch a worker: workers deliver at about the same time
NUM_WARMUPS, NUM_REPEATS = 2, 5  # steps before those timed, and those
WAITING = 0.1  # share of a step's time spent waiting for data above which it is worth a warning
FULL = 0.9  # share of memory above which an allocator may fail where it did not in the first steps


class Check(NamedTuple):
    """What one look found: a sentence with the value, the limit and, where not all is well, the way out."""

    subject: str
    state: str
    finding: str


class Pace(NamedTuple):
    """Seconds by which the length of a run is predicted."""

    data: float  # for the loaders of all ranks to yield a global batch
    step: float  # for all ranks to train on it
    answer: float  # for all ranks to answer an image of an evaluation, by one model
    num_workers: int  # of each rank; without any, a rank decodes and trains in turns

    @property
    def waiting(self) -> float:
        """Seconds of each step that are spent waiting for data."""
        return max(self.data - self.step, 0.0) if self.num_workers else self.data


def judge_classes(found: Sequence[str]) -> Check:
    """Whether each class has images in both splits, from what was remarked of those that have not."""
    if not found:
        return Check("classes", OK, "each has images in both splits.")
    return Check("classes", WARNING, f"{' '.join(found)} Add images, or leave the classes out.")


def judge_shards(num_shards: int, num_readers: int) -> Check:
    """Whether there are shards enough for the processes that read, where all read from a few shards at a time."""
    numbers = f"{num_shards} shards for {num_readers} reading processes"
    if num_shards >= num_readers:
        return Check("shards", OK, f"{numbers}.")
    way_out = "build more shards, set it to null, or lower data.num_workers"
    return Check("shards", WARNING, f"{numbers}, which data.shuffle_window sends to the same files: {way_out}.")


def judge_batches(num_draws: int, num_images: int, config: Config, num_ranks: int) -> Check:
    """How an epoch divides into batches, and these among the ranks."""
    batch_size = config.train.global_batch_size
    rest = num_draws % batch_size
    parts = [f"{-(-num_draws // batch_size):,} steps an epoch of {batch_size:,} images"]
    if rest:
        parts.append(f"{rest:,} in the last")
    if num_draws < num_images:
        parts.append(f"train.mixup leaves out the {num_images - num_draws:,} that fill no batch")
    state = WARNING if batch_size % num_ranks else OK
    if state == WARNING:
        parts.append(f"which {num_ranks} ranks do not share evenly")
        cure = f"make train.global_batch_size a multiple of {num_ranks}"
        parts.append(f"so that some wait for those with {-(-batch_size // num_ranks)}: {cure}")
    return Check("batches", state, ", ".join(parts) + ".")


def judge_images(found: Sequence[tuple[bool, str]], num_sampled: int, max_bad_images: int) -> Check:
    """Whether the images that cannot be used, each with whether training puts another in its place, end a run."""
    if not found:
        return Check("images", OK, f"{num_sampled:,} of them, spread evenly over both splits, are whole.")
    sentence = f"{len(found)} of {num_sampled} sampled ones cannot be used: {found[0][1]}"
    if all(is_replaced for is_replaced, _ in found) and len(found) <= max_bad_images:
        sentence += f" data.max_bad_images={max_bad_images} lets others take their place."
        return Check("images", WARNING, sentence)
    return Check("images", WRONG, sentence)


def judge_memory(peak: float, total: int, owner: str) -> Check:
    """Whether a step's peak fits into memory; infinite if it did not."""
    limit = f"{decimal(total)} of {owner}"
    way_out = "raise train.accumulation_steps or set train.grad_checkpointing"
    if peak > total:
        return Check("memory", WRONG, f"a step does not fit into the {limit}: {way_out}.")
    taken = f"a step takes {decimal(int(peak))} of the {limit}"
    if peak > FULL * total:
        return Check("memory", WARNING, f"{taken}, which leaves too little for what varies: {way_out}.")
    return Check("memory", OK, f"{taken}.")


def judge_shared_memory(needed: float, free: int, num_workers: int) -> Check:
    """Whether the batches that workers have ready fit into /dev/shm, by which they hand them over; in bytes."""
    if not num_workers:
        return Check("shared memory", OK, "without workers none is needed.")
    taken = f"batches that workers have ready take {decimal(int(needed))} of /dev/shm, {decimal(free)} of it is free"
    way_out = "lower data.num_workers or eval.batch_size, or give it more (docker run --shm-size)"
    if needed > FULL * free:
        return Check("shared memory", WRONG if needed > free else WARNING, f"{taken}: {way_out}.")
    return Check("shared memory", OK, f"{taken}.")


def judge_pace(pace: Pace, batch_size: int, ranks: Ranks) -> Check:
    """Whether the loaders keep up with the steps, and how many workers would."""
    workers, device = f"{ranks.world_size} x {pace.num_workers} workers", device_name(ranks.device)
    used = f"steps on {device} use {batch_size / pace.step:,.0f}"
    rates = f"{workers} yield {batch_size / pace.data:,.0f} images/s and {used}"
    share = pace.waiting / (pace.step + pace.waiting)
    measured = f"medians of {NUM_ROUNDS} rounds and {NUM_REPEATS} steps"
    if share <= WAITING:
        return Check("speed", OK, f"{rates} ({measured}).")
    needed = math.ceil(max(pace.num_workers, 1) * pace.data / pace.step)
    cure = f"data.num_workers={needed} would do, where each rank has as many of the machine's {usable_cpus()} CPUs"
    sentence = f"{rates}, so that {share:.0%} of the time goes into waiting for data: {cure} ({measured})."
    return Check("speed", WARNING, sentence)
