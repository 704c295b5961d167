"""The pictures of a comparison: accuracy over what it costs, and how far each model lies from the baseline."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.transforms import Bbox

from eval.statistics import NOISE
from vitreuse.plan import Plan

# Okabe and Ito's palette and differing marks, told apart without colour vision and in print, by what a plan has
# besides exact attention. In words of the plan language; the report's cells have the same colours.
STYLES = {
    "exact": ("#0072B2", "o"),
    "reuse": ("#E69F00", "D"),
    "lowrank": ("#009E73", "s"),
    "span": ("#CC79A7", "^"),
    "none": ("0.55", "v"),
    "merging": ("#D55E00", "P"),
    "hidden units": ("#56B4E9", "X"),
    "linear": ("#8C6D31", "<"),
    "skip": ("0.25", ">"),
    "several": ("#000000", "*"),
}
# Told apart without colour vision, by their side of the baseline too.
COLOUR_OF_VERDICT = {"better": "#0072B2", NOISE: "0.6", "worse": "#D55E00"}


class Point(NamedTuple):
    """One model: its top-1 in percent with the standard deviation over seeds, None of one, over what it costs, and its
    kind, a key of STYLES."""

    name: str
    cost: float
    top1: float
    top1_sd: float | None = None
    kind: str = "exact"


def kind_of(plan: Plan) -> str:
    """What a plan has besides exact attention, a key of STYLES."""
    kinds = {spec.word for spec in plan} - {"exact"}
    kinds |= {"merging" for spec in plan if spec.merged} | {"hidden units" for spec in plan if spec.hidden is not None}
    return "several" if len(kinds) > 1 else next(iter(kinds), "exact")


def scatter_figure(points: Sequence[Point], caption: str, cost: str) -> Figure:
    """Top-1 over a cost, such as "throughput (images/s)", every point named; no label lies on another or on a mark."""
    figure, axes = framed((9, 6), wrap(caption, 140))
    for point in points:
        colour, _ = STYLES[point.kind]
        if point.top1_sd is not None:
            ends = [point.top1 - point.top1_sd, point.top1 + point.top1_sd]
            axes.plot([point.cost] * 2, ends, color=colour, marker="_", linewidth=1)
    axes.set_xlabel(cost)
    axes.set_ylabel("top-1 accuracy (%)")
    mark_and_name(axes, points)
    return figure


def mark_and_name(axes: Any, points: Sequence[Point], fontsize: float = 9) -> None:
    """Draws the points by kind with a legend of the kinds above the axes, and names each; by numbers, with a list of
    the names beside the axes, where there is no room for these."""
    for kind, (colour, mark) in STYLES.items():
        of_kind = [point for point in points if point.kind == kind]
        if of_kind:
            costs, heights = [point.cost for point in of_kind], [point.top1 for point in of_kind]
            axes.scatter(costs, heights, s=55, color=colour, marker=mark, label=kind, zorder=3)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len({point.kind for point in points}) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    if name_points(axes, points, fontsize):
        for label in list(axes.texts):
            label.remove()
        numbered = list(enumerate(sorted(points, key=lambda point: point.cost), 1))
        _list_names(axes.figure, [f"{number}  {point.name}" for number, point in numbered], fontsize - 1)
        name_points(axes, [point._replace(name=str(number)) for number, point in numbered], fontsize - 1)


def _list_names(figure: Figure, names: Sequence[str], fontsize: float) -> None:
    """Lists names to the right of the axes."""
    nothing = [Line2D([], [], linestyle="none")] * len(names)
    beside = {"loc": "outside right upper", "handlelength": 0, "handletextpad": 0, "frameon": False}
    figure.legend(nothing, names, fontsize=fontsize, **beside)


def framed(size: tuple[float, float], caption: Sequence[str]) -> tuple[Figure, Any]:
    """A figure over the lines of its caption, and its axes."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps global state
    figure.supxlabel("\n".join(caption), fontsize=7, color="0.35")
    return figure, figure.add_subplot()


