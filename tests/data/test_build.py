"""Building shards: from every kind of source the same bytes, by any number of workers, through any interruption."""

import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_index import assert_one_sentence, write_tar
from tiny_split import encode
from torchvision.datasets import ImageFolder

from vitreuse.__main__ import main
from vitreuse.data import BuildSettings, DataError, Workers, build_shards, load_index, verify_shards
from vitreuse.data.datasets import list_classes
from vitreuse.data.listing import list_splits
from vitreuse.data.shards.build import ShardTask, _write_shard
from vitreuse.data.tree import DiskFolder, list_below

CLASS_SIZES = {"n01.cat": 7, "n02": 11, "n03": 5}
NUM_IMAGES = sum(CLASS_SIZES.values())
SETTINGS = BuildSettings(samples_per_shard=5)
SHRINK = BuildSettings(samples_per_shard=2, resize_px=64)


def make_photo(number, size=(120, 90), mode="RGB"):
    coarse = np.random.default_rng(number).integers(256, size=(7, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size).convert(mode)


def make_folder(folder, class_sizes, size=(120, 90)):
    """Class folders of JPEGs, with a dot in a name, another ending and a deeper folder among them."""
    number = 0
    for class_name, count in class_sizes.items():
        (folder / class_name / "deeper").mkdir(parents=True)
        for index in range(count):
            name = {1: f"deeper/{index:03d}.JPEG", 2: f"{index:03d}.v2.jpeg"}.get(index, f"{index:03d}.JPEG")
            (folder / class_name / name).write_bytes(encode(make_photo(number, size), "JPEG"))
            number += 1
        (folder / class_name / "notes.txt").write_text("no image")
        (folder / class_name / "._000.JPEG").write_bytes(b"resource fork")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), CLASS_SIZES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images that take a while to shrink, for builds that are to be killed."""
    return make_folder(tmp_path_factory.mktemp("photos"), {"a": 30, "b": 30}, size=(500, 375))


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_samples(folder):
    """Key, label and bytes of each sample, in order."""
    index = load_index(folder)
    found = [index.locate(number) for number in range(len(index))]
    return [(r.key, r.label, path.read_bytes()[r.offset : r.offset + r.size]) for path, r in found]


def list_images(folder, class_name):
    return [f"{class_name}/{name}" for name in list_below(DiskFolder(str(folder / class_name)))[0]]


def read_members(folder):
    """Name and bytes of each image, class by class."""
    return [(name, (folder / name).read_bytes()) for of in list_classes(folder) for name in list_images(folder, of)]


def pack_class(folder, class_name):
    """A tar of one class, as bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in [*list_images(folder, class_name), f"{class_name}/notes.txt", f"{class_name}/._000.JPEG"]:
            tar.add(folder / name, os.path.relpath(name, class_name))
    return content.getvalue()


def pack_tar_of_tars(folder, path):
    members = [(f"{class_name}.tar", pack_class(folder, class_name)) for class_name in CLASS_SIZES]
    write_tar(path, [("README", b"text"), ("._n02.tar", b"resource fork"), *members[::-1]])
    return path


def pack_tar(folder, path):
    """A tar whose images lie two folders deeper than their class folders say."""
    hidden = [("./data/._.JPEG", b"resource fork"), ("./data/train/.cache/x.JPEG", b"thumbnail")]
    write_tar(path, [*hidden, *((f"./data/train/{name}", content) for name, content in read_members(folder))])
    return path


def test_a_folder_of_images(source, tmp_path):
    assert build_shards(source, tmp_path / "train", SETTINGS) == [tmp_path / "train"]
    index = load_index(tmp_path / "train")
    reference = ImageFolder(str(source), is_valid_file=lambda path: "/." not in path and path.lower().endswith("jpeg"))
    expected = {
        re.sub(r"\.(?=[^/]*$)", "_", os.path.relpath(path, source).rpartition(".")[0]): (label, Path(path).read_bytes())
        for path, label in reference.samples
    }
    assert len(expected) == NUM_IMAGES and "n01.cat/002_v2" in expected and "n02/deeper/001" in expected
    assert list(index.class_names) == reference.classes == list(CLASS_SIZES)
    assert [shard.num_samples for shard in index.shards] == [5, 5, 5, 5, 3]
    samples = read_samples(tmp_path / "train")
    assert len(samples) == NUM_IMAGES
    assert {key: (label, content) for key, label, content in samples} == expected
    assert verify_shards(tmp_path / "train") == []
    assert sorted(os.listdir(tmp_path)) == ["train"]


