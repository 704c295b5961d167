"""make gpu on a CPU: every part does what it should, and the page says so; what fails is said and stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import page

ROOT = Path(__file__).parent.parent
COMMAND = (sys.executable, "-m", "tests.gpu")
ENVIRONMENT = {**os.environ, "PYTHONPATH": "tests", "CUDA_VISIBLE_DEVICES": ""}


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


@pytest.mark.proof
def test_every_part_runs_and_the_page_says_what_it_found(tmp_path):
    done = called("--device", "cpu", "--small", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [*found["parts"]] == ["correctness", "tune", "training", "resume", "speed"]
    assert len(found["parts"]["correctness"]["rows"]) == 12 and found["parts"]["tune"]["rows"][0]["costs"]
    assert {row["steps"] for row in found["parts"]["training"]["rows"]} == {8}
    (row,) = found["parts"]["resume"]["rows"]
    assert (row["resumed_apart"], row["undisturbed_apart"]) == (0, 0) and row["killed_after_step"] > 0
    assert any(row["speedup"] for row in found["parts"]["speed"]["rows"])
    text = (tmp_path / "README.md").read_text()
    for heading in ("## Correctness", "## Tune", "## Training", "## Resume", "## Speed"):
        assert heading in text
    assert "Failed" not in text and "| exact | 8 |" in text


def test_without_a_card_it_says_so():
    done = called("-o", "/nowhere")
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr and "Traceback" not in done.stderr


def test_a_part_that_fails_is_named_on_the_page_beside_the_others():
    rows = [{"plan": "exact", "name": "exact", "precision": "float32", "apart": 2e-6, "wrong": None}]
    machine = {"device": "NVIDIA H100", "torch": "2.14.0", "timm": "1.0.31", "date": "2026-11-30"}
    parts = {
        "correctness": {"rows": rows, "seconds": 3.0, "error": None},
        "training": {"rows": [], "seconds": 1.0, "error": "RuntimeError: no memory"},
    }
    text = page.written({"machine": machine, "parts": parts})
    assert "NVIDIA H100, 2.14.0, 1.0.31, 2026-11-30" in text and "| float32 | 1 | 2e-06 |" in text
    assert "**Failed:** RuntimeError: no memory" in text
    assert page.summary(parts["training"]) == "0 rows in 1 s, FAILED: RuntimeError: no memory"


def test_the_page_is_what_was_run_or_says_that_nothing_was():
    """Figures come with the file that they are from."""
    text = (ROOT / "docs/gpu/README.md").read_text()
    measured = ROOT / "docs/gpu/gpu.json"
    assert text == (page.written(json.loads(measured.read_text())) if measured.exists() else page.NOT_RUN)
