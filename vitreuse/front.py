"""A plot of what a search found: damage over cost."""

from __future__ import annotations

import io
from typing import Any

from vitreuse.file_names import for_picture
from vitreuse.plan_costs import METRICS


def front_plot(result: dict[str, Any]) -> bytes:
    """What ``vitreuse search`` found as a PNG: the front as a line, presets and the chosen plan as points by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps global state
    axes = figure.add_subplot()
    front = result["front"]
    axes.plot([row["share"] for row in front], [row["damage"] for row in front], ".-", color="#0072B2", zorder=2)
    points = {**result["presets"], "chosen": result["chosen"]}
    for name, row in points.items():
        axes.plot(row["share"], row["damage"], "D" if name == "chosen" else "o", color="#D55E00", zorder=3)
        axes.annotate(name, (row["share"], row["damage"]), (6, 4), textcoords="offset points", fontsize=9)
    axes.axvline(result["budget"], color="0.6", linewidth=0.8, linestyle="--")
    smallest = min((row["damage"] for row in (*front, *points.values()) if row["damage"] > 0), default=1.0)
    axes.set_yscale("symlog", linthresh=smallest)  # the exact plan has none
    axes.set(xlabel=f"{METRICS[result['metric']]}, share of the exact model", ylabel="predicted damage")
    axes.set_title(f"{for_picture(result['name'])}: {result['chosen']['plan']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()
