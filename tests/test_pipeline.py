"""Training images: timm's augmentation of photographs, from tensors of bytes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from train.augmentation import train_decoder, train_transform
from vitreuse.config import ConfigError, load_config
from vitreuse.data import decode_image, decode_tensor
from vitreuse.model.preprocessing import Normalize

SETTINGS = {"input_size": (3, 48, 56), "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
EXPERIMENT = """
model: {name: vit_reuse_tiny_patch16_224}
data: {root: data}
train: {epochs: 1, global_batch_size: 8, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def experiment(tmp_path):
    """Loads a config with a setting."""
    path = tmp_path / "x.yaml"
    path.write_text(EXPERIMENT)
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture(scope="module")
def photograph():
    """Blurred noise of 90 x 120 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)


def drawn(transform, image, seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return transform(image)


def drawn_by_us(transform, image, seed):
    return drawn(transform, image, seed).image


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_and_flips_are_timms(experiment, photograph, interpolation):
    settings = {**SETTINGS, "interpolation": interpolation}
    ours = train_transform(experiment("train.crop={scale: [0.1, 1.0]}"), settings)
    theirs = create_transform(**settings, is_training=True, scale=(0.1, 1.0), color_jitter=None, auto_augment=None)
    std, normalize = torch.tensor(SETTINGS["std"])[:, None, None], Normalize(SETTINGS)
    for seed in range(20):
        difference = normalize(drawn_by_us(ours, pil_to_tensor(photograph), seed)) - drawn(theirs, photograph, seed)
        assert difference.shape == SETTINGS["input_size"]
        assert (255 * difference * std).abs().max() < 2.5  # levels: the kernels round apart between rows and columns


@pytest.mark.parametrize("setting", ["auto_augment: rand-m9-mstd0.5-inc1", "auto_augment: 3a", "color_jitter: 0.4"])
def test_policies_change_colours_and_follow_the_seed(experiment, photograph, setting):
    plain = train_transform(experiment("train.crop={hflip: 0}"), SETTINGS)
    coloured = train_transform(experiment(f"train.crop={{hflip: 0, {setting}}}"), SETTINGS)
    image = pil_to_tensor(photograph)
    first, again = (torch.stack([drawn_by_us(coloured, image, seed) for seed in range(6)]) for _ in range(2))
    assert torch.equal(first, again)
    difference = first.int() - torch.stack([drawn_by_us(plain, image, seed) for seed in range(6)])
    assert difference.abs().max() > 8  # levels


@pytest.mark.parametrize("setting", ["crop={}", "crop={auto_augment: 3a}", "affine={degrees: 9}", "clip={}"])
def test_batches_of_bytes_are_normalised_as_torchvision_normalises_an_image(experiment, photograph, setting):
    config = experiment(f"train.{setting}")
    image = photograph if train_decoder(config) is decode_image else pil_to_tensor(photograph)
    drawn_images = [drawn_by_us(train_transform(config, SETTINGS), image, seed) for seed in range(3)]
    assert {drawn_image.dtype for drawn_image in drawn_images} == {torch.uint8}
    one_by_one = transforms.Normalize(SETTINGS["mean"], SETTINGS["std"])
    expected = torch.stack([one_by_one(drawn_image / 255) for drawn_image in drawn_images])
    assert torch.equal(Normalize(SETTINGS)(torch.stack(drawn_images)), expected)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_statistics_are_those_of_each_channel_and_moved_to_a_device_once(num_channels, monkeypatch):
    mean, std = (tuple(first + i / 10 for i in range(num_channels)) for first in (0.2, 0.3))
    normalize, moved, move = Normalize({"mean": mean, "std": std}), [], torch.Tensor.to
    expected = [(200 / 255 - mean[i]) / std[i] for i in range(num_channels)]
    images = torch.full((2, num_channels, 3, 4), 200, dtype=torch.uint8)
    assert normalize(images).mean((0, 2, 3)).tolist() == pytest.approx(expected)
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *to, **how: moved.append(to[0]) or move(own, *to, **how))
    assert [normalize(images.to("meta")).shape for _ in range(3)] == 3 * [images.shape]
    assert moved.count(torch.device("meta")) == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_augmentation_takes_images_of_any_size(experiment, size, channels):
    own = {"input_size": (channels, 8, 12), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    image = torch.randint(256, (channels, *size), dtype=torch.uint8)
    for setting in ("crop={auto_augment: 3a, color_jitter: 0.3}", "crop={erase_prob: 1, color_jitter: 2}", "affine={}"):
        config = experiment(f"train.{setting}")
        transform = train_transform(config, {**SETTINGS, **own})
        source = image if train_decoder(config) is decode_tensor else to_pil_image(image)
        for seed in range(30):
            assert drawn_by_us(transform, source, seed).shape == own["input_size"]


def test_only_photographs_are_decoded_as_tensors(experiment):
    assert train_decoder(experiment("train.crop={}")) is decode_tensor
    assert train_decoder(experiment("train.affine={}")) is train_decoder(experiment()) is decode_image


def test_an_unknown_policy_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"train\.crop\.auto_augment 'wild' is no policy of timm's"):
        train_transform(experiment("train.crop={auto_augment: wild}"), SETTINGS)
