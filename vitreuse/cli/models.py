"""``vitreuse models [FILTER]``: the registered names, their plans and what they cost."""

import argparse
from typing import Any

import timm
from rich.console import Group

from vitreuse.cost.summary import describe
from vitreuse.io.tables import table_of, titled
from vitreuse.model.registry import plain_name
from vitreuse.plan import PRESETS

HELP = "list model names with their plans, parameters and MACs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="?", default="*", metavar="FILTER", help="such as '*reuse*' (default: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The models that match the filter."""
    names = timm.list_models(args.filter, module="registry")
    if not names:
        examples = ", ".join(f"'*{method}*'" for method in PRESETS)
        raise ValueError(f"no model matches {args.filter!r}: try {examples}.")
    return {"models": [_summary(name) for name in names]}


def _summary(name: str) -> dict[str, Any]:
    found = describe(name)
    kept = ("name", "plan", "params", "macs", "theoretical_macs", "macs_ratio", "params_ratio")
    return {"plain": plain_name(name), **{key: found[key] for key in kept}}


def render(result: dict[str, Any]) -> Group:
    remark = "theoretical MACs of one image (maps carried, neighbourhoods exact); of exact: ratios to the exact plan"
    headings = ("name", "plan", "M params", "of exact", "GMACs", "of exact")
    return titled("", table_of(headings, map(_cells, result["models"]), ("name", "plan")), remark)


def _cells(model: dict[str, Any]) -> list[str]:
    params, macs = f"{model['params'] / 1e6:.2f}", f"{model['theoretical_macs'] / 1e9:.3f}"
    return [model["name"], model["plan"], params, f"{model['params_ratio']:.3f}", macs, f"{model['macs_ratio']:.3f}"]
