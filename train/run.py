"""The folder of a run, which no moment of death leaves half-written; loop.py is how a run goes on from it.

RUN_DIR/config.yaml         the resolved experiment
        run.json            status, plan, versions, commit, command and hardware, now and at each start
        metrics.jsonl       one object a line; kind is step, epoch, heal or final
        ledger.jsonl        with train.ledger: step, rank and the keys of its samples
        trace.json          with train.profile: what torch.profiler saw of some steps
        tensorboard/ wandb/ with train.loggers: the same records, for those programs
        checkpoints/        see checkpoint.py
        model.safetensors   at the end: the weights, with name, plan and keywords as metadata
        predictions.csv     at the end, where labels are read: what the model says of each validation image
        card.json           at the end, where labels are read: all that eval compare and eval report need of the run
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval import card
from eval.distributed import Ranks
from eval.predictions import Predictions
from train.augmentation import augments_on_device
from train.checkpoint import Background, Checkpoints
from train.trackers import Start, Trackers
from vitreuse.config import Config, ConfigError, changed_settings, load_config, to_yaml
from vitreuse.cost.macs import count_params
from vitreuse.cost.measure import describe_machine
from vitreuse.data import find_split
from vitreuse.data.labels import difference
from vitreuse.data.shards.index import HEADER_FILE
from vitreuse.files.hub import WEIGHTS, pack_weights, plan_text
from vitreuse.files.networks import STEP_FOLDERS
from vitreuse.io.durable import LOCK_FILE, TEMPORARY_FILES, durable_file, exclusive_lock, sync, write_durably
from vitreuse.io.file_names import to_bytes
from vitreuse.io.process import print_note
from vitreuse.io.urls import url_kind
from vitreuse.model.class_names import Names, names_of

MADE_BY = ("command", "git_commit", "versions", "hardware")  # what made a run, at its last start and at each
PACKAGES = ("vitreuse", "torch", "torchvision", "timm", "numpy", "webdataset")


class RunFolder:
    """The files of one run in a folder, which need not exist yet."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self.checkpoints = Checkpoints(path / "checkpoints", config.train.checkpoint.keep_last)
        self.trackers, self.writing = Trackers(), Background()

    @property
    def is_completed(self) -> bool:
        """Whether a run was finished here."""
        return self._record().get("status") == "completed"

    def refuse_other_run(self) -> None:
        """Checks that what is here, if anything, is this experiment; a damaged run.json is only said.

        Raises:
            ConfigError: The folder holds a run of another configuration, or something that is no run.
        """
        if not self.path.exists():
            return
        if not (self.path / "config.yaml").exists():
            if self.path.is_dir() and {*self.path.iterdir()} <= {self.path / LOCK_FILE, *self._temporaries()}:
                return  # empty, or a run ended before it had written anything
            raise ConfigError(f"{self.path} is not a run folder: choose another with run_dir=PATH.")
        before = load_config(self.path / "config.yaml")
        changes, roots = changed_settings(before, self.config), (before.data.root, self.config.data.root)
        if not _are_the_same(*roots) and not _is_known_by_content(self.config.data.folder):
            changes.append(f"data.root {before.data.root} -> {self.config.data.root}, of which only names are compared")
        if changes:
            other = f"{self.path} holds a run of another configuration ({'; '.join(changes)})"
            raise ConfigError(f"{other}: choose another folder with run_dir=PATH.")
        if (self.path / "run.json").exists() and not self._record():
            print_note(f"{self.path / 'run.json'} is damaged; the run goes on from its checkpoints and writes it anew.")

    def refuse_other_inputs(self, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Checks that what a run reads, by digests of each part, and its classes are what they were before.

        Raises:
            ConfigError: The classes, weights or data are others than those that the run was begun with.
        """
        known, way_out = self._record(), "put back what it read, or choose another folder with run_dir=PATH"
        names = known.get("class_names", class_names)  # which an older run did not note
        if names != class_names:
            now = f"the data have now {difference(class_names, names, 'the run')}"
            raise ConfigError(f"{self.path} was begun with other classes, {now}: {way_out}.")
        before = known.get("inputs", inputs)
        for name in {**before, **inputs}:
            old, new = before.get(name), inputs.get(name)
            if new is not None and old != new:  # weights that a run was begun with need not be there any more
                raise ConfigError(f"{self.path} was begun with other {name}, of digest {old} and not {new}: {way_out}.")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder and holds it against other processes inside the block; clears up after one that was killed.

        Raises:
            ConfigError: Another process writes here, or the folder cannot be made.
        """
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive_lock(self.path / LOCK_FILE))
            except BlockingIOError:
                raise ConfigError(f"{self.path} is being written by another process: wait for it to end.") from None
            except OSError as error:
                failed = f"{self.path} cannot be written ({error.strerror})"
                raise ConfigError(f"{failed}: choose another run_dir=PATH.") from None
            for path in self._temporaries():
                path.unlink(missing_ok=True)
            held.callback(self.trackers.close)
            yield

    def _temporaries(self) -> Iterator[Path]:
        """What a process that was killed in the middle of a write has left."""
        yield from self.path.glob(TEMPORARY_FILES)
        yield from self.checkpoints.folder.glob(f"{STEP_FOLDERS}/{TEMPORARY_FILES}")

    def describe(self, **facts: Any) -> None:
        """Merges facts, such as the status, into run.json."""
        self._write_record({**self._record(), **facts})

    def _write_record(self, record: dict[str, Any]) -> None:
        write_durably(self.path / "run.json", (json.dumps(record, indent=2) + "\n").encode())

    def _record(self) -> dict[str, Any]:
        """What run.json holds; nothing where there is none, or a damaged one."""
        with suppress(FileNotFoundError, ValueError):  # ValueError: neither JSON nor text
            record = json.loads((self.path / "run.json").read_bytes())
            if isinstance(record, dict):
                return record
        return {}

    def fail(self, reason: str) -> None:
        """Notes why a begun run ended, where that can be written; the first rank to fail is the one that knows.

        What is being written is written to its end first.
        """
        with suppress(Exception):  # this is about another error
            self.writing.settle()
        with suppress(OSError):  # the disk is full, say, or a rank elsewhere does not see the folder
            if (self.path / "config.yaml").exists() and self._record().get("status") != "failed":
                self.describe(status="failed", error=reason)

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """Writes the configuration and the facts of this start, and cuts the logs back to what was known at a step."""
        write_durably(self.path / "config.yaml", to_yaml(self.config).encode())
        about = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        starts = [*self._record().get("starts", []), {**about, **{key: facts.get(key) for key in MADE_BY}}]
        self._write_record({"status": "running", **facts, "starts": starts})
        for path in self._logs():
            _cut_back(path, step)
        self.trackers.open(self.config.train.loggers, Start(self.path, step, self.config))

    def _logs(self) -> list[Path]:
        return [path for path in (self.path / "metrics.jsonl", self.path / "ledger.jsonl") if path.exists()]

    def log(self, kind: str, step: int, **values: float | None) -> None:
        """Appends an object to metrics.jsonl, and hands its numbers to the trackers."""
        self._append("metrics.jsonl", {"kind": kind, "step": step, **values})
        if kind != "final":  # it repeats what the last epoch's record says
            self.trackers.log(step, {f"{kind}/{name}": value for name, value in values.items() if value is not None})

    def log_keys(self, step: int, keys_by_rank: list[list[str]]) -> None:
        """Appends the sample keys of one step to ledger.jsonl."""
        for rank, keys in enumerate(keys_by_rank):
            self._append("ledger.jsonl", {"step": step, "rank": rank, "keys": keys})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def record(self, step: int, kind: str) -> dict[str, Any] | None:
        """The record of a kind that metrics.jsonl has at a step, if it has one."""
        found = (record for record in self.records() if (record["kind"], record["step"]) == (kind, step))
        return next(found, None)

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in (path.read_bytes().splitlines() if path.exists() else ())]

    def save(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint, after the logs that lead up to it, while training goes on and leaves the state alone."""
        self.writing.do(self._save, state, step)

    def _save(self, state: dict[str, Any], step: int) -> None:
        for path in self._logs():
            sync(path)
        self.checkpoints.save(state, step)

    def rate(self, step: int, score: float) -> None:
        """Notes what was measured of a checkpoint, once it is written.

        This is done before a record says that it was measured: a run that goes on measures only what has no record.
        """
        self.writing.settle()
        self.checkpoints.rate(step, score)

    def best(self) -> dict[str, float | None]:
        """Step and score of the best checkpoint, where one was measured."""
        step, score = self.checkpoints.best() or (None, None)
        return {"best_step": step, "best_score": score}

    def finish(
        self, model: nn.Module, weights: dict[str, Tensor], predictions: Predictions | None, seconds: float
    ) -> None:
        """Leaves the model's weights and the status completed; what it says of the validation set and the run's card,
        where labels were read.

        The seconds are those of training, over all starts of the run.
        """
        self.writing.settle()
        settings, class_names = self.config.model, names_of(model)
        content = pack_weights(weights, settings.name, plan_text(model), settings.keywords, class_names)
        write_durably(self.path / WEIGHTS, content)
        if predictions is not None:
            self._write_card(predictions, class_names, seconds)
        self.describe(status="completed", **self.best())

    def _write_card(self, predictions: Predictions, class_names: Names | None, seconds: float) -> None:
        settings = self.config.model
        write_durably(self.path / "predictions.csv", to_bytes(predictions.to_csv()))
        record, data = self._record(), self.config.data
        facts = {key: record.get(key) for key in (*MADE_BY, "starts")}
        split = f"{data.source or Path(data.folder).resolve().name}/val"
        if "{}" in data.folder:  # a URL with a place for the name
            split = data.folder.replace("{}", "val")
        name = self.path.resolve().name
        facts = {**facts, "seconds": seconds, "precision": self.config.eval.precision}
        made = card.make_card(name, settings, split, predictions, facts, self.config, class_names)
        made.write(self.path / card.NAME)


def _cut_back(path: Path, step: int) -> None:
    """Takes out of a log what is not of a step up to the given one, a line in memory at a time."""
    with open(path, "rb") as old:
        if all(_is_known(line, step) for line in old):
            return
        old.seek(0)
        with durable_file(path) as new:
            new.writelines(line for line in old if _is_known(line, step))


def _is_known(line: bytes, step: int) -> bool:
    """Whether a line of a log is whole and belongs to a step up to the given one."""
    try:
        record = json.loads(line)
    except ValueError:  # cut off by a crash
        return False
    return line.endswith(b"\n") and record["step"] <= step and record.get("kind") != "final"


def run_facts(config: Config, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """What run.json says of how a run was made."""
    return {
        "model": config.model.name,
        "plan": plan_text(model),
        "num_params": count_params(model),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": {**describe_machine(ranks.device), "num_ranks": ranks.world_size},
        "augmented_on": "device" if augments_on_device(config, ranks.device) else "workers",
        "precision": {
            "autocast": config.train.precision,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        },
    }


def _git_commit() -> str | None:
    """The checkout's commit, with '-dirty' after it when files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return result.stdout.strip() or None


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)


def _is_known_by_content(folder: str) -> bool:
    """Whether the digests of images are of what they are, as those of shards, and not of their names alone."""
    if url_kind(folder):
        return True
    splits = [find_split(Path(folder), name) for name in ("train", "val")]
    return all(split is not None and (split / HEADER_FILE).is_file() for split in splits)


def _are_the_same(root: str | None, other: str | None) -> bool:
    """Whether two texts name one folder or URL."""
    if root is None or other is None or url_kind(root) or url_kind(other):
        return root == other
    return os.path.realpath(root) == os.path.realpath(other)
