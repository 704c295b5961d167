"""Errors that a user can cause, each one sentence that ends with the way out: what is wrong with a config or with data.

Whatever can suggest the word or the path that was probably meant does it by the functions below. A command prints the
sentence of a ValueError alone and ends with exit code 2 (see process.py).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be used."""


class DataError(ValueError):
    """A shard, index or folder that cannot be used.

    A DataLoader raises a worker's error again with the worker's whole traceback as its text. The sentence is what
    follows the last name of the class there, so that the message is the same for any number of workers. The end of a
    line in a name becomes an escape.
    """

    def __init__(self, message: str):
        sentence = message.rpartition(f"\n{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(sentence.strip().replace("\n", "\\n").replace("\r", "\\r"))


class DecodeError(DataError):
    """One sample whose image cannot be read; the other samples are not affected."""


@contextmanager
def as_data_error(what: str, way_out: str) -> Iterator[None]:
    """Inside the block, an OSError becomes the DataError `WHAT (No such file or directory): WAY_OUT.`"""
    try:
        yield
    except OSError as error:
        raise DataError(f"{what} ({error.strerror}): {way_out}.") from error


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word most like ``word``, whatever its case; None when none reaches that likeness (0 to 1)."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=likeness)
    return by_lower_case[found[0]] if found else None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: `, did you mean 'epochs'?`, or nothing when no known word is close."""
    match = closest(word, known)
    return f", did you mean {match!r}?" if match else ""


def nearest_path(path: str | Path) -> str:
    """The end of an error sentence on a missing path, as by ``nearest``; nothing when it exists or no name is close."""
    if os.path.lexists(path):
        return ""
    path = Path(path)
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        try:
            match = part if os.path.lexists(found / part) else closest(part, os.listdir(found))
        except OSError:  # a file, or a folder that cannot be listed
            return ""
        if match is None:
            return ""
        found = found / match
    return f", did you mean '{found}'?"
