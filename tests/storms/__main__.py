"""Proves that training is exact and cannot be killed: python tests/storms [WORD ...]

Every scenario starts real processes and breaks them, or what they stand on, and compares what they leave with what a
run leaves that nothing disturbed. WORDs choose the scenarios that have one of them in their names. Two play at a time.
The mounts for full and read-only disks need root, or `unshare -rm` before the command.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import faults
import kills
from processes import StormError
from rich.console import Console
from stage import SEED, UNDISTURBED, Stage

Scenario = Callable[[Stage], str]  # returns what was done and compared, raises StormError
SCENARIOS: tuple[Scenario, ...] = (*kills.SCENARIOS, *faults.SCENARIOS)
JOBS = 2


class Outcome(NamedTuple):
    """How a scenario ended."""

    holds: bool
    seconds: float
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'} {self.seconds:4.0f} s  {self.text}"


def main(words: list[str]) -> int:
    """Plays the scenarios that the words choose, all without a word; 0 if all hold, 1 if not, 2 if none is chosen."""
    chosen = [scenario for scenario in SCENARIOS if not words or any(word in scenario.__name__ for word in words)]
    if not chosen:
        names = ", ".join(scenario.__name__ for scenario in SCENARIOS)
        print(f"no scenario has {' or '.join(words)} in its name: {names}.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be cleared up after, as Ctrl-C is
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="storms-") as scratch, ThreadPoolExecutor(JOBS) as pool:
        stage = Stage(Path(scratch))
        try:
            outcomes = _play(chosen, stage, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stage.clear()
    num_held = sum(outcome.holds for outcome in outcomes)
    print(f"{num_held} of {len(outcomes)} hold, in {time.monotonic() - start:.0f} s, with seed {SEED}.")
    return 0 if num_held == len(outcomes) else 1


def _play(chosen: list[Scenario], stage: Stage, pool: ThreadPoolExecutor) -> list[Outcome]:
    """The scenarios after the runs that they are compared with, each reported as it ends."""
    console = Console(soft_wrap=True, highlight=False)
    undisturbed = _watch([pool.submit(_outcome, scenario, stage) for scenario in UNDISTURBED], stage, console)
    if not all(outcome.holds for outcome in undisturbed):
        return undisturbed
    return undisturbed + _watch([pool.submit(_outcome, scenario, stage) for scenario in chosen], stage, console)


def _watch(futures: list[Future[Outcome]], stage: Stage, console: Console) -> list[Outcome]:
    """Reports each outcome as it comes, and on a terminal what runs meanwhile."""
    pending = set(futures)
    with console.status("") as status:
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                console.print(str(future.result()), markup=False)
            status.update(stage.describe())
    return [future.result() for future in futures]


def _outcome(scenario: Scenario, stage: Stage) -> Outcome:
    start = time.monotonic()
    try:
        holds, text = True, scenario(stage)
    except StormError as error:
        holds, text = False, str(error)
    except Exception:  # the storms themselves are wrong
        holds, text = False, traceback.format_exc()
    return Outcome(holds, time.monotonic() - start, f"{scenario.__name__.replace('_', ' ')}: {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
