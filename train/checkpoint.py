"""Checkpoints that survive being killed at any moment: a state is complete or it is not there.

checkpoints/step-000000450/
    state.pt        tensors, numbers and strings; torch.load(weights_only=True) reads it
    complete.json   written last: step, size and checksum of state.pt, and the score, such as top-1, if measured
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vitreuse.config import ConfigError
from vitreuse.files.networks import STEP_FOLDERS
from vitreuse.io.durable import durable_file, save_tensors, sync, write_durably
from vitreuse.io.process import print_note

STATE_FILE = "state.pt"
MARKER_FILE = "complete.json"


class Checkpoints:
    """The checkpoints of a folder: the newest few stay, and the one with the best score."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def save(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint, then removes those that need not stay.

        Raises:
            OSError: It could not be written; what was there before is untouched.
        """
        folder = self.folder / f"step-{step:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        with durable_file(folder / STATE_FILE) as file:
            save_tensors(state, file)
        marker = {"step": step, "bytes": (folder / STATE_FILE).stat().st_size, "crc32": _crc32(folder / STATE_FILE)}
        write_durably(folder / MARKER_FILE, json.dumps({**marker, "score": None}).encode())
        sync(self.folder)
        self._prune(step)

    def rate(self, step: int, score: float) -> None:
        """Notes what was measured of a checkpoint, if that step has one; the best one stays."""
        path = self.folder / f"step-{step:09d}" / MARKER_FILE
        if path.exists():
            write_durably(path, json.dumps({**json.loads(path.read_bytes()), "score": score}).encode())
            self._prune(step)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint, of equal ones the last; None where none was measured."""
        found = _best(self._complete())
        return None if found is None else (found[1]["step"], found[1]["score"])

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, on the CPU; None if there is none.

        A damaged one, by its size and checksum, or one with code in it is named on standard error and passed over.

        Raises:
            ConfigError: There are some, and none is whole.
            Exception: A whole one cannot be read at the moment; an older one must not take its place.
        """
        complete = self._complete()
        for folder, marker in reversed(complete):
            path = folder / STATE_FILE
            try:
                if (path.stat().st_size, _crc32(path)) != (marker["bytes"], marker["crc32"]):
                    raise ValueError("its size or checksum is not the one written")
                return torch.load(path, map_location="cpu", weights_only=True)
            except (FileNotFoundError, ValueError, UnpicklingError) as error:
                reason = str(error).splitlines()[0]
                print_note(f"{path} is damaged ({reason}) and passed over.")
        if complete:
            none = f"{self.folder} holds {len(complete)} checkpoints and none that is whole"
            raise ConfigError(f"{none}: put one back, or start again in another folder with run_dir=PATH.")
        return None

    @property
    def are_there(self) -> bool:
        """Whether one was saved, be it damaged since."""
        return bool(self._complete())

    def _complete(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folders and markers of the checkpoints that have one, oldest first."""
        found = []
        for path in sorted(self.folder.glob(f"{STEP_FOLDERS}/{MARKER_FILE}")):
            with suppress(ValueError):  # a disk lost part of it: no marker
                marker = json.loads(path.read_bytes())
                found.append((path.parent, {"score": marker.get("top1"), **marker}))  # as older runs called it
        return found

    def _prune(self, step: int) -> None:
        """Keeps what need stay up to a step; a run only comes to lie before a checkpoint by passing over it."""
        complete = [(folder, marker) for folder, marker in self._complete() if marker["step"] <= step]
        keep = {folder for folder, _ in complete[-self.keep_last :]}
        if best := _best(complete):
            keep.add(best[0])
        for folder in self.folder.glob(STEP_FOLDERS):
            if folder not in keep:
                (folder / MARKER_FILE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # a file that others read now goes with the next one


def _best(complete: Sequence[tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]] | None:
    """The folder and marker of the best checkpoint among these, oldest first, that were measured."""
    measured = [(marker["score"], folder, marker) for folder, marker in complete if marker["score"] is not None]
    return max(measured)[1:] if measured else None


class Background:
    """Writes one thing after another in a thread of its own, while training goes on.

    What is begun and not ended when the process is killed leaves a temporary file, as where it is written in the
    foreground. Errors are raised by the next call of ``check`` or ``settle``.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._begun: list[Future[None]] = []

    def do(self, write: Callable[..., None], *args: Any) -> None:
        """Writes after what was given before."""
        self._begun.append(self._thread.submit(write, *args))

    def check(self) -> None:
        """Raises what went wrong by now, if anything did; waits for nothing."""
        while self._begun and self._begun[0].done():
            self._begun.pop(0).result()

    def settle(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        while self._begun:
            self._begun.pop(0).result()


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
