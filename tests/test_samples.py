"""The sample of images that redundancy is measured on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitreuse.cli.source import sample_images
from vitreuse.data import DataError, prepare_source
from vitreuse.files.networks import resolve_targets


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for number in range(count):
        Image.fromarray(random.randint(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.fixture
def target():
    return resolve_targets(["vit_tiny_patch16_224"])[0]


@pytest.mark.parametrize("below", ["", "val"])
def test_class_folders_have_labels(target, below, tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / below / name, 4)
    sample = sample_images(target, target.model.create("meta"), tmp_path, 5)
    batches = list(sample.batches(2))
    assert sample.class_names == ("cat", "dog")
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 224, 224), (2, 3, 224, 224), (1, 3, 224, 224)]
    assert torch.cat([labels for _, labels in batches]).tolist() == [int(number >= 4) for number in sample.numbers]


def test_images_alone_have_no_labels(target, tmp_path):
    draw(tmp_path / "photos", 3)
    sample = sample_images(target, target.model.create("meta"), tmp_path / "photos", 10)
    assert sample.class_names == ()
    assert sample.dataset.key(0) == "0.png"
    ((images, labels),) = sample.batches(10)
    assert images.shape == (3, 3, 224, 224)
    assert labels.tolist() == [-1, -1, -1]


def test_a_seed_chooses_the_images(target, tmp_path):
    prepare_source("digits", tmp_path)
    model = target.model.create("meta")
    first, again, other = (sample_images(target, model, tmp_path, 20, seed=seed).numbers for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 20
    assert first == sorted(first)


def test_wrong_folders_are_one_sentence(target, tmp_path):
    model = target.model.create("meta")
    (tmp_path / "empty").mkdir()
    for root, said in (
        (tmp_path / "empty", "neither shards, nor class folders, nor images"),
        (tmp_path / "gone", "no folder"),
        (None, "give --data DIR"),
    ):
        with pytest.raises(DataError, match=said):
            sample_images(target, model, root, 5)


@pytest.mark.parametrize(("number", "asked", "size"), [(11, 4, 4), (11, 7, 5), (2, 9, 1)])
def test_what_is_learned_from_is_not_shown(target, number, asked, size, tmp_path):
    draw(tmp_path / "photos", number)
    sample = sample_images(target, target.model.create("meta"), tmp_path / "photos", asked, seed=3)
    shown, learned = sample.apart()
    assert len(shown) == len(learned) == size and not {*shown.numbers} & {*learned.numbers}
    assert {*shown.numbers} <= {*sample.numbers} and shown.numbers == sorted(shown.numbers)
    assert [*map(len, (images for images, _ in learned.batches(size)))] == [size]


def test_one_image_is_not_both_learned_from_and_shown(target, tmp_path):
    draw(tmp_path / "photos", 1)
    with pytest.raises(DataError, match="has 1 image, and none is both learned from and shown: add more"):
        sample_images(target, target.model.create("meta"), tmp_path / "photos", 5).apart()
