"""`python -m train.sweep CONFIG... [section.key=value ...] [runs=DIR] [jobs=N] [seeds=N] [cards=DIR]`: many runs.

Each is a `python -m train` of its own, N at a time, in DIR and its config's name; with seeds=5, in DIR/NAME-seed0 to
DIR/NAME-seed4, all configs under one seed before the next, so that a sweep broken off has about as many runs of each. A
terminal shows a bar per run, read from its run folder; elsewhere the runs' own lines are passed on. Runs that are
completed already are not started again. With several CUDA devices each of the N places has its own, in turn.

--allow KIND lets the data of every run come from URLs of that kind, as for `python -m train`.

With cards=DIR each run leaves its card there as NAME.json or NAME-seed0.json, and one whose card is there counts as
completed: cards are small enough to be committed, and a sweep goes on from them where there are no run folders.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from eval.card import NAME as CARD
from eval.card import is_of, read_card
from train.distributed import StopSignal
from train.run import RunFolder
from vitreuse.cli.console import Parser, add_allow
from vitreuse.config import ConfigError
from vitreuse.files.networks import load_experiment
from vitreuse.io.durable import write_durably
from vitreuse.io.process import DONE, STOPPED, WRONG_INPUT, print_error
from vitreuse.io.progress import progress_bars

USAGE = (
    "usage: python -m train.sweep CONFIG... [section.key=value ...] [runs=DIR] [jobs=N] [seeds=N] [cards=DIR] "
    "[--allow KIND]"
)
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class Run:
    """One `python -m train`: its config, overrides, kinds of URL allowed, folder and card to keep, and its process once
    it is started."""

    config: Path
    overrides: list[str]
    folder: Path  # by whose name it is known
    card: Path | None = None
    allow: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    place: int = 0  # of the N
    output: Path | None = None  # on a terminal: what it says, until it is shown above the bars

    @property
    def is_completed(self) -> bool:
        """Whether its card is there, or its folder holds this very experiment, completed.

        Raises:
            ValueError: The card is of another experiment, or is none, or a card is wanted that the run will not leave.
        """
        if self.card is not None and self.card.exists():
            if is_of(read_card(self.card), load_experiment(self.config, self.overrides)):
                return True
            other = f"{self.card} is the card of another model, recipe or seed than {self.config}"
            raise ConfigError(f"{other}: remove it to train again, or name another folder with cards=DIR.")
        try:
            config = load_experiment(self.config, self.overrides)
        except ConfigError:  # which its process will print, as the next one
            return False
        if self.card is not None and not config.train.reads_labels:
            raise ConfigError(f"{self.config} reads no labels, and its run leaves no card: leave it or cards=DIR out.")
        try:
            folder = RunFolder(self.folder, config)
            folder.refuse_other_run()
        except ConfigError:
            return False
        return folder.is_completed

    def keep_card(self) -> None:
        """Leaves the completed run's card where cards are kept, unless it is there."""
        if self.card is not None and not self.card.exists():
            self.card.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.card, (self.folder / CARD).read_bytes())

    @property
    def exit_code(self) -> int | None:
        """How it ended, None before."""
        return None if self.process is None else self.process.poll()

    def start(self, place: int, devices: Sequence[str], output: Path | None) -> None:
        """Starts the process in one of the places, on the CUDA device of its turn; what it says goes into a file, or
        where this process's own errors go."""
        self.place, self.output = place, output
        own = {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if devices else {}
        command = [sys.executable, "-m", "train", str(self.config), *self.overrides, f"run_dir={self.folder}"]
        command += [f"--allow={kind}" for kind in self.allow]
        with nullcontext() if output is None else output.open("wb") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, env={**os.environ, **own})

    def progress(self) -> dict[str, Any]:
        """Steps done and to do, loss and images/s, as far as the run folder knows them."""
        try:
            total = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["num_steps"]
            last = json.loads((self.folder / "metrics.jsonl").read_bytes().splitlines()[-1])
        except (OSError, ValueError, LookupError):  # not yet written, or half a line
            return {}
        shown = {"completed": last["step"], "total": total}
        if last["kind"] == "step":
            loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
            shown["description"] = f"{self.folder.name} loss {loss}, {last['images_per_second']:.0f} images/s"
        return shown


