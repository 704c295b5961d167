"""`python -m train CONFIG [section.key=value ...] [run_dir=PATH]`, alone or under torchrun: trains, or checks a run."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import clear_frames, print_exception
from typing import NoReturn

import torch

from train.distributed import end_process, lost_process, reason
from train.doctor import doctor
from train.loop import train
from train.trainer import DivergedError
from train.verify import verify_resume
from vitreuse.cli.console import Parser, add_allow, versions
from vitreuse.config import ConfigError
from vitreuse.data import DataError
from vitreuse.files.networks import load_experiment
from vitreuse.io.errors import nearest
from vitreuse.io.process import (
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    WRONG_INPUT,
    OtherRankError,
    is_first_of_machine,
    print_error,
    print_note,
)
from vitreuse.io.urls import refuse_idle_allow, refuse_url

HELP = """usage: python -m train CONFIG [section.key=value ...] [run_dir=PATH]
                       [--allow KIND] [--doctor|--verify-resume]

Trains the experiment of a YAML file; under torchrun on several devices.

--allow KIND     let data.root be a URL of this kind: http, https, or pipe,
                 which runs a shell command; no config can
--doctor         train nothing: check data, memory, disk and speed, and predict
                 the hours
--verify-resume  train a few steps in a temporary folder, and prove that a
                 resumed run is the same to the bit
--version        print versions and exit

keys and their meaning: vitreuse/config/; experiments: configs/"""
USAGE = " ".join(HELP.partition("\n\n")[0].split())
OPTIONS = {"--doctor": doctor, "--verify-resume": verify_resume}  # instead of training; they leave the run folder alone


def main(arguments: list[str]) -> int:
    """Trains the experiment that the command line names; the exit code.

    What is wrong with the command line or the config, the ranks of a machine all see before they have met: the first of
    them prints it. A loss that diverges, all ranks see together. After that every other error is printed by the rank
    that raises it, see eval.distributed.Ranks.together.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return DONE
    if "--version" in arguments:
        print(versions())
        return DONE
    try:
        path, overrides, run_dir, option, allow = _parse(arguments)
        config = load_experiment(path, overrides)
        refuse_idle_allow(allow, [config.data.root])
    except ConfigError as error:
        if is_first_of_machine():
            print_error("train", error)
        return WRONG_INPUT
    try:
        if option is not None:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # which lets temporary folders go
            return OPTIONS[option](config, run_dir, allow)
        return DONE if train(config, run_dir, shlex.join([*_launcher(), *arguments]), allow) else STOPPED
    except KeyboardInterrupt:  # which training takes for a signal to stop
        print_note("train: interrupted.")
        return INTERRUPTED
    except (ConfigError, DataError, OtherRankError) as error:
        print_error("train", error)
        clear_frames(error.__traceback__)  # they hold loaders, whose workers outlive SIGTERM and so a caller of this
        return WRONG_INPUT
    except BaseException as error:
        _explain(error, run_dir)
        clear_frames(error.__traceback__)
        return FAILED


def run_as_program(arguments: list[str]) -> NoReturn:
    """Trains as main does, and ends this process however that went; nothing that training started outlives it."""
    try:
        code = main(arguments)
    except SystemExit as error:  # the parser's
        code = error.code if isinstance(error.code, int) else FAILED
    end_process(code)


def _explain(error: BaseException, run_dir: Path) -> None:
    """Prints what ended training, and the way out; of an error that is nobody's input where it came from, too."""
    way_out = f"what {run_dir} held before is whole, so cure this and run it again to go on."
    lost = lost_process(error) if isinstance(error, RuntimeError) else None
    if isinstance(error, DivergedError):
        print_note(f"train: {error}")  # which all ranks raise
    elif lost is not None:
        print_error("train", RuntimeError(lost))
    elif isinstance(error, OSError):
        print_error("train", OSError(f"{reason(error)}: {way_out}"))
    elif isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        less = "raise train.accumulation_steps, set train.grad_checkpointing, or lower eval.batch_size"
        print_error("train", RuntimeError(f"{reason(error).rstrip('.')}: {less}; {way_out}"))
    else:
        print_exception(error)
        print_error("train", RuntimeError(f"{reason(error).rstrip('.')}: {way_out}"))


def _parse(arguments: list[str]) -> tuple[Path, list[str], Path, str | None, Sequence[str]]:
    """The config, the overrides, the run folder, the option and the kinds of URL allowed of a command line."""
    parser = Parser("train", add_help=False, allow_abbrev=False)
    add_allow(parser)
    given, arguments = parser.parse_known_args(arguments)
    options = [argument for argument in arguments if argument.startswith("--")]
    for unknown in (argument for argument in options if argument not in OPTIONS):
        raise ConfigError(f"{unknown} is not an option{nearest(unknown, [*OPTIONS, '--allow']) or f'; {USAGE}.'}")
    if len(options) > 1:
        raise ConfigError(f"{' and '.join(options)}: give one at a time.")
    arguments = [argument for argument in arguments if argument not in OPTIONS]
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"no config is given; {USAGE}.")
    path = Path(os.path.expanduser(arguments[0]))
    run_dirs = [argument.removeprefix("run_dir=") for argument in arguments[1:] if argument.startswith("run_dir=")]
    for text in run_dirs:
        refuse_url("run_dir", text)
    run_dir = Path(os.path.expanduser(run_dirs[-1])) if run_dirs else Path("runs") / path.stem
    overrides = [argument for argument in arguments[1:] if not argument.startswith("run_dir=")]
    return path, overrides, run_dir, options[0] if options else None, given.allow


def _launcher() -> list[str]:
    """How this process was started, without the address at which several machines met."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return ["python", "-m", "train"]
    num_nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    nodes = [] if num_nodes == "1" else ["--nnodes", num_nodes]
    return ["torchrun", *nodes, "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", world_size), "-m", "train"]


if __name__ == "__main__":
    run_as_program(sys.argv[1:])
