"""The runs of a report: read from their folders or cards, and put together where only the seed differs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.card import Card, read_card
from eval.series import card_files
from vitreuse.targets import Target, resolve_targets

CURVE_POINTS = 120  # of a curve, at most: more than a phone has pixels for
Curve = list[tuple[float, float]]  # of (epochs, value)


@dataclass(frozen=True)
class Run:
    """A completed run; its folder is None where only its card was given."""

    card: Card
    folder: Target | None = None


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seed alone, under a label that no other experiment of the report has."""

    label: str
    runs: list[Run]

    @property
    def card(self) -> Card:
        """Of its first run: model and recipe are those of all."""
        return self.runs[0].card


def read_runs(text: str) -> list[Run]:
    """The run of a completed run folder or of a card, or the runs of a folder of cards.

    Raises:
        ValueError: the path is none of them.
    """
    folder = resolve_targets([text])[0] if Path(text, "config.yaml").exists() else None
    return [Run(read_card(path), folder) for path in card_files(Path(text))]


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """Runs by experiment, in the order given.

    Raises:
        ValueError: a seed of an experiment stands twice.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.card.experiment, []).append(run)
    for members in found.values():
        _check_seeds(members)
    labels: Counter[str] = Counter()
    named = []
    for members in found.values():
        name = members[0].card.name
        labels[name] += 1
        named.append(Experiment(name if labels[name] == 1 else f"{name} ({labels[name]})", members))
    return named


def _check_seeds(runs: Sequence[Run]) -> None:
    for seed, count in Counter(run.card.seed for run in runs).items():
        if count > 1:
            raise ValueError(
                f"{count} runs of {runs[0].card.name!r} have the seed {seed}: a mean over seeds needs different ones, "
                "so give one of them."
            )


def curves(experiment: Experiment) -> dict[str, Any] | None:
    """Loss and top-1 over the epochs, of each seed and in the mean; None where no run folder was given."""
    by_seed = [(run.card.seed, _read_curves(run.folder.run_dir)) for run in experiment.runs if run.folder is not None]
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
