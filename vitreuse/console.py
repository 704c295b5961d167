"""What the project's commands have in common: arguments, --json, one-sentence errors, exit codes.

A command is a module with ``HELP``, ``add_arguments(parser)``, ``run(args)``, which returns what --json prints, and
``render(result)``, which makes of it what a terminal shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from types import ModuleType
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.measure import Measurement

DONE, WRONG_INPUT = 0, 2


class Parser(argparse.ArgumentParser):
    """One sentence for wrong arguments, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help.\n")


def run_command(
    prog: str, description: str, commands: Mapping[str, ModuleType], shared: Parser, argv: Sequence[str] | None
) -> int:
    """Runs one of the commands: its result on standard output, progress and errors on standard error; the exit code.

    Args:
        prog: how the program is called.
        description: what it is for.
        commands: the commands by name.
        shared: arguments that every command takes, besides --json; made with add_help=False.
        argv: the arguments, those of the process when None.
    """
    shared.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser = Parser(prog=prog, description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, parents=[shared]))
    args = parser.parse_args(argv)
    command = commands[args.command]
    try:
        with redirect_stdout(sys.stderr):  # whatever a library prints must not end up inside the JSON
            result = command.run(args)
    except (ValueError, OSError) as error:
        print_error(f"{prog} {args.command}", error)
        return WRONG_INPUT
    if is_first_rank():
        print(json.dumps(result)) if args.json else print_whole(command.render(result))
    return DONE


def is_first_rank() -> bool:
    """Whether this process is the one that speaks, under torchrun or alone."""
    return os.environ.get("RANK", "0") == "0"


def print_error(prog: str, error: Exception) -> None:
    """Prints an error as one line on standard error."""
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)


def print_whole(renderable: RenderableType) -> None:
    """Prints on standard output as wide as it needs: a narrow terminal wraps lines, a file gets them whole."""
    console = Console()
    width = Measurement.get(console, console.options.update(width=1000), renderable).maximum
    Console(width=max(width, console.width)).print(renderable)
