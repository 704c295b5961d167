"""Local paths and nothing else: nothing is fetched here, and WebDataset's `pipe:` URLs run a shell."""

from __future__ import annotations

import re

from vitreuse.strict_yaml import ConfigError

URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def refuse_url(name: str, text: str | None) -> None:
    """Checks that what has this name is a local path, if it is given at all.

    Raises:
        ConfigError: It is a URL.
    """
    found = URL.match(text or "")
    if found:
        raise ConfigError(f"{name} {text!r} is a {found[0]} URL: fetch what it stands for and give its local path.")
