"""The built-in sets: right images, right split, written once, whole, whoever else writes them."""

import multiprocessing
import shutil
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny_split import make_samples, read_all, write_split

from vitreuse.data import DataError, open_split, prepare_source, verify_shards, write_shards
from vitreuse.data.sources.digits import POINTER_SAMPLES


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "data"
    prepare_source("digits", root)
    return root


@pytest.fixture(scope="module")
def pointers(tmp_path_factory):
    """The first pointer chains: all of them take five seconds."""
    root = tmp_path_factory.mktemp("pointer_chain") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POINTER_SAMPLES, "train", 400)
        patch.setitem(POINTER_SAMPLES, "val", 200)
        prepare_source("pointer_chain", root)
    return root


def numbers_of(sample):
    return [int(number) for number in sample.key.removeprefix("pointer-").split("-")]


def snapshot(root):
    return {path.relative_to(root): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*.*")}


def test_digits_are_all_there_once(written):
    images, labels = load_digits(return_X_y=True)
    samples = [sample for split in ("train", "val") for sample in read_all(open_split(written, split))]
    assert sorted(sample.key for sample in samples) == [f"digits-{number:04d}" for number in range(1797)]
    for sample in samples:
        number = int(sample.key.removeprefix("digits-"))
        assert sample.label == labels[number] and sample.image.mode == "L"
        assert np.array_equal(np.asarray(sample.image), np.rint(images[number].reshape(8, 8) * 255 / 16))


def test_digits_are_split_by_class(written):
    train, val = open_split(written, "train"), open_split(written, "val")
    assert train.shard_sizes == [400, 400, 400, 237] and val.shard_sizes == [200, 160]
    assert train.class_names == val.class_names == tuple("0123456789")
    counts = np.bincount([sample.label for sample in read_all(val)])
    share = np.bincount(load_digits(return_X_y=True)[1]) * 360 / 1797
    assert np.abs(counts - share).max() < 1
    assert [sample.key for sample in read_all(val)][:3] == ["digits-1496", "digits-0188", "digits-0705"]


def test_a_pointer_chain_is_four_digits_of_which_the_first_names_the_one_that_names_the_label(pointers):
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * 255 / 16)
    places = []
    for split in ("train", "val"):
        for sample in read_all(open_split(pointers, split)):
            numbers = numbers_of(sample)
            quarters = np.asarray(sample.image).reshape(2, 8, 2, 8).swapaxes(1, 2).reshape(4, 8, 8)
            assert np.array_equal(quarters, images[numbers])
            places.append(labels[numbers[labels[numbers[0]] % 4]] % 4)
            assert sample.label == labels[numbers[places[-1]]]
    assert np.bincount(places, minlength=4).min() > 70  # 0, 4 and 8 in the first place name it


def test_pointer_chains_hold_out_the_digits_that_digits_hold_out(written, pointers):
    for split in ("train", "val"):
        allowed = {int(sample.key.removeprefix("digits-")) for sample in read_all(open_split(written, split))}
        drawn = [number for sample in read_all(open_split(pointers, split)) for number in numbers_of(sample)]
        assert {*drawn} <= allowed and len({*drawn}) > 0.6 * len(allowed)


def test_pointer_chains_are_the_same_everywhere(pointers):
    first = [open_split(pointers, split).key(0) for split in ("train", "val")]
    assert first == ["pointer-1201-1250-1619-0129", "pointer-0308-0283-0499-1789"]


def test_another_built_in_set_in_the_folder_is_refused(written):
    with pytest.raises(DataError, match="holds 1437 samples that are not the pointer_chain: name another folder"):
        prepare_source("pointer_chain", written)


def test_digits_are_whole(written):
    assert verify_shards(written / "train") == verify_shards(written / "val") == []


def test_a_second_call_does_nothing_and_needs_no_package(written, monkeypatch):
    before = snapshot(written)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    prepare_source("digits", written)
    assert snapshot(written) == before


def test_a_missing_split_is_written_again(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "copy")
    shutil.rmtree(root / "val")
    prepare_source("digits", root)
    contents = [{path: data for path, (_, data) in snapshot(folder).items()} for folder in (root, written)]
    assert contents[0] == contents[1]


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"install it with pip install 'vitreuse\[digits\]'\.$"):
        prepare_source("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_source(tmp_path):
    with pytest.raises(DataError, match="no built-in data set 'digit': choose digits, pointer_chain, fashion_mnist,"):
        prepare_source("digit", tmp_path)


def test_other_shards_in_the_folder_are_refused(tmp_path):
    write_split(tmp_path / "train", make_samples(3), [3])
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match="train holds 3 samples that are not the digits: name another folder"):
        prepare_source("digits", tmp_path)
    assert snapshot(tmp_path) == before


def test_other_files_in_the_folder_are_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train cannot be written .*: choose a new or empty folder"):
        prepare_source("digits", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(DataError, match=r"digits cannot be written to .*: name another folder"):
        prepare_source("digits", tmp_path / "data")


def test_damaged_digits_are_reported(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "copy")
    (root / "train" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        prepare_source("digits", root)


def test_losing_a_race_ends_well(tmp_path, monkeypatch):
    """Another process finishes the split after this one has found it missing."""

    def write_twice(*args):
        samples = list(args[0])
        write_shards(samples, *args[1:])
        write_shards(samples, *args[1:])

    monkeypatch.setattr("vitreuse.data.sources.prepare.write_shards", write_twice)
    prepare_source("digits", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]
    assert len(open_split(tmp_path, "train")) == 1437


def _prepare_after(barrier, root):
    barrier.wait(timeout=300)
    prepare_source("digits", root)


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare_after, args=(barrier, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]
    assert verify_shards(tmp_path / "train") == verify_shards(tmp_path / "val") == []
