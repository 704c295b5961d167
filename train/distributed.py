"""What training needs of its processes beside eval.distributed: averaged gradients, a signal that stops all, deaths."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eval.distributed import Ranks
from vitreuse.io.process import is_first_of_machine


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the ranks; itself where there is one rank."""
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    # A class token's gradient is a slice of one row, whose strides say nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    replica = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # Buffers are constants here, since batch norm is refused; exchanging them would tie the ranks' numbers of forward
    # passes together. The attribute is older than torch's new name for the argument, which warns of the old one.
    replica.broadcast_buffers = False
    return replica


def reason(error: BaseException) -> str:
    """What an error says, in one line; of one of Python's kinds that say little alone, such as KeyError, the kind too.

    A DataLoader raises a worker's error again with the worker's traceback as its text: what the error said comes last,
    after the indented lines.
    """
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught "):
        while any(line.startswith("  ") for line in lines):
            lines.pop(0)
    text, kind = " ".join(" ".join(lines).split()), type(error).__name__
    if not text:
        return kind
    says_enough = isinstance(error, (ValueError, OSError, RuntimeError)) or text.startswith(f"{kind}: ")
    return text if says_enough else f"{kind}: {text}"


def lost_process(error: RuntimeError) -> str | None:
    """The sentence for a process that this one waited for in vain, or that had no room; None for any other error.

    torch has no type for most of them: the texts are those of its DataLoader and of gloo's transport.
    """
    if "unable to allocate shared memory" in str(error):
        less = "lower data.num_workers or the batch, or give it more (docker run --shm-size)"
        return f"a worker found no room in /dev/shm for its batch: {less}, and run it again to go on."
    reason = str(error).partition("\n")[0].partition(". ")[0]
    if reason.startswith("DataLoader worker (pid"):
        return f"{reason}: run it again to go on, with a smaller data.num_workers if memory was short."
    if isinstance(error, dist.DistError) or "/gloo/" in reason:
        reason = re.sub(r"^\[.*?\] ", "", reason)  # where in gloo's sources
        return f"another rank does not answer ({reason}): run it again to go on."
    return None


def kill_workers() -> None:
    """Ends the DataLoader workers of this process, whatever they are doing.

    They ignore SIGTERM (pipeline.ignore_stop_signals), by which an exit as usual would end them before it waits for
    them, and one that hangs in a read does not hear its loader either.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error where a worker dies
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def end_process(code: int) -> NoReturn:
    """Ends this process and its DataLoader workers.

    After a failure it is not waited for anything: for a library's threads, or a collective that another rank will not
    join.
    """
    kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if code:
        os._exit(code)
    sys.exit(code)


class Watch:
    """Tells on standard error what every thread of this process does, once it has made no progress for so long.

    A rank that others wait for in vain hears of nothing itself: each is watched, and all tell of the same moment. A
    process alone waits for none, and is not watched.
    """

    def __init__(self, ranks: Ranks, minutes: float):
        self.seconds = 60 * minutes if ranks.world_size > 1 else None

    def progress(self) -> None:
        """Begins to wait anew."""
        if self.seconds is not None:
            faulthandler.dump_traceback_later(self.seconds)

    def end(self) -> None:
        """Waits for nothing any more."""
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()


SAME_S = 0.5  # within which two of Ctrl-C's signals are one: torchrun passes it on beside the terminal
STOPPING = b"\nstopping after what is in hand; press Ctrl-C again to end at once.\n"
FAILED = "a rank has failed"  # a word in the store of the ranks
POLL_S, GRACE_S = 1.0, 3.0  # between two looks at it, and for a process to end by itself


@contextmanager
def ended_with_others(ranks: Ranks) -> Iterator[None]:
    """Ends this process within seconds if another rank fails inside its block, whatever this one waits for.

    A rank amid a long evaluation, or in a collective over NCCL, hears of a failure in no other way: torchrun kills it
    after half a minute, and other launchers may leave it to the collective's time-out.
    """
    if ranks.store is None:
        yield
        return
    is_over = threading.Event()
    threading.Thread(target=_end_with_others, args=(ranks.store, is_over), daemon=True).start()
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # who kept the store is gone
            ranks.store.set(FAILED, "")
        raise
    finally:
        is_over.set()


def _end_with_others(store: dist.Store, is_over: threading.Event) -> None:
    """Looks for the word until the block is over; runs in a thread of its own, over a connection of its own.

    The connection is made here: torch's store may be slow to answer a new one, for which training must not wait.
    """
    try:
        store = store.clone()
    except RuntimeError:
        return
    while not is_over.wait(POLL_S):
        try:
            has_failed = store.check([FAILED])
        except RuntimeError:
            return
        if has_failed and not is_over.wait(GRACE_S):
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(1)


class StopSignal:
    """Remembers a SIGTERM, SIGINT or SIGUSR1 instead of dying of it, so that the step in hand can be finished.

    Whoever presses Ctrl-C is told so, and at the second time the process ends at once, by a KeyboardInterrupt.
    """

    def __init__(self):
        self.received = self.is_urgent = False
        self._asked_at: float | None = None  # by Ctrl-C, for the first time

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Catches the three signals inside the block."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = [signal.signal(number, self._remember) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.received = True
        if number != signal.SIGINT:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if is_first_of_machine():
                os.write(2, STOPPING)  # a print could meet one that the signal has interrupted
        elif time.monotonic() - self._asked_at > SAME_S:
            self.is_urgent = True
            raise KeyboardInterrupt