@pytest.mark.parametrize("pack", [pack_tar_of_tars, pack_tar])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_tars_give_the_same_shards_as_their_folders(source, tmp_path, pack, num_workers):
    build_shards(source, tmp_path / "from_folder", SETTINGS)
    build_shards(pack(source, tmp_path / "images.tar"), tmp_path / "from_tar", SETTINGS, Workers(num_workers))
    from_folder, from_tar = (read_folder(tmp_path / name) for name in ("from_folder", "from_tar"))
    assert from_folder.pop("build.json") != from_tar.pop("build.json")
    assert from_folder == from_tar and len(from_tar) == 7


def test_the_bytes_depend_on_the_seed_and_not_on_the_workers(source, tmp_path):
    for name, seed, num_workers in (("alone", 0, 1), ("three", 0, 3), ("other", 1, 2)):
        build_shards(source, tmp_path / name, BuildSettings(5, seed=seed), Workers(num_workers))
    alone, three, other = (read_folder(tmp_path / name) for name in ("alone", "three", "other"))
    assert alone == three
    assert all(alone[name] != other[name] for name in alone)
    assert sorted(read_samples(tmp_path / "alone")) == sorted(read_samples(tmp_path / "other"))


def test_every_shard_holds_a_mix_of_classes(tmp_path):
    make_folder(tmp_path / "source", {f"c{number}": 20 for number in range(4)}, size=(3, 3))
    build_shards(tmp_path / "source", tmp_path / "train", BuildSettings(samples_per_shard=20))
    labels = np.array([label for _, label, _ in read_samples(tmp_path / "train")]).reshape(4, 20)
    counts = np.array([np.bincount(of_shard, minlength=4) for of_shard in labels])
    assert counts.min() >= 1 and counts.max() <= 10


def test_larger_images_are_shrunk_and_others_keep_their_bytes(tmp_path):
    sizes = {"tall": (90, 135), "wide": (201, 75), "small": (50, 300), "exact": (64, 64)}
    (tmp_path / "source" / "a").mkdir(parents=True)
    originals = {name: make_photo(number, size) for number, (name, size) in enumerate(sizes.items())}
    for name, image in originals.items():
        (tmp_path / "source" / "a" / f"{name}.png").write_bytes(encode(image))
    build_shards(tmp_path / "source", tmp_path / "train", BuildSettings(resize_px=64, quality=90))
    read = {key: content for key, _, content in read_samples(tmp_path / "train")}
    for name, size in (("tall", (64, 96)), ("wide", (172, 64))):
        expected = io.BytesIO()
        originals[name].resize(size, Image.Resampling.LANCZOS).save(expected, "JPEG", quality=90)
        assert read[f"a/{name}"] == expected.getvalue()
    assert all(read[f"a/{name}"] == encode(originals[name]) for name in ("small", "exact"))
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as tar:
        endings = {name for name in tar.getnames() if not name.endswith("cls")}
    assert endings == {"a/tall.jpg", "a/wide.jpg", "a/small.png", "a/exact.png"}


