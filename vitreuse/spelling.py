"""The word that was probably meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


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
