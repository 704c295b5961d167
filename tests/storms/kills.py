"""Runs that are killed, stopped, or moved to another number of ranks end as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections import defaultdict
from itertools import product

from pictures import write_pictures
from processes import Run, Start, check
from stage import CHECKPOINT_STEPS, NUM_TRAIN, NUM_VAL, SEED, SHARDED, SHORTER, Stage

NUM_RANDOM_KILLS, NUM_AIMED_KILLS, NUM_KILLS_OF_TWO, NUM_STOPS = 20, 6, 5, 3
LONGEST_PAUSE_S = 0.03  # after a step is logged: two or three more
RANKS, WORKERS = (1, 2, 3), (0, 1, 2, 3, 4)
TOLERANCE = 1e-4  # relative, between one rank and two: the sums of a step are taken in another order


def killed_at_random_moments(stage: Stage) -> str:
    """SIGKILL after random steps and pauses, and at the sight of a checkpoint's temporary file."""
    run, rng = stage.run("killed"), random.Random(SEED)
    steps = sorted(rng.sample(range(1, 190), NUM_RANDOM_KILLS + NUM_AIMED_KILLS))
    aimed = set(rng.sample(steps, NUM_AIMED_KILLS))
    num_half_written = num_redone = 0
    for step in steps:
        start = run.start()
        start.wait_for_step(step)
        if step in aimed:
            _wait_for_checkpoint_in_writing(start)
        else:
            time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
        check(start.kill() == -signal.SIGKILL, f"{run.name} had ended before it was killed after step {step}")
        lost = run.last_step - run.saved_step
        check(0 <= lost < 2 * CHECKPOINT_STEPS, f"a kill after step {run.last_step} left checkpoint {run.saved_step}")
        num_half_written += bool(start.half_written)
        num_redone += lost
    check(num_half_written, "no kill came while a checkpoint was written")
    run.complete()
    run.check_equals(stage.whole)
    left = list(run.folder.rglob(".*.tmp"))
    check(not left, f"{run.name} ended with {left} in its folder")
    return (
        f"{len(steps)} kills, {NUM_AIMED_KILLS} aimed at a checkpoint in writing; {num_half_written} left half a file, "
        f"{num_redone} steps were done again; weights, moving average, optimizer, curve and ledger equal to the bit"
    )


def _wait_for_checkpoint_in_writing(start: Start) -> None:
    pattern = f"checkpoints/step-*/.state.pt.{start.process.pid}.tmp"
    start.wait_until(lambda: any(start.run.folder.glob(pattern)), "its next checkpoint", pause_s=0)


def two_ranks_killed_at_random_moments(stage: Stage) -> str:
    """SIGKILL to the launcher of two ranks and all that it started."""
    return _killed_on_two(stage.run("killed-on-two", "everything", SHORTER), stage.whole_on_two)


def two_ranks_of_half_a_model_killed_at_random_moments(stage: Stage) -> str:
    """The same under FSDP2, whose two ranks share out weights, optimizer and moving average."""
    return _killed_on_two(stage.run("killed-sharded", "everything", SHORTER, SHARDED), stage.sharded)


def _killed_on_two(run: Run, undisturbed: Run) -> str:
    rng = random.Random(SEED)
    for step in sorted(rng.sample(range(1, 90), NUM_KILLS_OF_TWO)):
        start = run.start(ranks=2)
        start.wait_for_step(step)
        time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
        check(start.kill() == -signal.SIGKILL, f"{run.name} had ended before it was killed after step {step}")
        lost = run.last_step - run.saved_step
        check(0 <= lost < 2 * CHECKPOINT_STEPS, f"a kill after step {run.last_step} left checkpoint {run.saved_step}")
    run.complete(ranks=2)
    run.check_equals(undisturbed)
    return f"{NUM_KILLS_OF_TWO} kills of both; everything equal to the bit"


