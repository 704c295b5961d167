"""Fashion-MNIST: found in each of its places, written as it is, and refused in a sentence where it is not."""

import gzip
import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from tiny_split import read_all
from torchvision.datasets import FashionMNIST

from docs.study.debian import unpack_debian
from train.__main__ import main as train
from vitreuse.__main__ import main
from vitreuse.data import DataError, open_split, prepare_source, verify_shards
from vitreuse.data.sources import fashion_mnist

CONFIGS = Path(__file__).parents[2] / "configs/study"
RAW = "FashionMNIST/raw"
SPLITS = {"train": ("train", 23), "val": ("t10k", 11)}
TRAIN_IMAGES = "train-images-idx3-ubyte"


@pytest.fixture
def contents(monkeypatch, tmp_path):
    """The four files of a made-up Fashion-MNIST, by name; Debian's place for them is tmp_path/debian."""
    random, made = np.random.RandomState(0), {}
    for split, (stem, num_samples) in SPLITS.items():
        images = random.randint(256, size=(num_samples, 28, 28), dtype=np.uint8)
        labels = random.permutation(num_samples).astype(np.uint8) % 10
        made[f"{stem}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
        made[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, num_samples) + labels.tobytes()
        monkeypatch.setitem(fashion_mnist.SAMPLES, split, num_samples)
    for name, content in made.items():
        monkeypatch.setitem(fashion_mnist.DIGESTS, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    return made


def put(folder, contents, ending=""):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
    return folder


def assert_holds(root, torchvision_root):
    """Shards hold what torchvision reads from the same files, in their order."""
    for split, (stem, _) in SPLITS.items():
        expected = FashionMNIST(torchvision_root, train=split == "train", download=False)
        written = open_split(root, split)
        samples = read_all(written)
        assert [sample.label for sample in samples] == expected.targets.tolist()
        assert [sample.key for sample in samples] == [f"{stem}-{number:05d}" for number in range(len(expected))]
        assert np.array_equal(np.stack([sample.image for sample in samples]), expected.data.numpy())
        assert {sample.image.mode for sample in samples} == {"L"}
        assert written.class_names == tuple(FashionMNIST.classes)
        assert verify_shards(root / split) == []


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("place", "origin"), [("debian", None), (f"data/{RAW}", None), ("own", "own"), (f"own/{RAW}", "own")]
)
def test_files_are_found_in_each_place(contents, tmp_path, place, origin, ending):
    put(tmp_path / place, contents, ending)
    root = tmp_path / "data/fashion_mnist"
    prepare_source("fashion_mnist", root, origin and tmp_path / origin)
    put(tmp_path / "torchvision" / RAW, contents)
    assert_holds(root, tmp_path / "torchvision")
    shutil.rmtree(tmp_path / place)
    prepare_source("fashion_mnist", root)  # which needs no file any more


def test_debian_comes_before_torchvision_and_an_origin_before_both(contents, tmp_path, capsys):
    put(tmp_path / "own", contents)
    put(tmp_path / "debian", dict.fromkeys(contents, b"debian"))
    put(tmp_path / "data" / RAW, dict.fromkeys(contents, b"torchvision"))
    root = tmp_path / "data/fashion_mnist"
    with pytest.raises(DataError, match=f"debian/{TRAIN_IMAGES} begins with {b'debian'.hex()}"):
        prepare_source("fashion_mnist", root)
    assert main(["shards", "fashion_mnist", str(root), "--from", str(tmp_path / "own"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [split["num_samples"] for split in told["folders"]] == [23, 11]


def test_where_none_is_a_sentence_names_all_three_places(contents, tmp_path, capsys):
    root, own = tmp_path / "data/fashion_mnist", tmp_path / "own"
    assert main(["shards", "fashion_mnist", str(root)]) == 2
    without = capsys.readouterr().err
    assert f"with or without .gz, in {tmp_path / 'debian'} and {tmp_path / 'data' / RAW}: " in without
    assert main(["shards", "fashion_mnist", str(root), "--from", str(own)]) == 2
    given = capsys.readouterr().err
    assert f"with or without .gz, in {own} and {own / RAW}: " in given
    settings = [f"data.source_root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    assert train([str(CONFIGS / "fashion_exact.yaml"), *settings]) == 2
    trained = capsys.readouterr().err
    for told in (without, given, trained):
        assert told.count("\n") == 1 and f"no {TRAIN_IMAGES}, " in told
        assert "install Debian's dataset-fashion-mnist" in told
        assert f"let torchvision put FashionMNIST into {tmp_path / 'data'}," in told
        assert told.endswith(f"by vitreuse shards fashion_mnist {root} --from FOLDER.\n")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (TRAIN_IMAGES, lambda content: b"", "begins with nothing, an idx file of 23 x 28 x 28 bytes with 00000803"),
        (TRAIN_IMAGES, lambda content: content[:3] + b"\1" + content[4:], "begins with 00000801000000170000001c"),
        ("train-labels-idx1-ubyte", lambda content: content[:7] + b"\7" + content[8:], "of 23 bytes with 0000080100"),
        ("t10k-images-idx3-ubyte", lambda content: content[:-5], "8,619 bytes behind its header, which promises 8,624"),
        ("t10k-labels-idx1-ubyte", lambda content: content + b"\0", "12 bytes behind its header, which promises 11"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-1] + b"\7", r"has the digest .*\(MNIST's files have the"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_damaged_or_other_file_is_a_sentence(contents, tmp_path, name, damage, said, ending):
    put(tmp_path / "own", {**contents, name: damage(contents[name])}, ending)
    with pytest.raises(DataError, match=said) as refused:
        prepare_source("fashion_mnist", tmp_path / "data/fashion_mnist", tmp_path / "own")
    sentence = str(refused.value)
    assert sentence.startswith(str(tmp_path / f"own/{name}{ending}")) and "\n" not in sentence
    assert sentence.endswith(": fetch it again, or name another folder.")
    assert not (tmp_path / "data/fashion_mnist" / ("train" if name.startswith("train") else "val")).exists()


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-11], lambda packed: b"<html>", lambda packed: packed[:40] + b"\0" * 99]
)
def test_a_damaged_gzip_is_a_sentence(contents, tmp_path, damage):
    path = put(tmp_path / "own", contents, ".gz") / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{TRAIN_IMAGES}\.gz cannot be unpacked \(.*\): fetch it again, or name"):
        prepare_source("fashion_mnist", tmp_path / "data", tmp_path / "own")


def test_a_missing_file_and_one_that_cannot_be_read_are_named(contents, tmp_path):
    own = put(tmp_path / "own", contents)
    (own / "train-labels-idx1-ubyte").rename(own / "other")
    with pytest.raises(DataError, match=r"own has no train-labels-idx1-ubyte, with or without .gz: put all four files"):
        prepare_source("fashion_mnist", tmp_path / "data", own)
    (own / "train-labels-idx1-ubyte").mkdir()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte cannot be read \(Is a directory\): fetch it again"):
        prepare_source("fashion_mnist", tmp_path / "data", own)


def test_a_folder_that_would_not_be_read_is_refused(contents, tmp_path):
    own, root = put(tmp_path / "own", contents), tmp_path / "data"
    with pytest.raises(DataError, match=r"the digits come with a package, so that nothing would be read from .*:"):
        prepare_source("digits", root, own)
    prepare_source("fashion_mnist", root, own)
    with pytest.raises(
        DataError, match=r"data has the fashion_mnist already, so that nothing would be read from .*own:"
    ):
        prepare_source("fashion_mnist", root, own)
    shutil.rmtree(root / "val")
    prepare_source("fashion_mnist", root, own)  # of which a split was missing
    assert len(open_split(root, "val")) == 11


def test_a_run_of_the_study_leaves_its_card(contents, tmp_path):
    put(tmp_path / "data" / RAW, contents, ".gz")
    settings = ["train.epochs=1", "train.schedule.warmup_epochs=0", "train.global_batch_size=8"]
    settings += [f"data.source_root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    assert train([str(CONFIGS / "fashion_merge_reuse.yaml"), *settings]) == 0
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert (card["data"], card["n"], card["model"]["plan"]) == ("fashion_mnist/val", 11, "(exact reuse-8)*3")


@pytest.mark.proof
def test_the_real_files_are_those_that_torchvision_would_fetch(tmp_path):
    """Debian has left name and time out of the gzip files: with both they have the digests that torchvision checks."""
    debian = unpack_debian(["dataset-fashion-mnist"], tmp_path)
    folder = debian / "dataset-fashion-mnist" / fashion_mnist.DEBIAN.relative_to("/")
    raw = tmp_path / "torchvision" / RAW
    raw.mkdir(parents=True)
    for name, digest in FashionMNIST.resources:
        content, stem = (folder / name).read_bytes(), name.removesuffix(".gz")
        named = b"\x1f\x8b\x08\x08" + struct.pack("<I", 1504176606 + 21 * stem.startswith("t10k")) + b"\0\3"
        assert hashlib.md5(named + stem.encode() + b"\0" + content[10:]).hexdigest() == digest
        (raw / stem).write_bytes(gzip.decompress(content))
    root = tmp_path / "fashion_mnist"
    prepare_source("fashion_mnist", root, folder)
    assert_holds(root, tmp_path / "torchvision")
    assert np.bincount([sample.label for sample in read_all(open_split(root, "val"))]).tolist() == [1000] * 10
