"""Which figures of README and docs are older than the code that they speak of, by git's history.

    python -m docs.figures    # make figures

A figure is as old as the newest commit of the files that its command leaves; code that was changed since may have moved
it. What a figure speaks of stands in figures.yaml.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """A figure.

    Attributes:
        figure: What it is.
        pages: Where it is shown.
        command: What measures it.
        data: Files that the command leaves.
        code: Files and folders that it speaks of.
    """

    figure: str
    pages: tuple[str, ...]
    command: str
    data: tuple[str, ...]
    code: tuple[str, ...]


def read(path: Path) -> list[Measured]:
    """The figures of a YAML file."""
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text())
    return [
        Measured(each["figure"], tuple(each["pages"]), each["command"], tuple(each["data"]), tuple(each["code"]))
        for each in entries
    ]


def changes_since(measured: Measured, root: Path) -> list[str] | None:
    """The commits, newest first, that changed what a figure speaks of after it was measured; None of one that was not
    measured yet."""
    newest = _git(root, "log", "-1", "--format=%H", "--", *measured.data)
    if not newest:
        return None
    return _git(root, "log", "--format=%h %s", f"{newest[0]}..HEAD", "--", *measured.code)


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def main() -> None:
    """Prints a table."""
    table = Table(title="Figures and the code that they speak of")
    for heading in ("figure", "pages", "measured by", "changed since"):
        table.add_column(heading, overflow="fold")
    for measured in read(HERE / "figures.yaml"):
        commits = changes_since(measured, HERE.parent)
        if commits is None:
            verdict = "not yet run"
        else:
            verdict = f"stale: {len(commits)} commits, newest {commits[0].split()[0]}" if commits else "up to date"
        table.add_row(measured.figure, "\n".join(measured.pages), measured.command, verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
