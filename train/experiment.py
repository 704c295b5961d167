"""An experiment made ready: its trainer and its data; and after which of its steps it is evaluated and saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer

from eval.distributed import Ranks
from train.augmentation import train_decoder
from train.randomness import restored_generators
from train.recipe import has_batch_norm
from train.trainer import Trainer
from train.weights import start_from, weight_files
from vitreuse.config import Config, ConfigError
from vitreuse.data import hold_out, open_split, open_without_labels, prepare_source
from vitreuse.data.labels import are_numbers, listed, numbered_as
from vitreuse.io.process import allow_open_files, print_note
from vitreuse.io.urls import url_kind
from vitreuse.model.class_names import name_classes
from vitreuse.model.preprocessing import check_answers, image_mode, image_settings

REMARKS = {  # by whether a class has images to train on and images to validate with
    (False, True): "no image to train on, only some to validate with: no model can learn",
    (True, False): "no image to validate with: top-1 says nothing of",
    (False, False): "no image in either split:",
}


class Experiment(NamedTuple):
    """What a configuration describes, on one rank: the trainer at step 0, the training and the validation set.

    With data.holdout there are images held out of the training set, too.
    """

    trainer: Trainer
    train_set: Any
    val_set: Any
    held_out: Any = None


def set_up(config: Config, ranks: Ranks, allow: Collection[str] = (), goes_on: bool = False) -> Experiment:
    """Makes an experiment ready, with data from URLs of the kinds allowed; whatever is wrong with it shows here.

    One that goes on from a checkpoint does not need the weights that it was begun with, unless it heals, when these are
    compared with the teacher's.

    Raises:
        ConfigError: It cannot be run as it stands.
        DataError: The data cannot be used.
        OtherRankError: Another rank raised one of these.
    """
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
    torch.manual_seed(config.train.seed)
    allow_open_files()  # an epoch goes back and forth between all shards
    with ranks.together():  # all leave it when the data are written
        model = config.model.create().to(ranks.device)  # made on the CPU: the same weights on every device
        if config.data.source is not None and ranks.local_rank == 0:
            prepare_source(config.data.source, config.data.folder)
    with ranks.together():
        settings, mode = image_settings(model), image_mode(model)
        reads_labels = config.train.reads_labels
        if reads_labels:
            _check_model(model, settings, config.model.name, ranks)
        train_set, val_set = _open_sets(config, mode, allow)
        for note in (*train_set.notes, *val_set.notes):
            print_note(note)
        if reads_labels:
            _check_numbers(train_set, val_set)
        _check_shuffled(config, train_set)
        if config.model.weights is not None and (not goes_on or config.train.heal is not None):
            print_note(start_from(model, config.model.weights, train_set.class_names if reads_labels else None))
        if reads_labels:
            name_classes(model, train_set.class_names)
        held_out = None
        if config.data.holdout is not None:
            same = open_split(config.data.folder, "train", mode, cache_root=config.data.cache_root, allow=allow)
            train_set, held_out = hold_out(train_set, same, config.data.holdout, config.train.seed)
        trainer = Trainer(config, model, train_set, settings, ranks)
        _check_profiled(config, trainer.num_steps)
        return Experiment(trainer, train_set, val_set, held_out)


def _open_sets(config: Config, mode: str, allow: Collection[str]) -> tuple[Any, Any]:
    """The images to train on and those to validate with, of one numbering of classes; or by no label."""
    data, decode, reads_labels = config.data, train_decoder(config), config.train.reads_labels
    if not reads_labels and url_kind(data.folder) is None:
        return open_without_labels(Path(data.folder), mode, decode)
    where = {"cache_root": data.cache_root, "allow": allow}
    train_set = open_split(data.folder, "train", mode, decode, **where)
    val_set = open_split(data.folder, "val", mode, **where)
    if reads_labels:
        val_set = numbered_as(val_set, train_set.class_names, str(train_set.folder), "give both the same classes")
    return train_set, val_set


def inputs(experiment: Experiment) -> dict[str, str]:
    """Digests of what an experiment reads: both splits, and every file of weights."""
    splits = {"training images": experiment.train_set, "validation images": experiment.val_set}
    if experiment.held_out is not None:
        splits["images held out"] = experiment.held_out
    return {name: split.digest for name, split in splits.items()} | weight_files(experiment.trainer.config)


def _check_model(model: Any, settings: dict[str, Any], name: str, ranks: Ranks) -> None:
    """Refuses a model that cannot be trained on the images that it is built for."""
    is_training = isinstance(model, VisionTransformer)  # others have statistics that an image would move
    images = torch.zeros(1, *settings["input_size"], device=ranks.device)
    if ranks.world_size > 1 and has_batch_norm(model):
        raise ConfigError(
            f"model {name!r} has batch norm, whose statistics each of {ranks.world_size} ranks would keep for itself: "
            "train it by one rank."
        )
    with restored_generators():
        check_answers(model.train(is_training), images, model.num_classes, f"model {name!r}")
    model.train()


def _check_shuffled(config: Config, train_set: Any) -> None:
    """Refuses to shuffle folders of images within stretches: an epoch would go through one class after another."""
    window = config.data.shuffle_window
    if window is not None and not train_set.is_sharded:
        unfit = f"data.shuffle_window {window} is for shards and {config.data.folder} has none"
        raise ConfigError(f"{unfit}: set it to null, or write shards with vitreuse shards build.")


def _check_profiled(config: Config, num_steps: int) -> None:
    """Refuses to trace steps that the run does not come to."""
    traced = config.train.profile
    if traced is not None and traced.first_step > num_steps:
        beyond = f"train.profile.first_step {traced.first_step} is beyond the {num_steps} steps of the run"
        raise ConfigError(f"{beyond}: choose an earlier one, or leave profile out.")


def evaluation_is_due(config: Config, step: int, steps_per_epoch: int) -> bool:
    """Whether an experiment is evaluated after a step."""
    return _ends_epoch(config, step, steps_per_epoch, config.eval.every_epochs)


def raw_is_due(config: Config, step: int, steps_per_epoch: int) -> bool:
    """Whether an evaluation after a step is of the weights without moving average too."""
    return _ends_epoch(config, step, steps_per_epoch, config.eval.raw_every_epochs)


def checkpoint_is_due(config: Config, step: int, steps_per_epoch: int) -> bool:
    """Whether an experiment is saved after a step."""
    when = config.train.checkpoint
    is_due = when.every_steps is not None and step % when.every_steps == 0
    return is_due or _ends_epoch(config, step, steps_per_epoch, when.every_epochs)


def _ends_epoch(config: Config, step: int, steps_per_epoch: int, every_epochs: int) -> bool:
    """Whether a step is the last of an epoch that counts: one in so many, and the last of all."""
    epoch, rest = divmod(step, steps_per_epoch)
    return not rest and (epoch == config.train.epochs or epoch % every_epochs == 0)


def _coverage(train_set: Any, val_set: Any) -> dict[tuple[bool, bool], list[str]]:
    """Names of the classes by whether each split, both under the same labels, has images of them."""
    found = defaultdict(list)
    sizes = zip(train_set.class_names, train_set.class_sizes(), val_set.class_sizes(), strict=True)
    for name, num_trained, num_measured in sizes:
        found[num_trained > 0, num_measured > 0].append(name)
    return found


def remarks(train_set: Any, val_set: Any) -> list[str]:
    """What is to be said of classes that a split has no images of: a sentence for each kind of gap."""
    found = _coverage(train_set, val_set)
    gaps = [(what, found[gap]) for gap, what in REMARKS.items() if found[gap]]
    return [f"{what} {len(names)} class{'es' if len(names) > 1 else ''} ({listed(names)})." for what, names in gaps]


def _check_numbers(train_set: Any, val_set: Any) -> None:
    """Refuses labels without names of which some are validated and none trained: one split may count from 1."""
    names = _coverage(train_set, val_set)[False, True]
    if names and are_numbers(train_set.class_names):
        raise ConfigError(
            f"{val_set.folder} has images of the label{'s' if len(names) > 1 else ''} {listed(names)} and "
            f"{train_set.folder} has none, and without names nothing tells whether a label means the same class in "
            "both: count both from 0, or name the classes of both with vitreuse shards index FOLDER --class-names FILE."
        )
