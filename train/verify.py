"""`--verify-resume`: an experiment's first steps, once without a stop and once stopped and gone on with, compared.

Every part runs in a process that has done nothing but its imports, as a run that is started again does: nothing can be
handed on in memory. What is handed on goes through the files of a real checkpoint.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from eval.distributed import Ranks, joined
from train.checkpoint import Checkpoints
from train.distributed import StopSignal
from train.experiment import set_up
from train.trainer import Trainer
from vitreuse.config import Config, ConfigError
from vitreuse.data import end_with_parent
from vitreuse.io.durable import nearest_folder
from vitreuse.io.file_names import for_terminal
from vitreuse.io.process import DONE, FAILED

NUM_STEPS = 6  # the checkpoint is saved after half of them
CHECKPOINT, WHOLE, RESUMED, REPEATED = "checkpoint", "whole", "resumed", "repeated"  # folders of one state each

Leaves = dict[str, Any]  # tensors, numbers and strings by their place in a state


def verify_resume(config: Config, run_dir: Path, allow: Collection[str] = ()) -> int:
    """Compares stopped and resumed steps of an experiment with uninterrupted ones bit by bit, and prints the verdict.

    A temporary folder is made beside the run folder; data may come from URLs of the kinds allowed.

    Returns:
        The exit code: FAILED, not WRONG_INPUT, if they differ, since no other input is the cure of a cause outside it.

    Raises:
        ConfigError, DataError, OtherRankError: As training does at the start.
    """
    with joined("cpu") as ranks, _shared_folder(run_dir, ranks) as folder:
        start = partial(_in_fresh_process, _meeting_place(ranks), take_steps, config, folder, allow)
        start(WHOLE)
        start(RESUMED)
        whole, resumed = _leaves(folder, WHOLE), _leaves(folder, RESUMED)
        difference = first_difference(whole, resumed)
        if difference is None:
            verdict = _proof(whole, config, ranks)
        else:
            start(REPEATED)
            reason = _reason(first_difference(whole, _leaves(folder, REPEATED)))
            verdict = f"resume is not exact: {difference}; {reason}"
        ranks.gather(None)  # all have read the folder
        if ranks.is_main:
            print(for_terminal(verdict))
    return DONE if difference is None else FAILED


@contextmanager
def _shared_folder(run_dir: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder of all ranks, on a disk that they share if the run folder is on one."""
    with ranks.together():
        made = TemporaryDirectory(dir=nearest_folder(run_dir.parent), prefix=".verify-") if ranks.is_main else None
    try:
        yield Path(ranks.gather(made and made.name)[0])
    finally:
        if made is not None:
            made.cleanup()


