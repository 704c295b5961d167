"""The site has a page for each method, command, recipe and public name, and what leads nowhere fails its build."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from website.building import build_site

import vitreuse
from docs import hooks
from vitreuse.plan import WORDS

ROOT = Path(__file__).parent.parent
HOW = ROOT / "docs" / "how"
BESIDE = ("CHANGELOG.md", "LICENSE", "README.md", "configs", "eval", "experiments.md", "mkdocs.yml", "train")
REPO_URL = "https://example.org/repo"


def test_every_public_name_has_an_entry():
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    entries = [entry for page in pages for entry in re.findall("^::: vitreuse[.](.*)", page, re.MULTILINE)]
    assert len(entries) == len(set(entries))
    assert set(vitreuse.__all__) <= set(entries)


def test_every_word_has_a_page_with_its_formula_code_and_cost():
    rows = re.findall(r"^\| (`.*?) \|.*\((\w+\.md)\) \|$", (HOW / "index.md").read_text(), re.MULTILINE)
    assert set(WORDS) <= {word for words, _ in rows for word in re.findall("[a-z]+", words)}
    computes, pays, costs = "## What [a-z]+ computes?$", "## When [a-z]+ pays?$", "## What [a-z]+ costs?$"
    parts = ("# ", computes, "```text", "<!-- code ", pays, costs, "```text", "::: vitreuse")
    for _, name in rows:
        assert re.search("^" + ".*?^".join(parts), (HOW / name).read_text(), re.DOTALL | re.MULTILINE), name
        assert name == "exact.md" or "<!-- shares " in (HOW / name).read_text(), name


def test_code_is_that_of_the_file():
    shown = hooks.code("vitreuse.model.merge.choose_merging").splitlines()  # which torch wraps
    assert shown[0] == '```python title="vitreuse/model/merge.py"'
    assert "\n".join(shown[1:-1]) in (ROOT / "vitreuse" / "model" / "merge.py").read_text()


def test_shares_are_those_of_the_plan():
    *_, reuse, merge = hooks.shares("exact reuse*6 exact*5, exact-24*12").splitlines()
    assert reuse == "| `exact reuse*6 exact*5` | 0.898 | 0.876 | 0.856 |"  # the first as in README.md
    assert merge.startswith("| `exact-24*12` | - | 0.744 |")
    with pytest.raises(ValueError, match="the words are"):
        hooks.shares("exat*12")


def test_every_command_shows_its_help():
    pages = hooks.command_pages()
    assert set(re.findall("^# `(.*)`", "\n".join(pages.values()), re.MULTILINE)) == \
        {"vitreuse", "python -m train", "python -m train.sweep", "python -m eval"}
    for page in pages.values():
        for command, text in re.findall("^#+ `([^`]*)`\n\n```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE):
            assert text.startswith(f"usage: {command} "), command
            assert max(map(len, text.splitlines())) <= 120


def test_every_recipe_has_a_row():
    row = r"^\| \[(\w+)\]\(\.\./(configs/.*)\) \| (.+) \| (.+) \| (.+) \|$"
    rows = re.findall(row, hooks.recipes_page(), re.MULTILINE)
    assert [path for _, path, *_ in rows] == \
        [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "configs").rglob("[!_]*.yaml"))]
    assert ("lazy", "configs/digits/lazy.yaml", "`(exact reuse*2)*2`", "LazyFormer, arXiv 2102.12702, in miniature.",
            "139 seconds, evaluation included.") in rows


@pytest.mark.parametrize("page, link, expected", [
    ("training.md", "evaluation.md", "evaluation.md"),
    ("how/merge.md", "../study/README.md", "../study/README.md"),
    ("how/merge.md", "../../experiments.md", "../experiments.md"),
    ("experiments.md", "docs/training.md", "training.md"),
    ("how/merge.md", "../../vitreuse/model/merge.py", f"{REPO_URL}/blob/main/vitreuse/model/merge.py"),
    ("study/README.md", "../../configs/study", f"{REPO_URL}/tree/main/configs/study"),
    ("study/README.md", "conversion.py", f"{REPO_URL}/blob/main/docs/study/conversion.py"),
    ("training.md", "../README.md#train", f"{REPO_URL}/blob/main/README.md#train"),
    ("training.md", "evaluation.md#knn", "evaluation.md#knn"),
    ("training.md", "../README.md#nowhere", "../README.md#nowhere"),
    ("training.md", "missing.md", "missing.md"),
    ("training.md", "../missing.py", "../missing.py"),
    ("training.md", "../../outside", "../../outside"),
])  # fmt: skip
def test_links_are_those_of_the_site(page, link, expected):
    kept = {name: SimpleNamespace(inclusion=SimpleNamespace(is_included=lambda: True))
            for name in ("evaluation.md", "training.md", "study/README.md", "experiments.md")}
    left_out = {"study/conversion.py": SimpleNamespace(inclusion=SimpleNamespace(is_included=lambda: False))}
    files = SimpleNamespace(get_file_from_path={**kept, **left_out}.get)
    made = hooks.on_page_markdown(f"[a]({link})", SimpleNamespace(file=SimpleNamespace(src_uri=page)),
                                  {"repo_url": REPO_URL}, files)
    assert made == f"[a]({expected})"


def test_pages_that_measurements_leave_are_listed_once_they_are_there(tmp_path):
    def listed():
        found = hooks.on_config({"nav": [{"Home": "index.md"}, {"Studies": [{"A": "a.md"}, {"Experiments": "e.md"}]}],
                                 "docs_dir": str(tmp_path)})
        return [page for entry in found["nav"][1]["Studies"] for page in entry.values()]

    assert listed() == ["a.md", "e.md"]
    for page in hooks.MEASURED.values():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).touch()
    assert listed() == ["a.md", *hooks.MEASURED.values(), "e.md"]


@pytest.mark.proof
def test_what_leads_nowhere_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("cards", "__pycache__"))
    for name in (*BESIDE, "vitreuse"):
        (tmp_path / name).symlink_to(ROOT / name)
    flaws = {
        "training.md": ("[a](nowhere.md)", "'nowhere.md', but the target is not found"),
        "evaluation.md": ("[a](training.md#nowhere)", "does not contain an anchor '#nowhere'"),
        "gpu/README.md": ("[a](../../vitreuse/nowhere.py)", "'../../vitreuse/nowhere.py', but the target"),
        "compress.md": ("[a](../README.md#nowhere)", "'../README.md#nowhere', but the target"),
        "study/README.md": ("![a](nowhere.png)", "'nowhere.png', but the target"),
        "api/plans.md": ("[a][vitreuse.nowhere]", "Could not find cross-reference target 'vitreuse.nowhere'"),
        "unlisted.md": ("# In no navigation", "unlisted.md"),
    }
    for name, (text, _) in flaws.items():
        with (tmp_path / "docs" / name).open("a") as page:
            page.write(f"\n\n{text}\n")
    built = build_site(tmp_path, tmp_path / "site")
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert (built.returncode, len(warnings)) == (1, len(flaws)), built.stderr
    assert [said for _, said in flaws.values() if said not in built.stderr] == []
