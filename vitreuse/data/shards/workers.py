"""Processes that share the work on a folder: a function of one file or shard, mapped over all of them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from vitreuse.io.errors import DataError
from vitreuse.io.progress import WorkProgress

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """How a folder is worked on.

    Attributes:
        count: Processes that share the work; 1 does it in this process.
        show_progress: Whether to show on standard error how far it is.
    """

    count: int = 1
    show_progress: bool = False

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        label: str,
        unit: str = "shards",
        sizes: Sequence[int] | None = None,
        done: int = 0,
    ) -> Iterator[Result]:
        """The result of function(task) for each task, in their order, as soon as it is there.

        Args:
            function: Can be pickled, as the tasks can.
            tasks: What there is to do.
            label: What is done, for whoever watches.
            unit: What is counted.
            sizes: How many of these each task is; 1 by default.
            done: How many of these an earlier start has done.

        Raises:
            DataError: A worker was killed.
        """
        results = self._run(function, tasks)
        if not self.show_progress:
            yield from results
            return
        sizes = [1] * len(tasks) if sizes is None else sizes
        with WorkProgress(label, unit, done + sum(sizes), done) as progress:
            for result, size in zip(results, sizes, strict=True):
                progress.reach(progress.done + size)
                yield result

    def tell(self, sentences: Iterable[str]) -> None:
        """Shows sentences, such as what was left out, where progress is shown."""
        for sentence in sentences if self.show_progress else ():
            print(sentence, file=sys.stderr)

    def _run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        count = min(self.count, len(tasks))
        if count <= 1:
            yield from map(function, tasks)
            return
        with ProcessPoolExecutor(count, initializer=_prepare_worker) as pool:
            try:
                yield from pool.map(function, tasks)
            except BrokenProcessPool as error:
                way_out = "run the same command again, with fewer workers if memory is short"
                raise DataError(f"one of {count} worker processes was killed: {way_out}.") from error


THIS_PROCESS = Workers()


def usable_cpus() -> int:
    """How many CPUs this process may use, fewer than the machine's under Slurm, say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_worker() -> None:
    """Leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Lets this worker end when its parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_after_parent, daemon=True).start()
