"""Loss and top-1 over the epochs of a report's runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.series import Series

CURVE_POINTS = 120  # of a curve, at most: more than a phone has pixels for
Curve = list[tuple[float, float]]  # of (epochs, value)


def curves(series: Series) -> dict[str, Any] | None:
    """Loss and top-1 over the epochs, of each seed and in the mean; None where no run folder was given."""
    by_seed = [(run.card.seed, _read_curves(run.folder.run_dir)) for run in series.runs if run.folder is not None]
    if not by_seed:
        return None
    found: dict[str, Any] = {}
    for name in ("loss", "top1"):
        lines = [(seed, shortened(curve[name])) for seed, curve in by_seed if curve[name]]
        if lines:
            mean = _mean([line for _, line in lines]) if len(lines) > 1 else None
            found[name] = {"seeds": [{"seed": seed, "points": line} for seed, line in lines], "mean": mean}
    return found


def _read_curves(run_dir: Path | None) -> dict[str, Curve]:
    """What metrics.jsonl says: the loss of each step record, top-1 of each evaluated epoch."""
    assert run_dir is not None
    found: dict[str, Curve] = {"loss": [], "top1": []}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = {"step": "loss", "epoch": "top1"}.get(record["kind"])
        if name is not None and record.get(name) is not None:
            found[name].append((record["epoch"], record[name]))
    return found


def shortened(curve: Curve) -> Curve:
    """At most CURVE_POINTS points, each the mean of as many neighbours."""
    pieces = np.array_split(np.array(curve), min(len(curve), CURVE_POINTS))
    means = [piece.mean(0).tolist() for piece in pieces]
    return [(round(x, 3), round(y, 4)) for x, y in means]


def _mean(lines: Sequence[Curve]) -> Curve:
    """Where all lines are: at the points of the first."""
    end = min(line[-1][0] for line in lines)
    places = [x for x, _ in lines[0] if x <= end]
    values = np.mean([np.interp(places, *np.array(line).T) for line in lines], axis=0)
    return [(x, round(y, 4)) for x, y in zip(places, values.tolist(), strict=True)]
