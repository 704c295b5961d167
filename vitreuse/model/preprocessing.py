"""What a model takes in: the size and statistics of its images, its evaluation transform, an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreuse.io.errors import ConfigError

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of an image, beside its size
Transform = Callable[[Any], Tensor]  # from a PIL image to (channels, rows, columns)


class Normalize:
    """Makes of bytes what a model of these image_settings takes, to the bit as torchvision's transform does."""

    def __init__(self, settings: Mapping[str, Any]):
        self._statistics = torch.tensor([settings["mean"], settings["std"]])[..., None, None]
        self._on_device = {self._statistics.device: self._statistics}

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised floats of bytes (..., channels, rows, columns), on their device."""
        if images.device not in self._on_device:
            self._on_device[images.device] = self._statistics.to(images.device)
        mean, std = self._on_device[images.device]
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


class EvaluationTransform:
    """What is done to a PIL image before a model answers it: one half as bytes, the other to a whole batch at a time.

    Attributes:
        to_bytes: Resizes and crops an image, to bytes (channels, rows, columns).
        normalize: Of one or many.
    """

    def __init__(self, to_bytes: Transform, normalize: Normalize):
        self.to_bytes, self.normalize = to_bytes, normalize

    def __call__(self, image: Any) -> Tensor:
        """The normalised image (channels, rows, columns), as timm's transform makes it."""
        return self.normalize(self.to_bytes(image))


def image_settings(model: Any, use_test_size: bool = False) -> dict[str, Any]:
    """timm's data settings of a model (interpolation, mean, std, crop_pct, ...), with the channels that its first
    convolution takes, and for a ViT its own image size.

    ImageNet's three statistics become their mean for every channel of images that are not RGB.

    Args:
        use_test_size: The size and crop that timm's table was measured at, where they are not those of the training.
    """
    settings: dict[str, Any] = resolve_model_data_config(model, use_test_size=use_test_size)
    _, *size = settings["input_size"]
    if isinstance(model, VisionTransformer):
        size = model.patch_embed.img_size
    in_chans = _num_channels(model, settings)
    for key in ("mean", "std"):
        if len(settings[key]) != in_chans:
            settings[key] = (sum(settings[key]) / len(settings[key]),) * in_chans
    return {**settings, "input_size": (in_chans, *size)}


def _num_channels(model: Any, settings: dict[str, Any]) -> int:
    """The channels that a model takes: timm names its first convolution, or the first of several."""
    if isinstance(model, VisionTransformer):
        return model.patch_embed.proj.in_channels
    named = getattr(model, "pretrained_cfg", {}).get("first_conv")
    name = named if isinstance(named, str) or named is None else named[0]
    return settings["input_size"][0] if name is None else getattr(model.get_submodule(name), "in_channels", 3)


def image_mode(model: Any) -> str:
    """PIL's mode of the images that a model takes: L for one channel, RGB for three.

    Raises:
        ConfigError: It takes another number of channels, which no image file is decoded to.
    """
    num_channels = image_settings(model)["input_size"][0]
    if num_channels not in (1, 3):
        raise ConfigError(
            f"the model takes images of {num_channels} channels, and image files are decoded to 1 (grey) or 3 (RGB): "
            "set model.keywords.in_chans to one of them."
        )
    return "L" if num_channels == 1 else "RGB"


@torch.no_grad()
def check_answers(answer: Callable[[Tensor], Any], images: Tensor, num_classes: int, name: str) -> None:
    """Checks that a model takes images and answers with a logit for each class, under each of its heads.

    Args:
        answer: The model, or what calls it.
        images: (B, channels, rows, columns).
        num_classes: How many logits there should be.
        name: Of the model, for the error.

    Raises:
        ConfigError: It fails, as under a keyword that its constructor took, or answers with something else.
    """
    shape = " x ".join(map(str, images.shape[1:]))
    try:
        found = answer(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a keyword leads to
        raise ConfigError(f"{name} fails on an image of {shape} ({_in_a_line(error)}): change its keywords.") from error
    for logits in found if isinstance(found, tuple) else (found,):
        if getattr(logits, "shape", None) != (len(images), num_classes):
            given = " x ".join(map(str, logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
            way_out = "change its keywords, such as global_pool or features_only"
            if num_classes == 0:
                way_out = "it has no head, so set model.keywords.num_classes to the number of classes"
            raise ConfigError(
                f"{name} answers an image of {shape} with {given} instead of a logit for each of {num_classes} "
                f"classes: {way_out}."
            )


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__


def evaluation_transform(
    model: nn.Module, crop_pct: float | None = None, use_test_size: bool = False
) -> EvaluationTransform:
    """Resize, centre crop and normalise, by the model's own settings.

    Args:
        crop_pct: Share of the resized image that the crop keeps; the model's own by default.
        use_test_size: See image_settings.

    Raises:
        ValueError: The crop keeps nothing.
    """
    settings = image_settings(model, use_test_size)
    settings["crop_pct"] = settings["crop_pct"] if crop_pct is None else crop_pct
    if not settings["crop_pct"] > 0:
        raise ValueError(f"crop_pct {crop_pct} keeps nothing of an image: give a share above 0.")
    to_bytes: Any = create_transform(**settings, is_training=False, normalize=False)
    return EvaluationTransform(to_bytes, Normalize(settings))


def example(model: nn.Module, batch_size: int) -> Tensor:
    """Random images (B, channels, rows, columns) for a model, on its device and in its dtype.

    Raises:
        ValueError: The model was built for images smaller than one patch.
    """
    size = image_settings(model)["input_size"]
    if isinstance(model, VisionTransformer) and not model.patch_embed.num_patches:
        raise ValueError(f"images of {size[-1]} px are smaller than a patch of {model.patch_embed.patch_size[-1]} px.")
    weight = next(model.parameters())
    return torch.randn(batch_size, *size, device=weight.device, dtype=weight.dtype)
