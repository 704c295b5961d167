"""The notebooks do what they show, from a fresh folder."""

from pathlib import Path

import nbformat
import pytest

from docs.notebooks.__main__ import HERE, MOST_BYTES, execute

NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def shown(notebook):
    """The texts and the pages that the cells of a notebook show, in their order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.get("text") or output["data"].get("text/html") or output["data"]["text/plain"] for output in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_whole_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert all(cell.outputs for cell in notebook.cells[3:] if cell.cell_type == "code")
    pictures = sum("data:image/png;base64," in text for text in shown(notebook))
    assert pictures == 2 and str(Path.home()) not in path.read_text() and "/tmp/" not in path.read_text()


@pytest.mark.proof
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_fresh_folder(path, tmp_path):
    fresh, committed = execute(path, tmp_path), nbformat.read(path, as_version=4)
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in committed.cells]
    kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in fresh.cells]
    assert kinds == [[output.output_type for output in cell.get("outputs", [])] for cell in committed.cells]
    assert {"exact", "converted", "healed", "exported", "data"} <= {path.name for path in tmp_path.iterdir()}
