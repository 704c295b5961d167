"""The ``vitreuse`` command: the table of its commands, each a file in cli/."""

import sys
from collections.abc import Sequence

from vitreuse.cli import convert, export, fold, models, plan, search, shards, similarity, tune
from vitreuse.cli.console import Parser, run_command
from vitreuse.io.checkout import PROGRAMS, of_checkout
from vitreuse.io.process import WRONG_INPUT, print_error

MODULES = (models, plan, fold, tune, shards, similarity, search, convert, export)  # in the order of the help
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    word = next(iter(sys.argv[1:] if argv is None else argv), None)
    if word in PROGRAMS:
        print_error("vitreuse", ValueError(f"{word} is no command but python -m {word}{of_checkout()}."))
        return WRONG_INPUT
    description = (
        "Vision transformers that exploit redundancy in maps, tokens, hidden units and layers. "
        f"They are trained and evaluated by python -m train and python -m eval{of_checkout()}."
    )
    return run_command("vitreuse", description, COMMANDS, Parser(add_help=False), argv)


if __name__ == "__main__":
    sys.exit(main())
