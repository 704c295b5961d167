"""Trackers, which show a run's records while it trains: TensorBoard and Weights & Biases, each an extra to install.

A tracker sees what metrics.jsonl holds and is never the source of anything: one that fails is named and left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from vitreuse.config import Config, ConfigError
from vitreuse.io.durable import write_durably
from vitreuse.io.file_names import printable

UPLOAD_PATIENCE_S = 60  # at the end of a start, for a network that is down


class Start(NamedTuple):
    """One start of a run, as a tracker needs to know it."""

    folder: Path
    step: int  # of the checkpoint that it goes on from
    config: Config


class TensorBoard:
    """Event files in RUN_DIR/tensorboard, a new one per start.

    Not by torch's SummaryWriter: it writes in a thread, which prints a traceback when the disk is full, and opens the
    file again for every number.
    """

    def __init__(self, start: Start):
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = start.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        file = open(folder / f"events.out.tfevents.{time.time_ns()}", "xb")  # noqa: SIM115, closed by close
        self._event, self._records = Event, RecordWriter(file)
        self._write(file_version="brain.Event:2")
        # readers drop what a killed start has logged after its last checkpoint, since it comes again
        self._write(step=start.step + 1, session_log={"status": "START"})

    def _write(self, **content: Any) -> None:
        """Adds an event, written out at once as a line of metrics.jsonl is: a kill loses neither."""
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a record."""
        numbers = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": numbers})

    def close(self) -> None:
        """Ends the file."""
        self._records.close()


class Wandb:
    """A run of Weights & Biases, its files in RUN_DIR/wandb; its own variables, such as WANDB_PROJECT, are in force.

    All starts are one run. Of steps that come again after a kill its server keeps the first, which had the same loss.
    """

    def __init__(self, start: Start):
        import wandb

        patience = {"finish_timeout": UPLOAD_PATIENCE_S, "finish_timeout_raises": True}
        settings = wandb.Settings(silent=True, console="off", **patience)
        run_id, name = _kept_id(start.folder / "wandb"), printable(start.folder.name)
        known = {"dir": start.folder, "config": asdict(start.config)}
        self._run = wandb.init(id=run_id, name=name, resume="allow", settings=settings, **known)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a record."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run's upload."""
        self._run.finish()


def _kept_id(folder: Path) -> str:
    """The id of a run, chosen by its first start."""
    folder.mkdir(exist_ok=True)
    path = folder / "id"
    if not path.exists():
        write_durably(path, uuid4().hex.encode())
    return path.read_text()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}  # by the name of their package and of our extra


def check_installed(names: Sequence[str]) -> None:
    """Refuses trackers whose package is missing, and names the first one."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            missing = f"train.loggers has {name}, which is not installed"
            raise ConfigError(f"{missing}: pip install 'vitreuse[{name}]', or leave it out.") from None


class Trackers:
    """The trackers of one start of a run: none until they are opened, and without those that have failed."""

    def __init__(self):
        self._open: dict[str, TensorBoard | Wandb] = {}

    def open(self, names: Sequence[str], start: Start) -> None:
        """Opens each of them."""
        for name in names:
            with self._left_out_on_failure(name):
                self._open[name] = TRACKERS[name](start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a record to each."""
        for name, tracker in [*self._open.items()]:
            with self._left_out_on_failure(name):
                tracker.log(step, values)

    def close(self) -> None:
        """Closes each."""
        for name, tracker in [*self._open.items()]:
            with self._left_out_on_failure(name):
                tracker.close()

    @contextmanager
    def _left_out_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network down, a disk full: whatever it is, it does not end a training
            failed = self._open.pop(name, None)
            with suppress(Exception):
                if failed is not None:
                    failed.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{name} fails ({reason}): left out until the next start; metrics.jsonl has all.", file=sys.stderr)
