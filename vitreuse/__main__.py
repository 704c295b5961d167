"""The ``vitreuse`` command: the table of its commands, each a file in cli/."""

import sys
from collections.abc import Sequence

from vitreuse.cli import convert, export, fold, models, plan, search, shards, similarity, tune
from vitreuse.cli.console import Parser, run_command

MODULES = (models, plan, fold, tune, shards, similarity, search, convert, export)  # in the order of the help
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    description = "Vision transformers that exploit redundancy in maps, tokens, hidden units and layers."
    return run_command("vitreuse", description, COMMANDS, Parser(add_help=False), argv)


if __name__ == "__main__":
    sys.exit(main())
