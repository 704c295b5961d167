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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import timm
import torch
from rich.console import RenderableType

import vitreuse
from vitreuse.config.recipe import DEVICES, DTYPES
from vitreuse.io.errors import ConfigError
from vitreuse.io.file_names import for_terminal
from vitreuse.io.process import DONE, INTERRUPTED, WRONG_INPUT, is_first_of_machine, is_first_rank, print_error
from vitreuse.io.tables import as_text
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
        text = result if isinstance(result, str) else as_text(result, sys.stdout.isatty())
        print(for_terminal(text), end="", flush=True)
    except OSError as error:
        # Python writes the rest when it ends, and would print a traceback then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            text = f"standard output cannot be written ({error.strerror}): send it somewhere else."
            raise OSError(text) from error
