"""How far a run is, on standard error: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


def bars(console: Console, disable: bool) -> Progress:
    """A bar per run, with its text, steps and time left; on what is no terminal it should be disabled."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=disable)


class TrainingProgress:
    """Shows the steps of one run; silent on every rank but the main one.

    Args:
        label: Name of the run.
        step: Steps done already.
        num_steps: Steps of the whole run.
        enabled: Whether this rank shows anything.
    """

    def __init__(self, label: str, step: int, num_steps: int, enabled: bool):
        self.label, self.first_step, self.num_steps, self.enabled = label, step, num_steps, enabled
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._start = self._last_line = time.monotonic()
        self._bar = bars(self._console, disable=not (enabled and self._console.is_terminal))
        self._task = self._bar.add_task(label, total=num_steps, completed=step)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, loss: float, images_per_second: float) -> None:
        """One step is done."""
        text = f"{self.label} loss {loss:.3f}, {images_per_second:.0f} images/s"
        self._bar.update(self._task, completed=step, description=text)
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self.line(step, f"loss {loss:.3f}, {images_per_second:.0f} images/s")

    def line(self, step: int, text: str) -> None:
        """A line that stays, such as the result of an epoch."""
        if not self.enabled:
            return
        self._last_line = time.monotonic()
        pace = (self._last_line - self._start) / max(step - self.first_step, 1)  # seconds a step, evaluations included
        left = timedelta(seconds=round(pace * (self.num_steps - step)))
        rate = f"{1 / pace:.1f} steps/s" if pace else "no rate yet"
        self._console.print(f"{self.label} step {step}/{self.num_steps}, {text}, {rate}, {left} left", markup=False)
