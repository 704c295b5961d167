"""`--doctor`: what would end a run, slow it down or fill its disk, found in minutes and before it is started.

The experiment is made ready as for training, then its data are sampled, its loader and its steps are timed, and the
rest is computed. Nothing is trained that stays, and nothing is written into the run folder.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import clear_frames
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

from eval.distributed import Ranks, joined
from train import verdicts
from train.checkpoint import Checkpoints
from train.distributed import reason
from train.experiment import Experiment, checkpoint_is_due, evaluation_is_due, raw_is_due, remarks, set_up
from train.findings import look, validation_share
from train.order import Draw
from train.pipeline import Batch, TrainingImages
from train.run import RunFolder
from train.trainer import Trainer
from train.verdicts import NUM_REPEATS, NUM_ROUNDS, NUM_WARMUPS, OK, WARNING, WRONG, Check, Pace
from vitreuse.attention.policy import memory_bytes
from vitreuse.config import Config, ConfigError
from vitreuse.cost.measure import device_name, peak_process_memory_mib, time_interleaved
from vitreuse.data import DataError
from vitreuse.files.networks import STEP_FOLDERS
from vitreuse.io.durable import nearest_folder
from vitreuse.io.file_names import for_terminal
from vitreuse.io.process import DONE, WRONG_INPUT, OtherRankError
from vitreuse.io.tables import fitted
from vitreuse.io.urls import url_kind
from vitreuse.model.preprocessing import image_settings

STYLES = {OK: "green", WARNING: "yellow", WRONG: "bold red"}
NUM_SAMPLED = 256  # images of each split that are decoded: less than a second's work of one core
NUM_DRAWN, NUM_AUGMENTED = 2000, 16  # draws of augmentation, of so many images
NUM_EVALUATED = 2  # batches of an evaluation for each worker


def doctor(config: Config, run_dir: Path, allow: Collection[str] = ()) -> int:
    """Examines an experiment, whose data may come from URLs of the kinds allowed, and prints a table of what it found.

    Returns:
        The exit code: WRONG_INPUT if something is wrong, DONE if at most there are warnings.

    Raises:
        ConfigError, DataError, OtherRankError: As training does at the start; there is nothing to examine then.
        DivergedError: Weights are not finite, or the loss is not from the first steps on.
    """
    with joined(config.train.device, config.train.time_out_minutes) as ranks:
        checks = list(_examine(set_up(config, ranks, allow), RunFolder(run_dir, config), ranks))
    if ranks.is_main:
        _print(checks)
    return WRONG_INPUT if any(check.state == WRONG for check in checks) else DONE


def _print(checks: Sequence[Check]) -> None:
    table = Table("what", "state", "found", box=SIMPLE_HEAD)
    for subject, state, finding in checks:
        table.add_row(subject, Text(state, STYLES[state]), Text(for_terminal(finding)))
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # a line a check, for programs to read
    console.print(fitted(table, console))


def _examine(experiment: Experiment, folder: RunFolder, ranks: Ranks) -> Iterator[Check]:
    """All checks, up to one that leaves the others nothing to look at."""
    trainer, config = experiment.trainer, experiment.trainer.config
    check, done = _run_folder(folder, trainer, ranks)
    yield check
    yield from _splits(experiment, ranks)
    check = _images(experiment, ranks)
    yield check
    if check.state == WRONG:
        return
    yield _augmentation(trainer, ranks)
    yield _shared_memory(trainer, ranks)
    trainer.check_weights()
    trainer.counters.step = _first_of_last_epoch(trainer)
    try:
        with ranks.together():
            batch, rate = _loader_rate(trainer)
        rate = sum(ranks.gather(rate))
        check = _parameters(trainer, batch)
        yield check
        if check.state == WRONG:
            return
        times = time_interleaved({"": _one_step(trainer, batch)}, ranks.device, NUM_REPEATS, NUM_WARMUPS)
        step = max(ranks.gather(times[""].median_ms / 1000))
        yield _memory(ranks)
        answer = max(ranks.gather(_answer_seconds(experiment, ranks)))
    except (DataError, OtherRankError) as error:
        clear_frames(error.__traceback__)  # they keep a loader, whose workers outlive SIGTERM
        yield Check("images", WRONG, str(error))
        return
    except torch.OutOfMemoryError as error:
        check = verdicts.judge_memory(math.inf, *_memory_limit(ranks.device))
        if ranks.world_size > 1:  # the others, who may have room, wait for this rank: it must end by itself
            raise ConfigError(check.finding) from error
        yield check
        return
    pace = Pace(config.train.global_batch_size / rate, step, answer, config.data.num_workers)
    yield verdicts.judge_pace(pace, config.train.global_batch_size, ranks)
    check, saving = _disk(folder, trainer, ranks)
    yield check
    yield _duration(experiment, done, pace, saving)


def _splits(experiment: Experiment, ranks: Ranks) -> Iterator[Check]:
    """What can be said of both splits without a look at an image."""
    trainer, config = experiment.trainer, experiment.trainer.config
    yield _data(experiment)
    if config.train.reads_labels:
        yield verdicts.judge_classes(remarks(experiment.train_set, experiment.val_set))
    if config.data.shuffle_window is not None and experiment.train_set.is_sharded:
        num_readers = ranks.world_size * max(config.data.num_workers, 1)
        yield verdicts.judge_shards(len(experiment.train_set.shard_sizes), num_readers)
    yield verdicts.judge_batches(trainer.batches.num_draws, sum(trainer.batches.shard_sizes), config, ranks.world_size)


def _run_folder(folder: RunFolder, trainer: Trainer, ranks: Ranks) -> tuple[Check, int]:
    """What a run would do about the folder, and the step that it would go on from."""
    subject = "run folder"
    try:
        with ranks.together():
            folder.refuse_other_run()
    except (ConfigError, OtherRankError) as error:
        return Check(subject, WRONG, str(error)), 0
    if folder.is_completed:
        completed = f"{folder.path} holds this run completed: there is nothing left to train."
        return Check(subject, OK, completed), trainer.num_steps
    state = folder.checkpoints.load_newest()
    if state is None:
        return Check(subject, OK, f"{folder.path} holds no checkpoint: a run starts from step 0."), 0
    step = state["counters"]["step"]
    return Check(subject, OK, f"{folder.path}: a run goes on after step {step} of {trainer.num_steps}."), step


def _data(experiment: Experiment) -> Check:
    train_set, val_set = experiment.train_set, experiment.val_set
    classes = f" of {len(train_set.class_names):,} classes" if train_set.class_names else ", without labels,"
    chosen = "" if experiment.held_out is None else f"{len(experiment.held_out):,} to choose by, "
    numbers = f"{len(train_set):,} images{classes} to train on, {chosen}{len(val_set):,} to validate with"
    if not train_set.is_sharded:
        where = "class folders" if train_set.class_names else train_set.folder
        return Check("data", OK, f"{numbers}, in {where}.")
    index = f"the index of {len(train_set.shard_sizes)} shards is whole"
    is_fetched = url_kind(experiment.trainer.config.data.folder) is not None
    shards = "each is compared when it is fetched" if is_fetched else "their names and sizes agree with it"
    return Check("data", OK, f"{numbers}; {index}, and {shards}.")


def _images(experiment: Experiment, ranks: Ranks) -> Check:
    """Reads images spread evenly over both splits, each rank its share."""
    sampled = [
        (split, number)
        for split in (experiment.train_set, experiment.val_set, experiment.held_out)
        if split is not None
        for number in np.unique(np.linspace(0, len(split) - 1, NUM_SAMPLED, dtype=int)).tolist()
    ]
    errors = []
    for split, number in sampled[ranks.rank :: ranks.world_size]:
        try:
            split[number]
        except DataError as error:
            errors.append((split is experiment.train_set, str(error)))
    found = [error for share in ranks.gather(errors) for error in share]
    return verdicts.judge_images(found, len(sampled), experiment.trainer.config.data.max_bad_images)


def _augmentation(trainer: Trainer, ranks: Ranks) -> Check:
    """Draws the augmentation of some images so often that what is rare comes too, each rank its share."""
    own: Any = trainer.loader.dataset
    images = TrainingImages(own.samples, own.transforms, own.seed, cache_images=True)  # which are read once
    epoch, error = trainer.config.train.epochs - 1, None
    try:
        for copy in range(ranks.rank, NUM_DRAWN, ranks.world_size):
            images[Draw(epoch, copy % NUM_AUGMENTED % len(own.samples), copy)]
    except (ValueError, RuntimeError, TypeError) as caught:  # whatever a transform raises for what it drew
        error = reason(caught)
    met = [text for text in ranks.gather(error) if text is not None]
    if met:
        return Check("augmentation", WRONG, f"it fails for what it may draw ({met[0]}): change train.crop or affine.")
    return Check("augmentation", OK, f"{NUM_DRAWN:,} draws of it, and none failed.")


def _shared_memory(trainer: Trainer, ranks: Ranks) -> Check:
    """Whether the batches of training, or those of an evaluation, fit into /dev/shm on each machine.

    The two are never there together: after its last batch a loader has none ready.
    """
    config, size = trainer.config, math.prod(image_settings(trainer.model)["input_size"])
    share = -(-config.train.global_batch_size // ranks.world_size)
    noise = config.train.crop.erase_prob / 3 * 4 if config.train.crop is not None else 0.0  # of floats, at most
    largest = size * max(share * (1 + noise), config.eval.batch_size)
    num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = num_sharing * config.data.num_workers * (trainer.loader.prefetch_factor or 0) * largest
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.exists() else 0
    return verdicts.judge_shared_memory(needed, min(ranks.gather(free)), config.data.num_workers)


def _first_of_last_epoch(trainer: Trainer) -> int:
    """The step before a full batch of images of the model's own size: the first epochs' may be smaller."""
    return trainer.num_steps - trainer.batches.steps_per_epoch


def _loader_rate(trainer: Trainer) -> tuple[Batch, float]:
    """A full batch, and the images a second that this rank's loader yields after it to one who does nothing else."""
    data, batches = trainer.config.data, _endless(trainer)
    a_round = max(data.num_workers, 1)
    warmup = trainer.batches.steps_per_epoch if data.cache_images else a_round
    first = next(batches)
    _take(batches, warmup - 1)
    rates = []
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        num_images = _take(batches, a_round)
        rates.append(num_images / (time.perf_counter() - start))
    return first, statistics.median(rates)


