"""timm's augmentation policies: the published operations, and none that can raise for what it draws."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.transforms_factory import create_transform

from train.auto_augment import colour_transform, operations_of
from vitreuse.config import ConfigError, CropConfig, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
EVERY_KIND = (
    "rand-m9-mstd0.5-inc1",
    "rand-m9-mstd0.5",
    "rand-m9-n4-mstd0.5-mmax30-inc1",
    "rand-m5-p1-mstd101",
    "rand-m9-n3-tweights-inc1",
    "rand-m9-n14-t3aw-inc1",
    "rand-m9-t3a-inc1",
    "augmix-m5-w4-d2",
    "augmix-m10-b1-mstd3",
    "augmix-m3-a0.1",
    "original",
    "originalr-mstd0.5",
    "v0",
    "v0r-mstd2",
    "3a",
)
SIZES = ((1, 1), (3, 1), (7, 5))  # columns and rows


def shipped_policies():
    """The policies that the shipped configs name."""
    crops = (load_config(path).train.crop for path in sorted(CONFIGS.glob("*/[!_]*.yaml")))
    return sorted({crop.auto_augment for crop in crops if crop is not None and crop.auto_augment is not None})


def settings(mode="RGB", size=(7, 5)):
    channels = len(mode)
    return {
        "input_size": (channels, size[1], size[0]),
        "interpolation": "bicubic",
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
    }


def noise(mode="RGB", size=(7, 5)):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def policy(text, mode="RGB", size=(7, 5)):
    return colour_transform(CropConfig(auto_augment=text), settings(mode, size))


@pytest.mark.parametrize("text", shipped_policies())
def test_a_shipped_policy_never_raises(text):
    image, drawn = noise(), policy(text)
    seed(0)
    for _ in range(20_000):
        assert drawn(image).size == image.size


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES)
def test_every_operation_takes_every_magnitude(mode, size):
    image = noise(mode, size)
    ops = {op.name: op for text in EVERY_KIND for op in operations_of(policy(text, mode, size).transforms[0])}
    assert not NAME_TO_OP.keys() - ops.keys() - {"TranslateX", "TranslateY", "GaussianBlurRand"}  # in no policy
    for op in ops.values():
        op.prob, op.magnitude_std, op.magnitude_max = 1.0, 0, 30
        for op.magnitude in np.arange(0, 30.1, 0.25).tolist():
            result = op(image)
            assert (result.mode, result.size) == (mode, size)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("text", EVERY_KIND)
def test_every_kind_of_policy_takes_images_of_any_size(text, mode):
    for size in SIZES:
        image, drawn = noise(mode, size), policy(text, mode, size)
        seed(1)
        for _ in range(100):
            result = drawn(image)
            assert (result.mode, result.size) == (mode, size)


@pytest.mark.parametrize("text", [text for text in EVERY_KIND if "-n14" not in text])
def test_policies_are_timms_to_the_byte(text):
    """Wherever timm's own gives an image at all."""
    image, ours = noise(), policy(text)
    theirs = create_transform(
        input_size=(3, 5, 7), is_training=True, auto_augment=text, color_jitter=0.0, interpolation="bicubic",
        mean=(0.5,) * 3, std=(0.5,) * 3, separate=True,
    )[1]  # fmt: skip
    num_equal = 0
    for number in range(200):
        seed(number)
        found = ours(image)
        seed(number)
        try:
            expected = theirs(image)
        except ValueError as error:
            assert "bits must be" in str(error)  # Pillow's, from 13 on
            continue
        assert found.tobytes() == expected.tobytes()
        num_equal += 1
    assert num_equal > 150


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing"])
def test_posterize_keeps_as_many_bits_as_are_drawn(mode, name):
    """To the mask of Pillow before 13, which knew no smallest number of them."""
    image = noise(mode)
    op = next(
        op for op in operations_of(policy(f"rand-inc{int(name != 'Posterize')}", mode).transforms[0]) if op.name == name
    )
    op.prob, op.magnitude_max, kept = 1.0, 40, set()
    for op.magnitude in range(41):
        (bits,) = LEVEL_TO_ARG[name](op.magnitude, {})
        mask = ~(2 ** (8 - bits) - 1) if bits < 8 else ~0
        np.testing.assert_array_equal(np.asarray(op(image)), np.asarray(image).astype(int) & mask)
        kept.add(bits)
    assert kept >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "text",
    [
        "wild",
        "",
        "rand-m9-mstd.5",  # timm would read a magnitude without deviation
        "rand-m9-tweight",  # and the plain operations
        "rand-m9-inc",
        "rand-m-9",
        "rand-m9-p2",
        "rand-m9-n0",
        "rand-m9-mmax0",
        "rand-n20-tweights",  # more than there are, each once
        "rand-t3a-n2x",
        "augmix-w0",
        "augmix-a0",
        "augmix-a0.0-m3",
        "augmix-mstd",
        "3a-m9",
        "original-mstd",
        "v0r ",
        "RAND-m9",
    ],
)
def test_a_policy_that_timm_reads_otherwise_or_cannot_draw_is_refused(text):
    with pytest.raises(ConfigError, match=r"train\.crop\.auto_augment .* is no policy of timm's"):
        policy(text)
