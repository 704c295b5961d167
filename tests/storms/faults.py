"""What training stands on breaks: it goes on with a warning, or stops with one sentence and loses nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import CHECKOUT, PATIENCE_S, Run, Start, check, children
from stage import NUM_TRAIN, SHORTER, Stage

from vitreuse.data import load_index

POISONED = str(CHECKOUT / "tests/storms/poisoned.py")
SMALL_SHM = str(CHECKOUT / "tests/storms/small_shm.py")
RAISING = str(CHECKOUT / "tests/storms/raising.py")
ENDED_S = 20  # on two busy cores; the time-out of a collective is 30 minutes
DISK_BYTES, FREE_BYTES = 16 << 20, 64 << 10  # of a full disk free is room for logs and none for a checkpoint
EQUAL = "run again, it ended equal to the bit"


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """A mount, which ends with the block."""
    result = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    check(not result.returncode, f"{result.stderr.strip()}: run this as root, or with `unshare -rm` before it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _started(run: Run, ranks: int = 1, step: int = 10) -> Start:
    """A start of a run that has done some steps and one checkpoint at least."""
    start = run.start(ranks)
    start.wait_for_step(step)
    start.wait_until(lambda: run.saved_step, "its first checkpoint")
    return start


def the_disk_is_full(stage: Stage) -> str:
    """The folder's disk fills up while training; the next checkpoint finds no room."""
    run = stage.run("full-disk")
    run.folder.mkdir()
    with mounted(run.folder, "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs"):
        start = _started(run)
        ballast = run.folder / ".ballast"
        room = os.statvfs(run.folder)
        ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - FREE_BYTES))
        start.check_fails(1, "No space left on device", str(run.folder), "run it again")
        saved = run.saved_step
        check(saved and not start.half_written, f"{run.name} kept checkpoint {saved} and {start.half_written}")
        ballast.unlink()
        said = run.complete()
        check(f"goes on after step {saved} " in said, f"{run.name} had saved step {saved} and said: {said}")
        run.check_equals(stage.whole)
    return f"one sentence, checkpoint {saved} whole; {EQUAL}"


def the_folder_cannot_be_written(stage: Stage) -> str:
    """A read-only file system refuses a run before it starts, and stops one that runs."""
    run = stage.run("read-only")
    run.folder.mkdir()
    with mounted(run.folder, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        run.start().check_fails(2, f"{run.folder} cannot be written (Read-only file system)", "run_dir=")
    start = _started(run)
    with mounted(run.folder, "--bind", str(run.folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run.folder)], check=True)
        start.check_fails(1, "Read-only file system", str(run.folder), "run it again")
    run.complete()
    run.check_equals(stage.whole)
    return f"refused at the start, stopped in mid-run, one sentence each; {EQUAL}"


def checkpoints_are_damaged(stage: Stage) -> str:
    """Of three checkpoints the newest is cut short and the one before has lost its marker."""
    run = stage.run("damaged-checkpoints")
    start = _started(run)
    start.wait_until(lambda: len(run.checkpoints) >= 3, "its third checkpoint")
    start.kill()
    oldest, middle, newest = run.checkpoints[-3:]
    os.truncate(newest / "state.pt", (newest / "state.pt").stat().st_size - 100)
    (middle / "complete.json").unlink()
    said = run.complete()
    check(said.count("is damaged") == 1 and f"{newest}/state.pt is damaged" in said, f"{run.name} said: {said}")
    check(f"goes on after step {int(oldest.name[5:])} " in said, f"{run.name} said: {said}")
    run.check_equals(stage.whole)
    return f"a warning for the one cut short, gone on from the third; {EQUAL}"


def a_sample_is_damaged(stage: Stage) -> str:
    """While training reads them, a byte of one image changes on the disk: the sample is named, and nothing is lost."""
    data = shutil.copytree(stage.folder / "data", stage.folder / "damaged-data")
    run = stage.run("damaged-sample", "everything", f"data.root={data}")
    shard, record = load_index(data / "train").locate(NUM_TRAIN // 2)
    start = _started(run)
    _flip_byte(shard, record.offset + record.size // 2)
    start.check_fails(2, f"sample {record.key!r} of shard {shard} is not what was indexed")
    saved = run.saved_step
    check(saved and run.record["status"] == "failed", f"{run.name} is {run.record['status']}, with step {saved} saved")
    _flip_byte(shard, record.offset + record.size // 2)
    run.complete()
    run.check_equals(stage.whole)
    return f"named in one sentence; put right and {EQUAL}"


def _flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, position)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), position)


def a_worker_dies(stage: Stage) -> str:
    """SIGKILL to a DataLoader worker, as by a system that is short of memory."""
    run = stage.run("dead-worker")
    start = _started(run)
    os.kill(children(start.process.pid)[0], signal.SIGKILL)  # while it trains it has no others
    start.check_fails(1, "DataLoader worker", "run it again to go on")
    check(run.record["status"] == "failed", f"{run.name} is {run.record['status']}")
    run.complete()
    run.check_equals(stage.whole)
    return f"one sentence; {EQUAL}"


def a_rank_dies(stage: Stage) -> str:
    """SIGKILL to one of two ranks, first the second of them, then the one that writes."""
    run = stage.run("dead-rank", "everything", SHORTER)
    for rank, step in ((1, 20), (0, 60)):
        start = _started(run, ranks=2, step=step)
        os.kill(start.rank_pids[rank], signal.SIGKILL)
        start.check_fails(1, "another rank does not answer", "run it again to go on", by=1 - rank)
    run.complete(ranks=2)
    run.check_equals(stage.whole_on_two)
    return f"the other says so in one sentence; {EQUAL}"


