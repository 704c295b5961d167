"""What the README shows is what happens: its Python runs, its ratios are computed, its commands name what exists."""

import re
import shlex
from pathlib import Path

import pytest

from vitreuse.__main__ import main
from vitreuse.describe import describe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fenced(language):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for word, text in blocks if word == language]


def commands():
    lines = "\n".join(fenced("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_python_runs(capsys):
    namespace = {}
    for block in fenced("python"):
        exec(block, namespace)
        for expected in re.findall(r"print\(.*\)  # (.*)", block):
            assert expected in capsys.readouterr().out


def test_the_ratios_are_computed():
    rows = re.findall(r"\| `([^`]*)` \| ([\d.]+) \| ([\d.]+) \|", README)
    assert len(rows) == 5
    for plan, macs_ratio, params_ratio in rows:
        found = describe("deit_small_patch16_224", plan)
        assert (f"{found['macs_ratio']:.3f}", f"{found['params_ratio']:.3f}") == (macs_ratio, params_ratio)


@pytest.mark.parametrize("argv", [argv for argv in commands() if argv[0] == ".venv/bin/vitreuse"], ids=shlex.join)
def test_the_vitreuse_commands_work(argv, capsys):
    assert main(argv[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("argv", [argv for argv in commands() if argv[0] != ".venv/bin/vitreuse"], ids=shlex.join)
def test_the_other_commands_name_what_exists(argv):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    if argv[0] == "make":
        assert argv[1] in targets
    else:
        assert "-m" in argv and (ROOT / argv[argv.index("-m") + 1] / "__main__.py").exists()
        for word in argv:
            assert not word.endswith(".yaml") or (ROOT / word).exists()


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/evaluation.md", "experiments.md"])
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_the_tree_names_what_exists():
    tree = next(block for block in fenced("") if block.startswith("vitreuse/ "))
    files = re.findall(r"[\w/]+\.py\b|^\w+/|(?<=^  )\w+/", tree, flags=re.MULTILINE)
    assert len(files) > 15
    for name in files:
        found = [*ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}"), *ROOT.glob(name)]
        assert found, f"the README's tree names {name}, which does not exist"
