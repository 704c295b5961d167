"""timm's augmentation policies, read to the letter: the published ones, and none raises for what it draws."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize

from vitreuse.config import ConfigError, CropConfig

_COUNT, _POSITIVE, _NUMBER = r"[0-9]{1,3}", r"[1-9][0-9]{0,2}", r"[0-9]{1,3}(\.[0-9]+)?"
# timm passes over a part of the text that it does not know, as in rand-m9-mstd.5 or rand-tweight.
_KNOWN = re.compile(
    rf"rand(-(m{_COUNT}|n{_POSITIVE}|p[01](\.[0-9]+)?|mstd{_NUMBER}|mmax{_POSITIVE}|inc[01]|t(weights|3aw?)))*"
    rf"|augmix(-(m{_COUNT}|w{_POSITIVE}|d{_POSITIVE}|a(?!0+(\.0+)?(-|$)){_NUMBER}|b[01]|mstd{_NUMBER}))*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)


def colour_transform(crop: CropConfig, settings: dict[str, Any]) -> Any:
    """timm's policy and colour jitter of an experiment, which are for PIL images, by the model's image settings.

    Raises:
        ConfigError: The policy is none of timm's.
    """
    if crop.auto_augment is not None and not _KNOWN.fullmatch(crop.auto_augment):
        raise _unknown(crop, "it has a part that timm would pass over or cannot draw")
    try:
        images = {name: settings[name] for name in ("input_size", "interpolation", "mean", "std")}
        colours = {"color_jitter": crop.color_jitter, "auto_augment": crop.auto_augment}
        parts: Any = create_transform(**images, **colours, is_training=True, separate=True)
    except (AssertionError, ValueError) as error:  # what timm makes of a policy that it cannot read
        raise _unknown(crop, str(error)) from error
    made = parts[1]  # between the crop and the conversion to a tensor
    for policy in made.transforms:
        is_weighted = isinstance(policy, RandAugment) and policy.choice_weights is not None  # which draws each once
        if is_weighted and policy.num_layers > len(policy.ops):
            raise _unknown(crop, f"it draws {policy.num_layers} of {len(policy.ops)} operations, each at most once")
        for op in operations_of(policy):
            if op.aug_fn is posterize:
                op.aug_fn = keep_bits
    return made


def _unknown(crop: CropConfig, reason: str) -> ConfigError:
    policy = f"train.crop.auto_augment {crop.auto_augment!r}"
    return ConfigError(f"{policy} is no policy of timm's ({reason}): rand-m9-mstd0.5-inc1 is one.")


def operations_of(policy: Any) -> Iterator[AugmentOp]:
    """The operations that a policy of timm's draws from; none of what is no policy, such as colour jitter."""
    if isinstance(policy, (RandAugment, AugMixAugment)):
        yield from policy.ops
    elif isinstance(policy, AutoAugment):
        for sub_policy in policy.policy:
            yield from sub_policy


def keep_bits(image: Image.Image, bits_to_keep: int, **keywords: Any) -> Image.Image:
    """timm's posterize; an image of which no bit is kept is black, as it was before Pillow 13 refused to make one."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **keywords)
