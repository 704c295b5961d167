"""How far a long piece of work is: a bar on a terminal, and a line now and then in a log.

Whatever takes long shows itself so, always on standard error: standard output is for results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitreuse.io.file_names import printable

SECONDS_BETWEEN_LINES = 30.0
_is_shown = ContextVar("is_shown", default=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block no piece of work shows how far it is."""
    before = _is_shown.set(False)
    try:
        yield
    finally:
        _is_shown.reset(before)


def progress_bars(console: Console, unit: str, disable: bool) -> Progress:
    """A bar per piece of work with its text, units done and time left; on what is no terminal it should be disabled.

    They are drawn when they are updated, by no thread of their own: the work may fork.
    """
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    return Progress(*columns, console=console, auto_refresh=False, disable=disable)


class WorkProgress:
    """Shows a piece of work: a bar with rate and time left on a terminal, lines elsewhere.

    Args:
        label: What is done.
        unit: What is counted, such as 'images'.
        total: Units of the whole work.
        done: Units that an earlier start has done.
        enabled: Whether this process shows anything.
    """

    def __init__(self, label: str, unit: str, total: int, done: int = 0, enabled: bool = True):
        self.label, self.unit, self.total, self.done = printable(label), unit, total, done
        self.enabled = enabled and _is_shown.get()
        self._first = self._told = done
        self._start = self._last_line = time.monotonic()
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, force_jupyter=False)  # lines do there
        self._bar = progress_bars(self._console, unit, disable=not (self.enabled and self._console.is_terminal))
        self._task = self._bar.add_task(label, total=total, completed=done)

    def __enter__(self) -> WorkProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._bar.disable and self.done == self.total != self._told:
            self.line("")

    def reach(self, done: int, text: str = "") -> None:
        """Shows that so many units are done; the text, such as a loss, stands beside the rate."""
        self.done = done
        shown = ", ".join(filter(None, (self.label, text, self._rate())))
        self._bar.update(self._task, completed=self.done, description=shown, refresh=True)
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self.line(text)

    def line(self, text: str) -> None:
        """Prints a line that stays, such as the result of an epoch."""
        if not self.enabled:
            return
        self._last_line, self._told = time.monotonic(), self.done
        so_far = f"{self.label}: {self.done}/{self.total} {self.unit}"
        left = timedelta(seconds=round(self.seconds_left))
        self._console.print(", ".join(filter(None, (so_far, text, self._rate(), f"{left} left"))), markup=False)

    @property
    def seconds_left(self) -> float:
        """Time until the end at the pace of this start, with all that happens between units."""
        return self._pace() * (self.total - self.done)

    def _pace(self) -> float:
        """Seconds a unit, of this start."""
        return (time.monotonic() - self._start) / max(self.done - self._first, 1)

    def _rate(self) -> str:
        return f"{1 / max(self._pace(), 1e-9):.1f} {self.unit}/s"
