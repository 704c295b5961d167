"""``vitreuse tune``: measures this device, so that models choose by its own times."""

import argparse
from typing import Any

import torch

from vitreuse.cli.console import add_any_of, add_count, add_device, local_path, positive
from vitreuse.config.recipe import DTYPES
from vitreuse.verbs.tune import KEYS, table, tune

HELP = "measure which way of computing attention is faster on this device, and keep it for its models and for search"
render = table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_any_of(parser, "--dtype", DTYPES, ["float32", "bfloat16"])
    text = f"keys of a query; default: {' '.join(map(str, KEYS))}"
    parser.add_argument("--keys", type=positive, nargs="+", default=KEYS, metavar="M", help=text)
    add_count(parser, "--repeats", 10, "timed calls, of which the fastest counts")
    parser.add_argument("--output", type=local_path, metavar="FILE", help="default: where models look for it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes costs and rates over those of the same device type, dtype and mode in the file."""
    dtypes = [getattr(torch, name) for name in dict.fromkeys(args.dtype)]
    return tune(args.device, dtypes, args.keys, args.repeats, args.output).facts
