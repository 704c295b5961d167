"""Debian's packages of images for the studies: fetched by apt's own download, and unpacked without root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from vitreuse.io.durable import durable_folder


def unpack_debian(names: Sequence[str], data: Path, which: Callable[[str], str | None] = shutil.which) -> Path:
    """The folder of Debian's packages, each in a folder of its name, which is fetched and filled where it is missing.

    A package that lies in DATA/packages already is not fetched.

    Raises:
        ValueError: There is no apt or dpkg here, or the fetching failed.
    """
    unpacked, packages = data / "debian", data / "packages"
    packed = [name for name in names if not (unpacked / name).is_dir()]
    missing = [name for name in packed if not any(packages.glob(f"{name}_*.deb"))]
    needed = {"apt-get": missing, "dpkg-deb": packed}
    tools = [tool for tool, wanted in needed.items() if wanted and which(tool) is None]
    if tools:
        files = ", ".join(f"{name}_*.deb" for name in packed)
        raise ValueError(
            f"{' and '.join(tools)} would fetch and unpack images here, and there is none: unpack {files} of "
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
