import errno
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vitreuse.io import durable
from vitreuse.io.durable import (
    durable_file,
    durable_folder,
    exclusive_lock,
    writable_file,
    writable_folder,
    write_durably,
)


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


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"


def test_a_place_that_takes_no_file_is_found_out(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(OSError, match=r"nothing can be written in .*file.* \(a file is in its place\): choose"):
            writable_folder(folder)
    assert writable_folder(tmp_path / "new" / "one").is_dir() and not [*(tmp_path / "new" / "one").iterdir()]
    with pytest.raises(OSError, match="is a folder: give a file in it"):
        writable_file(tmp_path)
    assert writable_file(Path(os.devnull)) == Path(os.devnull)
    assert writable_file(tmp_path / "two" / "page.html").parent.is_dir()


def test_a_folder_takes_its_place_whatever_stands_around_it(tmp_path, monkeypatch):
    target, link = tmp_path / "large" / "out", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    left = target.with_name(f".out.{os.getpid()}.tmp")  # of a killed process, whose number comes again in a container
    (left / "half").mkdir(parents=True)
    with durable_folder(link) as folder:
        (folder / "file").touch()
    assert link.is_symlink() and [path.name for path in target.iterdir()] == ["file"] and not left.exists()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").touch()
    monkeypatch.chdir(tmp_path / "large")
    shutil.rmtree(target)
    for path, said in ((tmp_path / "locked", "holds .lock of another command"), (Path("."), "folder that you are in")):
        with pytest.raises(ValueError, match=said), durable_folder(path):
            pytest.fail("it was begun")


def test_what_is_no_file_is_written_into(tmp_path):
    """As /dev/null, or /dev/stdout, which must not become a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write_durably(pipe, b"said")
        assert read.result(60) == b"said"
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.fcntl, "lockf", refused)
    with exclusive_lock(tmp_path / ".lock"):
        assert f"{tmp_path} lies on a file system without locks" in capsys.readouterr().err


def test_a_file_system_that_cannot_wait_for_a_folder_still_takes_files(tmp_path, monkeypatch):
    fsync, failing = os.fsync, [errno.EINVAL]

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(failing[0], "of a folder")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", refused)
    write_durably(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"
    failing[0] = errno.EIO
    with pytest.raises(OSError, match="of a folder"):
        write_durably(tmp_path / "state", b"newer")
