"""One table of results in the forms people read it: terminal, Markdown, LaTeX, CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vitreuse.io.file_names import for_terminal, printable

Row = Mapping[str, Any]

# What TeX would not print as it stands; a bracket at the start of a line would be an option of the line before.
LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": "$<$", ">": "$>$", "±": r"$\pm$", "[": "{[}", "]": "{]}"},
}


class Column(NamedTuple):
    """One key of a row: its heading, with the unit, and the format of its values."""

    key: str
    heading: str
    spec: str = ""

    def text(self, row: Row) -> str:
        """The value as shown: a dash where nothing was measured, a size as rows x columns."""
        value = row[self.key]
        if isinstance(value, list):
            return " x ".join(format(part, self.spec) for part in value)
        return "-" if value is None else format(value, self.spec)


def to_rich(rows: Sequence[Row], columns: Sequence[Column], caption: str | None = None) -> Table:
    """The table for a terminal, numbers to the right."""
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.spec else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(for_terminal(column.text(row)) for column in columns))
    return table


def to_rich_upright(rows: Sequence[Row], columns: Sequence[Column], caption: str) -> Table:
    """The same with a line per key and a column per row, for many keys; the first is the heading."""
    first, *others = columns
    table = Table(first.heading, caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    for row in rows:
        table.add_column(first.text(row), justify="right", overflow="fold")
    for column in others:
        table.add_row(column.heading, *(column.text(row) for row in rows))
    return table


def to_markdown(rows: Sequence[Row], columns: Sequence[Column], caption: str) -> str:
    """The table for a README, its caption below."""
    lines = [
        "| " + " | ".join(column.heading for column in columns) + " |",
        "|" + "|".join("---:" if column.spec else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(column.text(row).replace("|", "\\|") for column in columns) + " |" for row in rows]
    return printable("\n".join([*lines, "", caption, ""]))


def to_latex(rows: Sequence[Row], columns: Sequence[Column], caption: str) -> str:
    """The table for a paper, with the rules of the package booktabs."""
    alignment = "".join("r" if column.spec else "l" for column in columns)
    lines = [[column.heading for column in columns], *([column.text(row) for column in columns] for row in rows)]
    head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in lines)
    ruled = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    table = [rf"\begin{{tabular}}{{{alignment}}}", *ruled, r"\end{tabular}"]
    whole = [r"\begin{table}", r"\centering", *table, rf"\caption{{{_latex(caption)}}}", r"\end{table}"]
    return "\n".join([r"% \usepackage{booktabs}", *whole, ""])


def _latex(text: str) -> str:
    """Plain text escaped, with a minus instead of a hyphen before a number."""
    escaped = "".join(LATEX.get(sign, sign) for sign in printable(text))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def to_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """The values unrounded, one line a row, a size as rows x columns; the keys carry the units."""
    lines = ([row.get(key) for key in keys] for row in rows)
    texts = ([" x ".join(map(str, value)) if isinstance(value, list) else value for value in line] for line in lines)
    return csv_text([keys, *texts])


def csv_text(lines: Iterable[Sequence[Any]]) -> str:
    """Lines of CSV; a value that holds a comma, a quote or the end of a line stands in quotes.

    Of the two signs that end a line Python before 3.13 quotes those alone with which it ends its own.
    """
    texts = []
    for line in lines:
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\r\n").writerow(line)
        texts.append(stream.getvalue().removesuffix("\r\n") + "\n")
    return "".join(texts)
