"""Plots as PNGs: what a search found, and how alike the layers of a model are.

They are made without pyplot, which keeps global state. matplotlib is an extra, imported where it is needed.
"""

import io
import textwrap
from itertools import cycle
from typing import Any

from vitreuse.cost.plan_costs import METRICS
from vitreuse.io.file_names import for_picture

SHAPES = {"chosen": "*", "searched": "D", "constant merging": "s"}  # of points; presets have the others in turn
OTHER_SHAPES = "o^vPX"
TITLE_WIDTH = 110  # characters


def front_plot(result: dict[str, Any]) -> bytes:
    """What ``vitreuse search`` found as a PNG: the forecast front as a line, what was measured as points, full where
    layers are fitted; what is handed over is a star."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    front = result["front"]
    axes.plot([row["share"] for row in front], [row["damage"] for row in front], ".-", color="#0072B2", zorder=2)
    points, others = result["audited"], cycle(OTHER_SHAPES)
    for name, row in points.items():
        kind, model = name.removesuffix(", fitted"), result["delivered"]["name"] if name == "chosen" else name
        shape, size = SHAPES[kind] if kind in SHAPES else next(others), 11 if name == "chosen" else 6
        style = {"markersize": size, "markerfacecolor": "#D55E00" if model.endswith(", fitted") else "none"}
        label = name if model == name else f"chosen: {model}"
        axes.plot(row["share"], row["distance"], shape, color="#D55E00", label=label, zorder=3, **style)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.axvline(result["budget"], color="0.6", linewidth=0.8, linestyle="--")
    distances = [*(row["damage"] for row in front), *(row["distance"] for row in points.values())]
    smallest = min((distance for distance in distances if distance > 1e-6), default=1.0)
    axes.set_yscale("symlog", linthresh=smallest)  # the exact plan has none
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{METRICS[result['metric']]}, share of the exact model")
    axes.set_ylabel("distance of answers: forecast (line), measured")
    title = textwrap.fill(f"{for_picture(result['name'])}: {result['chosen']['plan']}", TITLE_WIDTH)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream)
    return stream.getvalue()


def heatmaps(result: dict[str, Any]) -> bytes:
    """What ``vitreuse similarity`` found as a PNG: maps compared head by head, heads matched, damage of reuse."""
    import numpy as np
    from matplotlib.figure import Figure

    same, best = (np.array(result[name], dtype=float) for name in ("same_head", "best_head"))
    scale: dict[str, Any] = {"vmin": 0, "vmax": 1}
    panels = {"similarity, same head": (same, scale), "similarity, best head": (best, scale)}
    damage = np.full(same.shape, np.nan)
    for change in result["damage"]:
        if change["spec"] == "reuse" and change["anchor_spec"] == "exact" and change["damage"] > 0:
            damage[change["layer"], change["anchor"]] = change["damage"]
    if np.isfinite(damage).any():
        panels["damage of reuse"] = (damage, {"norm": "log", "cmap": "viridis_r"})
    figure = Figure(figsize=(4.2 * len(panels), 4), dpi=150, layout="constrained")
    for axes, (title, (values, style)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        image = axes.imshow(values, **style)
        axes.set(title=title, xlabel="anchor layer", ylabel="layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"{for_picture(result['name'])}, {result['num_images']:,} images", fontsize=10)
    return _png(figure)
