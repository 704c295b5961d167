"""A result as people read it: tables under a title and over remarks, as text and, in a notebook, as HTML.

What a function returns is a Shown, which says what is shown of it once, as what rich can draw.
"""

from __future__ import annotations

import importlib.util
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vitreuse.io.file_names import for_terminal, printable

CELL = "text-align: {}; padding: 0.2em 0.6em"  # no colours, which are the notebook's


class Shown:
    """What prints as a table, and shows as one in a notebook, with a picture where it has one and matplotlib is there.

    A class of results says what by ``table``, and by ``picture`` if it has any.
    """

    def table(self) -> RenderableType:
        """What is shown, of table_of and titled."""
        raise NotImplementedError

    picture: Callable[[], bytes] | None = None  # a PNG, drawn by matplotlib

    def __str__(self) -> str:
        return for_terminal(as_text(self.table())).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = as_html(self.table())
        if self.picture is None or importlib.util.find_spec("matplotlib") is None:
            return shown
        data = b64encode(self.picture()).decode()
        return f'{shown}<img style="max-width: 100%" alt="the same as a picture" src="data:image/png;base64,{data}">'


def table_of(headings: Iterable[str], rows: Iterable[Iterable[str]], text: Collection[str]) -> Table:
    """A table of these rows: columns whose heading is in ``text`` to the left, all others, of numbers, to the right."""
    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in text else "right")
    for row in rows:
        table.add_row(*row)
    return table


def titled(title: str, table: Table, *below: str | Table) -> Group:
    """A table under its title and over others and remarks, which may be wider than it is."""
    above = [Text(title, "table.title")] if title else []
    return Group(*above, table, *(Text(part, "table.caption") if isinstance(part, str) else part for part in below))


def as_html(renderable: RenderableType) -> str:
    """What table_of and titled make, as HTML without scripts and colours."""
    if isinstance(renderable, Group):
        return "".join(map(as_html, renderable.renderables))
    if not isinstance(renderable, Table):
        tag = "b" if isinstance(renderable, Text) and renderable.style == "table.title" else "small"
        return f"<div><{tag}>{_escaped(renderable)}</{tag}></div>"
    columns = renderable.columns
    styles = [CELL.format(column.justify) for column in columns]
    rows = zip(*(column.cells for column in columns), strict=True)
    head = _row("th", [column.header for column in columns], styles)
    body = "".join(_row("td", cells, styles) for cells in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Iterable[RenderableType], styles: Iterable[str]) -> str:
    inside = (f'<{tag} style="{style}">{_escaped(cell)}</{tag}>' for cell, style in zip(cells, styles, strict=True))
    return f"<tr>{''.join(inside)}</tr>"


def _escaped(text: RenderableType) -> str:
    return escape(printable(str(text)))


def as_text(renderable: RenderableType, is_terminal: bool = False) -> str:
    """What is printed: within a terminal's width, and on whatever else it is as wide as it needs."""
    console = Console(markup=False, emoji=False, force_jupyter=False, force_terminal=is_terminal)
    if is_terminal:
        renderable = fitted(renderable, console)
    else:
        console.width = max(_measured(renderable, console).maximum, console.width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def fitted(renderable: RenderableType, console: Console) -> RenderableType:
    """The same within a console's width, nothing lost: a table with its cells wrapped between words and its columns
    closer together, or where that does not do, each row as a paragraph."""
    if isinstance(renderable, Group):
        return Group(*(fitted(part, console) for part in renderable.renderables))
    if not isinstance(renderable, Table) or _measured(renderable, console).maximum <= console.width:
        return renderable
    cells = [[_measured(cell, console) for cell in (column.header, *column.cells)] for column in renderable.columns]
    least = [max(cell.minimum for cell in column) for column in cells]
    most = [max(cell.maximum for cell in column) for column in cells]
    spare = console.width - sum(least) - (len(least) - 1)  # a space between columns
    if spare < 0:
        return _as_paragraphs(renderable)
    renderable.padding, renderable.pad_edge, renderable.show_edge = 0, False, False
    for number in sorted(range(len(least)), key=lambda number: most[number] - least[number]):
        given = min(spare, most[number] - least[number])
        spare -= given
        column = renderable.columns[number]
        column.width, column.no_wrap, column.overflow = least[number] + given, False, "fold"
    return renderable


def _measured(renderable: RenderableType, console: Console) -> Measurement:
    """How wide something may be, from what can be wrapped no more to what need not be."""
    return Measurement.get(console, console.options.update(width=1000), renderable)


def _as_paragraphs(table: Table) -> Group:
    """The first cell of each row as a line, and below it all others that hold something, after their headings."""
    headings = [str(column.header) for column in table.columns]
    parts: list[RenderableType] = []
    for first, *others in zip(*(column.cells for column in table.columns), strict=True):
        shown = [f"{heading} {cell}" for heading, cell in zip(headings[1:], others, strict=True) if str(cell)]
        parts += [Text(f"{headings[0]} {first}".strip()), Padding(Text(", ".join(shown)), (0, 0, 1, 2))]
    return Group(*parts, *([] if table.caption is None else [Text(str(table.caption), "table.caption")]))
