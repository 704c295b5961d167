"""Proves that the documentation can be read: python -m tests.website. Builds it and opens it in Debian's Chromium.

On a phone and on a desk, light and dark: nothing is asked for but the site, the console stays empty, nothing is wider
than the window, every text stands out, pictures load, links and their anchors are there, and a reader gets from the
first page to the others by links, clicks, keys and words. Pictures go to runs/website/.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.browser import (
    LOOPBACK,
    PATIENCE_S,
    WINDOWS,
    Page,
    flaws_of_look,
    flaws_of_traffic,
    installed_chromium,
    opened,
)
from tests.website.building import build_site

PICTURES = Path("runs/website")
LOOKED_AT = ("index", "how/merge", "api/plans", "commands/vitreuse", "recipes", "study/dinov2/index")  # in all windows
EVERYWHERE = ("phone-light", "desktop-dark")  # the windows of all other pages

WAYS = {  # from the first page to that on reuse
    "desktop-light": [".md-tabs a[href='how/index.html']", "nav.md-nav--primary a[href='reuse.html']"],
    "phone-dark": ["label[for=__drawer]", "label[for=__nav_3]", "nav.md-nav--primary a[href='how/reuse.html']"],
}
REST_S = 0.5  # of what slides and fades
BROKEN = """[...document.images].filter(image => !image.complete || !image.naturalWidth)
    .map(image => `${image.src} does not load`)"""
LINKS = """[
    [...document.querySelectorAll("[id]")].map(each => each.id),
    [...document.links].map(link => decodeURI(link.href)),
    [...document.querySelectorAll("nav.md-nav--primary a[href]")].map(link => link.href),
]"""
SEEN = """(selector => {
    const seen = [...document.querySelectorAll(selector)].find(each => {
        const box = each.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
        const top = document.elementFromPoint(x, y);
        return box.width && each.contains(top);
    });
    if (!seen) return null;
    const box = seen.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
})"""  # the middle of the first element of a selector that nothing covers


def main() -> int:
    """Checks the site; 0 if all holds, 1 if not, 2 without a browser."""
    chromium = installed_chromium()
    if chromium is None:
        print("the site is looked at in Chromium, which is missing: apt-get install chromium.", file=sys.stderr)
        return 2
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="site-") as folder:
        start = time.monotonic()
        built = build_site(Path.cwd(), Path(folder))
        if built.returncode:
            print(built.stderr)
            return 1
        print(f"     built in {time.monotonic() - start:.1f} s")
        names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in Path(folder).rglob("*.html"))
        names.remove("404")
        with served(Path(folder)) as home, opened(chromium) as page:
            num_flaws = sum(map(say, flaws_of_site(page, home, Path(folder), names)))
    print(
        f"{'FAIL' if num_flaws else 'ok  '} website: {len(names)} pages, {', '.join(WINDOWS)}, pictures in {PICTURES}"
    )
    return 1 if num_flaws else 0


def say(flaw: str) -> int:
    """Prints a flaw, and counts it."""
    print(f"FAIL website: {flaw}", flush=True)
    return 1


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which this machine reads a folder."""
    server = ThreadingHTTPServer((LOOPBACK, 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def flaws_of_site(page: Page, home: str, folder: Path, names: list[str]) -> Iterator[str]:
    """What is wrong with the pages of a site in a folder, each by itself and all together."""
    anchors, links, listed = {}, {}, set()
    for name in names:
        yield from flaws_of_page(page, home, name)
        url = f"{home}{name}.html"
        anchors[url], links[url], navigation = page.ask(LINKS)
        listed |= {link.partition("#")[0] for link in navigation}
    for url, leads in links.items():
        for target, _, anchor in (lead.partition("#") for lead in leads if lead.startswith(home)):
            is_there = (folder / target.removeprefix(home)).is_file()
            if not is_there or (anchor and anchor not in anchors[target]):
                yield f"{url} links to {target}#{anchor}, which is not there"
    yield from (f"the navigation misses {url}" for url in sorted(anchors.keys() - listed))
    yield from flaws_of_ways(page, home)


def flaws_of_page(page: Page, home: str, name: str) -> Iterator[str]:
    """What is wrong with a page in the windows in which it is looked at."""
    for window in WINDOWS if name in LOOKED_AT else EVERYWHERE:
        picture = PICTURES / f"{name.replace('/', '-')}-{window}.png"
        flaws = [*flaws_of_look(page, f"{home}{name}.html", window, picture), *flaws_of_traffic(page, home)]
        yield from (f"{name}, {window}: {flaw}" for flaw in flaws + page.ask(BROKEN))


def flaws_of_ways(page: Page, home: str) -> Iterator[str]:
    """Whether a reader comes from the first page to the others: by keys, clicks and words."""
    page.show(f"{home}index.html", "desktop-light")
    yield from flaws_of_keys(page)
    for window, clicks in WAYS.items():
        page.show(f"{home}index.html", window)
        for selector in clicks:
            yield from flaws_of_click(page, selector)
        if page.ask("location.pathname") != "/how/reuse.html":
            yield f"{window}: {clicks} leads to {page.ask('location.href')}"
    yield from flaws_of_theme(page, home)
    yield from flaws_of_search(page, home)
    yield from flaws_of_traffic(page, home)


def flaws_of_keys(page: Page) -> Iterator[str]:
    """Whether Tab reaches the sections."""
    reached = []
    for _ in range(20):
        page.press("Tab")
        reached.append(page.ask("document.activeElement.textContent.trim()"))
    yield from (f"Tab misses {name}" for name in ("Skip to content", "How it works", "API") if name not in reached)


def flaws_of_click(page: Page, selector: str) -> Iterator[str]:
    """Whether there is something to click on, once everything has come to rest."""
    time.sleep(REST_S)
    middle = page.ask(f"{SEEN}({selector!r})")
    if middle is None:
        yield f"nothing to click on at {selector}"
        return
    page.click(*middle)
    time.sleep(REST_S)


def flaws_of_theme(page: Page, home: str) -> Iterator[str]:
    """Whether the button goes from what the system has to light, dark, and back."""
    page.show(f"{home}index.html", "desktop-dark")
    colour, seen = "getComputedStyle(document.body).backgroundColor", []
    for _ in range(4):
        seen.append(page.ask(colour))
        yield from flaws_of_click(page, "label[for^=__palette]")
    if seen[0] != seen[2] or seen[0] != seen[3] or seen[0] == seen[1]:
        yield f"the theme's button gives {seen}"
    page.ask("localStorage.clear()")


def flaws_of_search(page: Page, home: str) -> Iterator[str]:
    """Whether words find pages."""
    page.show(f"{home}index.html", "desktop-light")
    yield from flaws_of_click(page, "[data-md-component=search-query]")
    page.write("merge tokens")
    page.press("End")  # it looks when a key is let go
    end = time.monotonic() + PATIENCE_S
    found: list[str] = []
    while not found and time.monotonic() < end:
        time.sleep(REST_S)
        found = page.ask("[...document.querySelectorAll('.md-search-result__link')].map(link => link.pathname)")
    if "/how/merge.html" not in found:
        yield f"a search finds {found[:5]}"


if __name__ == "__main__":
    sys.exit(main())
