"""Names of files in what is written and printed: a byte that is no UTF-8 comes out as it went in, or as an escape.

Linux lets a name hold any bytes; Python has each that is no UTF-8 as a lone surrogate, from U+DC80 to U+DCFF.
"""

from __future__ import annotations

import hashlib
import sys

MOST_BYTES = 128  # of a label in the name of a file, of which file systems take 255


def to_bytes(text: str) -> bytes:
    """Text in UTF-8, names in it with the bytes that they have on disk.

    A reader has them again by ``open(path, encoding="utf-8", errors="surrogateescape", newline="")``.
    """
    return text.encode("utf-8", "surrogateescape")


def is_name(text: str) -> bool:
    """Whether to_bytes can write the text: other lone surrogates stand for no byte of a name."""
    try:
        to_bytes(text)
    except UnicodeEncodeError:
        return False
    return True


def stem_of(*parts: str | None) -> str:
    """The name of a file without its ending, of parts of which some may be missing, such as a label and a size; of a
    label that is too long for one its beginning, and a digest."""
    label, *others = filter(None, parts)
    name = label.replace("/", "_")
    if len(to_bytes(name)) > MOST_BYTES:
        digest = hashlib.sha256(to_bytes(name)).hexdigest()[:8]
        name = to_bytes(name)[: MOST_BYTES - 9].decode("utf-8", "ignore") + f"-{digest}"
    return ".".join([name, *(part.replace("/", "-") for part in others)])


def printable(text: str, encoding: str = "utf-8") -> str:
    """Text for what must be valid in an encoding, such as a picture or a page: what it lacks as an escape, \\udcff."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def for_picture(text: str) -> str:
    """Text as matplotlib draws it, which else takes what stands between two dollars for a formula."""
    return printable(text).replace("$", r"\$")


def for_terminal(text: str) -> str:
    """Text as standard output can show it."""
    return printable(text, getattr(sys.stdout, "encoding", None) or "utf-8")
