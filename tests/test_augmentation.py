"""Augmentation left to the device: the draws of timm's classes, carried out on a batch as PIL does on an image."""

import random
from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_auto_augment import EVERY_KIND
from timm.data.random_erasing import RandomErasing
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.functional import pil_to_tensor

from train.augmentation import augments_on_device, train_transform
from train.auto_augment import colour_transform, operations_of
from train.draws import Draws, gather, noted_colours
from train.operations import OPERATIONS, augmented
from train.pipeline import Batch, OnDevice, collate
from vitreuse.config import ConfigError, CropConfig, load_config
from vitreuse.model.preprocessing import Normalize

POLICIES = [text for text in EVERY_KIND if "augmix" not in text]
EXACT = {"autocontrast", "brightness", "equalize", "invert", "posterize", "sharpness", "solarize", "solarize_add"}
NUM_DRAWS = 120
EXPERIMENT = """
model: {name: vit_reuse_tiny_patch16_224}
data: {root: data}
train: {epochs: 1, global_batch_size: 8, optimizer: {lr: 1e-3}}
"""


def settings(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    channels = len(mode)
    numbers = {"mean": (0.485, 0.456, 0.406)[:channels], "std": (0.2, 0.3, 0.4)[:channels]}
    return {"input_size": (channels, size[1], size[0]), "interpolation": "bicubic", **numbers}


def photograph(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth noise, as photographs are smooth: where neighbours differ much, PIL's and torch's kernels do."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).convert(mode)
    return noise.resize(size, Image.Resampling.BICUBIC)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("text", [text for text in POLICIES if "-n14" not in text])
def test_a_policy_on_the_device_is_the_workers_own_image_by_image(text, mode):
    crop = CropConfig(auto_augment=text, color_jitter=0.3 if text == "3a" else 0.0)
    image, colours, draw = photograph(mode), colour_transform(crop, settings(mode)), noted_colours(crop, settings(mode))
    expected, draws = [], []
    for number in range(NUM_DRAWS):
        seed(number)
        expected.append(pil_to_tensor(colours(image)).float())
        after = states()
        seed(number)
        draws.append(Draws(False, draw(), (), ()))
        assert states() == after  # of every generator
    made = augmented(pil_to_tensor(image).repeat(NUM_DRAWS, 1, 1, 1), gather(draws)).float()
    apart = (made - torch.stack(expected)).abs().flatten(1)
    changed = (made - pil_to_tensor(image).float()).abs().flatten(1).mean(1)
    assert (changed > 1).float().mean() > 0.25
    assert (
        apart.mean() < 1.5 and apart.mean(1).median() < 1
    )  # a threshold after other steps may fall between two levels
    for number, own in enumerate(draws):
        names = {step.operation for step in own.steps}
        if len(own.steps) <= 1:
            limit = 0 if names <= EXACT - {"autocontrast"} else 1 if names <= {*EXACT, "color", "contrast"} else 16
            assert apart[number].max() <= limit, (number, own.steps)


def test_every_operation_is_drawn_by_some_policy():
    drawn = set()
    for text, interpolation in product(POLICIES, ("bilinear", "random")):
        draw = noted_colours(CropConfig(auto_augment=text), {**settings(), "interpolation": interpolation})
        seed(0)
        drawn |= {step.operation for _ in range(400) for step in draw()}
    assert drawn == OPERATIONS.keys()


@pytest.fixture
def experiment(tmp_path):
    """Loads a config with a setting."""
    path = tmp_path / "x.yaml"
    path.write_text(EXPERIMENT)
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize("policy", ["auto_augment: 3a, color_jitter: 0.3", "auto_augment: rand-m9-mstd0.5-inc1"])
def test_a_recipe_is_the_same_on_the_device_and_in_workers(experiment, policy):
    config = experiment(f"train.crop={{{policy}, erase_prob: 0.5, scale: [0.5, 1.0]}}")
    image, batches = pil_to_tensor(photograph(size=(120, 90))), []
    for on_device in (False, True):
        transform = train_transform(config, settings(), on_device)
        items: list[Any] = []
        for number in range(NUM_DRAWS):
            seed(number)
            items.append((transform(image), 0, "", {}))
        batches.append(OnDevice(settings(), torch.device("cpu"))(collate(items)))
    workers, device = batches
    assert device.drawn.is_flipped.mean() == pytest.approx(0.5, abs=0.15)
    assert not workers.drawn.is_flipped.any() and not workers.drawn.groups
    assert np.array_equal(workers.drawn.boxes, device.drawn.boxes) and torch.equal(
        workers.drawn.noise, device.drawn.noise
    )
    assert (workers.drawn.boxes[:, 1] > 0).mean() == pytest.approx(0.5, abs=0.15)
    levels = 255 * torch.tensor(settings()["std"]).view(-1, 1, 1)
    assert ((workers.images - device.images) * levels).abs().mean((1, 2, 3)).max() < 4
    assert ((workers.images - device.images) * levels).abs().mean() < 1


def test_what_is_erased_is_timms(experiment):
    config = experiment("train.crop={erase_prob: 0.7}")
    transform, image = train_transform(config, settings()), pil_to_tensor(photograph())
    plain = train_transform(experiment("train.crop={}"), settings())
    items: list[Any] = []
    expected = []
    for number in range(40):
        seed(number)
        items.append((transform(image), 0, "", {}))
        seed(number)
        normalised = Normalize(settings())(plain(image).image)
        expected.append(RandomErasing(0.7, mode="pixel", device="cpu")(normalised))
    torch.testing.assert_close(OnDevice(settings(), torch.device("cpu"))(collate(items)).images, torch.stack(expected))


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (2, 7)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operations_take_images_of_any_size(size, mode):
    image = pil_to_tensor(photograph(mode, size))
    for text in POLICIES:
        draw = noted_colours(CropConfig(auto_augment=text), settings(mode, size))
        seed(1)
        drawn = gather([Draws(True, draw(), (), ()) for _ in range(30)])
        assert augmented(image.repeat(30, 1, 1, 1), drawn).shape == (30, *image.shape)


def test_no_tensor_is_left_on_the_wrong_device():
    """As on a GPU, which is not asked for a number: that would wait for it."""
    draw = noted_colours(CropConfig(auto_augment="rand-m9-n4-p1-mstd0.5-inc1"), settings())
    seed(0)
    blur = noted_colours(CropConfig(auto_augment="3a"), settings())
    boxes, noise = [(0, 5, 3, 9)], [torch.randn(3, 5, 6)]
    drawn = gather([Draws(True, [*draw(), *blur(), *blur(), *blur()], boxes, noise) for _ in range(12)])
    assert {group.operation for group in drawn.groups} > {"blur", "affine bicubic", "equalize"}
    device = torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = Batch(torch.empty(12, 3, 48, 64, dtype=torch.uint8), drawn, torch.zeros(12, dtype=torch.long), [], {})
        on_device = OnDevice(settings(), device)
        made = on_device(batch)
    assert (made.images.device.type, made.images.dtype, made.images.shape) == ("cuda", torch.float32, (12, 3, 48, 64))
    assert made.labels.device.type == "cuda"


def test_an_empty_batch_stays_empty():
    assert len(OnDevice(settings(), torch.device("cpu"))(collate([])).images) == 0


@pytest.mark.parametrize(
    ("override", "device", "expected"),
    [
        ("crop={}", "cuda", True),
        ("crop={}", "cpu", False),
        ("crop={auto_augment: augmix-m3}", "cuda", False),
        ("affine={}", "cuda", False),
        ("crop={auto_augment: 3a}", "cuda", True),
    ],
)
def test_a_gpu_augments_what_it_can(experiment, override, device, expected):
    assert augments_on_device(experiment(f"train.{override}"), torch.device(device)) is expected


@pytest.mark.parametrize("where", ["device", "workers"])
def test_the_recipe_says_where(experiment, where):
    config = experiment("train.crop={}", f"train.augment_on={where}")
    for device in ("cpu", "cuda"):
        assert augments_on_device(config, torch.device(device)) is (where == "device")


def test_what_cannot_be_left_to_the_device_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"augment_on 'device' has no effect without train\.crop: leave it out"):
        experiment("train.augment_on=device")
    config = experiment("train.crop={auto_augment: augmix-m3-w3}", "train.augment_on=device")
    with pytest.raises(ConfigError, match="mixes several versions of an image, which workers alone do"):
        train_transform(config, settings(), on_device=True)


@pytest.mark.proof
@pytest.mark.parametrize("text", ["rand-m9-n1-p1-mstd0.5-inc1", "3a"])
def test_operations_leave_the_distribution_of_the_workers_own(text):
    """Means, deviations and quantiles of the levels, over some 2,000 draws of each kind, the same in both."""
    crop, image = CropConfig(auto_augment=text), photograph()
    colours, draw = colour_transform(crop, settings()), noted_colours(crop, settings())
    made: dict[str, list[tuple[torch.Tensor, Draws]]] = defaultdict(list)
    for number in range(2000 * len(list(operations_of(colours.transforms[0])))):
        seed(number)
        expected = pil_to_tensor(colours(image))
        seed(number)
        (step,) = draw()
        made[step.operation].append((expected, Draws(False, [step], (), ())))
    for operation, both in made.items():
        theirs, draws = zip(*both, strict=True)
        ours = augmented(pil_to_tensor(image).repeat(len(draws), 1, 1, 1), gather(draws))
        assert len(draws) > 1800
        for found, expected in zip(numbers_of(ours), numbers_of(torch.stack(theirs)), strict=True):
            assert found == pytest.approx(expected, abs=1.2), operation  # levels


def numbers_of(images: torch.Tensor) -> list[float]:
    """Mean, deviation and quantiles of the levels of each channel."""
    levels = images.float().transpose(0, 1).flatten(1)[:, ::7]
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = [np.quantile(channel.numpy(), shares.numpy()) for channel in levels]
    return [*levels.mean(1).tolist(), *levels.std(1).tolist(), *np.concatenate(quantiles).tolist()]
