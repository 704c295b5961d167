"""What the project's commands have in common: arguments, --json, progress, one-sentence errors, exit codes.

A command is a module with ``HELP``, ``add_arguments(parser)``, which declares its own arguments, ``run(args)``, which
returns what --json prints, and ``render(result)``, which makes of it what a terminal shows; it may have an ``EPILOG``,
shown below its help as it is. What a user can cause, run raises as a ValueError or OSError of one sentence.
"""

import argparse
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import vitreuse
from vitreuse.config.recipe import DEVICES, DTYPES
from vitreuse.io.errors import ConfigError
from vitreuse.io.file_names import for_terminal
from vitreuse.io.process import DONE, INTERRUPTED, WRONG_INPUT, is_first_of_machine, is_first_rank, print_error
from vitreuse.io.urls import FETCHED, refuse_url

SHELLS = ("bash", "zsh", "fish", "tcsh")
MEASURED_DTYPES = DTYPES[:2]  # in which eval measures models


class HelpText(argparse.HelpFormatter):
    """argparse's help, with paragraphs of several lines left as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """One sentence for wrong arguments, without the usage text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpText, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help.\n" if is_first_of_machine() else None)


class PrintCompletion(argparse.Action):
    """Prints the script by which a shell completes the command, made once: to start the command takes seconds."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab, which pip install 'vitreuse[completion]' installs")
        for command in _all_parsers(parser):
            for action in command._actions:
                if action.type is local_path or action.metavar in ("MODEL", "TARGET"):  # a name, or a path
                    vars(action)["complete"] = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit(DONE)


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        for inner in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from _all_parsers(inner)


def run_command(
    prog: str, description: str, commands: Mapping[str, ModuleType], shared: Parser, argv: Sequence[str] | None
) -> int:
    """Runs one of the commands: its result on standard output, progress and errors on standard error; the exit code.

    Under torchrun the first rank prints the result and the first of each machine what is wrong with the arguments; any
    other error is printed by the rank that raises it.

    ``shared``, made with add_help=False, has the arguments that every command takes besides --json; where ``argv`` is
    None, they are those of the process.
    """
    shared.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=versions(), help="print versions and exit")
    if " " not in prog:  # what a shell can complete
        meaning = "print what completes this command in a shell, see docs/plans.md"
        parser.add_argument("--print-completion", action=PrintCompletion, choices=SHELLS, help=meaning)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        described, epilog = f"{command.HELP[0].upper()}{command.HELP[1:]}.", getattr(command, "EPILOG", None)
        texts = {"help": command.HELP, "description": described, "epilog": epilog}
        command.add_arguments(subparsers.add_parser(name, **texts, parents=[shared]))
    args = parser.parse_args(argv)
    command = commands[args.command]
    try:
        with interrupted_by_sigterm(), redirect_stdout(sys.stderr):  # what a library prints is not to be in the JSON
            result = command.run(args)
        if is_first_rank():
            _print_whole(json.dumps(result) + "\n" if args.json else command.render(result))
    except (ValueError, OSError) as error:
        print_error(f"{prog} {args.command}", error)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"{prog} {args.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return DONE


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does, so that temporary folders go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def versions() -> str:
    """The versions of this package, and of those by which it computes."""
    named = [f"{package.__name__} {package.__version__}" for package in (vitreuse, torch, timm)]
    return ", ".join([*named, f"Python {platform.python_version()}"])


def table_of(headings: Iterable[str], rows: Iterable[Iterable[str]], text: Collection[str]) -> Table:
    """A table of these rows: columns whose heading is in ``text`` to the left, all others, of numbers, to the right."""
    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in text else "right")
    for row in rows:
        table.add_row(*row)
    return table


def titled(title: str, table: Table, *below: str | Table) -> Group:
    """A table under its title and over others and remarks, which may be wider than it is."""
    above = [Text(title, "table.title")] if title else []
    return Group(*above, table, *(Text(part, "table.caption") if isinstance(part, str) else part for part in below))


def positive(text: str) -> int:
    """A whole number above 0, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def local_path(text: str) -> Path:
    """A path of this machine, from the command line; a shell leaves the ~ in --output=~/x for us to read."""
    try:
        refuse_url("the path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(os.path.expanduser(text))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declares --device, a name that choose_device takes."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")


def add_dtype(
    parser: argparse.ArgumentParser, of: str, choices: Sequence[str] = DTYPES, default: str | None = "float32"
) -> None:
    """Declares --dtype of something, float32 where it is left out, which a default of None lets the command see."""
    parser.add_argument("--dtype", choices=choices, default=default, help=f"of the {of}; default: float32")


def add_any_of(parser: argparse.ArgumentParser, flag: str, choices: Iterable[str], default: list[str]) -> None:
    """Declares an option that takes one or more of the choices."""
    meaning, metavar = f"any of {', '.join(choices)}; default: {' '.join(default)}", flag.removeprefix("--").upper()
    parser.add_argument(flag, nargs="+", choices=[*choices], default=default, metavar=metavar, help=meaning)


def add_count(parser: argparse.ArgumentParser, flag: str, default: int, meaning: str) -> None:
    """Declares how many there are of something: --repeats, --batch-size."""
    parser.add_argument(flag, type=positive, default=default, metavar="N", help=f"{meaning}; default: %(default)s")


def add_image_size(parser: argparse.ArgumentParser, kind: Callable[[str], int] = positive) -> None:
    """Declares --image-size."""
    parser.add_argument("--image-size", type=kind, metavar="PX", help="side of the image (default: the model's)")


def add_plan(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Declares --plan."""
    default = "" if required else " (default: the model's)"
    parser.add_argument("--plan", required=required, metavar="TEXT", help=f"such as 'exact reuse*6 exact*5'{default}")


def add_output(parser: argparse.ArgumentParser, meaning: str, required: bool = False) -> None:
    """Declares -o, the folder that a command writes."""
    parser.add_argument("-o", "--output", type=local_path, required=required, metavar="DIR", help=meaning)


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Declares --allow, which alone lets data come from URLs: no config can."""
    meaning = "let data come from URLs of this kind; pipe runs a shell command; may be given several times"
    parser.add_argument("--allow", action="append", choices=FETCHED, default=[], help=meaning)


def _print_whole(result: RenderableType) -> None:
    """Prints to the last byte, or until a reader such as head has seen enough.

    Raises:
        OSError: Standard output takes no more.
    """
    try:
        print(for_terminal(result if isinstance(result, str) else _as_text(result)), end="", flush=True)
    except OSError as error:
        # Python writes the rest when it ends, and would print a traceback then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            text = f"standard output cannot be written ({error.strerror}): send it somewhere else."
            raise OSError(text) from error


def _as_text(renderable: RenderableType) -> str:
    """What standard output shows: within a terminal's width, and whatever else it is as wide as it needs."""
    console = Console(markup=False, emoji=False)  # brackets and colons in a name are its own
    if sys.stdout.isatty():
        renderable = fitted(renderable, console)
    else:
        console.width = max(_measured(renderable, console).maximum, console.width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def fitted(renderable: RenderableType, console: Console) -> RenderableType:
    """The same within a console's width, nothing lost: a table with its cells wrapped between words and its columns
    closer together, or where that does not do, each row as a paragraph."""
    if isinstance(renderable, Group):
        return Group(*(fitted(part, console) for part in renderable.renderables))
    if not isinstance(renderable, Table) or _measured(renderable, console).maximum <= console.width:
        return renderable
    cells = [[_measured(cell, console) for cell in (column.header, *column.cells)] for column in renderable.columns]
    least = [max(cell.minimum for cell in column) for column in cells]
    most = [max(cell.maximum for cell in column) for column in cells]
    spare = console.width - sum(least) - (len(least) - 1)  # a space between columns
    if spare < 0:
        return _as_paragraphs(renderable)
    renderable.padding, renderable.pad_edge, renderable.show_edge = 0, False, False
    for number in sorted(range(len(least)), key=lambda number: most[number] - least[number]):
        given = min(spare, most[number] - least[number])
        spare -= given
        column = renderable.columns[number]
        column.width, column.no_wrap, column.overflow = least[number] + given, False, "fold"
    return renderable


def _measured(renderable: RenderableType, console: Console) -> Measurement:
    """How wide something may be, from what can be wrapped no more to what need not be."""
    return Measurement.get(console, console.options.update(width=1000), renderable)


def _as_paragraphs(table: Table) -> Group:
    """The first cell of each row as a line, and below it all others that hold something, after their headings."""
    headings = [str(column.header) for column in table.columns]
    parts: list[RenderableType] = []
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        shown = [f"{heading} {cell}" for heading, cell in zip(headings[1:], others, strict=True) if str(cell)]
        parts += [Text(f"{headings[0]} {first}".strip()), Padding(Text(", ".join(shown)), (0, 0, 1, 2))]
    return Group(*parts, *([] if table.caption is None else [Text(str(table.caption), "table.caption")]))
