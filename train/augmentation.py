"""What is done to an image before a model is trained on it, by the recipe: in workers, or noted for the device.

The size of the images may grow with the epoch (train.resolution).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resize

from train.auto_augment import colour_transform
from train.draws import NOTHING, Augmented, Draws, NotedErasing, noted_colours
from vitreuse.config import Config, ConfigError, CropConfig, ResolutionConfig
from vitreuse.data import Decoder, decode_image, decode_tensor

Transform = Callable[[Any], Augmented]  # of a PIL image or a tensor of bytes
Size = tuple[int, int]  # rows and columns, in pixels


def train_decoder(config: Config) -> Decoder:
    """What train_transform starts from: photographs are cropped as tensors, faster than PIL images."""
    return decode_image if config.train.crop is None else decode_tensor


def train_transform(config: Config, settings: dict[str, Any], on_device: bool = False) -> Transform:
    """The training transform of an experiment, from an image as train_decoder gives it, by the model's image_settings.

    It ends in bytes; with ``on_device``, before flips and colours, which are drawn and left to be done.
    """
    if config.train.crop is not None:
        return CropTransform(config.train.crop, settings, on_device)
    steps: list[Any] = [transforms.Resize(settings["input_size"][-2:], InterpolationMode(settings["interpolation"]))]
    affine = config.train.affine
    if affine is not None:
        shift, smooth = (affine.shift, affine.shift), InterpolationMode.BILINEAR
        steps.append(transforms.RandomAffine(affine.degrees, shift, affine.scale, interpolation=smooth))
    return transforms.Compose([*steps, transforms.PILToTensor(), Augmented])


def augments_on_device(config: Config, device: torch.device) -> bool:
    """Whether flips and colours are left to the device: where the recipe says so, or nothing and it can."""
    recipe = config.train
    if recipe.augment_on is not None:
        return recipe.augment_on == "device"
    crop = recipe.crop
    return device.type == "cuda" and crop is not None and "augmix" not in (crop.auto_augment or "")


def transforms_by_epoch(config: Config, model: Any, settings: dict[str, Any], on_device: bool) -> list[Transform]:
    """The training transform of every epoch of an experiment; epochs of one image size share theirs.

    Raises:
        ConfigError: train.resolution does not fit the model.
    """
    num_channels, *built = settings["input_size"]
    epochs, resolution = range(config.train.epochs), config.train.resolution
    if resolution is None:
        return [train_transform(config, settings, on_device)] * len(epochs)
    _check_resolution(resolution, model, min(built))
    sizes = [image_size(epoch, resolution, (built[0], built[1]), model.patch_embed.patch_size) for epoch in epochs]
    of_size = {
        size: train_transform(config, {**settings, "input_size": (num_channels, *size)}, on_device) for size in {*sizes}
    }
    return [of_size[size] for size in sizes]


def image_size(epoch: int, resolution: ResolutionConfig, built: Size, patch: Size) -> Size:
    """The size of the images of an epoch: whole patches, growing linearly to the size that the model is built for."""
    if epoch >= resolution.epochs:
        return built
    shorter = min(built)
    grown = resolution.from_px * resolution.epochs + (shorter - resolution.from_px) * epoch  # of shorter * epochs
    whole = shorter * resolution.epochs
    rows, columns = (side * grown // (whole * unit) * unit for side, unit in zip(built, patch, strict=True))
    return rows, columns


def _check_resolution(resolution: ResolutionConfig, model: Any, shorter: int) -> None:
    if not getattr(model, "dynamic_img_size", False):
        must = "train.resolution changes the size of the images, which the model must take"
        raise ConfigError(f"{must}: set model.keywords.dynamic_img_size to true.")
    patch = model.patch_embed.patch_size
    if resolution.from_px >= shorter or any(resolution.from_px % side for side in patch):
        allowed = f"below the {shorter} px of the model and a multiple of its patches of {patch[0]} x {patch[1]} px"
        raise ConfigError(f"train.resolution.from_px {resolution.from_px} must be {allowed}.")


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, of a tensor of bytes by torchvision's kernel for bytes, which is fastest pixel by pixel."""

    def __call__(self, image: Tensor) -> Tensor:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        height, width = max(height, 1), max(width, 1)  # of an image of few pixels timm may take none, beside it
        top, left = min(top, image.shape[1] - height), min(left, image.shape[2] - width)
        interpolation: Any = self.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        region = image[:, top : top + height, left : left + width]
        by_pixel = region.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels last, as decoders write them
        return resize(by_pixel, list(self.size), interpolation, antialias=True)


def _to_pil(image: Tensor) -> Image.Image:
    """The PIL image of bytes (1 or 3, rows, columns), of which those of a pixel lie side by side."""
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if len(image) == 3 else pixels[..., 0])


class CropTransform:
    """What timm's create_transform does to a PIL image in training, to a tensor of bytes, with the same draws."""

    def __init__(self, crop: CropConfig, settings: dict[str, Any], on_device: bool):
        settings = {**settings, "interpolation": crop.interpolation or settings["interpolation"]}
        self.size, self.on_device = settings["input_size"], on_device
        self.crop = RandomResizedCrop(self.size[-2:], crop.scale, crop.ratio, settings["interpolation"])
        self.flip = transforms.RandomHorizontalFlip(crop.hflip)
        self.erasing = RandomErasing(crop.erase_prob, mode="pixel", device="cpu") if crop.erase_prob else None
        self.colours: Any = None
        if crop.auto_augment is not None or crop.color_jitter:
            self.colours = (noted_colours if on_device else colour_transform)(crop, settings)

    def __call__(self, image: Tensor) -> Augmented:
        image = self.crop(image)
        if self.on_device:
            is_flipped = bool(torch.rand(1) < self.flip.p)
            draws = Draws(is_flipped, self.colours() if self.colours is not None else (), (), ())
        else:
            image, draws = self.flip(image), NOTHING
            if self.colours is not None:
                image = pil_to_tensor(self.colours(_to_pil(image)))
        if self.erasing is not None:
            erasing = NotedErasing(self.size).draw(self.erasing)
            draws = draws._replace(boxes=erasing.boxes, noise=erasing.noise)
        return Augmented(image, draws)