class _Canvas(NamedTuple):
    """What labels are placed on, in pixels.

    Attributes:
        spots: Where the points are, (x, y).
        half_sizes: Half of the width and height of each point's label.
        marks: What is drawn of the points and their deviations.
        frame: The axes.
        unit: Pixels of a typographic point.
    """

    spots: Sequence[Any]
    half_sizes: Sequence[Any]
    marks: Sequence[Bbox]
    frame: Any
    unit: float


class _Place(NamedTuple):
    """A label's place, the line from its point to it, and whether that line or the label meets another's."""

    box: Bbox
    line: Path
    crosses: bool


def name_points(axes: Any, points: Sequence[Point], fontsize: float = 9) -> int:
    """Names each point at a free place near it, with a line to it where that is not beside it.

    Returns:
        How many of the lines cross others or run through labels: none if there is room.
    """
    figure = axes.figure
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in the layout that is drawn
    unit = figure.dpi / 72
    spots = [axes.transData.transform((point.cost, point.top1)) for point in points]
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}
    centred = {"xycoords": "figure pixels", "textcoords": "figure pixels", "ha": "center", "va": "center"}
    labels = [
        axes.annotate(point.name, spot, spot, fontsize=fontsize, arrowprops=line, **centred)
        for point, spot in zip(points, spots, strict=True)
    ]
    half_sizes = [label.get_window_extent().size / 2 + unit for label in labels]
    marks = [_box(spot, np.full(2, 6 * unit)) for spot in spots]
    marks += [line.get_window_extent() for line in axes.lines]
    canvas = _Canvas(spots, half_sizes, marks, axes.get_window_extent(), unit)
    found = min((_places(canvas, order) for order in _orders(spots)), key=_num_crossing)
    for label, place in zip(labels, found, strict=True):
        label.set_position((place.box.x0 / 2 + place.box.x1 / 2, place.box.y0 / 2 + place.box.y1 / 2))
    return _num_crossing(found)


def _num_crossing(places: Sequence[_Place]) -> int:
    return sum(place.crosses for place in places)


def _orders(spots: Sequence[Any]) -> list[list[int]]:
    """Orders in which points are named: by how near the next one is, the crowded ones first and last, and by place."""

    def room(number: int) -> float:
        away = [float(np.hypot(*(spots[number] - spot))) for place, spot in enumerate(spots) if place != number]
        return min(away, default=0.0)

    numbers = list(range(len(spots)))
    ascending = [
        sorted(numbers, key=key) for key in (room, lambda number: spots[number][0], lambda number: spots[number][1])
    ]
    return [*ascending, *(order[::-1] for order in ascending)]


def _places(canvas: _Canvas, order: Sequence[int]) -> list[_Place]:
    """The places of all labels, in the order of the points, found one after the other."""
    found: dict[int, _Place] = {}
    for number in order:
        found[number] = _free_place(canvas, number, list(found.values()))
    return [found[number] for number in range(len(canvas.spots))]


def _free_place(canvas: _Canvas, number: int, others: Sequence[_Place]) -> _Place:
    """The nearest place to a point at which its label lies in the frame and touches nothing, nor does the line to it;
    where there is none, the nearest at which the label alone is free."""
    spot, half_size, free = canvas.spots[number], canvas.half_sizes[number], None
    boxes = [place.box for place in others]
    obstacles = [*boxes, *(mark for mark in canvas.marks if not mark.contains(*spot))]
    for distance_pt, part in product(range(8, 400, 4), range(16)):
        direction = np.array([math.cos(part * math.pi / 8), math.sin(part * math.pi / 8)])
        centre = spot + direction * (distance_pt * canvas.unit + half_size)
        box, line = _box(centre, half_size), Path([spot, centre])
        if box.count_overlaps([*boxes, *canvas.marks]) or not _holds(canvas.frame, box):
            continue
        crosses = any(line.intersects_bbox(obstacle, filled=True) for obstacle in obstacles) or any(
            place.line.intersects_bbox(box, filled=True) or line.intersects_path(place.line, filled=False)
            for place in others
        )
        if not crosses:
            return _Place(box, line, False)
        free = free or _Place(box, line, True)
    return free or _Place(_box(spot, half_size), Path([spot, spot]), True)  # more labels than the frame has room for


def _holds(frame: Any, box: Bbox) -> bool:
    return frame.contains(*box.min) and frame.contains(*box.max)


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
