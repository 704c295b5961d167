"""Progressive resolution: smaller images at first, whose size is a function of the epoch alone."""

from __future__ import annotations

from typing import Any

from train.pipeline import Transform, train_transform
from vitreuse.config import Config, ConfigError, ResolutionConfig

Size = tuple[int, int]  # rows and columns, in pixels


def transforms_by_epoch(config: Config, model: Any, settings: dict[str, Any]) -> list[Transform]:
    """The training transform of every epoch; epochs of one image size share theirs.

    Args:
        config: The experiment.
        model: What is trained.
        settings: vitreuse.model.preprocessing.image_settings of the model.

    Raises:
        ConfigError: train.resolution does not fit the model.
    """
    num_channels, *built = settings["input_size"]
    epochs, resolution = range(config.train.epochs), config.train.resolution
    if resolution is None:
        return [train_transform(config, settings)] * len(epochs)
    _check_fit(resolution, model, min(built))
    sizes = [image_size(epoch, resolution, (built[0], built[1]), model.patch_embed.patch_size) for epoch in epochs]
    of_size = {
        size: train_transform(config, {**settings, "input_size": (num_channels, *size)})
        for size in dict.fromkeys(sizes)
    }
    return [of_size[size] for size in sizes]


def image_size(epoch: int, resolution: ResolutionConfig, built: Size, patch: Size) -> Size:
    """The size of the images of an epoch: whole patches, growing linearly to the size that the model is built for."""
    if epoch >= resolution.epochs:
        return built
    shorter = min(built)
    grown = resolution.from_px * resolution.epochs + (shorter - resolution.from_px) * epoch  # of shorter * epochs
    rows, columns = (
        side * grown // (shorter * resolution.epochs * unit) * unit for side, unit in zip(built, patch, strict=True)
    )
    return rows, columns


def _check_fit(resolution: ResolutionConfig, model: Any, shorter: int) -> None:
    if not getattr(model, "dynamic_img_size", False):
        raise ConfigError(
            "train.resolution changes the size of the images, which the model must take: set "
            "model.keywords.dynamic_img_size to true."
        )
    patch = model.patch_embed.patch_size
    if resolution.from_px >= shorter or any(resolution.from_px % side for side in patch):
        raise ConfigError(
            f"train.resolution.from_px {resolution.from_px} must be below the {shorter} px of the model and a multiple "
            f"of its patches of {patch[0]} x {patch[1]} px."
        )
