"""A training run from its first step, or the one after its newest checkpoint, to the weights it leaves."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.distributed import Ranks, joined
from eval.inputs import evaluation_transform, image_settings
from eval.top1 import Top1, evaluate
from train.distributed import StopSignal
from train.pipeline import ignore_stop_signals, train_decoder
from train.run import RunFolder, run_facts
from train.trainer import StepResult, Trainer
from train.weights import start_from
from vitreuse.backends import Conditions, sentence
from vitreuse.config import Config, ConfigError
from vitreuse.console import WorkProgress
from vitreuse.data import open_split, prepare_source


def train(config: Config, run_dir: Path, command: str) -> bool:
    """Trains an experiment in a run folder, going on from what is there.

    Returns:
        Whether the run is complete; False if a signal stopped it, with everything saved.

    Raises:
        ConfigError: The experiment cannot be run as it stands; nothing was written.
        DataError: The data cannot be used.
        DivergedError: The loss stayed infinite or NaN.
        OtherRankError: Another rank raised one of these at the start or in an evaluation.
    """
    with joined(config.train.device) as ranks, StopSignal().listening() as stop, ExitStack() as held:
        folder = RunFolder(run_dir, config)
        with ranks.together():
            folder.refuse_other_run()
        if all(ranks.gather(folder.is_completed)):
            _say(ranks, f"{run_dir} is completed already: nothing to do.")
            return True
        loop = _Loop(*_set_up(config, ranks), folder, stop)
        with ranks.together():
            if ranks.is_main:
                held.enter_context(folder.claimed())
        loop.resume()
        try:
            return loop.run(command)
        except Exception as error:
            folder.fail(str(error) or repr(error))
            raise


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, file=sys.stderr)


def _set_up(config: Config, ranks: Ranks) -> tuple[Trainer, Any]:
    """The trainer at step 0 and the validation set; whatever is wrong with an experiment shows here."""
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    torch.manual_seed(config.train.seed)
    with ranks.together():  # all leave it when the data are written
        model = config.model.create().to(ranks.device)  # made on the CPU: the same weights on every device
        if config.model.weights is not None:
            _say(ranks, start_from(model, config.model.weights))
        if config.data.source is not None and ranks.local_rank == 0:
            prepare_source(config.data.source, config.data.folder)
    with ranks.together():
        settings = image_settings(model)
        mode = "L" if settings["input_size"][0] == 1 else "RGB"
        train_set = open_split(config.data.folder, "train", mode, train_decoder(config))
        val_set = open_split(config.data.folder, "val", mode)
        _check_same_classes(config.data.folder, train_set.class_names, val_set.class_names)
        return Trainer(config, model, train_set, settings, ranks), val_set


def _check_same_classes(folder: str, trained: Sequence[str], measured: Sequence[str]) -> None:
    """Refuses splits that number their classes differently, as class folders do when val lacks a class of train."""
    if tuple(trained[: len(measured)]) == tuple(measured):
        return
    label = next((n for n, names in enumerate(zip(trained, measured, strict=False)) if len(set(names)) == 2), None)
    if label is None:
        difference = f"train has {len(trained)} classes and val {len(measured)}"
    else:
        difference = f"label {label} is class {trained[label]!r} in train and {measured[label]!r} in val"
    raise ConfigError(f"{folder}: {difference}: give both the same classes in the same order.")


def _check_same_step(steps: list[int]) -> None:
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank} after step {step}" for rank, step in enumerate(steps))
        raise ConfigError(
            f"the ranks would go on from different checkpoints ({found}; 0 is none): "
            "give all the same run_dir, on a file system that their machines share."
        )


@dataclass
class _Pace:
    """Images and seconds since the last step record."""

    images: int = 0
    waiting: float = 0.0  # seconds spent waiting for data
    total: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.total if self.total else 0.0

    def add(self, images: int, waiting: float, total: float) -> None:
        self.images, self.waiting, self.total = self.images + images, self.waiting + waiting, self.total + total


class _Loop:
    """Steps, records, evaluations and checkpoints of one start of a run."""

    def __init__(self, trainer: Trainer, val_set: Any, folder: RunFolder, stop: StopSignal):
        self.trainer, self.val_set, self.folder, self.stop = trainer, val_set, folder, stop
        self.config, self.ranks = trainer.config, trainer.ranks
        self.measured: dict[str, float] | None = None  # the newest evaluation
        self.pace = _Pace()

    def resume(self) -> None:
        """Goes to where the newest checkpoint was saved, if there is one.

        Raises:
            ConfigError: The ranks find different ones, as on machines that do not share the run folder.
        """
        state = self.folder.checkpoints.load_newest()
        steps = self.ranks.gather(0 if state is None else state["counters"]["step"])
        with self.ranks.together():
            _check_same_step(steps)
        if state is not None:
            self.trainer.load_state_dict(state)
            step = self.trainer.counters.step
            _say(self.ranks, f"{self.folder.path} goes on after step {step} of {self.trainer.num_steps}.")

    def run(self, command: str) -> bool:
        """Trains to the end or to a signal, and leaves the weights; whether the end was reached."""
        if self.ranks.is_main:
            self._begin(command)
        trainer = self.trainer
        name, step, num_steps = self.folder.path.name, trainer.counters.step, trainer.num_steps
        with WorkProgress(name, "steps", num_steps, step, enabled=self.ranks.is_main) as self.progress:
            while trainer.counters.step < trainer.num_steps:
                if self._train_epoch():
                    if self.ranks.is_main:
                        self.folder.describe(status="stopped")
                    _say(
                        self.ranks,
                        f"stopped at step {trainer.counters.step} with everything saved: run it again to go on.",
                    )
                    return False
        self._finish()
        return True

    def _begin(self, command: str) -> None:
        self._say_how_attention_runs()
        if self.config.train.mixup is not None:
            self._say_what_mixup_drops()
        facts = run_facts(self.config, self.trainer.model, self.ranks, command)
        self.folder.begin(self.trainer.counters.step, {**facts, "num_steps": self.trainer.num_steps})

    def _say_how_attention_runs(self) -> None:
        recipe, model = self.config.train, self.trainer.model
        if hasattr(model, "plan"):  # timm's own model has one way
            share = -(-recipe.global_batch_size // (self.ranks.world_size * recipe.accumulation_steps))
            dtype = getattr(torch, recipe.precision)
            conditions = Conditions(self.ranks.device, dtype, True, share, recipe.compile)
            _say(self.ranks, sentence(model, conditions))

    def _say_what_mixup_drops(self) -> None:
        batches = self.trainer.batches
        dropped = sum(batches.shard_sizes) - batches.num_draws
        if dropped:
            _say(self.ranks, f"train.mixup needs even batches: each epoch leaves out {dropped} images of its last one.")

    def _train_epoch(self) -> bool:
        """The rest of an epoch; whether a signal stopped it."""
        trainer, previous = self.trainer, time.perf_counter()
        for batch in trainer.remaining_batches():
            received = time.perf_counter()
            result = trainer.train_step(batch, self.stop.received)
            done = time.perf_counter()
            self.pace.add(result.num_images, received - previous, done - previous)
            trainer.counters.seconds += done - previous
            for warning in result.warnings:
                _say(self.ranks, f"{warning} Another image takes its place.")
            self._record_step(result, batch.keys)
            if trainer.at_epoch_end:
                self._end_epoch()
            stop = result.stop and trainer.counters.step < trainer.num_steps
            if stop or self._checkpoint_is_due():
                self._save()
            if stop:
                return True
            previous = time.perf_counter()
        return False

    def _record_step(self, result: StepResult, keys: list[str]) -> None:
        step, recipe = self.trainer.counters.step, self.config.train
        if recipe.ledger:
            keys_by_rank = self.ranks.gather(keys)
            if self.ranks.is_main:
                self.folder.log_keys(step, keys_by_rank)
        if not self.ranks.is_main or (step % recipe.log_every_steps and not result.skipped):
            return
        self.progress.reach(step, f"loss {result.loss:.3f}, {self.pace.images_per_second:.0f} images/s")
        self.folder.log(
            "step",
            step=step,
            epoch=(step - 1) / self.trainer.batches.steps_per_epoch,
            loss=_finite(result.loss),
            grad_norm=_finite(result.grad_norm),
            lr=result.lr,
            skipped=result.skipped,
            bad_images=len(self.trainer.counters.bad_images),
            images_per_second=round(self.pace.images_per_second, 1),
            data_wait_percent=round(100 * self.pace.waiting / self.pace.total, 1),
        )
        self.pace = _Pace()

    def _end_epoch(self) -> None:
        counters, epoch = self.trainer.counters, self.trainer.epoch
        loss = counters.epoch_loss / counters.epoch_images if counters.epoch_images else None
        is_last = counters.step == self.trainer.num_steps
        self.measured = self._evaluate() if is_last or epoch % self.config.eval.every_epochs == 0 else None
        if self.ranks.is_main:
            facts = {"train_loss": loss, "bad_images": len(counters.bad_images), **(self.measured or {})}
            self.folder.log("epoch", step=counters.step, epoch=epoch, **facts)
            top1 = f", top-1 {self.measured['top1']:.2f} %" if self.measured else ""
            shown = "not finite" if loss is None else f"{loss:.4f}"
            self.progress.reach(counters.step)
            self.progress.line(f"epoch {epoch}/{self.config.train.epochs}, loss {shown}{top1}")

    def _evaluate(self) -> dict[str, float]:
        """Accuracy of the model that the run would leave now, and with a moving average that of the raw weights too."""
        result = self._top1(self.trainer.final_model)
        measured = {"n": result.n, "top1": result.top1, "top5": result.top5}
        if self.trainer.ema is not None:
            measured["raw_top1"] = self._top1(self.trainer.model).top1
        return measured

    def _top1(self, model: torch.nn.Module) -> Top1:
        return evaluate(
            model,
            self.val_set,
            transform=evaluation_transform(model, self.config.eval.crop_pct),
            ranks=self.ranks,
            batch_size=self.config.eval.batch_size,
            num_workers=self.config.data.num_workers,
            worker_init_fn=ignore_stop_signals,
        )

    def _checkpoint_is_due(self) -> bool:
        step, when = self.trainer.counters.step, self.config.train.checkpoint
        if when.every_steps is not None and step % when.every_steps == 0:
            return True
        is_last = step == self.trainer.num_steps
        return self.trainer.at_epoch_end and (is_last or self.trainer.epoch % when.every_epochs == 0)

    def _save(self) -> None:
        if self.ranks.is_main:
            top1 = self.measured["top1"] if self.measured and self.trainer.at_epoch_end else None
            self.folder.save(self.trainer.state_dict(), self.trainer.counters.step, top1)

    def _finish(self) -> None:
        measured = self.measured or self._evaluate()  # resumed after the last step, nothing was measured
        if not self.ranks.is_main:
            return
        counters = self.trainer.counters
        seconds = round(counters.seconds, 3)
        self.folder.log(
            "final", step=counters.step, epoch=self.trainer.epoch, skipped=counters.skipped, seconds=seconds, **measured
        )
        self.folder.finish(self.trainer.final_model)


def _finite(number: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return number if math.isfinite(number) else None