def _endless(trainer: Trainer) -> Iterator[Batch]:
    while True:
        yield from trainer.remaining_batches()


def _take(batches: Iterator[Batch], number: int) -> int:
    """Passes over some batches; the number of their images."""
    return sum(len(next(batches).keys) for _ in range(number))


def _one_step(trainer: Trainer, batch: Batch) -> Callable[[], object]:
    """A whole training step on a batch, again and again at the same step of the run."""

    def step() -> None:
        trainer.counters.step = _first_of_last_epoch(trainer)
        trainer.train_step(batch, stop=False)

    return step


def _parameters(trainer: Trainer, batch: Batch) -> Check:
    """Takes a step and looks at what has a gradient; with several ranks a second step would fail without one."""
    _one_step(trainer, batch)()
    trained = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    unused = [name for name, parameter in trained if parameter.grad is None]
    if not unused:
        num_weights = sum(parameter.numel() for _, parameter in trained)
        return Check("parameters", OK, f"all {len(trained)}, {num_weights:,} numbers, get a gradient.")
    named = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if unused[3:] else "")
    state, ends = (WRONG, "ends") if trainer.ranks.world_size > 1 else (WARNING, "would end")
    way_out = "choose a model or plan that reads them, or name them in train.freeze"
    sentence = f"no gradient reaches {named}, which {ends} a run of several ranks: {way_out}."
    return Check("parameters", state, sentence)


