"""Splits by the names that people give them: read as such, told, or refused; and classes that only sound so."""

import subprocess

import pytest
from test_index import assert_one_sentence
from test_tree import SETTINGS, TELLING, draw, pack, read_keys

from vitreuse.__main__ import main
from vitreuse.data import (
    DataError,
    FolderDataset,
    build_shards,
    choose_split,
    find_split,
    load_index,
    open_images,
    open_split,
)


def make_classes(root, *splits, classes=("cat", "dog")):
    for split in splits:
        draw(root / split, *(f"{name}/{number}.png" for name in classes for number in range(2)))


def make_flat(root, *folders):
    for folder in folders:
        draw(root / folder, "0.png", "1.png")


# What the folders of a data set are called, and the splits that they are.
LAYOUTS = {
    "roboflow": {"train": "train", "valid": "val", "test": "test"},
    "kaggle": {"train": "train", "test": "test"},
    "kaggle-long": {"training": "train", "validation": "val", "testing": "test"},
    "doubled": {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
    "doubled-plain": {"train/train": "train", "val/val": "val"},
    "upper": {"Train": "train", "VAL": "val", "Test": "test"},
    "dev": {"train": "train", "dev": "val"},
    "eval": {"train": "train", "eval": "val"},
    "years": {"train2017": "train", "val2017": "val"},
    "sets": {"training_set": "train", "test_set": "test"},
    "words": {"train_images": "train", "validation-images": "val"},
    "shipped": {"ILSVRC2012_img_train": "train", "ILSVRC2012_img_val": "val"},
    "wrapped": {"train/images": "train", "valid/images": "val"},
    "deeper": {"archive/data/train": "train", "archive/data/val": "val"},
    "in-images": {"images/train": "train", "images/val": "val"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "tar", "open"])
def test_splits_are_known_by_many_names(tmp_path, layout, kind):
    source, splits = tmp_path / "name", {*layout.values()}
    make_classes(source, *layout)
    if kind == "open":
        for split in splits:
            dataset = open_split(source, split)
            assert dataset.class_names == ("cat", "dog") and len(dataset) == 4
            assert choose_split(source, split) == find_split(source, split)
        assert {split for split in ("train", "val", "test") if find_split(source, split)} == splits
        return
    built = build_shards(pack(source, tmp_path / "a.tar") if kind == "tar" else source, tmp_path / "shards", SETTINGS)
    assert [folder.name for folder in built] == [split for split in ("train", "val", "test") if split in splits]
    for folder in built:
        assert load_index(folder).class_names == ("cat", "dog")
        assert read_keys(folder) == ["cat/0", "cat/1", "dog/0", "dog/1"]


def test_what_is_renamed_or_left_out_is_told(tmp_path, capsys):
    make_classes(tmp_path / "name", "train", "valid")
    make_classes(tmp_path / "name", "extra")
    make_flat(tmp_path / "name", "test")
    draw(tmp_path / "name", "preview.png")
    (tmp_path / "name/docs").mkdir()
    for source in (tmp_path / "name", pack(tmp_path / "name", tmp_path / "a.tar")):
        built = build_shards(source, tmp_path / f"from-{source.name}", SETTINGS, TELLING)
        assert [folder.name for folder in built] == ["train", "val"]
        told = capsys.readouterr().err
        assert f"{source}: valid as val.\n" in told
        assert f"{source}: left out: docs, extra, preview.png, test, not sorted into classes.\n" in told


@pytest.mark.parametrize("names", [("train", "tram"), ("test", "car", "bus"), ("valid", "invalid"), ("dev", "ops")])
def test_one_class_among_others_may_sound_like_a_split(tmp_path, names):
    make_flat(tmp_path / "a" / "set", *names)
    for source in (tmp_path / "a", pack(tmp_path / "a", tmp_path / "a.tar")):
        build_shards(source, tmp_path / f"from-{source.name}", SETTINGS)
        assert load_index(tmp_path / f"from-{source.name}").class_names == tuple(sorted(names))
    assert open_images(choose_split(tmp_path / "a/set", "train")).class_names == tuple(sorted(names))


def test_classes_that_share_a_word_are_no_splits(tmp_path):
    make_flat(tmp_path / "a", "bullet train", "steam train", "crash_test")
    build_shards(tmp_path / "a", tmp_path / "shards", SETTINGS)
    assert len(load_index(tmp_path / "shards").class_names) == 3


def make_two_vals(root):
    make_classes(root, "train", "val", "valid")


def make_flat_splits_among_classes(root):
    make_flat(root, "train", "test", "car")


def make_lone_split(root):
    make_classes(root, "train", "extra")


def make_flat_splits(root):
    make_flat(root, "train", "test")


def make_splits_of_classes(root):
    make_flat(root, *(f"{name}/{split}" for name in ("bottle", "cable") for split in ("train", "test")))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (make_two_vals, ["val and valid, which both are val", "move one away"]),
        (make_flat_splits_among_classes, ["test, train, as splits are called, beside car", "rename what is a class"]),
        (make_lone_split, ["train, as splits are called, beside extra", "cannot be told apart"]),
        (make_flat_splits, ["train", "is not sorted into class folders"]),
        (make_splits_of_classes, ["splits test, train below bottle, beside cable", "sort the classes into splits"]),
    ],
)
def test_what_may_be_splits_or_classes_is_refused(tmp_path, make, parts):
    make(tmp_path / "name")
    for source in (tmp_path / "name", pack(tmp_path / "name", tmp_path / "a.tar")):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / "shards", SETTINGS)
        assert_one_sentence(error, *parts)
        assert not (tmp_path / "shards").exists()


