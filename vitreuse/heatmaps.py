"""Heat maps of how alike the layers of a model are, and what reuse between them would do."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

from vitreuse.file_names import for_picture


def require_matplotlib() -> None:
    """Before any work is done.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "pictures need matplotlib: install it with pip install 'vitreuse[plots]', or take --json without -o."
        )


def heatmaps(result: dict[str, Any]) -> bytes:
    """What ``vitreuse similarity`` found as a PNG: maps compared head by head, heads matched, damage of reuse."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, tuple[Any, dict[str, Any]]] = {
        "similarity, same head": (np.array(result["same_head"], dtype=float), {"vmin": 0, "vmax": 1}),
        "similarity, best head": (np.array(result["best_head"], dtype=float), {"vmin": 0, "vmax": 1}),
    }
    damage = np.full(panels["similarity, same head"][0].shape, np.nan)
    for change in result["damage"]:
        if change["spec"] == "reuse" and change["anchor_spec"] == "exact" and change["damage"] > 0:
            damage[change["layer"], change["anchor"]] = change["damage"]
    if np.isfinite(damage).any():
        panels["damage of reuse"] = (damage, {"norm": "log", "cmap": "viridis_r"})
    figure = Figure(figsize=(4.2 * len(panels), 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps global state
    for axes, (title, (values, style)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        image = axes.imshow(values, **style)
        axes.set(title=title, xlabel="anchor layer", ylabel="layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"{for_picture(result['name'])}, {result['num_images']:,} images", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png)
    return png.getvalue()