def _memory(ranks: Ranks) -> Check:
    """The most that a rank has held at any time up to here, and so during a step."""
    num_sharing = 1 if ranks.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    peak = peak_process_memory_mib(ranks.device) * 2**20 * num_sharing
    return verdicts.judge_memory(max(ranks.gather(peak)), *_memory_limit(ranks.device))


def _memory_limit(device: torch.device) -> tuple[int, str]:
    """Bytes of memory, and what they belong to."""
    if device.type == "cuda":
        return memory_bytes(device.type), device_name(device)
    return memory_bytes(device.type), "this machine, for its ranks without their workers"


def _answer_seconds(experiment: Experiment, ranks: Ranks) -> float:
    """How long an image of an evaluation takes, from one of the first images."""
    trainer, val_set, config = experiment.trainer, experiment.val_set, experiment.trainer.config
    batch_size = config.eval.batch_size * ranks.world_size
    num_images = min(len(val_set), NUM_EVALUATED * max(config.data.num_workers, 1) * batch_size)
    start = time.perf_counter()
    teacher = trainer.objective.feature_teacher
    share = validation_share(config, trainer.model, Subset(val_set, range(num_images)), ranks)
    look(config, trainer.final_model, teacher, share)
    return (time.perf_counter() - start) / num_images


def _disk(folder: RunFolder, trainer: Trainer, ranks: Ranks) -> tuple[Check, float]:
    """Whether the checkpoints will fit on the disk, and the seconds that training waits for one."""
    start = time.perf_counter()
    state = trainer.state_dict()
    waiting = time.perf_counter() - start
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
    size = ranks.gather(size)[0]  # the others' have no tensors
    num_there = len(list(folder.checkpoints.folder.glob(STEP_FOLDERS)))
    num_more = max(trainer.config.train.checkpoint.keep_last + 2 - num_there, 1)  # the best, and the one being written
    where = nearest_folder(folder.path)
    free = shutil.disk_usage(where).free
    sizes = f"{num_more} more of {decimal(size)} each"
    if num_more * size > free:
        less = "free some, lower train.checkpoint.keep_last, or choose another run_dir"
        return Check("disk", WRONG, f"{where} has {decimal(free)} free, checkpoints need {sizes}: {less}."), 0.0
    if not os.access(where, os.W_OK):
        return Check("disk", WRONG, f"{where} cannot be written: choose another run_dir=PATH."), 0.0
    if ranks.is_main:
        start = time.perf_counter()
        with TemporaryDirectory(dir=nearest_folder(folder.path.absolute().parent), prefix=".doctor-") as beside:
            Checkpoints(Path(beside), keep_last=1).save(state, 0)
        seconds = time.perf_counter() - start
        sizes += f"; training waits {waiting:.2g} s for a copy, which is written in {seconds:.2g} s"
    return Check("disk", OK, f"{where} has {decimal(free)} free, checkpoints need {sizes}."), waiting


