import os

import pytest

from vitreuse.io import durable
from vitreuse.io.durable import durable_file, write_durably


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "state"
    write_durably(path, b"old")
    with pytest.raises(OSError, match="full"), durable_file(path) as file:
        file.write(b"half of the ne")
        raise OSError("disk is full")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "state", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(durable.os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(durable.os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_durably(path, b"new")
    assert events == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"new"