def _meeting_place(ranks: Ranks) -> dict[str, str]:
    """Variables by which the ranks of fresh processes meet each other and not those of these processes."""
    if ranks.world_size == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {"MASTER_PORT": str(ranks.gather(port)[0]), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _in_fresh_process(environment: dict[str, str], function: Callable[..., None], *args: Any) -> None:
    """Calls a function in a process of its own, with some variables set, and raises what it raises.

    A server imports torch once and is forked for every call; it never computes, so that a fork is as good as a start.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, _begin, (environment, get_start_method())) as pool:
        with StopSignal().listening() as stop:  # half a start would leave a process behind that cannot find its parent
            future = pool.submit(function, *args)
        if stop.received:
            raise KeyboardInterrupt
        future.result()


def _begin(environment: dict[str, str], start_method: str) -> None:
    os.environ.update(environment)
    set_start_method(start_method, force=True)  # of loaders' workers: they would be started as this process was
    end_with_parent()


def take_steps(config: Config, folder: Path, allow: Collection[str], name: str) -> None:
    """Takes the first steps of an experiment and leaves the state after the last of them, by a name in a folder.

    RESUMED starts from the checkpoint, any other at step 0 and saves one half-way.
    """
    with joined(config.train.device, config.train.time_out_minutes) as ranks:
        trainer = set_up(config, ranks, allow).trainer
        if trainer.num_steps < 2:
            raise ConfigError("the run has one step, and none is left to go on with: train for longer.")
        last = min(NUM_STEPS, trainer.num_steps)
        if name == RESUMED:
            trainer.load_state_dict(_load(folder, CHECKPOINT))
        steps = []
        for step in _steps(trainer, last):
            steps.append(step)
            if trainer.counters.step == last // 2:  # inside the loop: the loader is not disturbed
                _save(folder, CHECKPOINT, trainer, {})
        _save(folder, name, trainer, {"steps": steps[-(last - last // 2) :]})
        ranks.gather(None)  # no rank leaves before the state is written


def _steps(trainer: Trainer, last: int) -> Iterator[dict[str, Any]]:
    """Trains up to a step; what each step did, with the samples of every rank."""
    while trainer.counters.step < last:
        for batch in trainer.remaining_batches():
            result = trainer.train_step(batch, stop=False)
            yield {"keys": trainer.ranks.gather(batch.keys), **result._asdict()}
            if trainer.counters.step == last:
                return


def _save(folder: Path, name: str, trainer: Trainer, more: dict[str, Any]) -> None:
    state = trainer.state_dict()
    if trainer.ranks.is_main:
        Checkpoints(folder / name, keep_last=1).save({**more, **state}, trainer.counters.step)


def _load(folder: Path, name: str) -> dict[str, Any]:
    state = Checkpoints(folder / name, keep_last=1).load_newest()
    if state is None:
        raise OSError(f"{folder / name} holds no checkpoint: give all ranks a run_dir on a file system that they share")
    return state


def _leaves(folder: Path, name: str) -> Leaves:
    flat, _ = tree_flatten_with_path(_load(folder, name))
    return {keystr(path): leaf for path, leaf in flat}


def first_difference(expected: Leaves, found: Leaves) -> str | None:
    """Where two states first differ, how, and in how many places more; None if they are equal to the bit."""
    places = [place for place in {**expected, **found} if _differs(expected.get(place), found.get(place))]
    if not places:
        return None
    more = f", as do {len(places) - 1} of the other {len(expected) - 1} tensors and numbers" if places[1:] else ""
    return f"{places[0]} {_how_it_differs(expected.get(places[0]), found.get(places[0]))}{more}"


def _differs(expected: Any, found: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
        return not (alike and torch.equal(*(side.reshape(-1).view(torch.uint8) for side in (expected, found))))
    return repr(expected) != repr(found)  # which tells all floats apart, and takes NaN for NaN


def _how_it_differs(expected: Any, found: Any) -> str:
    if isinstance(expected, Tensor) and isinstance(found, Tensor) and expected.shape == found.shape:
        distance = (expected.double() - found.double()).abs()
        return f"differs in {int((distance != 0).sum())} of {distance.numel()} numbers, by up to {distance.max():.1e}"
    return f"is {_shown(found)} instead of {_shown(expected)}"


def _shown(leaf: Any) -> str:
    return f"a tensor {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _reason(repeated_difference: str | None) -> str:
    """Why a resume is not exact, from how the uninterrupted steps differ from themselves when repeated."""
    if repeated_difference is None:
        return "uninterrupted steps repeat themselves to the bit, so that a checkpoint lacks what training goes by."
    return (
        f"nor do uninterrupted steps repeat themselves ({repeated_difference}), so the device's kernels are not "
        "deterministic: torch.use_deterministic_algorithms(True) with CUBLAS_WORKSPACE_CONFIG=:4096:8 makes those of "
        "CUDA so, at some cost; otherwise a resumed run is as good, but not the same."
    )


def _proof(state: Leaves, config: Config, ranks: Ranks) -> str:
    last = state["['counters']['step']"]
    parts = [place.split("'")[1] for place, leaf in state.items() if isinstance(leaf, Tensor)]
    num_keys = sum("['keys']" in place for place in state)
    ranks_and_workers = f"{ranks.world_size} x {config.data.num_workers} workers"
    return (
        f"resume is exact: saved after step {last // 2} and gone on in a fresh process, the run is after step {last} "
        f"where it is without a stop: {len(parts)} tensors ({', '.join(dict.fromkeys(parts))}), the losses of "
        f"{last - last // 2} steps and the keys of {num_keys} samples are equal to the bit (device "
        f"{config.train.device}, {config.train.precision}, {ranks_and_workers})."
    )