def _duration(experiment: Experiment, done: int, pace: Pace, saving: float) -> Check:
    """How long the run has still to go."""
    trainer, config = experiment.trainer, experiment.trainer.config
    steps, steps_per_epoch = range(done + 1, trainer.num_steps + 1), trainer.batches.steps_per_epoch
    if not steps:
        return Check("duration", OK, "no step is left to train.")
    evaluated = [step for step in steps if evaluation_is_due(config, step, steps_per_epoch)]
    is_averaged = trainer.ema is not None
    num_raw = sum(is_averaged and raw_is_due(config, step, steps_per_epoch) for step in evaluated)
    num_answers = (len(evaluated) + num_raw) * len(experiment.val_set) + len(evaluated) * len(experiment.held_out or ())
    num_saves = sum(checkpoint_is_due(config, step, steps_per_epoch) for step in steps)
    parts = {
        f"{len(steps):,} steps": len(steps) * (pace.step + pace.waiting),
        f"{len(evaluated):,} evaluations": num_answers * pace.answer,
        f"{num_saves:,} checkpoints": num_saves * saving,
    }
    listed = ", ".join(f"{timedelta(seconds=round(seconds))} for {part}" for part, seconds in parts.items())
    smaller = "" if config.train.resolution is None else "; less, since its first epochs have smaller images"
    return Check("duration", OK, f"{sum(parts.values()) / 3600:.2f} hours: {listed}{smaller}.")
