"""Folders and the tars that tar makes of them: the same images, whatever links, leftovers and damage are among them."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_index import assert_one_sentence, write_tar
from tiny_split import encode, make_image
from torchvision.datasets import ImageFolder

from vitreuse.__main__ import main
from vitreuse.data import BuildSettings, DataError, FolderDataset, Workers, build_index, build_shards, load_index
from vitreuse.data.names import LEFTOVERS

SETTINGS = BuildSettings(samples_per_shard=5)
TELLING = Workers(show_progress=True)


def draw(folder, *names):
    """Images that differ by their place."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(make_image(sum(map(ord, name)))))


@pytest.fixture
def images(tmp_path):
    """Two classes of 3 images, one of them in a deeper folder."""
    draw(tmp_path / "images", *(f"{name}/{number}.png" for name in ("cat", "dog") for number in (0, 1)))
    draw(tmp_path / "images", "cat/deep/2.png", "dog/2.png")
    return tmp_path / "images"


def read_keys(folder):
    index = load_index(folder)
    return sorted(index.locate(number)[1].key for number in range(len(index)))


def read_tars(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def pack(folder, path, *options):
    """A tar of a folder by the system's program."""
    subprocess.run(["tar", *options, "-C", folder.parent, "-cf", path, folder.name], check=True)
    return path


def make_links(images):
    """Hard links, symbolic links to images, class folders and folders in them, elsewhere and chained."""
    os.link(images / "cat/0.png", images / "dog/hard.png")
    (images / "dog/soft.png").symlink_to("../cat/1.png")
    (images / "dog/chained.png").symlink_to("soft.png")
    (images / "cow").symlink_to("cat")
    (images / "dog/more").symlink_to("../cat/deep", target_is_directory=True)
    os.link(images / "dog/soft.png", images / "dog/hard-of-soft.png", follow_symlinks=False)


@pytest.mark.parametrize("options", [[], ["--format=pax"], ["--format=v7"], ["--sort=name", "--sparse"]])
def test_a_tar_gives_what_its_folder_gives_links_included(images, tmp_path, options):
    make_links(images)
    reference = ImageFolder(str(images))
    assert len(reference) == 14
    build_shards(images, tmp_path / "from_folder", SETTINGS)
    build_shards(pack(images, tmp_path / "images.tar", *options), tmp_path / "from_tar", SETTINGS)
    expected = sorted(os.path.relpath(path, images).removesuffix(".png") for path, _ in reference.samples)
    assert read_keys(tmp_path / "from_folder") == read_keys(tmp_path / "from_tar") == expected
    assert read_tars(tmp_path / "from_folder") == read_tars(tmp_path / "from_tar")
    assert [FolderDataset(images).key(number) for number in range(14)] == [
        os.path.relpath(path, images) for path, _ in reference.samples
    ]


def test_links_in_shards_are_what_they_link_to(tmp_path):
    """As in a folder of files that was freed of duplicates and packed: every label is one file."""
    folder = tmp_path / "files"
    draw(folder, "a.png", "b.png")
    (folder / "a.cls").write_text("1")
    os.link(folder / "a.cls", folder / "b.cls")
    (folder / "c.png").symlink_to("b.png")
    (folder / "c.cls").symlink_to("a.cls")
    (tmp_path / "shards").mkdir()
    pack(folder, tmp_path / "shards" / "a.tar", "--sort=name")
    index = build_index(tmp_path / "shards")
    records = [index.locate(number)[1] for number in range(3)]
    assert [(record.key, record.label) for record in records] == [(f"files/{key}", 1) for key in "abc"]
    assert records[1][:2] == records[2][:2] != records[0][:2]


def test_a_link_elsewhere_is_read_from_a_folder_and_refused_in_a_tar(images, tmp_path):
    shutil.move(images / "dog", tmp_path / "elsewhere")
    (images / "dog").symlink_to(tmp_path / "elsewhere")
    (images / "cat/far.png").symlink_to(tmp_path / "elsewhere/0.png")
    assert len(FolderDataset(images)) == 7
    with pytest.raises(DataError) as error:
        build_shards(pack(images, tmp_path / "a.tar"), tmp_path / "shards", SETTINGS)
    assert_one_sentence(error, "dog of images in ", "which is not in the tar", "tar --dereference")
    (images / "dog").unlink()
    shutil.move(tmp_path / "elsewhere", images / "dog")
    with pytest.raises(DataError) as error:
        build_shards(pack(images, tmp_path / "b.tar"), tmp_path / "shards", SETTINGS)
    assert_one_sentence(error, "far.png of images/cat in ", "which is not in the tar", "tar --dereference")


def test_absolute_links_are_followed_in_a_tar_of_absolute_names(images, tmp_path):
    (images / "cat/near.png").symlink_to(images / "dog/0.png")
    subprocess.run(["tar", "-P", "-cf", tmp_path / "a.tar", images], check=True)
    build_shards(tmp_path / "a.tar", tmp_path / "shards", SETTINGS)
    assert len(load_index(tmp_path / "shards")) == 7


@pytest.mark.parametrize("target", ["gone.png", "../../gone", "broken.png"])
@pytest.mark.parametrize("name", ["cat/broken.png", "cow"])
def test_a_broken_link_to_an_image_or_a_class_is_refused(images, tmp_path, name, target):
    (images / name).symlink_to(target)
    for source in (images, pack(images, tmp_path / "a.tar")):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / "shards", SETTINGS)
        assert_one_sentence(error, Path(name).name, f"is a link to {target}")
    with pytest.raises(DataError, match=f"is a link to {target}"):
        FolderDataset(images)


