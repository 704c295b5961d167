"""Tars read from end to end, as trees in which links lead to what they link to.

Python's tarfile takes a tar that is cut between two members, or in a header, for a whole one. What follows the last
member is therefore checked here: a tar ends with a block of zeros, and no other follows.
"""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vitreuse.data.names import is_leftover
from vitreuse.data.tree import LEADS_BACK, WHOLE_FILE, Entry, Level, Span, Unusable, list_below, read_level
from vitreuse.io.errors import DataError, as_data_error

BLOCK_BYTES = 512
HEADER_MARK, HEADER_MARK_AT = b"ustar", 257  # in a member's header
MAX_LINKS = 40  # followed from one to the next, as Linux does
# What is often called .tar and is none: the first bytes, what they are, and what unpacks it.
COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip -c"),
    (b"BZh", "bzip2", "bunzip2 -c"),
    (b"\xfd7zXZ\0", "xz", "unxz -c"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd -c"),
)
ARCHIVES = ((b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!", "rar"))


def tar_members(file: BinaryIO, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar, each read when it is asked for.

    Args:
        file: The file that is the tar, or that has it as a member.
        start: Where in the file the tar begins; offset_data of a member counts from the file's beginning.
        size: Bytes of the tar; None for all that follows.

    Raises:
        TarError: It is no tar, or cut short.
    """
    stop = os.fstat(file.fileno()).st_size if size is None else start + size
    end = start
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] tarfile keeps 700 bytes for each
            end = tar.offset  # pyright: ignore[reportAttributeAccessIssue] of the next header: of sparse files too
            yield info
    if end + BLOCK_BYTES > stop or os.pread(file.fileno(), BLOCK_BYTES, end) != bytes(BLOCK_BYTES):
        raise tarfile.ReadError(f"no end mark at byte {end - start}")
    for place in range(end, stop, BLOCK_BYTES):
        if os.pread(file.fileno(), len(HEADER_MARK), place + HEADER_MARK_AT) == HEADER_MARK:
            raise tarfile.ReadError(f"another tar follows its end mark, at byte {place - start}")


def describe_tar_error(path: Path, error: Exception, start: int = 0) -> tuple[str, str]:
    """The reason why a file could not be read as a tar from ``start`` on, and the way out."""
    with open(path, "rb") as file:
        head = os.pread(file.fileno(), 8, start)
    for magic, name, command in COMPRESSED:
        if head.startswith(magic):
            unpacked = path.with_name(f"{path.name.partition('.')[0]}-unpacked.tar")
            way_out = "pack it again without" if start else f"{command} {path} > {unpacked} makes a tar of it"
            return f"is compressed by {name}, and images are read where they lie", way_out
    for magic, name in ARCHIVES:
        if head.startswith(magic):
            return f"is a {name} archive and no tar", "unpack it"
    return f"is damaged, cut short or no uncompressed tar ({error})", "fetch or write it again"


class Link(NamedTuple):
    """A symbolic link in a tar."""

    target: str


@dataclass(eq=False)
class Node:
    """A folder in a tar: what lies in it by name, a later member in place of an earlier one of the same name.

    Attributes:
        path: Its path from the top of the tar.
        above: The folder that it lies in; None for the top.
        entries: What lies in it; None for neither file nor folder, such as a pipe.
    """

    path: str = ""
    above: "Node | None" = None
    entries: dict[str, "Node | Span | Link | Unusable | None"] = field(default_factory=dict)

    def add(self, info: tarfile.TarInfo) -> None:
        """Adds a member to the tree that this is the top of."""
        below, name = posixpath.split(clean_path(info.name))
        folder = self._make_folder(below)
        if not name:
            return
        if info.isdir():
            folder._make_folder(name)
        elif info.islnk():
            folder.entries[name] = self._find_hard_link(info)
        elif info.issym():
            folder.entries[name] = Link(info.linkname)
        elif info.issparse():
            folder.entries[name] = Unusable("has holes that the tar leaves out: pack it again, without --sparse")
        else:
            folder.entries[name] = Span(info.offset_data, info.size) if info.isreg() else None

    def follow(self, path: str, num_links: int = 0) -> "Node | Span | Unusable | None":
        """What lies at a path from here, an absolute one from the top; Unusable where nothing does."""
        here = self
        while path.startswith("/") and here.above is not None:
            here = here.above
        found: Node | Span | Link | Unusable | None = here
        for part in path.split("/"):
            if part in ("", "."):
                continue
            if not isinstance(found, Node):
                return _leads_out(path)
            here, found = found, found.above if part == ".." else found.entries.get(part)
            if isinstance(found, Link):
                found = here.follow(found.target, num_links + 1) if num_links < MAX_LINKS else None
            if found is None:
                return _leads_out(path)
        return found

    def _make_folder(self, path: str) -> "Node":
        folder = self
        for name in filter(None, path.split("/")):
            inner = folder.entries.get(name)
            if not isinstance(inner, Node):
                inner = folder.entries[name] = Node(posixpath.join(folder.path, name), folder)
            folder = inner
        return folder

    def _find_hard_link(self, info: tarfile.TarInfo) -> "Node | Span | Link | Unusable | None":
        """What a hard link stands for, which is an earlier member."""
        below, name = posixpath.split(clean_path(info.linkname))
        folder = self.follow(below)
        return folder.entries.get(name, _leads_out(info.linkname)) if isinstance(folder, Node) else _leads_out(name)


def clean_path(name: str) -> str:
    """The path of a member from the top of the tar."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _leads_out(target: str) -> Unusable:
    return Unusable(f"is a link to {target}, which is not in the tar: pack it again with tar --dereference")


@dataclass(frozen=True, eq=False)
class TarFolder:
    """A folder in a tar.

    Attributes:
        tar: What the tar is called in a sentence.
        node: The folder itself.
        trail: The folders from which links led here.
    """

    tar: str
    node: Node
    trail: tuple[Node, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.node.path} in {self.tar}" if self.node.path else self.tar

    def level(self) -> Level:
        return read_level(self.place, self.node.entries, self._look)

    def _look(self, name: str) -> Entry:
        entry = self.node.entries[name]
        if isinstance(entry, Node):
            return TarFolder(self.tar, entry, self.trail)
        if not isinstance(entry, Link):
            return entry
        found, trail = self.node.follow(entry.target), (*self.trail, self.node)
        if not isinstance(found, Node):
            return found
        if any(found in _with_all_above(passed) for passed in trail):
            what = f"the link {name} of {self.place} to {entry.target} {LEADS_BACK}"
            raise DataError(f"{what}: pack the tar without it.")
        return TarFolder(self.tar, found, trail)


def _with_all_above(node: Node) -> list[Node]:
    found = [node]
    while (above := found[-1].above) is not None:
        found.append(above)
    return found


class InnerTar(NamedTuple):
    """A tar that is a member of a tar, as a folder: read each time it is looked at, in whichever process."""

    tar: Path  # the file that holds it
    name: str
    span: Span

    @property
    def place(self) -> str:
        return f"{self.name} in {self.tar}"

    def level(self) -> Level:
        return TarFolder(self.place, read_nodes(self.tar, self.place, self.span)).level()


def read_nodes(tar: Path, place: str, span: Span) -> Node:
    """Reads the members of a tar, or of one inside it, as a tree.

    Raises:
        DataError: It is damaged, compressed, or no tar.
    """
    top = Node()
    try:
        with as_data_error(f"{tar} cannot be read", "make it readable"), open(tar, "rb") as file:
            for info in tar_members(file, span.offset, span.size):
                top.add(info)
    except tarfile.TarError as error:
        problem, way_out = describe_tar_error(tar, error, span.offset)
        raise DataError(f"{place} {problem}: {way_out}.") from error
    return top


class TarOfTars(NamedTuple):
    """A tar of tars, as ImageNet's training set is shipped: a folder of theirs, by their names without the ending."""

    place: str
    tars: dict[str, InnerTar]
    skipped: Counter[str]

    def level(self) -> Level:
        return Level(dict(sorted(self.tars.items())), {}, self.skipped)


def open_tar(tar: Path) -> TarFolder | TarOfTars:
    """Reads a tar of images, or of tars.

    Raises:
        DataError: It cannot be read, has both, or two tars of the same name.
    """
    top = TarFolder(str(tar), read_nodes(tar, str(tar), WHOLE_FILE))
    members = [InnerTar(tar, path, span) for path, span in _files(top.node) if path.lower().endswith(".tar")]
    if not members:
        return top
    images, skipped = list_below(top)
    for image in images:
        raise DataError(f"{tar} has both images ({image}) and tars ({members[0].name}): leave one kind out.")
    tars = {posixpath.basename(member.name)[: -len(".tar")]: member for member in members}
    if len(tars) < len(members):
        raise DataError(f"{tar} has two tars of the same name in different folders: name them by class.")
    del skipped[".tar"]
    return TarOfTars(str(tar), tars, skipped)


def _files(node: Node) -> Iterator[tuple[str, Span]]:
    """The files of a tree but none that a system left behind, with their paths."""
    left = [node]  # and no recursion: a tar may be deeper than Python's stack
    while left:
        folder = left.pop()
        for name, entry in folder.entries.items():
            if isinstance(entry, Node) and not is_leftover(name):
                left.append(entry)
            elif isinstance(entry, Span) and not is_leftover(name):
                yield posixpath.join(folder.path, name), entry
