"""A training run from its first step, or the one after its newest checkpoint, to the weights it leaves."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.distributed import joined
from eval.labelled import Share
from train.distributed import StopSignal, Watch, ended_with_others, kill_workers, reason
from train.experiment import checkpoint_is_due, evaluation_is_due, inputs, raw_is_due, remarks, set_up
from train.findings import Findings, look, validation_share
from train.mfu import Mfu
from train.reference import Reference
from train.run import RunFolder, run_facts
from train.tracing import StepTrace
from train.trackers import check_installed
from train.trainer import StepResult, Trainer
from vitreuse.attention.policy import Conditions
from vitreuse.config import Config
from vitreuse.cost.backends import sentence
from vitreuse.cost.measure import peak_process_memory_mib
from vitreuse.files.hub import WEIGHTS
from vitreuse.io.process import print_note
from vitreuse.io.progress import WorkProgress

# What is noted of raw weights beside their moving average, and of images held out.
RAW = ("top1", "top5", "val_loss", "cosine", "patch_cosine")


def train(config: Config, run_dir: Path, command: str, allow: Collection[str] = ()) -> bool:
    """Trains an experiment, with data from URLs of the kinds allowed, in a run folder, going on from what is there.

    Returns:
        Whether the run is complete; False if a signal stopped it, with everything saved.

    Raises:
        ConfigError: The experiment cannot be run as it stands; nothing was written.
        DataError: The data cannot be used.
        DivergedError: Weights or logits are infinite or NaN, or the loss stayed so.
        OtherRankError: Another rank raised one of these at the start or in an evaluation.
    """
    minutes = config.train.time_out_minutes
    with joined(config.train.device, minutes) as ranks, StopSignal().listening() as stop, ExitStack() as held:
        folder = RunFolder(run_dir, config)
        with ranks.together():
            folder.refuse_other_run()
            if ranks.is_main:
                check_installed(config.train.loggers)
            watched = config.train.reference if ranks.is_main else None
            reference = None if watched is None else Reference(watched)
        if ranks.from_main(folder.is_completed):
            print_note(f"{run_dir} is completed already: nothing to do.")
            return True
        experiment = set_up(config, ranks, allow, ranks.from_main(folder.checkpoints.are_there))
        for remark in remarks(experiment.train_set, experiment.val_set) if config.train.reads_labels else ():
            print_note(remark)
        loop = _Loop(experiment.trainer, experiment.val_set, folder, stop, reference, experiment.held_out)
        with ranks.together():
            read, class_names = inputs(experiment), list(experiment.train_set.class_names)
            if ranks.is_main:
                held.enter_context(folder.claimed())
                folder.refuse_other_inputs(read, class_names)
        try:
            with ended_with_others(ranks):
                held.callback(loop.watch.end)
                loop.resume()
                return loop.run({"command": command, "inputs": read, "class_names": class_names})
        except BaseException as error:
            if loop.has_begun or not isinstance(error, ValueError):  # before that one is about the input
                folder.fail("interrupted" if stop.is_urgent else reason(error))
            kill_workers()
            if isinstance(error, Exception) or stop.is_urgent:
                raise
            raise RuntimeError(f"training was ended from inside by {reason(error)}") from error  # signals are none


class _Measured(NamedTuple):
    """What an evaluation found: of the validation images, all figures of its record, and the one to choose by."""

    found: Findings
    figures: dict[str, float]
    score: float


@dataclass
class _Pace:
    """Images and seconds since the last step record."""

    images: Counter[torch.Size] = field(default_factory=Counter)  # by rows and columns
    waiting: float = 0.0  # seconds spent waiting for data
    total: float = 0.0

    def add(self, images: int, size: torch.Size, waiting: float, total: float) -> None:
        self.images[size] += images
        self.waiting, self.total = self.waiting + waiting, self.total + total


class _Loop:
    """Steps, records, evaluations and checkpoints of one start of a run."""

    def __init__(
        self,
        trainer: Trainer,
        val_set: Any,
        folder: RunFolder,
        stop: StopSignal,
        reference: Reference | None = None,
        held_out: Any = None,
    ):
        self.trainer, self.folder, self.stop = trainer, folder, stop
        self.config, self.ranks = trainer.config, trainer.ranks
        self.share = validation_share(self.config, trainer.model, val_set, self.ranks)
        self.choosing = None
        if held_out is not None:
            self.choosing = validation_share(self.config, trainer.model, held_out, self.ranks)
        self.measured: _Measured | None = None  # at the newest evaluation
        self.reference = reference  # None of every rank but the main one
        self.pace = _Pace()
        self.mfu = Mfu(self.config, self.trainer.model, self.ranks)
        traced = self.config.train.profile if self.ranks.is_main else None
        self.trace = StepTrace(traced, folder.path, self.ranks.device)
        self.watch = Watch(self.ranks, self.config.train.time_out_minutes)
        self.has_begun = False
        self.looked_at: set[Share] = set()

    def resume(self) -> None:
        """Goes to where the newest checkpoint was saved, if there is one; the main rank reads it for all."""
        self.watch.progress()
        with self.ranks.together():
            read = self.folder.checkpoints.load_newest() if self.ranks.is_main else None
        state = self.ranks.from_main(read)
        if state is not None:
            self.trainer.load_state_dict(state)
            step = self.trainer.counters.step
            print_note(f"{self.folder.path} goes on after step {step} of {self.trainer.num_steps}.")
            self.trace.go_on(step)

    def run(self, facts: dict[str, Any]) -> bool:
        """Trains to the end or to a signal, with these facts in run.json, and leaves the weights; whether it ended."""
        with self.ranks.together():  # none fails before run.json is this start's, and can say why
            if self.ranks.is_main:
                self._begin(facts)
        self.has_begun, trainer = True, self.trainer
        trainer.check_weights()
        name, step, num_steps = self.folder.path.name, trainer.counters.step, trainer.num_steps
        with WorkProgress(name, "steps", num_steps, step, enabled=self.ranks.is_main) as self.progress:
            if not step:
                self._record_start()
            elif trainer.at_epoch_end and not self._record(step, "epoch"):  # a start that was stopped may have left it
                self._end_epoch()
            while trainer.counters.step < trainer.num_steps:
                if self._train_epoch():
                    self.trace.end()
                    if self.ranks.is_main:
                        self.folder.writing.settle()
                        self.folder.describe(status="stopped")
                    stopped = f"stopped at step {trainer.counters.step} with everything saved"
                    print_note(f"{stopped}: run it again to go on.")
                    return False
        self.trace.end()
        self._finish()
        return True

    def _begin(self, facts: dict[str, Any]) -> None:
        recipe, model, batches = self.config.train, self.trainer.model, self.trainer.batches
        if hasattr(model, "plan"):  # timm's own model has one way to run attention
            share = -(-recipe.global_batch_size // (self.ranks.world_size * recipe.accumulation_steps))
            dtype = getattr(torch, recipe.precision)
            print_note(sentence(model, Conditions(self.ranks.device, dtype, True, share, recipe.compile)))
        if dropped := sum(batches.shard_sizes) - batches.num_draws:
            print_note(f"train.mixup needs even batches: each epoch leaves out {dropped} images of its last one.")
        made = {**run_facts(self.config, model, self.ranks), "num_steps": self.trainer.num_steps}
        self.folder.begin(self.trainer.counters.step, {**facts, **made})
        if self.reference is not None:
            self.reference.replay(self.folder.records())

    def _train_epoch(self) -> bool:
        """The rest of an epoch; whether a signal stopped it."""
        trainer, previous = self.trainer, time.perf_counter()
        self.watch.progress()  # the first step exchanges, and compiles, what none before it did
        self.trace.begin(trainer.counters.step)
        for batch in trainer.remaining_batches():
            received = time.perf_counter()
            result = trainer.train_step(batch, self.stop.received)
            done = time.perf_counter()
            self.pace.add(result.num_images, batch.images.shape[-2:], received - previous, done - previous)
            self.watch.progress()
            trainer.counters.seconds += done - previous
            for warning in result.warnings:
                print_note(f"{warning} Another image takes its place.")
            self.trace.reach(trainer.counters.step)
            self._record_step(result, batch.keys)
            self.folder.writing.check()
            stop = result.stop and trainer.counters.step < trainer.num_steps
            if stop or checkpoint_is_due(self.config, trainer.counters.step, trainer.batches.steps_per_epoch):
                self._save()
            if stop:
                return True
            if trainer.at_epoch_end:  # saved before: an evaluation may take longer than who wants to stop waits
                self._end_epoch()
            self.trace.begin(trainer.counters.step)
            previous = time.perf_counter()
        return False

    def _save(self) -> None:
        """Saves where the run is, by all ranks, once what is being written is: the main one has memory for one copy.

        Raises:
            OSError: What was being written could not be.
        """
        self.folder.writing.settle()
        state = self.trainer.state_dict()
        if self.ranks.is_main:
            self.folder.save(state, self.trainer.counters.step)

    def _record_step(self, result: StepResult, keys: list[str]) -> None:
        step, recipe = self.trainer.counters.step, self.config.train
        if recipe.ledger:
            keys_by_rank = self.ranks.gather(keys)
            if self.ranks.is_main:
                self.folder.log_keys(step, keys_by_rank)
        if not self.ranks.is_main or (step % recipe.log_every_steps and not result.skipped):
            return
        mfu = self.mfu.percent(self.pace.images, self.pace.total)
        images_per_second = self.pace.images.total() / self.pace.total
        self.progress.reach(step, f"loss {result.loss:.3f}, {images_per_second:.0f} images/s")
        epoch, loss = (step - 1) / self.trainer.batches.steps_per_epoch, _finite(result.loss)
        self.folder.log(
            "step",
            step=step,
            epoch=epoch,
            loss=loss,
            grad_norm=_finite(result.grad_norm),
            lr=result.lr,
            skipped=result.skipped,
            bad_images=len(self.trainer.counters.bad_images),
            images_per_second=round(images_per_second, 1),
            data_wait_percent=round(100 * self.pace.waiting / self.pace.total, 1),
            mfu_percent=None if mfu is None else round(mfu, 2),
            peak_memory_mib=round(peak_process_memory_mib(self.ranks.device), 1),
            eta_seconds=round(self.progress.seconds_left, 3),
        )
        self.pace = _Pace()
        if self.reference is not None and (warning := self.reference.follow(epoch, loss)):
            print_note(warning)

    def _record(self, step: int, kind: str) -> dict[str, Any] | None:
        """The record of a kind at a step, the same on all ranks."""
        return self.ranks.gather(self.folder.record(step, kind) if self.ranks.is_main else None)[0]

    def _record_start(self) -> None:
        """Records what the objective knows before the first step, unless an earlier start has."""
        objective = self.trainer.objective
        if objective.record_kind is None or self._record(0, objective.record_kind):
            return
        facts = objective.facts_before(self.trainer.final_model, partial(self._look, share=self.share))
        if self.ranks.is_main:
            self.folder.log(objective.record_kind, step=0, epoch=0, **facts.values)
            self.progress.line(facts.sentence)

    def _end_epoch(self) -> None:
        counters, epoch = self.trainer.counters, self.trainer.epoch
        loss = counters.epoch_loss / counters.epoch_images if counters.epoch_images else None
        is_due = evaluation_is_due(self.config, counters.step, self.trainer.batches.steps_per_epoch)
        self.measured = self._evaluate() if is_due else None
        if self.ranks.is_main:
            figures, score = {}, ""
            if self.measured:
                found, figures = self.measured.found, self.measured.figures
                self.folder.rate(counters.step, self.measured.score)
                score = f", {found.text}"
            facts = {"train_loss": loss, "bad_images": len(counters.bad_images), **figures}
            self.folder.log("epoch", step=counters.step, epoch=epoch, **facts)
            shown = "not finite" if loss is None else f"{loss:.4f}"
            self.progress.reach(counters.step)
            self.progress.line(f"epoch {epoch}/{self.config.train.epochs}, loss {shown}{score}")

    def _evaluate(self) -> _Measured:
        """What is found of the model that the run would leave now; with a moving average, of the raw weights too."""
        found = chosen = self._look(self.trainer.final_model, self.share)
        figures = {**found.figures}
        step, steps_per_epoch = self.trainer.counters.step, self.trainer.batches.steps_per_epoch
        if self.trainer.ema is not None and raw_is_due(self.config, step, steps_per_epoch):
            raw = self._look(self.trainer.model, self.share).figures
            figures |= {f"raw_{name}": raw[name] for name in RAW if name in raw}
        if self.choosing is not None:
            chosen = self._look(self.trainer.final_model, self.choosing)
            figures |= {f"holdout_{name}": chosen.figures[name] for name in RAW if name in chosen.figures}
        return _Measured(found, figures, chosen.score)

    def _look(self, model: torch.nn.Module, share: Share) -> Findings:
        self.watch.progress()
        if share not in self.looked_at:  # its workers are forked now, for which no thread should be writing
            self.folder.writing.settle()
        self.looked_at.add(share)
        return look(self.config, model, self.trainer.objective.feature_teacher, share)

    def _finish(self) -> None:
        self.trainer.check_updated()
        found, measured, _ = self.measured or self._evaluate()  # resumed after the last step, nothing was measured
        objective, counters = self.trainer.objective, self.trainer.counters
        before = None if objective.record_kind is None else self._record(0, objective.record_kind)
        weights = self.trainer.final_weights()
        if not self.ranks.is_main:
            return
        facts = objective.facts_after(before, found)
        if facts.sentence:
            print_note(facts.sentence)
        seconds = round(counters.seconds, 3)
        totals = {"skipped": counters.skipped, "seconds": seconds, **self.folder.best()}
        figures = {**totals, **measured, **facts.values}
        self.folder.log("final", step=counters.step, epoch=self.trainer.epoch, **figures)
        self.folder.finish(self.trainer.final_model, weights, found.predictions, seconds)
        print_note(f"{self.folder.path} is completed; its weights are in {WEIGHTS}.")


def _finite(number: float) -> float | None:
    """The number, or None where JSON has no word for it."""
    return number if math.isfinite(number) else None
