"""Fashion-MNIST in the study: images that are fetched where there are none, and a recipe chosen by images kept out."""

import gzip
import hashlib
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from docs.study import fashion
from eval.flops import model_macs
from vitreuse.config import load_config
from vitreuse.data import open_split
from vitreuse.data.sources import fashion_mnist

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs/study").glob("fashion_*.yaml"))
SMALL = f"""\
base: {ROOT / "configs/study/fashion_exact.yaml"}
data: {{source: null, root: data/fashion_mnist}}
train: {{epochs: 1, global_batch_size: 9, schedule: {{warmup_epochs: 0}}}}
"""
SAMPLES = {"train": ("train", 40), "val": ("t10k", 10)}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A checkout without images, cards and apt, whose Fashion-MNIST is of 50 images; the files' contents by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["fashion"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "usr/share")
    random, contents = np.random.RandomState(0), {}
    for split, (stem, number) in SAMPLES.items():
        monkeypatch.setitem(fashion_mnist.SAMPLES, split, number)
        pixels, labels = random.bytes(number * 28 * 28), bytes(range(10)) * (number // 10)
        contents[f"{stem}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, number, 28, 28) + pixels
        contents[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, number) + labels
    for name, content in contents.items():
        monkeypatch.setitem(fashion_mnist.DIGESTS, name, hashlib.sha256(content).hexdigest())
    (tmp_path / "configs/study").mkdir(parents=True)
    (tmp_path / "configs/study/fashion_exact.yaml").write_text(SMALL)
    return contents


def put(folder, contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_without_apt_two_sentences_say_why_and_name_the_three_places(study, capsys):
    assert fashion.main() == 2
    why, places = capsys.readouterr().err.splitlines()
    assert "apt-get and dpkg-deb would fetch and unpack images here, and there is none: unpack dataset-fashion" in why
    assert "install Debian's dataset-fashion-mnist, let torchvision put" in places and "--from FOLDER." in places


def test_apt_fetches_the_package_where_no_files_are(study, tmp_path, capsys):
    """An apt that makes the package of the same layout, and a dpkg-deb that unpacks it."""
    put(tmp_path / "made" / fashion_mnist.DEBIAN.relative_to("/"), study)
    (tmp_path / "bin").mkdir()
    for tool, does in {
        "apt-get": f'[ "$1" = download ] && exec /bin/tar -cf "$2_1_all.deb" -C {tmp_path}/made .',
        "dpkg-deb": 'exec /bin/tar -xf "$2" -C "$3"',
    }.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    assert fashion.main() == 0, capsys.readouterr().err
    assert [len(open_split("data/fashion_mnist", split)) for split in SAMPLES] == [40, 10]
    (tmp_path / "bin/apt-get").unlink()
    assert fashion.main() == 0  # for the shards are there


def test_no_image_is_needed_where_all_cards_are(study, tmp_path):
    (tmp_path / "docs/study/fashion/cards").mkdir(parents=True)
    for seed in range(5):
        assert fashion.main() == 2
        (tmp_path / f"docs/study/fashion/cards/fashion_exact-seed{seed}.json").touch()
    assert fashion.main() == 0


@pytest.mark.proof
def test_the_recipe_is_chosen_by_images_that_were_kept_out(study, tmp_path, monkeypatch, capsys):
    put(tmp_path / "data/FashionMNIST/raw", study)
    monkeypatch.setattr(sys, "argv", ["fashion", "--choose"])
    monkeypatch.setattr(fashion, "RATES", ("1e-2",))
    for _ in range(2):  # the second time of runs that are completed
        assert fashion.main() == 0
        told = capsys.readouterr().out.splitlines()
        lines = [re.fullmatch(r"(\d+\.\d\d) %  (train.optimizer.lr=.*)", line) for line in told]
        assert len({line[2] for line in lines}) == 2
        shares = [float(line[1]) for line in lines]
        assert shares == sorted(shares, reverse=True) and all(share % 25 == 0 for share in shares)  # 4 images of 40


def test_controls_cost_what_their_headers_say():
    """A header's share of the MACs is that of fashion_exact.yaml, and its cost that of its model."""
    macs = {path.stem: model_macs(load_config(path).model.create("meta")) for path in CONFIGS}
    for path in CONFIGS:
        header = path.read_text().partition("\nbase:")[0]
        assert f"# Cost: {macs[path.stem] / 1e6:.2f} M MACs an image" in header
        for share in re.findall(r"(0\.\d\d) of the MACs", header):
            assert share == f"{macs[path.stem] / macs['fashion_exact']:.2f}"
        for name, share in re.findall(r"`(\w+)` (?:has )?(0\.\d\d)", header):
            assert share == f"{macs[f'fashion_{name}'] / macs['fashion_exact']:.2f}"
