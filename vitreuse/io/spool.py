"""Values that are too many for memory, one after the other in the files of a folder that goes when it is done with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

from vitreuse.io.durable import save_tensors


class Spool:
    """Values in order, of which one is in memory at a time; a context manager whose folder is temporary.

    Raises:
        OSError: The disk of temporary files is full.
    """

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="vitreuse-")
        self._count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, number: int) -> Any:
        return torch.load(self._path(number), weights_only=False)  # written by this very process

    def append(self, value: Any) -> None:
        """Adds a value at the end."""
        self._write(self._count, value)
        self._count += 1

    def replace(self, change: Callable[[Any], Any]) -> None:
        """Puts in the place of each value what a function makes of it."""
        for number, value in enumerate(self):
            self._write(number, change(value))

    def _path(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.pt"

    def _write(self, number: int, value: Any) -> None:
        try:
            with self._path(number).open("wb") as file:
                save_tensors(value, file)
        except OSError as error:
            full = f"{self._folder.name} takes no more tokens of images ({error.strerror})"
            raise OSError(f"{full}: set TMPDIR to a folder on a larger disk, or give fewer images.") from error
