"""Training runs as users start them: real processes, followed through what they write, and compared bit by bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300  # what a process may take for anything; on an idle machine none takes a tenth of it
TRAIN = ("-m", "train")
ENVIRONMENT = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
TIMED = (  # what the clock and the machine decide
    "images_per_second",
    "data_wait_percent",
    "mfu_percent",
    "peak_memory_mib",
    "eta_seconds",
    "seconds",
)


class StormError(AssertionError):
    """Training did not do what it must."""


def check(holds: object, sentence: str) -> None:
    """Raises StormError with the sentence unless the condition holds."""
    if not holds:
        raise StormError(sentence)


class Start:
    """One start of a run: its processes and what they say.

    Args:
        run: The run.
        ranks: How many; more than one are started by torchrun.
        program: What Python is given before the arguments of the run.
        environment: Variables beside those of this process.
    """

    def __init__(
        self, run: Run, ranks: int = 1, program: Sequence[str] = TRAIN, environment: Mapping[str, str] | None = None
    ):
        self.run, self.ranks, self.seen_before = run, ranks, run.last_step
        self.said_in = Path(tempfile.mkdtemp(dir=run.folder.parent, prefix=f"{run.folder.name}-said-"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "--redirects", "2", "--log-dir", str(self.said_in)] if ranks > 1 else []
        command = [sys.executable, *command, *program, *run.arguments, f"run_dir={run.folder}"]
        with open(self.said_in / ("stderr.log" if ranks == 1 else "torchrun.log"), "wb") as said:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                cwd=CHECKOUT,
                stdout=said,
                stderr=said,
            )

    @property
    def said(self) -> str:
        """What the ranks have written to standard error, without torchrun's own report."""
        return "".join(self.said_by(rank) for rank in range(self.ranks))

    def said_by(self, rank: int) -> str:
        """What one rank and its workers have written to standard error."""
        logs = self.said_in.rglob("stderr.log" if self.ranks == 1 else f"{rank}/stderr.log")
        return "".join(path.read_text() for path in logs)

    @property
    def rank_pids(self) -> list[int]:
        """The training processes, by rank, once they train."""
        if self.ranks == 1:
            return [self.process.pid]
        return sorted(children(self.process.pid), key=lambda pid: int(variables(pid)["RANK"]))

    @property
    def pids(self) -> list[int]:
        """All its processes that live: torchrun, ranks and workers have the run folder in their command line."""
        lines = {path: _text(path).split("\0") for path in Path("/proc").glob("[0-9]*/cmdline")}
        pids = [int(path.parent.name) for path, line in lines.items() if f"run_dir={self.run.folder}" in line]
        return [pid for pid in pids if is_alive(pid)]

    @property
    def half_written(self) -> list[Path]:
        """Files that its first rank is writing, or was when it was killed."""
        return list(self.run.folder.rglob(f".*.{self.rank_pids[0]}.tmp"))

    def wait_until(self, happened: Callable[[], object], what: str, pause_s: float = 0.001) -> None:
        """Waits for something that the run must do before it ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            code = self.process.poll()
            check(code is None, f"a start of {self.run.name} ended with exit code {code} before {what}: {self.said}")
            if time.monotonic() > deadline:
                raise StormError(f"{self.run.name} took more than {PATIENCE_S} s until {what}: {self.stacks()}")
            time.sleep(pause_s)

    def stacks(self) -> str:
        """What the threads of every process are doing, which ends all of them."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # at which Python's faulthandler tells
        deadline = time.monotonic() + PATIENCE_S
        while self.pids and time.monotonic() < deadline:
            time.sleep(0.1)
        return "".join(path.read_text(errors="replace") for path in self.said_in.rglob("*.log"))

    def wait_for_step(self, step: int) -> None:
        """Waits until this start has logged a step, or the one after what an earlier start has logged."""
        target = max(step, self.seen_before + 1)
        self.wait_until(lambda: self.run.last_step >= target, f"step {target}")

    def kill(self) -> int:
        """SIGKILL to torchrun and every rank, whose workers see for themselves that they are alone; the exit code."""
        if self.process.poll() is None:
            for pid in (self.process.pid, *(children(self.process.pid) if self.ranks > 1 else ())):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.process.wait(PATIENCE_S)

    def end(self, number: int | None = None) -> int:
        """Waits for the end, after a signal if one is given; the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def check_fails(self, code: int, *parts: str, by: int | None = None) -> None:
        """Waits for an end with this exit code and, from all ranks or from one, one sentence with these parts alone."""
        found = self.end()
        said = self.said if by is None else self.said_by(by)
        errors = re.findall(r"^train: .*$", said, flags=re.MULTILINE)
        is_right = found == code and len(errors) == 1 and all(part in errors[0] for part in parts)
        check(
            is_right and "Traceback" not in said,
            f"{self.run.name} should have ended with exit code {code} and a sentence with {', '.join(parts)}, "
            f"but ended with {found} and said: {said}",
        )


@dataclass
class Run:
    """A run folder, and what every start of it is given: config and overrides."""

    folder: Path
    arguments: tuple[str, ...]
    starts: list[Start] = field(default_factory=list)
    is_closed: bool = False  # to further starts

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return self.folder.name

    @property
    def last_step(self) -> int:
        """The newest step in metrics.jsonl that is logged whole."""
        lines = _text(self.folder / "metrics.jsonl").rpartition("\n")[0].splitlines()
        return json.loads(lines[-1])["step"] if lines else 0

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says."""
        return json.loads((self.folder / "run.json").read_text())

    @property
    def status(self) -> str | None:
        """What run.json says of how far it is; None before there is one."""
        return json.loads(_text(self.folder / "run.json") or "{}").get("status")

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the complete checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob("checkpoints/step-*/complete.json"))

    @property
    def saved_step(self) -> int:
        """The step of the newest complete checkpoint; 0 for none."""
        return max((int(folder.name.removeprefix("step-")) for folder in self.checkpoints), default=0)

    def start(self, *args: Any, **kwargs: Any) -> Start:
        """Starts it, or lets it go on; with the arguments of Start."""
        check(not self.is_closed, "interrupted")
        self.starts.append(Start(self, *args, **kwargs))
        return self.starts[-1]

    def complete(self, ranks: int = 1, program: Sequence[str] = TRAIN) -> str:
        """Runs it to its end; what it said."""
        start = self.start(ranks, program)
        check(start.end() == 0 and self.record["status"] == "completed", f"{self.name} did not complete: {start.said}")
        return start.said

    def records(self, name: str = "metrics") -> list[dict[str, Any]]:
        """The objects of a log."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def curve(self) -> list[dict[str, Any]]:
        """The metrics without what a clock decides."""
        return [{key: value for key, value in record.items() if key not in TIMED} for record in self.records()]

    def state(self) -> dict[str, Any]:
        """The newest checkpoint, read as data alone, without what a clock decides."""
        state = torch.load(self.checkpoints[-1] / "state.pt", weights_only=True)
        del state["counters"]["seconds"]
        return state

    def predictions(self) -> str:
        """What the run says of each image; nothing where it reads no labels."""
        path = self.folder / "predictions.csv"
        return path.read_text() if path.exists() else ""

    def check_equals(self, whole: Run) -> None:
        """Compares everything that a completed run leaves with that of a run that nothing interrupted, bit by bit."""
        parts = {
            "ledger.jsonl": (self.records("ledger"), whole.records("ledger")),
            "metrics.jsonl": (self.curve(), whole.curve()),
            "model.safetensors": tuple(load_file(run.folder / "model.safetensors") for run in (self, whole)),
            "state.pt": (self.state(), whole.state()),
            "predictions.csv": tuple(run.predictions() for run in (self, whole)),
        }
        different = [path for name, pair in parts.items() for path in differences(*pair, name)]
        check(not different, f"{self.name} differs from {whole.name} in {', '.join(different[:5])}")


def differences(found: Any, expected: Any, path: str) -> list[str]:
    """Where two trees of tensors, numbers and strings are not the same to the bit."""
    if type(found) is not type(expected):
        return [path]
    if isinstance(expected, torch.Tensor):
        alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
        return [] if alike and torch.equal(_bits(found), _bits(expected)) else [path]
    if isinstance(expected, (list, tuple)):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(expected, dict):
        alone = [f"{path}[{key!r}]" for key in found.keys() ^ expected.keys()]
        shared = [key for key in expected if key in found]
        return alone + [place for key in shared for place in differences(found[key], expected[key], f"{path}[{key!r}]")]
    return [] if found == expected else [path]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process still does anything; one that has ended may wait to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def variables(pid: int) -> dict[str, str]:
    """A process's environment variables."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
