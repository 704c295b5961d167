"""The recipe at work: one optimizer step after another, the same on any number of ranks up to rounding."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from eval.distributed import Ranks
from train.augmentation import augments_on_device
from train.distributed import replicated
from train.findings import DivergedError
from train.objective import create_objective
from train.order import RankBatches
from train.pipeline import Batch, OnDevice, create_loader, create_mixup, mixed_in_groups, training_images
from train.randomness import Stream, seed_generators, seed_sequence
from train.recipe import create_optimizer, create_scheduler, freeze, has_batch_norm, step_of_rate
from train.sharding import check_shardable, gradients_kept, part_like, part_of, parts_like, shard, whole, whole_state
from vitreuse.config import Config, ConfigError
from vitreuse.data import DataError
from vitreuse.model.class_names import LABEL_NAMES, names_of, pack_names


@dataclass
class Counters:
    """How far a run is: from the step alone follow its place in the data, the learning rate and every random draw."""

    step: int = 0  # done, skipped ones included
    skipped: int = 0  # without an update, since a loss or gradient was not finite
    skipped_in_a_row: int = 0  # without those by which float16 looks for the scale of its loss
    skipped_since_update: int = 0  # with them
    epoch_loss: float = 0.0  # summed over the images of this epoch's steps that were not skipped
    epoch_images: int = 0
    seconds: float = 0.0  # spent, over all starts of the run
    bad_images: list[str] = field(default_factory=list)  # keys of those that could not be decoded and were replaced


class StepResult(NamedTuple):
    """What one optimizer step did, the same on every rank."""

    loss: float  # mean over the global batch
    grad_norm: float
    lr: float
    skipped: bool
    num_images: int  # of the global batch
    stop: bool  # some rank was asked to stop
    warnings: list[str]  # about images that could not be decoded and were not known before


class Trainer:
    """A model, its training set and its optimizer, advanced step by step.

    The model is on the rank's device and has these image_settings (vitreuse.model.preprocessing); samples are the
    training set, as open_split returns it.

    Raises:
        ConfigError: The recipe does not fit the model, the data or the number of ranks.
    """

    def __init__(self, config: Config, model: Any, samples: Any, settings: dict[str, Any], ranks: Ranks):
        recipe = config.train
        self.config, self.model, self.ranks, self.counters = config, model, ranks, Counters()
        _check_fit(config, samples.class_names, model.num_classes, ranks.world_size)
        check_shardable(recipe)
        order = (recipe.seed, samples.shard_sizes, recipe.global_batch_size, config.data.shuffle_window, recipe.repeats)
        must_be_even = recipe.mixup is not None  # timm's Mixup pairs the images of a batch
        self.batches = RankBatches(*order, must_be_even, ranks.rank, ranks.world_size)
        if not self.batches.steps_per_epoch:
            raise ConfigError(f"{len(samples)} training images do not fill one batch of {recipe.global_batch_size}.")
        images = training_images(config, model, samples, settings, augments_on_device(config, ranks.device))
        self.loader = create_loader(images, self.batches, config.data.num_workers, ranks.device.type == "cuda")
        self.on_device = OnDevice(settings, ranks.device)
        self.mixup = create_mixup(config, model.num_classes)
        freeze(model, recipe.freeze)
        steps_per_epoch = self.batches.steps_per_epoch
        self.objective = create_objective(config, model, settings, samples.class_names, steps_per_epoch)
        self.ema = ModelEmaV3(model, recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema else None
        self._is_sharded = recipe.strategy == "fsdp2" and ranks.world_size > 1
        if self._is_sharded:
            for network in dict.fromkeys((model, self.final_model)):
                shard(network, ranks)
        self.optimizer = create_optimizer(config, model)
        self.scheduler = create_scheduler(config, self.optimizer, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=recipe.precision == "float16")
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self._filled_to = 0
        if recipe.compile:
            share = -(-recipe.global_batch_size // ranks.world_size)
            self._filled_to = 0 if has_batch_norm(model) else -(-share // recipe.accumulation_steps)
            model.compile()
        self._empty_images = torch.zeros(1, *settings["input_size"], device=ranks.device)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.epochs * self.batches.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0; after the last step of an epoch the next one."""
        return self.counters.step // self.batches.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step done was its epoch's last."""
        return self.counters.step % self.batches.steps_per_epoch == 0

    @property
    def final_model(self) -> nn.Module:
        """The model a run leaves: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @cached_property
    def replica(self) -> nn.Module:
        """The objective with gradients exchanged between ranks; made by all ranks together, in the first step."""
        return self.objective if self._is_sharded else replicated(self.objective, self.ranks)

    def remaining_batches(self) -> Iterator[Batch]:
        """This rank's batches from the next step to the end of its epoch, as the loader gives them.

        After a resume too: the order of an epoch follows from seed and epoch, its first step from the counters.
        """
        self.batches.start_at(self.epoch, self.counters.step % self.batches.steps_per_epoch)
        self.ranks.settle()
        yield from self.loader

    def train_step(self, batch: Batch, stop: bool) -> StepResult:
        """One optimizer step, by all ranks together, with what is still to be done to its images on the device.

        Args:
            batch: This rank's share, perhaps empty; it stays as it is.
            stop: Whether this rank was asked to stop; every rank learns of it.

        Raises:
            DivergedError: As many steps in a row as train.max_skipped_steps had no finite loss or gradient.
            DataError: More images than data.max_bad_images could not be decoded; raised by the first rank.
            OtherRankError: The same, by the others.
        """
        batch, recipe, counters, ranks = self.on_device(batch), self.config.train, self.counters, self.ranks
        count = self.batches.count(counters.step % self.batches.steps_per_epoch)
        seed_generators(seed_sequence(recipe.seed, Stream.STEP, counters.step, ranks.rank), ranks.device)
        self.scheduler.step_update(step_of_rate(recipe.schedule, counters.step, self.batches.steps_per_epoch))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = self._backward(batch, count)
        self.scaler.unscale_(self.optimizer)
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        grad_norm = whole(torch.nn.utils.get_total_norm(grads))
        not_finite = ~(loss_sum + grad_norm).isfinite()
        flags = (torch.full_like(loss_sum, flag) for flag in (stop, bool(batch.bad_images)))
        sums = torch.stack([loss_sum, grad_norm.to(loss_sum), not_finite.float(), *flags]).double()
        # the one wait for the device; the norm is the same on all ranks
        total_loss, total_norm, num_not_finite, num_stopping, num_bad = ranks.sum(sums).tolist()
        warnings = self._count_bad_images(batch.bad_images) if num_bad else []
        skipped = num_not_finite > 0
        if not skipped:
            self._update()
        self.scaler.update()
        self._count(total_loss, count, skipped)
        if counters.skipped_in_a_row >= recipe.max_skipped_steps:
            raise self._diverged(batch.keys, bool(loss_sum.isfinite()))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        norm = total_norm / ranks.world_size
        return StepResult(total_loss / count, norm, lr, skipped, count, num_stopping > 0, warnings)

    def _backward(self, batch: Batch, count: int) -> Tensor:
        """Accumulates the gradients of the global batch's mean loss; this rank's sum of losses.

        DistributedDataParallel averages over ranks, so each rank's sum is divided by count / world_size. A rank without
        images takes part in the exchange with a gradient of zero.
        """
        images, targets, scale = batch.images, batch.labels, self.ranks.world_size / count
        loss_sum = torch.zeros((), device=self.ranks.device)
        if not len(images):
            self.scaler.scale(self._loss(self._empty_images, targets.new_zeros(1)) * 0).backward()
            return loss_sum
        if self.mixup is not None:
            images, targets = self._mixed(images, targets)
        pieces = min(self.config.train.accumulation_steps, len(images))
        parts = zip(images.tensor_split(pieces), targets.tensor_split(pieces), strict=True)
        for i, (part, part_targets) in enumerate(parts):
            with nullcontext() if i == pieces - 1 else gradients_kept(self.replica):
                loss = self._loss(part, part_targets) * len(part)
                self.scaler.scale(loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and soft targets, mixed by one draw a rank, or one a group of the global batch."""
        assert self.mixup is not None and self.config.train.mixup is not None
        groups, ranks = self.config.train.mixup.groups, self.ranks
        if groups is None:
            return self.mixup(images, labels)
        key = (self.config.train.seed, Stream.MIXUP, self.counters.step)
        seeds = [seed_sequence(*key, group) for group in range(ranks.rank, groups, ranks.world_size)]
        return mixed_in_groups(self.mixup, images, labels, seeds)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some images; of a compiled model, which sees as many each time, filled up by black ones."""
        if len(images) < self._filled_to:
            black = images.new_zeros(self._filled_to - len(images), *images.shape[1:])
            images = torch.cat([images, black])
        return self.replica(images, targets, self.counters.step)

    def _update(self) -> None:
        clip = self.config.train.clip
        if clip is not None:
            dispatch_clip_grad(self.model.parameters(), clip.limit, clip.mode)
        self.scaler.step(self.optimizer)
        if self.ema is not None:
            self.ema.update(self.model, self.counters.step + 1)

    def _count(self, total_loss: float, count: int, skipped: bool) -> None:
        counters = self.counters
        if self.at_epoch_end:  # of the epoch before: this step begins one
            counters.epoch_loss, counters.epoch_images = 0.0, 0
        counters.step += 1
        counters.skipped += skipped
        if skipped:
            # gradients that overflow float16 halve the scale of the loss: no divergence while that can help
            overflow = self.scaler.is_enabled() and math.isfinite(total_loss) and self.scaler.get_scale() >= 1
            counters.skipped_in_a_row += not overflow
            counters.skipped_since_update += 1
            return
        counters.skipped_in_a_row = counters.skipped_since_update = 0
        counters.epoch_loss += total_loss
        counters.epoch_images += count

    def _count_bad_images(self, bad_images: dict[str, str]) -> list[str]:
        """Adds the images that any rank had to replace in this step to those known; what to say about new ones."""
        known, limit = self.counters.bad_images, self.config.data.max_bad_images
        met = ChainMap(*self.ranks.gather(bad_images))
        new = sorted(met.keys() - known)
        known += new
        with self.ranks.together():
            if len(known) > limit:
                named = ", ".join(known[:4]) + ", ..." * (len(known) > 4)
                found = f"{len(known)} training images cannot be decoded ({named})"
                cure = "write them again or leave them out, or allow more"
                raise DataError(f"{found}, and data.max_bad_images allows {limit}: {cure}.")
        return [met[key] for key in new]

    def _diverged(self, keys: list[str], loss_is_finite: bool) -> DivergedError:
        """The error for this step, with samples of the ranks whose loss is not finite; of all if only gradients are."""
        shares = self.ranks.gather((loss_is_finite, keys))
        suspects = [key for is_finite, share in shares if not is_finite for key in share]
        suspects = suspects or [key for _, share in shares for key in share]
        steps = f"{self.counters.skipped_in_a_row} steps in a row up to step {self.counters.step}"
        where = f"with {', '.join(suspects[:4])} in its batch"
        cure = "look at these samples, or lower train.optimizer.lr in another run folder (run_dir=PATH)"
        return DivergedError(f"loss or gradient was not finite for {steps}, {where}: {cure}.")

    def check_weights(self) -> None:
        """Checks that training starts, or goes on, from finite weights, and is taught by such; by all ranks together.

        Raises:
            DivergedError: Some are NaN or infinite.
        """
        for whose, network in {"model": self.model, **self.objective.constants}.items():
            tensors = {name: part_of(tensor) for name, tensor in network.state_dict().items()}
            own = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            broken = sorted(set().union(*self.ranks.gather(own)))
            if broken:
                found = f"the {whose}'s weights are not finite in {len(broken)} tensors, the first {broken[0]}"
                cure = "give it others, in a run folder of its own (run_dir=PATH)"
                raise DivergedError(f"{found}, so that nothing can be learned: {cure}.")

    def check_updated(self) -> None:
        """Checks at the end of a run that its weights were trained to the end.

        Raises:
            DivergedError: No step changed them, or none of the last train.max_skipped_steps.
        """
        counters, skipped = self.counters, self.counters.skipped_since_update
        if skipped == counters.step or skipped >= self.config.train.max_skipped_steps:
            which = "all" if skipped == counters.step else "the last"
            found = f"{which} {skipped} of {counters.step} steps were skipped, since a loss or gradient was not finite"
            cure = "lower train.optimizer.lr, or look at the data, and train in another run folder (run_dir=PATH)"
            raise DivergedError(f"{found}: {cure}.")

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings from which load_state_dict goes on as if nothing had happened.

        All ranks call this together; the main rank's alone has tensors, copies on the CPU.
        """
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["counters"] = asdict(self.counters)
        if (names := names_of(self.model)) is not None:
            state[LABEL_NAMES] = pack_names(names)
        if self.ema is not None:
            state["ema"] = self.ema.module.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return whole_state(state, self.ranks)

    def final_weights(self) -> dict[str, Tensor]:
        """The weights of final_model; all ranks call this together, as state_dict."""
        return whole_state(self.final_model.state_dict(), self.ranks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where a state_dict of the same experiment was made, under any number of ranks and either strategy."""
        self.model.load_state_dict(parts_like(state["model"], self.model))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {  # numbered by group
            number: {name: part_like(value, parameters[number]) for name, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.counters = Counters(**state["counters"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts_like(state["ema"], self.ema.module))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def _check_fit(config: Config, class_names: Sequence[str], num_model_classes: int, world_size: int) -> None:
    num_classes = len(class_names)
    if config.train.reads_labels and num_classes != num_model_classes:
        found = f"{config.data.folder} has {num_classes} classes and the model {num_model_classes}"
        raise ConfigError(f"{found}: set model.keywords.num_classes to {num_classes}.")
    batch_size = config.train.global_batch_size
    if config.train.mixup is not None and batch_size % (2 * world_size):
        must = f"train.global_batch_size {batch_size} must be a multiple of {2 * world_size}"
        raise ConfigError(f"train.mixup pairs the images of each rank, so {must}, twice the number of ranks.")
    groups = None if config.train.mixup is None else config.train.mixup.groups
    if groups is not None and (groups % world_size or batch_size % (2 * groups)):
        must = f"a multiple of the {world_size} ranks, and a batch of {batch_size} one of twice the groups"
        raise ConfigError(f"train.mixup.groups {groups} must be {must}: choose others, or leave it out.")
    pieces, share = config.train.accumulation_steps, -(-batch_size // world_size)
    if pieces > share:
        cut = f"train.accumulation_steps {pieces} would cut a rank's {share} images into more pieces than there are"
        raise ConfigError(f"{cut}: lower it to {share} or less.")
