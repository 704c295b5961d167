"""Executes the notebooks of this folder, each in a fresh one, and keeps what they show: `python -m docs.notebooks`.

What is kept is small and says nothing of the machine: no paths, no host, no times of cells.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOST_BYTES = 300_000
SECONDS = 1800  # of a cell, on a machine that is busy


def execute(path: Path, folder: Path) -> Any:
    """A notebook with what it shows when it is run in a folder, by this checkout.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
        ValueError: What it shows is too large, or names a folder of this machine.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=where, record_timing=False)
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    for cell in notebook.cells:
        cell.metadata.clear()
        cell.outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata["language_info"] = {"name": "python"}
    _refuse_unfit(notebook, folder)
    return notebook


def _refuse_unfit(notebook: Any, folder: Path) -> None:
    """Raises ValueError for a notebook that is too large, or shows what others do not have."""
    num_bytes = len(nbformat.writes(notebook).encode())
    if num_bytes > MOST_BYTES:
        raise ValueError(f"the notebook has {num_bytes:,} bytes: show less than {MOST_BYTES:,}.")
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for name in (str(folder), str(ROOT), str(Path.home()), os.uname().nodename):
        if re.search(rf"(?<![\w/]){re.escape(name)}\b", shown):
            raise ValueError(f"the notebook shows {name}, which others do not have: show names relative to its folder.")


def main() -> None:
    """Renews all notebooks."""
    for path in sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