class Sweep:
    """Runs in their order, so many processes at a time, and what a terminal shows of them."""

    def __init__(self, runs: Sequence[Run], jobs: int):
        self.runs, self.jobs, self.devices = runs, jobs, visible_devices()
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.bars = progress_bars(self.console, "steps", disable=not self.console.is_terminal)
        self.tasks = [self.bars.add_task(run.folder.name, total=None, start=False) for run in runs]

    def run(self, stop: StopSignal) -> int:
        """Runs them all, or until a signal; the exit code: 0, the first failure's, or 75."""
        with self.bars, TemporaryDirectory() as outputs, ExitStack() as started:
            started.callback(self._end)
            while not self._is_over(stop.received):
                self._start_next(stop.received, Path(outputs))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._show()
                for run in self.runs:
                    if run.exit_code == DONE:
                        run.keep_card()
        if stop.received:
            return STOPPED
        failed = [run for run in self.runs if run.exit_code != DONE]
        for run in failed:
            print(f"{run.folder.name} ended with exit code {run.exit_code}.", file=sys.stderr)
        return next((run.exit_code for run in failed if run.exit_code), DONE)

    def _end(self) -> None:
        """Asks what still runs to stop, as after an error of this process, and waits for it."""
        for run in self.runs:
            if run.process is not None and run.exit_code is None:
                run.process.terminate()
                run.process.wait()

    def _is_over(self, stopping: bool) -> bool:
        """Whether all runs have ended, or when stopping all that were started."""
        return all(run.exit_code is not None or (stopping and run.process is None) for run in self.runs)

    def _start_next(self, stopping: bool, outputs: Path) -> None:
        """Fills the free places; a signal is passed on instead."""
        running = [run for run in self.runs if run.process is not None and run.exit_code is None]
        if stopping:
            for run in running:
                assert run.process is not None
                run.process.terminate()
            return
        waiting = [i for i, run in enumerate(self.runs) if run.process is None]
        places = sorted({*range(self.jobs)} - {run.place for run in running})
        for i, place in zip(waiting, places, strict=False):
            self.runs[i].start(place, self.devices, outputs / str(i) if self.console.is_terminal else None)
            self.bars.start_task(self.tasks[i])

    def _show(self) -> None:
        for run, task in zip(self.runs, self.tasks, strict=True):
            if run.output is None:
                continue
            if run.exit_code is None:
                self.bars.update(task, **run.progress())
                continue
            ended = "" if run.exit_code == DONE else f" ended with exit code {run.exit_code}"
            self.bars.update(task, **{**run.progress(), "description": run.folder.name + ended})
            self.bars.stop_task(task)
            lines = run.output.read_text(encoding="utf-8", errors="replace").splitlines()
            said = lines[-2:] if run.exit_code == DONE else lines  # its result and where it is, or why it failed
            self.console.print("\n".join(said), markup=False)
            run.output = None
        self.bars.refresh()


def visible_devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if given is None else given.split(",")
    return [name.strip() for name in names if name.strip()]


def main(arguments: list[str]) -> int:
    """Runs what the command line names; the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    try:
        runs, jobs = _parse(arguments)
        completed = [run for run in runs if run.is_completed]
    except ValueError as error:
        print_error("train.sweep", error)
        return WRONG_INPUT
    if completed:
        print(f"{len(completed)} of {len(runs)} runs are completed already.", file=sys.stderr)
    for run in completed:
        run.keep_card()
    left = [run for run in runs if run not in completed]
    sweep, places = Sweep(left, jobs), min(jobs, len(left))
    if 0 < len(sweep.devices) < places:
        print(f"{places} runs at a time share {len(sweep.devices)} CUDA devices.", file=sys.stderr)
    with StopSignal().listening() as stop:
        return sweep.run(stop)


def _parse(arguments: Sequence[str]) -> tuple[list[Run], int]:
    """The runs of a command line, and how many at a time."""
    parser = Parser("train.sweep", add_help=False, allow_abbrev=False)
    add_allow(parser)
    given, arguments = parser.parse_known_args(arguments)
    configs = [Path(os.path.expanduser(argument)) for argument in arguments if "=" not in argument]
    own, overrides = {}, []
    for argument in arguments:
        if argument.startswith(("-", "run_dir=")):
            ours = "a sweep's are in runs=DIR, each in a folder of its config's name"
            raise ConfigError(f"{argument} is for python -m train, of one run: {ours}; {USAGE}.")
        key, is_setting, value = argument.partition("=")
        if key in ("runs", "jobs", "seeds", "cards") and is_setting:
            own[key] = os.path.expanduser(value)
        elif is_setting:
            overrides.append(argument)
    stems = [config.stem for config in configs]
    if not stems or len(set(stems)) < len(stems):
        raise ConfigError(f"give one or more configs, each of another name; {USAGE}.")
    folder, jobs = Path(own.get("runs", "runs")), _count("jobs", own.get("jobs", "1"))
    if "seeds" in own and any(override.startswith("train.seed=") for override in overrides):
        raise ConfigError("train.seed and seeds: give at most one of the two.")
    seeds = [None] if "seeds" not in own else [*range(_count("seeds", own["seeds"]))]
    cards = Path(own["cards"]) if "cards" in own else None
    runs = []
    for seed, config in product(seeds, configs):
        name = config.stem if seed is None else f"{config.stem}-seed{seed}"
        settings = overrides if seed is None else [*overrides, f"train.seed={seed}"]
        runs.append(Run(config, settings, folder / name, cards and cards / f"{name}.json", given.allow))
    return runs, jobs


def _count(key: str, text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise ConfigError(f"{key}={text} is not a whole number from 1 to 99999.")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
