"""The ``vitreuse`` command: what a name or a plan means, what this device makes of it, trained models, and shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vitreuse.cli import convert, export, fold, models, plan, search, shards, similarity, tune
from vitreuse.cli.console import Parser, run_command

COMMANDS = {
    "models": models,
    "plan": plan,
    "fold": fold,
    "tune": tune,
    "shards": shards,
    "similarity": similarity,
    "search": search,
    "convert": convert,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    description = "Vision transformers that exploit redundancy in attention."
    return run_command("vitreuse", description, COMMANDS, Parser(add_help=False), argv)


if __name__ == "__main__":
    sys.exit(main())