@pytest.mark.parametrize(
    ("name", "target", "said_of_tar"),
    [
        ("cat/up", "..", "leads back"),
        ("cat/deep/up", "..", "leads back"),
        ("cat/deep/up", "../..", "leads back"),
        ("up", ".", "leads back"),
        ("cat/self", "../cat", "leads back"),
        ("cat/top", "/", "leads back"),
        ("cat/out", "../..", "leads back"),
        ("cat/far", "../../..", "not in the tar"),
    ],
)
def test_a_link_back_to_a_folder_that_it_is_in_is_refused(images, tmp_path, name, target, said_of_tar):
    (images / name).symlink_to(target)
    for source, said in ((images, "leads back"), (pack(images, tmp_path / "a.tar"), said_of_tar)):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / "shards", SETTINGS)
        assert_one_sentence(error, Path(name).name, said)
    with pytest.raises(DataError, match="leads back to a folder that it is in"):
        FolderDataset(images)


def test_links_that_lead_to_each_other_are_refused(images, tmp_path):
    (images / "cat/other").symlink_to("../dog")
    (images / "dog/other").symlink_to("../cat")
    for source in (images, pack(images, tmp_path / "a.tar")):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / "shards", SETTINGS)
        assert_one_sentence(error, "other", "leads back to a folder that it is in")


def test_a_later_member_of_a_tar_takes_the_place_of_an_earlier_one(images, tmp_path):
    pack(images, tmp_path / "a.tar")
    (images / "cat/0.png").write_bytes(encode(make_image(999)))
    subprocess.run(["tar", "-C", tmp_path, "-rf", tmp_path / "a.tar", "images/cat/0.png"], check=True)
    for name in ("images", "a.tar"):
        build_shards(tmp_path / name, tmp_path / f"from-{name}", SETTINGS)
    assert read_tars(tmp_path / "from-images") == read_tars(tmp_path / "from-a.tar")


@pytest.mark.parametrize("num_zeros", [0, 30 * 512])
def test_a_tar_behind_a_tar_is_not_lost(images, tmp_path, num_zeros):
    content = pack(images, tmp_path / "a.tar").read_bytes() + bytes(num_zeros)
    (tmp_path / "a.tar").write_bytes(content)
    build_shards(tmp_path / "a.tar", tmp_path / "shards", SETTINGS)
    (tmp_path / "a.tar").write_bytes(content * 2)
    with pytest.raises(DataError) as error:
        build_shards(tmp_path / "a.tar", tmp_path / "more", SETTINGS)
    assert_one_sentence(error, "a.tar is damaged", f"another tar follows its end mark, at byte {len(content)}")


def test_an_image_with_holes_is_refused_and_other_files_with_holes_are_not(images, tmp_path):
    for name in ("dog/notes.bin", "dog/9.png"):  # the first is the last member
        with open(images / name, "wb") as file:
            file.truncate(1 << 20)
        if name.endswith("bin"):
            build_shards(pack(images, tmp_path / "a.tar", "--sparse", "--sort=name"), tmp_path / "shards", SETTINGS)
            assert len(load_index(tmp_path / "shards")) == 6
    with pytest.raises(DataError) as error:
        build_shards(pack(images, tmp_path / "b.tar", "--sparse"), tmp_path / "more", SETTINGS)
    assert_one_sentence(error, "9.png of images/dog in ", "has holes", "--sparse")


