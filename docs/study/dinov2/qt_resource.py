"""Files of a Qt resource collection (.rcc), as GCompris keeps its photographs in.

The format is that of Qt's rcc tool with --binary: a header, a tree of nodes of one length, names, and the content of
each file behind its length; numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER, NODE_BYTES = ">4sIIII", {1: 14, 2: 22, 3: 22}
COMPRESSED, FOLDER = 0b101, 0b10


def files_of(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The path and the content of each file of a collection that is kept as it is, in the order of the tree.

    Files that were compressed, as texts are, are left out.

    Raises:
        ValueError: It is no collection, or of another version.
    """
    if content[:4] != b"qres":
        raise ValueError("a Qt resource collection begins with qres, and this file does not.")
    _, version, tree_at, data_at, names_at = struct.unpack_from(HEADER, content)
    if version not in NODE_BYTES:
        raise ValueError(f"a Qt resource collection of version {version} cannot be read, those of 1 to 3 can.")

    def below(number: int, folder: str) -> Iterator[tuple[str, bytes]]:
        node_at = tree_at + number * NODE_BYTES[version]
        name_at, flags, first, second = struct.unpack_from(">IHII", content, node_at)
        path = folder + _name(content, names_at + name_at) if number else ""
        if flags & FOLDER:
            for child in range(second, second + first):
                yield from below(child, f"{path}/" if path else "")
        elif not flags & COMPRESSED:
            (length,) = struct.unpack_from(">I", content, data_at + second)
            start = data_at + second + 4
            yield path, content[start : start + length]

    return below(0, "")


def _name(content: bytes, at: int) -> str:
    """A name behind its length in characters and its hash."""
    (length,) = struct.unpack_from(">H", content, at)
    return content[at + 6 : at + 6 + 2 * length].decode("utf-16-be")
