"""Figures of README and docs: which are older than the code that they speak of, and what plans look like."""

import subprocess
from pathlib import Path

import pytest

from docs.figures import Measured, changes_since, read
from docs.pictures import anchors, tokens_left
from vitreuse import parse_plan

ROOT = Path(__file__).parent.parent
FIGURES = read(ROOT / "docs/figures.yaml")


def commit(root, name, subject):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(subject)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", *who, "commit", "-qm", subject], cwd=root, check=True)


def test_a_figure_is_stale_when_its_code_changed_after_it_was_measured(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    measured = Measured("speed", ("README.md",), "make speed", ("speed.jsonl",), ("code", "one.py"))
    commit(tmp_path, "code/layer.py", "Add a layer")
    assert changes_since(measured, tmp_path) is None
    commit(tmp_path, "speed.jsonl", "Measure it")
    commit(tmp_path, "other.py", "Change what it does not speak of")
    assert changes_since(measured, tmp_path) == []
    commit(tmp_path, "code/layer.py", "Make the layer faster")
    commit(tmp_path, "one.py", "Add another")
    found = changes_since(measured, tmp_path)
    assert [line.split(" ", 1)[1] for line in found] == ["Add another", "Make the layer faster"]
    commit(tmp_path, "speed.jsonl", "Measure it again")
    assert changes_since(measured, tmp_path) == []


@pytest.mark.parametrize("measured", FIGURES, ids=lambda measured: measured.figure)
def test_what_a_figure_names_is_there(measured):
    for name in (*measured.pages, *measured.code):
        assert (ROOT / name).exists(), name
    target = measured.command.split()
    if target[0] == "make":
        assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text()


def test_a_strip_shows_the_tokens_that_are_left_and_whose_map_is_read():
    assert anchors(parse_plan("exact reuse lowrank:7 reuse none reuse")) == [(0, 1), (2, 3), (2, 5)]
    assert tokens_left(parse_plan("exact-49 exact-98 exact/5 exact-7")) == [1.0, 0.75, 0.25, 0.25]