def test_what_is_hidden_or_left_behind_by_a_system_is_no_image(images, tmp_path, capsys):
    keys = [FolderDataset(images).key(number) for number in range(6)]
    hidden = [".ipynb_checkpoints", ".AppleDouble", ".thumbnails", "@eaDir", "$RECYCLE.BIN", *LEFTOVERS - {"@eadir"}]
    hidden.remove("$recycle.bin")
    for name in hidden:
        draw(images, *(f"{place}{name}/x.png" for place in ("", "cat/", "cat/deep/")))
    draw(images, "cat/._0.png", "dog/.hidden.png")
    (images / "dog/notes.txt").write_text("x")
    dataset = FolderDataset(images)
    assert [dataset.key(number) for number in range(len(dataset))] == keys
    expected = 3 * len({*map(str.lower, hidden)}) + 3
    assert len(dataset.notes) == 1
    assert f"{images}: {expected} files or folders that are no images are left out: " in dataset.notes[0]
    for source in (images, pack(images, tmp_path / "images.tar")):
        build_shards(source, tmp_path / f"from-{source.name}", SETTINGS, TELLING)
        assert dataset.notes[0].partition(": ")[2] in capsys.readouterr().err
    assert read_tars(tmp_path / "from-images") == read_tars(tmp_path / "from-images.tar")
    assert read_keys(tmp_path / "from-images") == [key.removesuffix(".png") for key in keys]


def test_what_is_left_out_is_counted_by_kind(images, tmp_path, capsys):
    os.mkfifo(images / "cat/pipe.png")
    draw(images, "cat/._0.png", "dog/._1.png", "dog/.thumbnails/1.png")
    for name in ("cat/README", "cat/a.txt", "dog/b.TXT", "dog/c.txt", "dog/Icon\r"):
        (images / name).write_text("x")
    (images / "cat/link.txt").symlink_to("gone.txt")
    counts = "4 .txt, 2 ._*, 1 without an ending, 1 pipe, socket or device, 1 .thumbnails, 1 'Icon\\r'"
    assert FolderDataset(images).notes == [f"{images}: 10 files or folders that are no images are left out: {counts}."]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(images, "images")
    build_shards(tmp_path / "a.tar", tmp_path / "shards", SETTINGS, TELLING)
    assert f"images in {tmp_path}/a.tar: 10 files or folders that are no images" in capsys.readouterr().err


def test_leftovers_in_shards_are_no_samples(tmp_path, capsys):
    picture = encode(make_image(0))
    leftover = [(f"{name}/b.{end}", picture) for name in ("__MACOSX", ".cache") for end in ("png", "cls")]
    write_tar(tmp_path / "a.tar", [("a.png", picture), ("a.cls", b"0"), ("._a.png", b"fork"), *leftover])
    (tmp_path / "._a.tar").write_bytes(b"resource fork")
    assert main(["shards", "index", str(tmp_path), "--workers", "1"]) == 0
    told = capsys.readouterr().err
    assert "5 files or folders that are no images are left out: 2 __MACOSX, 2 .cache, 1 ._*." in told
    assert read_keys(tmp_path) == ["a"]
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 0


def failing_scandir(monkeypatch, folder, fail):
    scandir = os.scandir

    def scan(path):
        if str(path) == str(folder):
            fail()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


def deny():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("folder", ["cat/deep", "cat", ""])
@pytest.mark.parametrize("kind", ["denied", "vanished"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_folder_that_cannot_be_read_is_an_error(images, tmp_path, monkeypatch, folder, kind, num_workers):
    """Root, as which tests may run, may read anything."""
    place = images / folder
    failing_scandir(monkeypatch, place, deny if kind == "denied" else lambda: shutil.rmtree(place))
    reason = "Permission denied" if kind == "denied" else "No such file or directory"
    with pytest.raises(DataError) as error:
        build_shards(images, tmp_path / "shards", SETTINGS, Workers(num_workers))
    assert_one_sentence(error, f"folder {place} cannot be read ({reason})", "make it readable")
    assert not (tmp_path / "shards").exists()
    if kind == "denied":
        with pytest.raises(DataError) as error:
            FolderDataset(images)
        assert_one_sentence(error, f"folder {place} cannot be read ({reason})")


def test_a_folder_of_shards_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.tar").symlink_to("gone.tar")
    with pytest.raises(DataError) as error:
        build_index(tmp_path)
    assert_one_sentence(error, f"shard {tmp_path / 'a.tar'} cannot be read (No such file or directory)")
    monkeypatch.setattr(os, "listdir", lambda path: deny())
    with pytest.raises(DataError) as error:
        build_index(tmp_path)
    assert_one_sentence(error, f"folder {tmp_path} cannot be read (Permission denied)")