def stopped_by_sigterm_to_torchrun(stage: Stage) -> str:
    """SIGTERM to the launcher of two ranks: the step in hand is finished and saved."""
    run, rng = stage.run("stopped", "everything", SHORTER), random.Random(SEED)
    for step in sorted(rng.sample(range(1, 90), NUM_STOPS)):
        start = run.start(ranks=2)
        start.wait_for_step(step)
        time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
        start.end(signal.SIGTERM)
        check(run.record["status"] == "stopped", f"{run.name} is {run.record['status']} after SIGTERM: {start.said}")
        check(run.saved_step == run.last_step, f"stopped after step {run.last_step}, saved after {run.saved_step}")
        check("Traceback" not in start.said, f"{run.name} said: {start.said}")
    run.complete(ranks=2)
    run.check_equals(stage.whole_on_two)
    return f"{NUM_STOPS} stops, each with its last step saved; everything equal to the bit"


def moved_from_one_rank_to_two_and_back(stage: Stage) -> str:
    """Stopped by SIGTERM on one rank, killed after a checkpoint on two, completed on one."""
    return _moved(stage, stage.run("moved", "plain"))


def moved_to_two_ranks_of_half_a_model_and_back(stage: Stage) -> str:
    """The same under FSDP2."""
    return _moved(stage, stage.run("moved-sharded", "plain", SHARDED))


def _moved(stage: Stage, run: Run) -> str:
    alone = run.start()
    alone.wait_for_step(15)
    check(alone.end(signal.SIGTERM) == 75, f"{run.name} was not stopped: {alone.said}")
    first = run.last_step
    both = run.start(ranks=2)
    both.wait_until(lambda: run.saved_step > first + CHECKPOINT_STEPS, "its second checkpoint")
    both.kill()
    second = run.saved_step
    run.complete()
    by_two = {record["step"] for record in run.records("ledger") if record["rank"] == 1}
    check(by_two == set(range(first + 1, second + 1)), f"two ranks did the steps {by_two}, not {first + 1} to {second}")
    check(_keys(run) == _keys(stage.plain), f"{run.name} and {stage.plain.name} saw other samples in some step")
    apart = max(_relative_differences(run, stage.plain))
    check(apart < TOLERANCE, f"{run.name} and {stage.plain.name} differ by {apart:.1e}, more than {TOLERANCE}")
    return f"steps {first + 1} to {second} on two ranks; samples of every step the same, loss within {apart:.0e}"


def every_image_is_seen_once_an_epoch(stage: Stage) -> str:
    """By any number of ranks and workers, from fewer shards than workers, with a last batch that is smaller."""
    write_pictures(stage.folder / "few-shards", NUM_TRAIN, NUM_VAL, per_shard=20)
    settings = (f"data.root={stage.folder / 'few-shards'}", "train.epochs=2", "eval.every_epochs=1")
    everything = sorted(f"train-{number}" for number in range(NUM_TRAIN))
    for ranks, workers in product(RANKS, WORKERS):
        run = stage.run(f"once-{ranks}-{workers}", "plain", *settings, f"data.num_workers={workers}")
        run.complete(ranks)
        keys = [*_keys(run).values()]
        for epoch in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            seen = sorted(key for step in epoch for key in step)
            check(seen == everything, f"{run.name} saw in an epoch {seen}")
        counted = [record["n"] for record in run.records() if "n" in record]
        check(counted == [NUM_VAL] * 3, f"{run.name} evaluated {counted} images")
    return f"{len(RANKS)} numbers of ranks x {len(WORKERS)} of workers, 3 shards, {NUM_TRAIN} images in batches of 8"


def _keys(run: Run) -> dict[int, list[str]]:
    """The samples of each step, over all ranks."""
    keys = defaultdict(list)
    for record in run.records("ledger"):
        keys[record["step"]] += record["keys"]
    return {step: sorted(found) for step, found in keys.items()}


def _relative_differences(run: Run, other: Run) -> list[float]:
    """Of losses, gradient norms and learning rates, over both curves."""
    names = ("loss", "grad_norm", "lr", "train_loss")
    mine, others = ([r[name] for r in side.records() for name in names if name in r] for side in (run, other))
    return [abs(a - b) / abs(b) for a, b in zip(mine, others, strict=True)]


SCENARIOS = (
    killed_at_random_moments,
    two_ranks_killed_at_random_moments,
    two_ranks_of_half_a_model_killed_at_random_moments,
    stopped_by_sigterm_to_torchrun,
    every_image_is_seen_once_an_epoch,
    moved_from_one_rank_to_two_and_back,
    moved_to_two_ranks_of_half_a_model_and_back,
)
