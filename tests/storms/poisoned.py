"""`python -m train ARGUMENTS` with images of NaN on one rank for some steps: poisoned.py RANK FIRST LAST ARGUMENTS."""

import math
import os
import sys

from train.__main__ import run_as_program
from train.pipeline import Batch
from train.trainer import StepResult, Trainer

rank, first, last = map(int, sys.argv[1:4])
train_step = Trainer.train_step


def poisoned_step(trainer: Trainer, batch: Batch, stop: bool) -> StepResult:
    """Trainer.train_step on images of NaN where they are due."""
    if first <= trainer.counters.step + 1 <= last:
        batch = batch._replace(images=batch.images * math.nan)
    return train_step(trainer, batch, stop)


if os.environ["RANK"] == str(rank):
    Trainer.train_step = poisoned_step
run_as_program(sys.argv[4:])
