"""Local paths and URLs: only data may come from a URL, and only from a kind of URL that the command line allows.

WebDataset's `pipe:` URLs run a shell, so what a config says must never be enough.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from vitreuse.io.errors import ConfigError

FETCHED = ("http", "https", "pipe")  # kinds of URL that can be allowed
URL = re.compile(r"(pipe(?=:)|[a-z][a-z0-9+.-]*(?=://))", re.IGNORECASE)


def url_kind(text: str | None) -> str | None:
    """The scheme of a URL, such as 'https'; None for a path."""
    found = URL.match(text or "")
    return found[0].lower() if found else None


def refuse_url(name: str, text: str | None) -> None:
    """Checks that what has this name is a local path, if it is given at all.

    Raises:
        ConfigError: It is a URL.
    """
    kind = url_kind(text)
    if kind is not None:
        raise ConfigError(f"{name} {text!r} is a {kind}: URL: fetch what it stands for and give its local path.")


def refuse_unallowed_url(name: str, text: str, allow: Collection[str]) -> None:
    """Checks that what has this name is a local path, or a URL of a kind that the command line allows; no config may.

    Raises:
        ConfigError: It is another URL.
    """
    kind = url_kind(text)
    if kind is None or kind in allow:
        return
    if kind in FETCHED:
        effect = "runs a shell command" if kind == "pipe" else "is fetched"
        way_out = f"which {effect}: add --allow {kind} to the command line if you trust it, or give a local path."
    else:
        way_out = f"and only {', '.join(FETCHED)} can be allowed: give 'pipe:PROGRAM {{}}', or a local path."
    raise ConfigError(f"{name} {text!r} is a {kind}: URL, {way_out}")


def refuse_idle_allow(allow: Iterable[str], roots: Iterable[str | None]) -> None:
    """Checks that each kind of URL that the command line allows is one that data come from.

    Raises:
        ConfigError: One is not.
    """
    kinds = {url_kind(root) for root in roots}
    for kind in allow:
        if kind not in kinds:
            raise ConfigError(f"--allow {kind} has no effect, the data are behind no {kind}: URL: leave it out.")
