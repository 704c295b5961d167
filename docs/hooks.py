"""What mkdocs adds to docs/ to make the site of it: pages made from the code, and links that lead out of docs/.

The pages are written for GitHub too, where links work as they stand and comments are not seen. On the site a link out
of docs/ goes to the page that the file became, or to the file in the repository, and two comments become what they
ask for: ``<!-- code NAME -->`` the source of a function or class, ``<!-- shares PLAN, PLAN -->`` a table of MACs.
"""

from __future__ import annotations

import inspect
import io
import os
import posixpath
import pydoc
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest.mock import patch

import griffe
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
PAGES_OF = {"experiments.md": "experiments.md", "CHANGELOG.md": "changelog.md"}  # files beside docs/ that are pages too
MEASURED = {  # which commands leave: make speed, make study, and two of python -m docs.study.dinov2
    "Speed over image size": "speed/README.md",
    "Tables, Fashion-MNIST": "study/fashion/results.md",
    "DINOv2, pieces of the fit": "study/dinov2/fits.md",
    "DINOv2, on a task": "study/dinov2/task/results.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)#?([^)\s]*)")
ASKED = re.compile(r"<!-- (code|shares) (.+?) -->")
HELP_WIDTH = "80"
FACTS = re.compile("^(Shape|Exact when|Differs from the paper|Cost|Raises|Source|Paper): ", re.MULTILINE)
RECIPES = """Each is a YAML file that `python -m train` takes, whose header also says command, hardware and what came of
it; those of ImageNet's small exact ones have a line for each preset. What a key means is in [Training](training.md)."""
MODEL, SIZES_PX = "deit_small_patch16_224", (224, 384, 512)


def on_config(config: Any) -> Any:
    """Lists among the studies the pages that commands leave once they have been run."""
    studies = next(item["Studies"] for item in config["nav"] if "Studies" in item)
    made = [{title: page} for title, page in MEASURED.items() if Path(config["docs_dir"], page).exists()]
    studies[-1:-1] = made  # before the last, which has all that was tried
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, and those that lie beside docs/."""
    made = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in PAGES_OF.items()}
    made |= {f"commands/{name}.md": text for name, text in command_pages().items()}
    for name, text in {**made, "recipes.md": recipes_page()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page with what its comments ask for, and links as the site has them."""
    makers: dict[str, Callable[[str], str]] = {"code": code, "shares": shares}
    markdown = ASKED.sub(lambda asked: makers[asked[1]](asked[2]), markdown)
    return LINK.sub(lambda link: site_link(link[1], link[2], page.file.src_uri, files, config["repo_url"]), markdown)


def site_link(link: str, anchor: str, page: str, files: Files, repo_url: str) -> str:
    """A link of a page to a file as the site has it; one to nothing stays as it is, and mkdocs complains of it."""
    behind = f"#{anchor}" if anchor else ""
    path = {name: path for path, name in PAGES_OF.items()}.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    name = PAGES_OF.get(target, target.removeprefix("docs/"))
    file = files.get_file_from_path(name) if target in PAGES_OF or target.startswith("docs/") else None
    if file is not None and file.inclusion.is_included():
        return posixpath.relpath(name, posixpath.dirname(page) or ".") + behind
    is_there = not target.startswith("..") and (ROOT / target).exists()
    if not is_there or (anchor and anchor not in anchors(ROOT / target)):
        return link + behind
    return f"{repo_url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}{behind}"


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings of a page in Markdown."""
    headings = re.findall("^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {slugify(case="lower")(heading, "-") for heading in headings}


def code(name: str) -> str:
    """The source of a function or class of the package by its full name, under its file's."""
    found: Any = pydoc.locate(name)
    path = Path(inspect.getsourcefile(inspect.unwrap(found)) or "").relative_to(ROOT)
    return f'```python title="{path.as_posix()}"\n{dedent(inspect.getsource(found))}```'


def shares(plans: str) -> str:
    """A table of plans' theoretical MACs over those of the exact plan, of DeiT-S at several sizes."""
    rows = ([f"`{plan}`", *(share(plan, size_px) for size_px in SIZES_PX)] for plan in plans.split(", "))
    headings = ["MACs over exact, DeiT-S", *(f"{size_px} px" for size_px in SIZES_PX)]
    return table(headings, rows, "|---|" + "---:|" * len(SIZES_PX))


def share(plan: str, size_px: int) -> str:
    """That of one plan; a dash where it is for larger images."""
    try:
        return f"{macs(plan, size_px) / macs('exact*12', size_px):.3f}"
    except ValueError:
        if size_px == SIZES_PX[-1]:
            raise
        return "-"


@cache
def macs(plan: str, size_px: int) -> int:
    """Theoretical MACs of a plan."""
    from vitreuse.cost.macs import count_macs
    from vitreuse.cost.summary import model_on_meta

    return sum(count_macs(model_on_meta(MODEL, plan, size_px), theoretical=True).values())


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], ruler: str) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {' | '.join(headings)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)])


def command_pages() -> dict[str, str]:
    """By its program's last word, the page of the help of each command."""
    from eval import __main__ as instruments
    from train import __main__ as train
    from train import sweep
    from vitreuse import __main__ as library
    from vitreuse.cli.shards import VERBS

    commands = [*library.COMMANDS, *(f"shards {verb}" for verb in VERBS)]
    return {
        "vitreuse": command_page("vitreuse", library.main, commands),
        "train": command_page("python -m train", train.main),
        "sweep": command_page("python -m train.sweep", sweep.main),
        "eval": command_page("python -m eval", instruments.main, instruments.COMMANDS),
    }


def command_page(program: str, main: Callable[[list[str]], int], commands: Iterable[str] = ()) -> str:
    """The help of a program, and of each of its commands."""
    shown = [f"# `{program}`", help_of(main)]
    for command in commands:
        shown += [f"## `{program} {command}`", help_of(main, *command.split())]
    return "\n\n".join(shown)


def help_of(main: Callable[[list[str]], int], *command: str) -> str:
    """What a program prints under --help."""
    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS=HELP_WIDTH), redirect_stdout(printed), suppress(SystemExit):
        main([*command, "--help"])
    return f"```text\n{printed.getvalue().strip()}\n```"


def recipes_page() -> str:
    """A table for each folder of configs/, of what the headers of its recipes say."""
    from vitreuse.config import load_config

    shown = ["# Recipes", RECIPES]
    for folder in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir()):
        rows = []
        for path in sorted(folder.glob("[!_]*.yaml")):
            said, plan = header(path), load_config(path).model.plan
            link = f"[{path.stem}](../{path.relative_to(ROOT).as_posix()})"
            rows.append([link, f"`{plan}`" if plan else "as converted", said["Source"], said["Cost"]])
        shown += [f"## configs/{folder.name}", table(["recipe", "plan", "source", "cost"], rows, "|---|---|---|---|")]
    return "\n\n".join(shown)


def header(path: Path) -> dict[str, str]:
    """What the comment at the beginning of a config says, by its headings."""
    said, heading = {}, ""
    for line in takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()):
        if found := re.match("# ([A-Z][^:]*): (.*)", line):
            heading, said[found[1]] = found[1], found[2]
        else:
            said[heading] += f" {line[1:].strip()}"
    return said


class Facts(griffe.Extension):
    """Makes a list of the facts in a docstring, each on a line of its own there: Shape, Cost, Paper and the like."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that was read."""
        if obj.docstring is not None:
            obj.docstring.value = FACTS.sub(r"\n- **\1:** ", obj.docstring.value)
