"""What the study is made of: files of Debian and Python packages, each pinned by its digest.

Debian's are fetched by apt's own download and unpacked without root; Python's are read where pip has put them, and
nothing of theirs is imported.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from vitreuse.io.durable import durable_folder

HERE = Path(__file__).parent
DATA = Path("data/dinov2")
DEBIAN = ("tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers", "gcompris-qt-data")


def unpack_debian(data: Path = DATA, which: Callable[[str], str | None] = shutil.which) -> Path:
    """The folder of Debian's packages, each in a folder of its name, which is fetched and filled where it is missing.

    A package that lies in data/packages already is not fetched.

    Raises:
        ValueError: There is no apt or dpkg here, or the fetching failed.
    """
    unpacked, packages = data / "debian", data / "packages"
    packed = [name for name in DEBIAN if not (unpacked / name).is_dir()]
    missing = [name for name in packed if not any(packages.glob(f"{name}_*.deb"))]
    needed = {"apt-get": missing, "dpkg-deb": packed}
    tools = [tool for tool, names in needed.items() if names and which(tool) is None]
    if tools:
        files = ", ".join(f"{name}_*.deb" for name in packed)
        raise ValueError(
            f"{' and '.join(tools)} would fetch and unpack photographs here, and there is none: unpack {files} of "
            f"Debian into {unpacked}, each into a folder of its package's name, so that it has the folder usr."
        )
    packages.mkdir(parents=True, exist_ok=True)
    if missing:
        _call("apt-get", "download", *missing, folder=packages)
    for name in packed:
        with durable_folder(unpacked / name) as folder:
            _call("dpkg-deb", "-x", str(next(packages.glob(f"{name}_*.deb")).resolve()), str(folder.resolve()))
    return unpacked


def _call(*command: str, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].rstrip(".")
        raise ValueError(f"{' '.join(command[:2])} ended with exit code {done.returncode}: {last}.")


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
