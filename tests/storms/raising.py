"""`python -m train ARGUMENTS` in which one rank raises an error: raising.py RANK STEP PLACE ERROR ARGUMENTS.

PLACE is where: in the step itself, in its loss, in a worker of the loader, in an evaluation, in a worker of that, while
a checkpoint is half written, or in a callback that logs; stuck is in the step while the workers hang, and alone while
the other ranks hang outside any collective; silent raises nothing and hangs. It is raised at
the first of them after so many steps; in the loader after so many of a worker's batches.
"""

import os
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

import eval.labelled
import train.checkpoint
from train.__main__ import run_as_program
from train.loop import _Loop
from train.pipeline import TrainingImages
from train.run import RunFolder
from train.trainer import Trainer

ERRORS: dict[str, BaseException] = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "assertion": AssertionError(),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(0),
    "runtime": RuntimeError("a bug\nof several lines"),
    "key": KeyError("blocks.0"),
    "data": ValueError("a sample of no use"),
    "disk": OSError(28, "No space left on device"),
}
rank, step, place, error = os.environ.get("RANK", "0"), int(sys.argv[2]), sys.argv[3], ERRORS[sys.argv[4]]
steps_done = 0


def raising(function: Callable[..., Any], is_due: Callable[..., bool], after: bool = False) -> Callable[..., Any]:
    """The function, which raises the error when it is due; after what it does or instead of it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        due = is_due(*args)
        if due and not after:
            raise error
        result = function(*args, **kwargs)
        if due:
            raise error
        return result

    return call


def hanging(function: Callable[..., Any], is_due: Callable[..., bool]) -> Callable[..., Any]:
    """The function, which does not come back once it is due."""

    def call(*args: Any) -> Any:
        if is_due(*args):
            time.sleep(3600)
        return function(*args)

    return call


def counted(trainer: Trainer, *args: Any) -> Any:
    """Trainer.train_step, which tells the others how far the run is."""
    global steps_done
    steps_done = trainer.counters.step
    result = train_step(trainer, *args)
    steps_done = trainer.counters.step
    return result


def enough(*_: Any) -> bool:
    """Whether so many steps are done."""
    return steps_done >= step


train_step, Trainer.train_step = Trainer.train_step, counted
calls = count(1)
if rank == sys.argv[1]:
    if place in ("step", "stuck", "alone"):
        Trainer.train_step = raising(counted, lambda trainer, *_: trainer.counters.step >= step)
    if place == "stuck":
        # the epoch's last batch, where a worker has two of three
        TrainingImages.__getitems__ = hanging(TrainingImages.__getitems__, lambda *_: next(calls) >= step)
    elif place == "silent":
        Trainer.train_step = hanging(counted, lambda trainer, *_: trainer.counters.step >= step)
    elif place == "loss":
        Trainer._loss = raising(Trainer._loss, enough)
    elif place == "loader":
        TrainingImages.__getitems__ = raising(TrainingImages.__getitems__, lambda *_: next(calls) > step)
    elif place == "evaluation":
        _Loop._look = raising(_Loop._look, enough)
    elif place == "evaluation_worker":
        eval.labelled._Images.__getitem__ = raising(eval.labelled._Images.__getitem__, lambda *_: next(calls) > step)
    elif place == "saving" and rank == "0":
        train.checkpoint.save_tensors = raising(train.checkpoint.save_tensors, enough, after=True)
    elif place == "saving":
        Trainer.state_dict = raising(Trainer.state_dict, enough)
    elif place == "logging":
        RunFolder.log = raising(RunFolder.log, enough)
elif place == "alone":
    Trainer.train_step = hanging(counted, lambda trainer, *_: trainer.counters.step >= step)
run_as_program(sys.argv[5:])
