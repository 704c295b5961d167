"""The loss of a run beside a curve that it should follow: a run that is set up wrongly shows it long before its end."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vitreuse.config import ConfigError, ReferenceConfig


class Reference:
    """A curve of losses, and how far above it a run has been; a file without one is refused."""

    def __init__(self, config: ReferenceConfig):
        self.config = config
        self._epochs, self._losses = np.array(sorted(_read_curve(Path(config.curve)))).T
        self._newest: deque[tuple[float, float]] = deque(maxlen=config.num_records)  # (loss, the curve's loss there)
        self._has_warned = False

    def follow(self, epoch: float, loss: float | None) -> str | None:
        """Takes a step record of the run; a warning if the loss has come too far above the curve, once."""
        if loss is None or not self._epochs[0] <= epoch <= self._epochs[-1]:
            return None
        self._newest.append((loss, float(np.interp(epoch, self._epochs, self._losses))))
        own, expected = np.mean(self._newest, axis=0)
        percent = 100 * (own / expected - 1)
        is_full = len(self._newest) == self.config.num_records
        if self._has_warned or not is_full or percent <= self.config.tolerance_percent:
            return None
        self._has_warned = True
        return (
            f"warning: at epoch {epoch:.2f} the loss, {own:.3f} over the last {len(self._newest)} records, is "
            f"{percent:.0f} % above the {expected:.3f} of {self.config.curve}: look at data and recipe before going on."
        )

    def replay(self, records: Iterable[dict[str, Any]]) -> None:
        """Takes what an earlier start has recorded, and warned of."""
        for record in records:
            if record["kind"] == "step":
                self.follow(record["epoch"], record["loss"])


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """Epochs and losses of a CSV with these columns, or of the step records of a run's metrics.jsonl."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows: Iterable[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [record for record in map(json.loads, file) if record["kind"] == "step"]
        points = [(float(row["epoch"]), float(row["loss"])) for row in rows if row["loss"] not in (None, "")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it has no numbers under epoch and loss"
        cure = "give a CSV with the columns epoch and loss, or the metrics.jsonl of a run"
        raise ConfigError(f"train.reference.curve {path} cannot be read ({reason}): {cure}.") from error
    if not points or min(loss for _, loss in points) <= 0:
        raise ConfigError(f"train.reference.curve {path} needs losses above 0, and at least one: give another curve.")
    return points
