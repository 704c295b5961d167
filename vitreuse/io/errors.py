"""Errors that a user can cause, one sentence each, and the word or path that was probably meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one sentence for the user."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error sentence: `, did you mean 'epochs'?`, or nothing when no known word is close."""
    match = closest(word, known)
    return f", did you mean {match!r}?" if match else ""


def nearest_path(path: str | Path) -> str:
    """The end of an error sentence about a path that does not exist, as nearest for a word."""
    match = None if os.path.lexists(path) else closest_path(Path(path))
    return f", did you mean '{match}'?" if match else ""


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


def closest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word most like ``word``, whatever its case; None when none reaches that likeness (0 to 1)."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=likeness)
    return by_lower_case[found[0]] if found else None


def closest_path(path: Path) -> Path | None:
    """The existing path most like one that does not exist, name by name; None when a name has none that is close."""
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        if not os.path.lexists(found / part):
            try:
                match = closest(part, os.listdir(found))
            except OSError:  # a file, or a folder that cannot be listed
                return None
            if match is None:
                return None
            part = match
        found = found / part
    return found
