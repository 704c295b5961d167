"""Proves that a report can be read: python -m tests.report. Opens one in Debian's Chromium, without a network.

A page of sixty runs and a card with a hostile name, on a phone in the dark and on a desk in the light: nothing is asked
for, the console stays empty, nothing is wider than the window, keys reach every chart. Pictures go to runs/report/.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from eval.__main__ import main as evaluate
from tests.browser import Page, flaws_of_look, flaws_of_traffic, installed_chromium, opened
from tests.report.fabricated import PLANS, make_runs
from vitreuse.plan import parse_plan
from vitreuse.plan.language import WORDS

PICTURES = Path("runs/report")
WINDOWS = ("phone-dark", "desktop-light")
MOST_BYTES, MOST_SECONDS = 3_000_000, 20.0
HOSTILE = "</script><img src=x onerror=alert(1)>"


def main() -> int:
    """Checks a page; 0 if all holds, 1 if not, 2 without a browser."""
    chromium = installed_chromium()
    if chromium is None:
        print("the report is looked at in Chromium, which is missing: apt-get install chromium.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        runs = make_runs(Path(scratch), PLANS, 12)
        card, report = Path(scratch) / "card.json", Path(scratch) / "report.html"
        card.write_text((Path(runs[0]) / "card.json").read_text().replace("model0", HOSTILE))
        found = _build([*runs, str(card)], report)
        with opened(chromium) as page:
            found += [f"{window}: {flaw}" for window in WINDOWS for flaw in _flaws(page, report, window)]
    for flaw in found:
        print(f"FAIL report: {flaw}")
    print(f"{'FAIL' if found else 'ok  '} report: {', '.join(WINDOWS)}, pictures in {PICTURES}")
    return 1 if found else 0


def _build(runs: list[str], path: Path) -> list[str]:
    """What is wrong with how a page is built."""
    start = time.monotonic()
    if evaluate(["report", *runs, "-o", str(path)]):
        return ["it was not built"]
    seconds, size = time.monotonic() - start, path.stat().st_size
    print(f"     {len(runs)} runs: {size / 2**10:,.0f} KiB in {seconds:.1f} s")
    return [f"{seconds:.1f} s to build"] * (seconds > MOST_SECONDS) + [f"{size} bytes"] * (size > MOST_BYTES)


def _flaws(page: Page, path: Path, window: str) -> Iterator[str]:
    """What is wrong with a page in a window."""
    url = path.resolve().as_uri()
    yield from flaws_of_look(page, url, window, PICTURES / f"{window}.png")
    yield from _flaws_of_content(page)
    yield from _flaws_under_keys(page)
    yield from flaws_of_traffic(page, url)


def _flaws_of_content(page: Page) -> Iterator[str]:
    """Whether everything is there, once, as text."""
    for selector, number in {
        "#table tbody tr": 6,
        "#scatters svg .mark": 18,
        "#breakdown svg .mark": 6 + 6 + 36,
        "#curves svg .series": 10,
        "#made-table tbody tr": 61,
        "figure details table": 8,
        "svg.strip": 6 + 1 + len(WORDS),
    }.items():
        shown = page.ask(f"document.querySelectorAll({selector!r}).length")
        if shown != number:
            yield f"{shown} of {number} {selector}"
    if page.ask("document.querySelectorAll('main img').length"):
        yield "a name was read as HTML"
    for number, plan in enumerate(PLANS):
        rows = "[...document.querySelectorAll('#breakdown figure:first-child tbody tr')].map(row => row.textContent)"
        shown: list[str] = page.ask(f"choose({number}) ?? {rows}")
        if len(shown) != len(parse_plan(plan)) or any("undefined" in row or "NaN" in row for row in shown):
            yield f"the layers of {plan} are shown as {shown}"
    page.ask("choose(0) ?? 0")


def _flaws_under_keys(page: Page) -> Iterator[str]:
    """Whether Tab reaches the theme, the table's heads, every chart and the choice of a model, and arrows go on."""
    focused = """(() => {
        const reached = document.activeElement;
        const chart = reached.matches(".mark") && reached.closest("figure").querySelector("h3");
        return chart ? chart.innerText : reached.id || reached.textContent;
    })()"""
    reached: list[str] = page.ask("document.activeElement.blur() ?? []")
    for _ in range(60):
        page.press("Tab")
        reached.append(page.ask(focused))
    titles = page.ask("[...document.querySelectorAll('figure h3')].map(title => title.innerText)")
    yield from (f"Tab misses {name}" for name in ["theme", "Top-1 (%)", "chosen", *titles] if name not in reached)
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"
    page.ask("document.querySelector('#scatters .mark[tabindex=\"0\"]')?.focus()")
    first = page.ask(tip)
    page.press("ArrowRight")
    second = page.ask(tip)
    if "top-1" not in first or "top-1" not in second or first == second:
        yield f"the tooltips under keys are {first!r} and {second!r}"
    page.press("Escape")
    if not page.ask("document.getElementById('tip').hidden"):
        yield "Escape leaves the tooltip"
    yield from _flaws_of_order(page)
    yield from _flaws_of_theme(page)


def _flaws_of_order(page: Page) -> Iterator[str]:
    """Whether Enter on a head of the table sorts it."""
    page.ask("document.querySelectorAll('#table thead button')[2].focus()")
    page.press("Enter")
    order = page.ask("[...document.querySelectorAll('#table tbody tr')].map(row => parseFloat(row.cells[2].innerText))")
    if order != sorted(order, reverse=True) or order == sorted(order):
        yield f"sorted by top-1 the table goes {order}"


def _flaws_of_theme(page: Page) -> Iterator[str]:
    """Whether the button turns light into dark and back."""
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = [page.ask(colour)]
    for _ in range(2):
        page.ask("document.getElementById('theme').focus()")
        page.press("Enter")
        seen.append(page.ask(colour))
    if seen[0] == seen[1] or seen[0] != seen[2]:
        yield f"the theme's button gives {seen}"


if __name__ == "__main__":
    sys.exit(main())
