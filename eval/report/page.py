"""The page: one file that needs no other, with the data as JSON between a style and a script."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent


def to_html(data: Any) -> str:
    """The HTML of a report's data.

    Whatever stands in the data stays data: the script shows it as text, and no `<` can end its element early.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(style=parts["css"], script=parts["js"], data=text)
