"""`python -m train CONFIG [section.key=value ...] [run_dir=PATH]`, alone or under torchrun."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from train.distributed import lost_process
from train.loop import train
from train.trainer import DivergedError
from vitreuse.config import ConfigError, load_config
from vitreuse.console import (
    DONE,
    FAILED,
    STOPPED,
    WRONG_INPUT,
    OtherRankError,
    is_first_of_machine,
    is_first_rank,
    print_error,
)
from vitreuse.data import DataError
from vitreuse.local import refuse_url

USAGE = "usage: python -m train CONFIG [section.key=value ...] [run_dir=PATH]"


def main(arguments: list[str]) -> int:
    """Trains the experiment that the command line names; the exit code.

    What is wrong with the command line or the config, the ranks of a machine all see before they have met: the first of
    them prints it. A loss that diverges, all ranks see together. After that every other error is printed by the rank
    that raises it, see eval.distributed.Ranks.together.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\nkeys and their meaning: vitreuse/config.py; experiments: configs/")
        return DONE
    try:
        path, overrides, run_dir = _parse(arguments)
        config = load_config(path, overrides)
    except ConfigError as error:
        if is_first_of_machine():
            print_error("train", error)
        return WRONG_INPUT
    try:
        return DONE if train(config, run_dir, shlex.join([*_launcher(), *arguments])) else STOPPED
    except (ConfigError, DataError, OtherRankError) as error:
        print_error("train", error)
        return WRONG_INPUT
    except DivergedError as error:
        if is_first_rank():
            print_error("train", error)
    except OSError as error:
        again = f"what {run_dir} held before is whole, so cure this and run it again to go on."
        print_error("train", OSError(f"{error}: {again}"))
    except RuntimeError as error:
        reason = lost_process(error)
        if reason is None:
            raise
        print_error("train", RuntimeError(reason))
    return FAILED


def _parse(arguments: list[str]) -> tuple[Path, list[str], Path]:
    """The config, the overrides and the run folder of a command line."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"no config is given; {USAGE}.")
    path = Path(arguments[0])
    run_dir = Path("runs") / path.stem
    overrides = []
    for argument in arguments[1:]:
        if argument.startswith("run_dir="):
            text = argument.removeprefix("run_dir=")
            refuse_url("run_dir", text)
            run_dir = Path(text)
        else:
            overrides.append(argument)
    return path, overrides, run_dir


def _launcher() -> list[str]:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return ["python", "-m", "train"]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", world_size), "-m", "train"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
