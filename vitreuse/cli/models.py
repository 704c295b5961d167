"""``vitreuse models [FILTER]``: the registered names, their plans and what they cost."""

from __future__ import annotations

import argparse
from typing import Any

import timm
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from vitreuse.cli.console import titled
from vitreuse.cost.summary import describe
from vitreuse.model.registry import plain_name

HELP = "list model names with their plans, parameters and MACs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own arguments."""
    parser.add_argument("filter", nargs="?", default="*", metavar="FILTER", help="such as '*reuse*' (default: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The models that match the filter.

    Raises:
        ValueError: no name matches.
    """
    names = timm.list_models(args.filter, module="registry")
    if not names:
        raise ValueError(f"no model matches {args.filter!r}: try '*reuse*', '*lazy*', '*lowrank*' or '*mixspan*'.")
    return {"models": [_summary(name) for name in names]}


def _summary(name: str) -> dict[str, Any]:
    found = describe(name)
    kept = ("name", "plan", "params", "macs", "theoretical_macs", "macs_ratio", "params_ratio")
    return {"plain": plain_name(name), **{key: found[key] for key in kept}}


def render(result: dict[str, Any]) -> Group:
    """The table for a terminal."""
    remark = "theoretical MACs of one image (maps carried, neighbourhoods exact); of exact: ratios to the exact plan"
    table = Table(box=SIMPLE_HEAD)
    for heading in ("name", "plan"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M params", "of exact", "GMACs", "of exact"):
        table.add_column(heading, justify="right")
    for model in result["models"]:
        table.add_row(
            model["name"],
            model["plan"],
            f"{model['params'] / 1e6:.2f}",
            f"{model['params_ratio']:.3f}",
            f"{model['theoretical_macs'] / 1e9:.3f}",
            f"{model['macs_ratio']:.3f}",
        )
    return titled("", table, remark)
