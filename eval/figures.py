"""The pictures of a comparison: accuracy over what it costs, and how far each model lies from the baseline."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from eval.statistics import NOISE

# Okabe and Ito's palette and differing marks: told apart without colour vision and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
# Told apart without colour vision, by their side of the baseline too.
COLOUR_OF_VERDICT = {"better": "#0072B2", NOISE: "0.6", "worse": "#D55E00"}


class Point(NamedTuple):
    """One model: its top-1 in percent with the standard deviation over seeds, None of one, over what it costs."""

    name: str
    cost: float
    top1: float
    top1_sd: float | None = None


def scatter_figure(points: Sequence[Point], caption: str, cost: str) -> Figure:
    """Top-1 over a cost, such as "throughput (images/s)", every point named; no two labels or marks overlap."""
    figure, axes = framed((8, 5.5), wrap(caption, 125))
    for number, point in enumerate(points):
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        axes.scatter(point.cost, point.top1, s=70, color=colour, marker=mark, zorder=3)
        if point.top1_sd is not None:
            ends = [point.top1 - point.top1_sd, point.top1 + point.top1_sd]
            axes.plot([point.cost] * 2, ends, color=colour, marker="_", linewidth=1)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(cost)
    axes.set_ylabel("top-1 accuracy (%)")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in the layout that is drawn
    name_points(axes, points)
    return figure


def framed(size: tuple[float, float], caption: Sequence[str]) -> tuple[Figure, Any]:
    """A figure over the lines of its caption, and its axes."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps global state
    figure.supxlabel("\n".join(caption), fontsize=7, color="0.35")
    return figure, figure.add_subplot()


def name_points(axes: Any, points: Sequence[Point], fontsize: float = 9) -> None:
    """Names each point at the nearest free place around it, with a line to it where that is not beside it."""
    pixels_per_pt = axes.figure.dpi / 72
    spots = [axes.transData.transform((point.cost, point.top1)) for point in points]
    taken = [_box(spot, np.full(2, 6 * pixels_per_pt)) for spot in spots]
    taken += [line.get_window_extent() for line in axes.lines]
    for point, spot in zip(points, spots, strict=True):
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 8}
        centred = {"xycoords": "figure pixels", "textcoords": "figure pixels", "ha": "center", "va": "center"}
        label = axes.annotate(point.name, spot, spot, fontsize=fontsize, arrowprops=line, **centred)
        half_size = label.get_window_extent().size / 2 + pixels_per_pt
        centre = _free_place(spot, half_size, taken, axes.get_window_extent(), pixels_per_pt)
        label.set_position(centre)
        taken.append(_box(centre, half_size))


def _free_place(spot: Any, half_size: Any, taken: Sequence[Any], frame: Any, pixels_per_pt: float) -> Any:
    """Centre of a label in pixels: the nearest to its spot at which it lies in the frame and touches nothing."""
    centres = []
    for distance_pt, eighth in product(range(8, 300, 4), range(8)):
        direction = np.array([math.cos(eighth * math.pi / 4), math.sin(eighth * math.pi / 4)])
        centre = spot + direction * (distance_pt * pixels_per_pt + half_size)
        box = _box(centre, half_size)
        if not box.count_overlaps(taken) and frame.contains(*box.min) and frame.contains(*box.max):
            return centre
        centres.append(centre)
    return centres[0]  # more labels than the frame has room for


def _box(centre: Any, half_size: Any) -> Bbox:
    return Bbox.from_extents(*(centre - half_size), *(centre + half_size))


def intervals_figure(rows: Sequence[Mapping[str, Any]], baseline: str, caption: str) -> Figure:
    """A forest plot of the differences to the baseline, the best at the top; what is within noise is hollow and grey.

    Args:
        rows: Those of a comparison, under the names to be shown.
    """
    rows, note = sorted(rows, key=lambda row: row["difference"]), wrap(caption, 150)
    figure, axes = framed((9, 1.6 + 0.26 * len(rows) + 0.12 * len(note)), note)
    axes.axvline(0, color="0.3", linewidth=1)
    for place, row in enumerate(rows):
        colour = COLOUR_OF_VERDICT[row["verdict"]]
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.5)
        face = "white" if row["verdict"] == NOISE else colour
        axes.plot(row["difference"], place, "o", color=colour, markerfacecolor=face, markersize=6)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"top-1 minus that of {baseline} (points)")
    return figure
