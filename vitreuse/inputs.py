"""What a model takes in: the size and statistics of its images, its evaluation transform, an example."""

from collections.abc import Callable
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import VisionTransformer
from torch import Tensor, nn

DTYPES = ("float32", "bfloat16")  # in which models are measured
Transform = Callable[[Any], Tensor]  # from a PIL image to (channels, rows, columns)


def image_settings(model: Any, use_test_size: bool = False) -> dict[str, Any]:
    """timm's data settings of a model (interpolation, mean, std, crop_pct, ...), for a ViT with its own input_size.

    ImageNet's three statistics become their mean for every channel of images that are not RGB.

    Args:
        use_test_size: the size and crop that timm's table was measured at, where they are not those of the training.
    """
    settings: dict[str, Any] = resolve_model_data_config(model, use_test_size=use_test_size)
    if not isinstance(model, VisionTransformer):
        return settings
    in_chans, (rows, columns) = model.patch_embed.proj.in_channels, model.patch_embed.img_size
    for key in ("mean", "std"):
        if len(settings[key]) != in_chans:
            settings[key] = (sum(settings[key]) / len(settings[key]),) * in_chans
    return {**settings, "input_size": (in_chans, rows, columns)}


def evaluation_transform(model: nn.Module, crop_pct: float | None = None, use_test_size: bool = False) -> Transform:
    """Resize, centre crop and normalise, by the model's own settings.

    Args:
        crop_pct: share of the resized image that the crop keeps; the model's own by default.
        use_test_size: see image_settings.
    """
    settings = image_settings(model, use_test_size)
    transform: Any = create_transform(**{**settings, "crop_pct": crop_pct or settings["crop_pct"]}, is_training=False)
    return transform


def example(model: nn.Module, batch_size: int) -> Tensor:
    """Random images (B, channels, rows, columns) for a model, on its device and in its dtype.

    Raises:
        ValueError: the model was built for images smaller than one patch.
    """
    size = image_settings(model)["input_size"]
    if isinstance(model, VisionTransformer) and not model.patch_embed.num_patches:
        raise ValueError(f"images of {size[-1]} px are smaller than a patch of {model.patch_embed.patch_size[-1]} px.")
    weight = next(model.parameters())
    return torch.randn(batch_size, *size, device=weight.device, dtype=weight.dtype)
