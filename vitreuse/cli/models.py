"""``vitreuse models [FILTER]``: the registered names, their plans and what they cost."""

import argparse
from typing import Any

from vitreuse.verbs.describe import models, models_table

HELP = "list model names with their plans, parameters and MACs"
render = models_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="?", default="*", metavar="FILTER", help="such as '*reuse*' (default: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The models that match the filter."""
    return models(args.filter).facts
