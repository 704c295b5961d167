"""A forest plot: how much better or worse than the baseline each model is, with the interval of the difference."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BETTER, NOISE, WORSE = "#0072B2", "0.6", "#D55E00"  # told apart without colour vision, by their side too


@dataclass(frozen=True)
class Interval:
    """One model's difference to the baseline in points, with the ends of its interval, and whether it is noise."""

    name: str
    points: float
    low: float
    high: float
    is_noise: bool

    @property
    def colour(self) -> str:
        """Of its mark."""
        return NOISE if self.is_noise else BETTER if self.points > 0 else WORSE


def intervals_figure(intervals: Sequence[Interval], baseline: str, caption: str) -> Figure:
    """A row per model, the best at the top; what is within noise is hollow and grey."""
    rows = sorted(intervals, key=lambda interval: interval.points)
    note = textwrap.wrap(caption, 150)
    figure = Figure(figsize=(9, 1.6 + 0.26 * len(rows) + 0.12 * len(note)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps global state
    axes = figure.add_subplot()
    axes.axvline(0, color="0.3", linewidth=1)
    for place, row in enumerate(rows):
        axes.plot([row.low, row.high], [place, place], color=row.colour, linewidth=1.5)
        face = "white" if row.is_noise else row.colour
        axes.plot(row.points, place, "o", color=row.colour, markerfacecolor=face, markersize=6)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"top-1 minus that of {baseline} (points)")
    figure.supxlabel("\n".join(note), fontsize=7, color="0.35")
    return figure
