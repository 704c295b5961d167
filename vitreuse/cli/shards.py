"""``vitreuse shards {digits|index|verify|info} FOLDER``: write, index and check WebDataset shards."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from vitreuse.data import build_index, prepare_source, shards_info, verify_shards

HELP = "write the digits as shards; index, verify or describe a folder of shards"
VERBS = {
    "digits": "write scikit-learn's digits as FOLDER/train and FOLDER/val",
    "index": "index the WebDataset tars of a folder",
    "verify": "compare every byte of a folder's shards with their index; exit code 2 if they differ",
    "info": "sum up a folder of indexed shards",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own arguments."""
    lines = "; ".join(f"{verb}: {help_text}" for verb, help_text in VERBS.items())
    parser.add_argument("verb", choices=VERBS, metavar="{" + "|".join(VERBS) + "}", help=lines)
    parser.add_argument("folder", metavar="FOLDER")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the verb says and sums up the folders that it concerns.

    Raises:
        ValueError: the data are not whole, or cannot be read or written.
    """
    folders = [args.folder]
    if args.verb == "digits":
        prepare_source("digits", args.folder)
        folders = [str(Path(args.folder) / split) for split in ("train", "val")]
    elif args.verb == "index":
        build_index(args.folder)
    elif args.verb == "verify" and (problems := verify_shards(args.folder)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return {"folders": [dataclasses.asdict(shards_info(folder)) for folder in folders]}


def render(result: dict[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table("folder")
    for heading in ("samples", "classes", "shards", "samples a shard", "MiB"):
        table.add_column(heading, justify="right")
    for split in result["folders"]:
        smallest, largest = split["smallest_shard"], split["largest_shard"]
        a_shard = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        counts = (str(split[f"num_{what}"]) for what in ("samples", "classes", "shards"))
        table.add_row(split["folder"], *counts, a_shard, f"{split['num_bytes'] / 2**20:.2f}")
    return table