@pytest.mark.parametrize(
    ("mode", "file_format", "shrunk_mode"),
    [("L", "JPEG", "L"), ("CMYK", "JPEG", "RGB"), ("RGBA", "PNG", "RGB"), ("P", "PNG", "RGB"), ("1", "PNG", "RGB")],
)
def test_images_of_any_mode_are_shrunk(tmp_path, mode, file_format, shrunk_mode):
    (tmp_path / "source" / "a").mkdir(parents=True)
    original = make_photo(0, mode=mode)
    (tmp_path / "source" / "a" / "x.png").write_bytes(encode(original, file_format))
    build_shards(tmp_path / "source", tmp_path / "train", BuildSettings(resize_px=64))
    ((_, _, content),) = read_samples(tmp_path / "train")
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode, image.size) == ("JPEG", shrunk_mode, (85, 64))
    expected = original.convert(shrunk_mode).resize((85, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 6


def test_train_and_val_share_their_labels(tmp_path):
    make_folder(tmp_path / "source" / "train", CLASS_SIZES)
    make_folder(tmp_path / "source" / "val", {"n02": 3, "n03": 3})
    (tmp_path / "source" / "test").mkdir()
    built = build_shards(tmp_path / "source", tmp_path / "shards", SETTINGS, Workers(2))
    assert built == [tmp_path / "shards" / split for split in ("train", "val")]
    for folder, num_classes in zip(built, (3, 2), strict=True):
        assert load_index(folder).class_names == tuple(CLASS_SIZES)
        labels = {(key.partition("/")[0], label) for key, label, _ in read_samples(folder)}
        assert labels == set(list(zip(CLASS_SIZES, range(3), strict=True))[-num_classes:])


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path / "source", {"train": 3, "tram": 3})
    assert build_shards(tmp_path / "source", tmp_path / "shards", SETTINGS) == [tmp_path / "shards"]
    assert load_index(tmp_path / "shards").class_names == ("train", "tram")


PHOTO = encode(make_photo(0), "JPEG")


def make_flat_folder(path):
    path.mkdir()
    (path / "ILSVRC2012_val_00000001.JPEG").write_bytes(PHOTO)


def make_flat_val(path):
    make_folder(path / "train", {"a": 3})
    make_flat_folder(path / "val")


def make_empty_image(path):
    make_folder(path, {"a": 3})
    (path / "a" / "000.JPEG").write_bytes(b"")


def make_twins(path):
    make_folder(path, {"a": 3})
    (path / "a" / "000.png").write_bytes(PHOTO)


def make_other_val(path):
    make_folder(path / "train", {"a": 3, "b": 3})
    make_folder(path / "val", {"a": 3, "c": 3})


def make_compressed_tar(path):
    write_inner = io.BytesIO()
    with tarfile.open(fileobj=write_inner, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a/x.jpg"))
    path.write_bytes(write_inner.getvalue())


def make_inner_tar_without_end(path):
    """ImageNet's layout, the first of its tars cut just before its end mark."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        info = tarfile.TarInfo("x.JPEG")
        info.size = len(PHOTO)
        tar.addfile(info, io.BytesIO(PHOTO))
    end = 512 + -(-len(PHOTO) // 512) * 512
    write_tar(path, [("n01.tar", content.getvalue()[:end]), ("n02.tar", content.getvalue())])


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["there is no ", "name a folder"]),
        (lambda path: path.mkdir(), ["is not sorted into class folders"]),
        (make_flat_folder, ["is not sorted into class folders", "ImageNet's validation set"]),
        (lambda path: write_tar(path, [("x.JPEG", PHOTO)]), ["is not sorted into class folders"]),
        (lambda path: write_tar(path, [("val/x.JPEG", PHOTO), ("val/y.JPEG", PHOTO)]), ["is not sorted into class"]),
        (lambda path: write_tar(path, [("README", b"text")]), ["is not sorted into class folders"]),
        (make_flat_val, ["val is not sorted into class folders"]),
        (lambda path: (path / "a").mkdir(parents=True), ["class folder", "has no images", "fill or remove"]),
        (lambda path: write_tar(path, [("n01.tar", bytes(1024))]), ["n01.tar in ", "has no images"]),
        (make_empty_image, ["image a/000.JPEG of ", "is empty"]),
        (lambda path: write_tar(path, [("a/x.jpg", PHOTO), ("b/y.jpg", b"")]), ["image b/y.jpg of ", "is empty"]),
        (make_twins, ["a/000.JPEG and a/000.png of ", "the same key"]),
        (lambda path: make_folder(path, {"a": 1, "__none__": 1}), ["__none__/000", "WebDataset's readers"]),
        (make_other_val, ["val has a class 'c' that train lacks"]),
        (lambda path: path.write_bytes(PHOTO), ["damaged, cut short or no uncompressed tar"]),
        (make_compressed_tar, ["is compressed by gzip", "gunzip -c ", "makes a tar of it"]),
        (make_inner_tar_without_end, ["n01.tar in ", "damaged, cut short", "no end mark"]),
        (lambda path: write_tar(path, [("x.jpg", PHOTO), ("n01.tar", b"")]), ["both images (x.jpg) and tars"]),
        (lambda path: write_tar(path, [("a/n.tar", b""), ("b/n.tar", b"")]), ["two tars of the same name"]),
        (lambda path: write_tar(path, [("n.tar", b""), ("a/n.TAR", b"")]), ["two tars of the same name"]),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, make, parts):
    make(tmp_path / "source")
    with pytest.raises(DataError) as error:
        build_shards(tmp_path / "source", tmp_path / "shards", SETTINGS)
    assert_one_sentence(error, tmp_path / "source", *parts)
    assert set(os.listdir(tmp_path)) <= {"source"}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_undecodable_image_is_named_where_it_must_be_shrunk(tmp_path, num_workers):
    make_folder(tmp_path / "source", {"a": 3})
    (tmp_path / "source" / "a" / "000.JPEG").write_bytes(PHOTO[:-60])
    with pytest.raises(DataError) as error:
        build_shards(tmp_path / "source", tmp_path / "shrunk", SHRINK, Workers(num_workers))
    assert_one_sentence(error, f"image a/000.JPEG of {tmp_path / 'source'} is no whole image (")
    build_shards(tmp_path / "source", tmp_path / "copied", SETTINGS, Workers(num_workers))
    assert ("a/000", 0, PHOTO[:-60]) in read_samples(tmp_path / "copied")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_images_that_cannot_be_used_are_named_at_once(tmp_path, num_workers, capsys):
    for split in ("train", "val"):
        make_folder(tmp_path / "source" / split, {"a": 30, "b": 3}, size=(9, 7))
    bad = [f"a/{number:03d}.JPEG" for number in (5, *range(7, 30))]
    for name in bad:
        (tmp_path / "source" / "train" / name).write_bytes(b"no image")
    for name in ("a/000.JPEG", "b/000.JPEG"):
        (tmp_path / "source" / "val" / name).write_bytes(PHOTO[:-60])
    folder, command = tmp_path / "shards", ["shards", "build", str(tmp_path / "source"), str(tmp_path / "shards")]
    options = ["--resize", "5", "--samples-per-shard", "7", "--workers", str(num_workers)]
    assert main([*command, *options]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    first, second = (f"images of {tmp_path / 'source' / split} cannot be used: image a/" for split in ("train", "val"))
    assert f"24 {first}" in told and f"2 {second}" in told
    assert [name for name in bad if name in told] == bad[:20] and " and 4 more; " in told
    assert told.count("is no whole image (") == 2 and told.endswith(".")
    for name in bad:
        (tmp_path / "source" / "train" / name).unlink()
    assert main([*command, *options]) == 2  # train is whole now
    told = capsys.readouterr().err
    assert f"2 {second}" in told and len(load_index(folder / "train")) == 9
    for name in ("a/000.JPEG", "b/000.JPEG"):
        (tmp_path / "source" / "val" / name).write_bytes(PHOTO)
    assert main([*command, *options]) == 0 and len(load_index(folder / "val")) == 33
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]


def test_no_shard_stays_without_its_bad_images_when_a_build_is_killed(tmp_path):
    """What a kill leaves is taken for whole by the next start."""
    make_folder(tmp_path / "source", {"a": 9}, size=(9, 7))
    (tmp_path / "source" / "a" / "004.JPEG").write_bytes(b"no image")
    listing = list_splits(tmp_path / "source", Workers())[""]
    path = tmp_path / "shard.tar"
    problems = _write_shard(ShardTask(path, listing.source, listing.images, BuildSettings(9, resize_px=5)))
    assert [*problems] == ["a/004.JPEG"] and not path.exists()


def make_several_empty_images(path):
    make_folder(path, {"a": 30})
    for number in (0, *range(3, 30)):
        (path / "a" / f"{number:03d}.JPEG").write_bytes(b"")


def make_several_twins(path):
    make_folder(path, {"a": 6})
    for number in (0, 3, 4):
        (path / "a" / f"{number:03d}.png").write_bytes(PHOTO)


def make_several_empty_classes(path):
    for name in ("a", "b", "c"):
        (path / name).mkdir(parents=True)


def make_lookalikes(path):
    make_folder(path, {"caf\u00e9": 3, "cafe\u0301": 3})


def make_other_spelling(path):
    make_folder(path / "train", {"caf\u00e9": 3})
    make_folder(path / "val", {"cafe\u0301": 3})


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (make_several_empty_images, ["28 images of ", "are empty (a/000.JPEG, a/003.JPEG, ", " and 8 more)"]),
        (make_several_twins, ["a/000.JPEG and a/000.png, a/003.JPEG and a/003.png, a/004", "(3 such pairs)"]),
        (make_several_empty_classes, ["source/a has no images", "one of 3 such classes (a, b, c)"]),
        (make_lookalikes, [r"'cafe\u0301' and 'caf\xe9' of ", "differ only in Unicode normalisation"]),
        (
            make_other_spelling,
            [r"val has a class 'cafe\u0301' and train has 'caf\xe9'", "only in Unicode normalisation"],
        ),
    ],
)
def test_all_of_a_kind_are_named(tmp_path, make, parts):
    make(tmp_path / "source")
    with pytest.raises(DataError) as error:
        build_shards(tmp_path / "source", tmp_path / "shards", SETTINGS)
    assert_one_sentence(error, *parts)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0, it must be at least 1"),
        ({"resize_px": 0}, "resize_px is 0, it must be at least 1"),
        ({"quality": 101}, "quality is 101, it must be from 1 to 100"),
        ({"seed": -1}, "seed is -1, it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(DataError) as error:
        BuildSettings(**settings)
    assert_one_sentence(error, sentence)


def test_the_same_command_again_does_nothing_and_another_is_refused(source, tmp_path):
    build_shards(source, tmp_path / "train", SETTINGS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    build_shards(source, tmp_path / "train", SETTINGS, Workers(2))
    with pytest.raises(DataError) as error:
        build_shards(source, tmp_path / "train", BuildSettings(5, seed=1))
    assert_one_sentence(error, tmp_path / "train", "was built otherwise (seed 0, now 1)", "new or empty folder")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()} == before
    assert os.listdir(tmp_path) == ["train"]


def test_a_folder_in_use_is_spared_and_an_empty_one_is_filled(source, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("used", "file"):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / name, SETTINGS)
        assert_one_sentence(error, tmp_path / name, "is not empty and has no build.json")
    build_shards(source, tmp_path / "empty", SETTINGS)
    assert len(load_index(tmp_path / "empty")) == NUM_IMAGES
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "used"]


def test_a_place_that_cannot_be_written_is_one_sentence(source, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError) as error:
        build_shards(source, tmp_path / "file" / "train", SETTINGS)
    assert_one_sentence(error, tmp_path / "file" / "train", "cannot be written (Not a directory)", "run the same")


def unfinish(folder):
    """Puts a whole build back to where a kill during its third shard leaves it."""
    staged = folder.with_name(f".{folder.name}.building") / folder.name
    staged.parent.mkdir()
    folder.rename(staged)
    for name in ("shard-000002.tar", "shard-000004.tar", "index.npy", "index.json"):
        (staged / name).unlink()
    (staged / ".shard-000002.tar.12345.tmp").write_bytes(b"half")
    return staged


@pytest.fixture
def begun(tmp_path):
    """A source of its own, the whole build of it, and the folder where another was killed."""
    source = make_folder(tmp_path / "source", CLASS_SIZES)
    for name in ("whole", "train"):
        build_shards(source, tmp_path / name, SETTINGS)
    return source, read_folder(tmp_path / "whole"), unfinish(tmp_path / "train")


def test_only_what_is_missing_is_written(begun):
    source, whole, staged = begun
    kept = {path.name: path.stat().st_mtime_ns for path in staged.glob("*.tar")}
    folder = staged.parents[1] / "train"
    build_shards(source, folder, SETTINGS)
    assert read_folder(folder) == whole
    assert len(kept) == 3 and all((folder / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert sorted(os.listdir(staged.parents[1])) == ["source", "train", "whole"]


def grow_image(source):
    with open(source / "n02" / "000.JPEG", "ab") as file:
        file.write(b"more")


def touch_image(source):
    os.utime(source / "n02" / "000.JPEG", ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "settings", "part"),
    [
        (lambda source: None, BuildSettings(4), "samples_per_shard 5, now 4"),
        (lambda source: None, BuildSettings(5, resize_px=9), "resize_px None, now 9"),
        (lambda source: (source / "n02" / "000.JPEG").unlink(), SETTINGS, "num_images 23, now 22, listing_sha256 "),
        (grow_image, SETTINGS, "(listing_sha256 "),
        (touch_image, SETTINGS, "(listing_sha256 "),
    ],
)
def test_another_source_or_setting_is_refused(begun, change, settings, part):
    source, _, staged = begun
    before = read_folder(staged)
    change(source)
    folder = staged.parents[1] / "train"
    with pytest.raises(DataError) as error:
        build_shards(source, folder, settings)
    assert_one_sentence(error, f"{staged.parent} holds a build that was begun otherwise", part, "remove it")
    assert read_folder(staged) == before
    shutil.rmtree(staged.parent)
    build_shards(source, folder, settings)
    assert verify_shards(folder) == []


def test_an_image_that_shrinks_while_it_is_built_is_named(source, tmp_path, monkeypatch):
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: original(path)[: -1 if path.suffix == ".JPEG" else None])
    with pytest.raises(DataError) as error:
        build_shards(source, tmp_path / "train", SETTINGS)
    assert_one_sentence(error, source, ".JPEG", "bytes instead of", "leave the source as it is")


HOLD_LOCK = """
import fcntl, sys
lock = open(sys.argv[1], "r+")
fcntl.lockf(lock, fcntl.LOCK_SH)  # which refuses whoever wants it for himself
print("held", flush=True)
sys.stdin.read()
"""


def test_two_builds_of_a_folder_at_once_are_refused(begun):
    source, whole, staged = begun
    (staged.parent / ".lock").touch()
    command = [sys.executable, "-c", HOLD_LOCK, staged.parent / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = read_folder(staged)
        with pytest.raises(DataError) as error:
            build_shards(source, staged.parents[1] / "train", SETTINGS)
        assert_one_sentence(error, staged.parents[1] / "train", "is being built by another process")
        assert read_folder(staged) == before
        holder.stdin.close()
    build_shards(source, staged.parents[1] / "train", SETTINGS)
    assert read_folder(staged.parents[1] / "train") == whole


def count_shards(folder):
    return len(list(folder.with_name(f".{folder.name}.building").glob("*/*.tar")))


def wait_for_shards(folder, number, is_running):
    deadline = time.monotonic() + 300
    while count_shards(folder) < number and is_running() and time.monotonic() < deadline:
        time.sleep(0.001)


def build_command(source, folder, *more):
    command = [sys.executable, "-m", "vitreuse", "shards", "build", source, folder, *more]
    return [*command, "--samples-per-shard", "2", "--resize", "64"]


def test_the_command_killed_and_run_again_gives_the_bytes_of_an_uninterrupted_build(photos, tmp_path):
    """The killed one's workers end too: they hold its standard error, which is read to its end."""
    build_shards(photos, tmp_path / "whole", SHRINK)
    folder = tmp_path / "train"
    killed = subprocess.Popen(build_command(photos, folder, "--workers", "3"), stderr=subprocess.PIPE)
    wait_for_shards(folder, 3, lambda: killed.poll() is None)
    killed.kill()
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL and not folder.exists() and 3 <= count_shards(folder) < 30
    again = subprocess.run(build_command(photos, folder, "--json"), capture_output=True, text=True, check=True)
    assert read_folder(folder) == read_folder(tmp_path / "whole")
    assert json.loads(again.stdout)["folders"][0]["num_samples"] == 60
    assert re.search(r"^writing train: 60/60 images, [\d.]+ images/s, 0:00:00 left$", again.stderr, re.MULTILINE)
    assert sorted(os.listdir(tmp_path)) == ["train", "whole"]


def test_kills_at_many_moments_leave_no_trace(photos, tmp_path):
    folder = tmp_path / "train"
    context = multiprocessing.get_context("fork")
    num_killed = 0
    for number in (0, 1, 5, 10, 15, 20, 25, 29, 30):
        build = context.Process(target=build_shards, args=(photos, folder, SHRINK, Workers(2)))
        build.start()
        wait_for_shards(folder, number, build.is_alive)
        build.kill()
        build.join()
        num_killed += build.exitcode == -signal.SIGKILL
    assert num_killed >= 5
    build_shards(photos, folder, SHRINK)
    build_shards(photos, tmp_path / "whole", SHRINK)
    assert read_folder(folder) == read_folder(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["train", "whole"]


def square(number):
    return number**2


def kill_own_process(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_keep_the_order_of_the_tasks_and_progress_counts_their_sizes(capfd):
    workers = Workers(3, show_progress=True)
    assert list(workers.map(square, range(20), "squaring", "numbers", sizes=[2] * 20, done=10)) == [
        number**2 for number in range(20)
    ]
    assert re.fullmatch(r"squaring: 50/50 numbers, [\d.]+ numbers/s, 0:00:00 left\n", capfd.readouterr().err)
    assert list(Workers(3).map(square, [7], "squaring")) == [49]
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_a_bar_with_rate_and_time_left(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    list(Workers(2, show_progress=True).map(square, range(3), "squaring [them]", "numbers"))
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capfd.readouterr().err)
    assert re.search(r"squaring \[them\], [\d.]+ numbers/s ━+ 3/3 numbers 0:00:00", shown), shown


def test_a_worker_that_is_killed_ends_the_work_with_a_sentence():
    with pytest.raises(DataError) as error:
        list(Workers(2).map(kill_own_process, range(9), "dying"))
    assert_one_sentence(error, "one of 2 worker processes was killed", "run the same command again")


def test_workers_index_and_verify_as_one_process_does(source, tmp_path, capsys):
    build_shards(source, tmp_path / "train", SETTINGS)
    before = read_folder(tmp_path / "train")
    for verb in ("index", "verify"):
        assert main(["shards", verb, str(tmp_path / "train"), "--workers", "2"]) == 0
        assert re.search(r"ing train: 5/5 shards", capsys.readouterr().err)
    assert read_folder(tmp_path / "train") == before
    shard = tmp_path / "train" / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["shards", "verify", str(tmp_path / "train"), "--workers", "2"]) == 2
    assert shard.name in capsys.readouterr().err


def test_quality_without_shrinking_is_refused(source, tmp_path, capsys):
    assert main(["shards", "build", str(source), str(tmp_path / "train"), "--quality", "80"]) == 2
    assert capsys.readouterr().err.startswith("vitreuse shards: --quality 80 has no effect without --resize")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_documentation_work(source, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    commands = re.findall(r"^\.venv/bin/vitreuse (shards .*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        shutil.copytree(source, Path("imagenet") / split)
    pack_tar_of_tars(source, Path("ILSVRC2012_img_train.tar"))
    assert [main(shlex.split(command, comments=True)) for command in commands] == [0, 0, 0]
    assert capsys.readouterr().out.count("data/imagenet") == 4
