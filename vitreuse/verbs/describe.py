"""What a plan means in a model, layer by layer, and which models there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import timm
from rich.console import Group
from timm.models import get_model_args

from vitreuse.cost import summary
from vitreuse.files.hub import plan_text
from vitreuse.io.file_names import for_terminal
from vitreuse.io.tables import Shown, table_of, titled
from vitreuse.model.keywords import architecture
from vitreuse.model.registry import plain_name
from vitreuse.plan import PRESETS, Plan

SUMMED = {  # the parts of a layer whose MACs are shown as one number, by its heading
    "qkv": ("qkv",),
    "lowrank": ("token_projection",),
    "logits": ("logits",),
    "values": ("values",),
    "proj": ("proj",),
    "merge": ("merge",),
    "mlp": ("fc1", "fc1_g", "fc1_x", "fc2"),
    "linear": ("linear",),
}
STRIP = 12  # characters that stand for all tokens
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a character


@dataclass(frozen=True, eq=False, repr=False)
class Description(Shown):
    """What a plan means.

    Attributes:
        facts: Parameters and MACs, as a whole and per layer and part, beside those of the exact plan.
    """

    facts: dict[str, Any]

    def table(self) -> Group:
        return table(self.facts)


@dataclass(frozen=True, eq=False, repr=False)
class Models(Shown):
    """Which models there are.

    Attributes:
        facts: Of each its name, plan, parameters and MACs.
    """

    facts: dict[str, Any]

    def table(self) -> Group:
        return models_table(self.facts)


def describe(
    model: Any,
    plan: str | Plan | None = None,
    image_size: int | None = None,
    larger: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Description:
    """What a plan costs in a model, per layer and part.

    Args:
        model: A name of ours or of a plain ViT of timm, or such a model, made by timm.create_model.
        plan: A plan, the model's own when None.
        image_size: Side in pixels, the model's own when None.
        larger: Keywords of the model alone, and not of the exact plan's, which it is compared with.
        keywords: Those of both.

    Raises:
        ValueError: A wrong plan, an unknown model, or one that takes no plan.
    """
    name, shape = (model, {}) if isinstance(model, str) else _made_by(model)
    own = shape.pop("plan", None)
    text = own if plan is None else str(plan)
    return Description(summary.describe(name, text, image_size, larger, {**shape, **keywords}))


def _made_by(model: Any) -> tuple[str, dict[str, Any]]:
    """The name and the keywords by which timm made a model, its plan among them.

    Raises:
        ValueError: It did not.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(f"a {type(model).__name__} that timm.create_model did not make has no name: give one.")
    plan = {"plan": text} if (text := plan_text(model)) is not None else {}
    return architecture(model), {key: value for key, value in get_model_args(model).items() if key != "plan"} | plan


def models(pattern: str = "*") -> Models:
    """The registered models whose names match, with their plans and what they cost.

    Raises:
        ValueError: None does.
    """
    names = timm.list_models(pattern, module="registry")
    if not names:
        examples = ", ".join(f"'*{method}*'" for method in PRESETS)
        raise ValueError(f"no model matches {pattern!r}: try {examples}.")
    return Models({"models": [_summary(name) for name in names]})


def _summary(name: str) -> dict[str, Any]:
    found = summary.describe(name)
    kept = ("name", "plan", "params", "macs", "theoretical_macs", "macs_ratio", "params_ratio")
    return {"plain": plain_name(name), **{key: found[key] for key in kept}}


def models_table(result: dict[str, Any]) -> Group:
    """A row for each model."""
    remark = "theoretical MACs of one image (maps carried, neighbourhoods exact); of exact: ratios to the exact plan"
    headings = ("name", "plan", "M params", "of exact", "GMACs", "of exact")
    return titled("", table_of(headings, map(_model_cells, result["models"]), ("name", "plan")), remark)


def _model_cells(model: dict[str, Any]) -> list[str]:
    params, macs = f"{model['params'] / 1e6:.2f}", f"{model['theoretical_macs'] / 1e9:.3f}"
    return [model["name"], model["plan"], params, f"{model['params_ratio']:.3f}", macs, f"{model['macs_ratio']:.3f}"]


def table(result: dict[str, Any]) -> Group:
    """MACs in millions, equal layers in one row, columns that say nothing left out."""
    gmacs = result["theoretical_macs"] / 1e9
    remarks = (
        f"{result['params'] / 1e6:.2f} M params ({result['params_ratio']:.3f} of exact), "
        f"{gmacs:.3f} GMACs, {2 * gmacs:.3f} GFLOPs ({result['macs_ratio']:.3f} of exact)",
        f"{result['macs'] / 1e9:.3f} GMACs run on a CPU; layers in MMACs of one image",
    )
    larger = "".join(f", {keyword} {value:g}" for keyword, value in result["keywords"].items())
    rows, columns = result["image_size_px"]
    title = f"{result['plan']}  in {result['name']} at {rows} x {columns} px{larger}"
    layers = result["layers"]
    groups = groupby(layers, key=lambda row: {**row, "layer": None})
    shown = [_cells(list(group), layers[0]["tokens"]) for _, group in groups]
    idle = set() if any(row["merged"] for row in layers) else {"tokens", "left"}
    idle |= set() if any("/" in row["spec"] for row in layers) else {"hidden"}
    headings = [heading for heading in shown[0] if heading not in idle and any(row[heading] for row in shown)]
    rows = ([row[heading] for heading in headings] for row in shown)
    return titled(title, table_of(headings, rows, ("layer", "word", "map of", "left")), *remarks)


def _cells(equal_layers: list[dict[str, Any]], most_tokens: int) -> dict[str, str]:
    """A row of the table by its headings, for consecutive layers that differ in nothing but their number."""
    first, last = equal_layers[0], equal_layers[-1]
    macs = first["theoretical_macs"]
    counts = {heading: sum(macs.get(part, 0) for part in parts) for heading, parts in SUMMED.items()}
    return {
        "layer": str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']}",
        "word": first["spec"],
        "map of": "" if first["anchor"] is None else str(first["anchor"]),
        "tokens": str(first["tokens"]),
        "left": _strip(first["tokens"] / most_tokens),
        "hidden": str(first["hidden"] or ""),
        **{heading: f"{count / 1e6:.1f}" if count else "" for heading, count in counts.items()},
        "total": f"{sum(macs.values()) / 1e6:.1f}",
        "of exact": f"{first['macs_ratio']:.3f}",
    }


def _strip(share: float) -> str:
    """A bar as long as a share of STRIP characters, in eighths of one where standard output can show them."""
    if for_terminal(EIGHTHS) != EIGHTHS:
        return "#" * round(STRIP * share)
    whole, eighths = divmod(round(8 * STRIP * share), 8)
    return (whole * EIGHTHS[8] + EIGHTHS[eighths]).rstrip()