def test_a_class_that_train_lacks_is_refused_in_test_too(tmp_path):
    make_classes(tmp_path / "a", "train")
    make_classes(tmp_path / "a", "test", classes=("cat", "dog", "emu"))
    with pytest.raises(DataError) as error:
        build_shards(tmp_path / "a", tmp_path / "shards", SETTINGS)
    assert_one_sentence(error, f"{tmp_path}/a/test has a class 'emu' that train lacks")


def test_splits_are_never_read_as_classes(tmp_path):
    make_classes(tmp_path, "name/train", "name/valid", "outer/train/train", "outer/train/test")
    for read, sentence in (
        (lambda: open_images(tmp_path / "name"), r"name has splits \(train, valid\), not classes"),
        (lambda: open_split(tmp_path, "name"), r"name has splits \(train, valid\), not classes"),
        (lambda: open_split(tmp_path / "outer", "train"), r"train has splits \(train, test\), not classes"),
        (lambda: choose_split(tmp_path / "name", "test"), r"has the splits train, valid and no test: choose one"),
        (lambda: open_split(tmp_path / "name", "test"), r"no folder .*name/test: .* has train, valid and needs test/"),
    ):
        with pytest.raises(DataError, match=sentence):
            read()


def test_two_tars_of_class_folders_in_a_tar_are_its_splits(tmp_path):
    make_classes(tmp_path / "name", "train", "val")
    (tmp_path / "outer").mkdir()
    for split in ("train", "val"):
        subprocess.run(
            ["tar", "-C", tmp_path / "name" / split, "-cf", tmp_path / f"outer/{split}.tar", "."], check=True
        )
    built = build_shards(pack(tmp_path / "outer", tmp_path / "a.tar"), tmp_path / "shards", SETTINGS)
    assert [folder.name for folder in built] == ["train", "val"]
    assert read_keys(tmp_path / "shards/val") == ["cat/0", "cat/1", "dog/0", "dog/1"]


def test_the_command_builds_what_roboflow_exports(tmp_path, capsys):
    make_classes(tmp_path / "export", "train", "valid", "test")
    (tmp_path / "export/README.roboflow.txt").write_text("x")
    assert main(["shards", "build", str(tmp_path / "export"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    assert "export: valid as val." in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["test", "train", "val"]


def test_stray_images_are_named(tmp_path):
    make_flat(tmp_path / "name", "cat", "dog")
    draw(tmp_path / "name", "preview.png")
    tars = [pack(tmp_path / "name", tmp_path / "a.tar"), tmp_path / "b.tar"]
    subprocess.run(["tar", "-C", tmp_path / "name", "-cf", tars[1], "."], check=True)
    for source in (tmp_path / "name", *tars):
        with pytest.raises(DataError) as error:
            build_shards(source, tmp_path / "shards", SETTINGS)
        assert_one_sentence(error, str(source), "(preview.png)", "put each into a folder of its class")
    assert FolderDataset(tmp_path / "name").notes == [f"{tmp_path}/name: left out: preview.png."]


@pytest.mark.parametrize("folder", ["test/test", "test/images", "test"])
def test_a_flat_test_is_left_out_of_a_build_and_has_no_labels(tmp_path, capsys, folder):
    make_classes(tmp_path / "a", "train")
    make_flat(tmp_path / "a", folder)
    built = build_shards(tmp_path / "a", tmp_path / "shards", SETTINGS, TELLING)
    assert [path.name for path in built] == ["train"] and load_index(built[0]).class_names == ("cat", "dog")
    assert "a: left out: test, not sorted into classes." in capsys.readouterr().err
    images = open_images(choose_split(tmp_path / "a", "test"))
    assert [(sample.key, sample.label) for sample in (images[0], images[1])] == [("0.png", -1), ("1.png", -1)]
    with pytest.raises(DataError, match="test has neither shards"):
        open_split(tmp_path / "a", "test")


def test_files_beside_splits_are_counted(tmp_path, capsys):
    make_classes(tmp_path / "a", "train", "val", "__MACOSX")
    (tmp_path / "a/README.txt").write_text("x")
    build_shards(tmp_path / "a", tmp_path / "shards", SETTINGS, TELLING)
    assert "a: 2 files or folders that are no images are left out: 1 .txt, 1 __MACOSX." in capsys.readouterr().err


def test_what_holds_no_images_does_not_hide_the_classes_beside_it(tmp_path, capsys):
    """Food-101, CUB-200 and Stanford Dogs are food-101/images/CLASS/ beside food-101/meta/."""
    make_classes(tmp_path / "a" / "food-101", "images")
    (tmp_path / "a/food-101/meta/deep").mkdir(parents=True)
    (tmp_path / "a/food-101/meta/deep/classes.txt").write_text("x")
    for source in (tmp_path / "a", pack(tmp_path / "a", tmp_path / "a.tar")):
        build_shards(source, tmp_path / f"from-{source.name}", SETTINGS, TELLING)
        assert load_index(tmp_path / f"from-{source.name}").class_names == ("cat", "dog")
        assert ": left out: meta.\n" in capsys.readouterr().err
    dataset = open_split(tmp_path, "a")
    assert dataset.class_names == ("cat", "dog") and dataset.notes == [f"{tmp_path}/a: left out: meta."]


@pytest.mark.parametrize("beside", ["dog", "Dog/deeper"])
def test_a_class_that_is_yet_to_be_filled_is_refused(tmp_path, beside):
    make_flat(tmp_path / "a", "cat/deeper")
    (tmp_path / "a" / beside).mkdir(parents=True)
    for source in (tmp_path / "a", pack(tmp_path / "a", tmp_path / "a.tar")):
        with pytest.raises(DataError, match=r"class folder .*[dD]og.* has no images"):
            build_shards(source, tmp_path / "shards", SETTINGS)
