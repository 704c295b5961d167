"""What plans look like: a strip of layers each, as high as the share of the tokens that are left: plans.png.

    python -m docs.pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import FancyArrowPatch, Rectangle

from eval.figures import STYLES, framed
from vitreuse import PRESETS, Plan, parse_plan, preset_plan
from vitreuse.io.durable import durable_file

HERE = Path(__file__).parent
DEPTH, NUM_PATCHES, NUM_HIDDEN = 12, 196, 1536  # of a ViT-S at 224 px
MIXED = ("(lowrank:64 reuse*2)*4", "exact-24/1344 exact-16/1152 exact-32 exact-8*2 exact-16*3 exact linear skip none")
LETTERS = {"exact": "E", "reuse": "R", "lowrank": "L", "span": "S", "none": "N", "linear": "=", "skip": ""}
DARK = ("exact", "skip")  # whose letters are white
ROW = 1.75  # from one strip to the next, where a layer of all tokens is 1 high


def tokens_left(plan: Plan) -> list[float]:
    """The share of the patch tokens that each layer begins with."""
    left, found = NUM_PATCHES, []
    for spec in plan:
        found.append(left / NUM_PATCHES)
        left -= spec.merged
    return found


def anchors(plan: Plan) -> list[tuple[int, int]]:
    """For each layer that reuses a map the layer that made it, and itself."""
    maker, found = 0, []
    for layer, spec in enumerate(plan):
        if spec.word == "reuse":
            found.append((maker, layer))
        elif spec.makes_map:
            maker = layer
    return found


def draw_strip(axes: Any, plan: Plan, base: float) -> None:
    """A layer is as high as its tokens; the bar below it is as wide as its MLP; arcs lead from a map to its readers."""
    for layer, (spec, share) in enumerate(zip(plan, tokens_left(plan), strict=True)):
        colour, _ = STYLES[spec.word]
        face = "none" if spec.word == "skip" else colour
        axes.add_patch(Rectangle((layer + 0.05, base), 0.9, share, facecolor=face, edgecolor=colour))
        ink = "white" if spec.word in DARK else "black"
        axes.text(layer + 0.5, base + share / 2, LETTERS[spec.word], ha="center", va="center", fontsize=8, color=ink)
        if spec.word not in ("linear", "skip"):
            width = 0.9 * (1.0 if spec.hidden is None else spec.hidden / NUM_HIDDEN)
            axes.add_patch(Rectangle((layer + 0.5 - width / 2, base - 0.2), width, 0.12, facecolor="0.55"))
    for maker, reader in anchors(plan):
        ends = ((maker + 0.5, base + 1.03), (reader + 0.5, base + 1.03))
        arc = {"connectionstyle": "arc3,rad=-0.25", "arrowstyle": "-|>", "mutation_scale": 7}
        axes.add_patch(FancyArrowPatch(*ends, color="0.35", linewidth=0.8, **arc))


def draw_plans() -> None:
    """Writes plans.png."""
    plans = {method: preset_plan(method, DEPTH, NUM_PATCHES) for method in PRESETS}
    plans |= {"two methods": parse_plan(MIXED[0]), "several words": parse_plan(MIXED[1])}
    caption = (
        "A cell is a layer, as high as its share of tokens; below it the width of its MLP; arcs: a map and its readers."
    )
    figure, axes = framed((9, 7.4), [caption])
    for row, (name, plan) in enumerate(plans.items()):
        base = -ROW * row
        draw_strip(axes, plan, base)
        axes.text(-0.3, base + 0.62, name, ha="right", va="center", fontsize=10)
        axes.text(DEPTH + 0.3, base + 0.5, _wrapped(str(plan)), ha="left", va="center", fontsize=7, family="monospace")
    axes.set(xlim=(-3, DEPTH + 7), ylim=(-ROW * (len(plans) - 1) - 0.4, 1.6))
    axes.set_axis_off()
    with durable_file(HERE / "plans.png") as file:
        figure.savefig(file, format="png")


def _wrapped(text: str) -> str:
    """A long plan in lines of a few words."""
    words = text.split(" ") if len(text) > 32 else [text]
    return "\n".join(" ".join(words[start : start + 3]) for start in range(0, len(words), 3))


if __name__ == "__main__":
    draw_plans()