def the_loss_of_one_rank_is_nan(stage: Stage) -> str:
    """NaN on one of two ranks, for a step and then for good: the ranks act together."""
    runs = [stage.run(f"nan-once-on-{rank}", "plain", "train.epochs=4") for rank in (0, 1)]
    for rank, run in enumerate(runs):
        run.complete(ranks=2, program=(POISONED, str(rank), "17", "17"))
        skipped = [record["step"] for record in run.records() if record.get("skipped") is True]
        check(skipped == [17] and run.records()[-1]["skipped"] == 1, f"{run.name} skipped the steps {skipped}")
    runs[1].check_equals(runs[0])
    run = stage.run("nan-for-good", "everything", SHORTER)
    start = run.start(ranks=2, program=(POISONED, "1", "38", "100"))
    start.check_fails(1, "not finite for 3 steps in a row up to step 40", "lower train.optimizer.lr")
    check(run.record["status"] == "failed" and run.saved_step == 35, f"{run.name} saved step {run.saved_step}")
    run.complete(ranks=2)
    run.check_equals(stage.whole_on_two)
    return f"one step left out and counted, the same on whichever rank; three in a row end it in one sentence, {EQUAL}"


# Place, error, rank and what its sentence says; evaluations and checkpoints come when they are due.
RAISED = (
    ("step", "memory", 0, "CUDA out of memory"),
    ("loader", "runtime", 1, "a bug of several lines"),
    ("loss", "assertion", 1, "AssertionError"),
    ("saving", "exit", 0, "SystemExit: 0"),
    ("saving", "key", 1, "KeyError: 'blocks.0'"),
    ("evaluation", "interrupt", 1, "KeyboardInterrupt"),
    ("evaluation_worker", "runtime", 0, "a bug of several lines"),
    ("logging", "disk", 0, "No space left on device"),
    ("alone", "key", 1, "KeyError: 'blocks.0'"),
    ("alone", "memory", 0, "CUDA out of memory"),
)


def one_rank_raises(stage: Stage) -> str:
    """An error that nobody expects on one of two ranks, whose DataLoader workers ignore SIGTERM: all end, at once."""
    run, seconds = stage.run("raising", "everything", SHORTER), []
    for place, error, rank, said in RAISED:
        step = 6 if place in ("loader", "evaluation_worker") else run.last_step + 3  # the former: a worker's own
        program = (RAISING, str(rank), str(step), place, error)
        start = run.start(ranks=2, program=program)
        start.wait_until(lambda: run.status == "running", "its first step")
        start.wait_until(lambda: run.status == "failed", f"an error in {place}")
        failed = time.monotonic()
        check(start.end() == 1, f"{run.name}: torchrun ended with {start.process.returncode} after an error in {place}")
        while start.pids:
            check(time.monotonic() - failed < PATIENCE_S, f"{run.name}: processes outlive an error in {place}")
            time.sleep(0.01)
        seconds.append(time.monotonic() - failed)
        told = re.findall(r"^train: .*$", start.said_by(rank), flags=re.MULTILINE)
        is_told = len(told) == 1 and said in told[0] and said in run.record["error"]
        check(is_told, f"{run.name}: {error} in {place} was told as {told} and {run.record['error']}")
        check(not list(run.folder.rglob(".*.tmp")), f"{run.name}: an error in {place} left half a file")
    check(max(seconds) < ENDED_S, f"{run.name}: the processes took {max(seconds):.0f} s to end after an error")
    run.complete(ranks=2)
    run.check_equals(stage.whole_on_two)
    return f"{len(seconds)} errors, all processes ended within {max(seconds):.1f} s, exit code 1, one reason; {EQUAL}"


def one_rank_is_silent(stage: Stage) -> str:
    """It hangs, and the other waits for it in a collective: both tell where they stand, and the run ends."""
    run = stage.run("silent", "everything", SHORTER, "train.time_out_minutes=0.15")
    start = run.start(ranks=2, program=(RAISING, "1", "5", "silent", "runtime"))
    start.wait_until(lambda: run.status == "failed", "the time-out")
    check(start.end() == 1, f"{run.name}: torchrun ended with {start.process.returncode} after the time-out")
    for rank, place in enumerate(("in train_step", "raising.py")):
        told = start.said_by(rank)
        check("Timeout (0:00:09" in told and place in told, f"{run.name}: rank {rank} told {told}")
    check("another rank does not answer" in start.said_by(0), f"{run.name}: {start.said_by(0)}")
    run.complete(ranks=2)
    run.check_equals(stage.whole_on_two)
    return f"both ranks told their stacks after 9 s; {EQUAL}"


def there_is_no_shared_memory(stage: Stage) -> str:
    """/dev/shm, by which workers hand over their batches, is full: one sentence, and nothing is lost."""
    run = stage.run("small-shm")
    _started(run).kill()
    saved = run.saved_step
    start = run.start(program=(SMALL_SHM, "64k"))
    start.check_fails(1, "no room in /dev/shm", "run it again to go on")
    check(run.saved_step == saved, f"{run.name} had saved step {saved} and has {run.saved_step}")
    run.complete()
    run.check_equals(stage.whole)
    return f"one sentence; {EQUAL}"


SCENARIOS = (
    the_disk_is_full,
    the_folder_cannot_be_written,
    checkpoints_are_damaged,
    a_sample_is_damaged,
    a_worker_dies,
    a_rank_dies,
    the_loss_of_one_rank_is_nan,
    one_rank_raises,
    one_rank_is_silent,
    there_is_no_shared_memory,
)
