"""What a command asks about its own process: its device, its rank, where its sentences go, and its exit codes.

torchrun starts several processes with the same arguments, its ranks; without it the one there is counts as the first.
"""

from __future__ import annotations

import os
import resource
import sys

import torch

from vitreuse.io.errors import ConfigError

DONE, FAILED, WRONG_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130  # exit codes; 75 asks to be started again


class OtherRankError(ValueError):
    """An error that another rank met and prints: this one ends with it too, and in silence."""


def choose_device(name: str) -> torch.device:
    """The device of a name: auto takes cuda where there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"there is no CUDA device for the device {name}: use cpu or auto.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device: use cpu, cuda or auto.") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"there is no device {name}, of {count}: use cuda:{count - 1} or less.")
    return device


def max_open_files() -> int:
    """How many files this process may hold open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def allow_open_files(number: int = 1 << 16) -> None:
    """Lets this process and those that it starts hold so many files open, or as many as the system grants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    granted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft < granted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all, under torchrun or alone."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_machine() -> bool:
    """Whether this process speaks for those of its machine, which were all started with the same arguments."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def print_error(prog: str, error: Exception) -> None:
    """Prints an error as one line on standard error; nothing where another rank prints it."""
    if not isinstance(error, OtherRankError):
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)


def print_note(text: str) -> None:
    """Prints a line on standard error that no other rank repeats."""
    if is_first_rank():
        print(text, file=sys.stderr)
