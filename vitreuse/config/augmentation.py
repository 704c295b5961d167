"""What is done to images: the sections of a recipe on augmentation, mixing and resolution."""

from dataclasses import dataclass

from vitreuse.config.strict_yaml import setting
from vitreuse.io.errors import ConfigError


def _check_order(key: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ConfigError(f"{key}: runs from {bounds[0]} to {bounds[1]}, write the smaller number first.")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Augmentation by timm.data.create_transform: random resized crop, flip, colour, policy, erasing."""

    scale: tuple[float, float] = setting(
        "share of the image's area that a crop covers, from and to", (0.08, 1.0), above=0, maximum=1
    )
    ratio: tuple[float, float] = setting("width over height of a crop, from and to", (0.75, 4 / 3), above=0)
    interpolation: str | None = setting(
        "of a crop's pixels; random is bilinear or bicubic in turns, as timm draws; null for the model's own",
        None,
        choices=("bilinear", "bicubic", "random"),
    )
    hflip: float = setting("probability of a left-right flip", 0.5, minimum=0, maximum=1)
    color_jitter: float = setting("strength of brightness, contrast and saturation jitter", 0.0, minimum=0, maximum=100)
    auto_augment: str | None = setting("timm's policy text: rand-m9-mstd0.5-inc1, 3a, augmix-m3-w3, original", None)
    erase_prob: float = setting("probability of random erasing, per-pixel noise", 0.0, minimum=0, maximum=1)

    def __post_init__(self):
        _check_order("scale", self.scale)
        _check_order("ratio", self.ratio)
        if self.auto_augment is not None and "3a" not in self.auto_augment and self.color_jitter:
            raise ConfigError(f"color_jitter: timm drops it under auto_augment {self.auto_augment!r}, set it to 0.")


@dataclass(frozen=True, kw_only=True)
class AffineConfig:
    """Augmentation by torchvision's RandomAffine on the whole image: for small pictures that a crop would spoil."""

    degrees: float = setting("largest turn to either side", 0.0, minimum=0, maximum=180)
    shift: float = setting("largest shift, as a share of the image's side", 0.0, minimum=0, maximum=1)
    scale: tuple[float, float] = setting("factor on the size, from and to", (1.0, 1.0), minimum=0.001, maximum=1000)

    def __post_init__(self):
        _check_order("scale", self.scale)


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """Mixing of images by timm.data.Mixup, over one rank's share of a batch."""

    mixup: float = setting("alpha of the beta law for mixup; 0 is off", 0.8, minimum=0)
    cutmix: float = setting("alpha of the beta law for CutMix; 0 is off", 1.0, minimum=0)
    prob: float = setting("share of batches that are mixed", 1.0, minimum=0, maximum=1)
    switch_prob: float = setting("share of CutMix among them when both are on", 0.5, minimum=0, maximum=1)
    groups: int | None = setting(
        "groups of a global batch, each with draws of its own, the same on any number of ranks that divides them; null "
        "for one a rank",
        None,
        above=0,
    )

    def __post_init__(self):
        if self.mixup == 0 and self.cutmix == 0:
            raise ConfigError("mixup and cutmix are both 0; write train.mixup: null to mix nothing.")


@dataclass(frozen=True, kw_only=True)
class ResolutionConfig:
    """Smaller images at first: they grow linearly, by whole patches, to the size that the model is built for."""

    from_px: int = setting("shorter side of the first epoch's images, in pixels", above=0)
    epochs: int = setting("epochs before the first one at the model's own size", above=0)
