"""Images by what they are for: some are learned from, choices are made on others, and the last are measured on."""

from __future__ import annotations

from typing import Any, NamedTuple

from vitreuse.data.samples import Images, images_for, num_shown

LEAST_IMAGES = 6
LEAST_TRIED, MOST_TRIED, PATCHES_TRIED = 8, 32, 8192  # images that choices are made on, and their patches together


class Split(NamedTuple):
    """Images that share none: some are learned from, choices are made on others, and nothing is chosen on the last."""

    fitted: Images
    tried: Images
    shown: Images


def split_apart(model: Any, given: Any, shown: Any, seed: int) -> Split:
    """Three parts of images, the last one of them only where no others are to be shown.

    Raises:
        ValueError: There are too few, or they are not as the model takes them.
    """
    images = images_for(model, given)
    size = next(iter(images)).shape[-2:]
    if tuple(size) != tuple(model.patch_embed.img_size):  # of a dynamic model
        built, asked = (" x ".join(map(str, each)) for each in (model.patch_embed.img_size, size))
        raise ValueError(
            f"images are {asked} and the model was built for {built}, for which its costs are: create it with "
            f"img_size=({', '.join(map(str, size))})."
        )
    total = len(images)
    if total < LEAST_IMAGES:
        given_number = f"{total} images are given, and {LEAST_IMAGES} are needed"
        raise ValueError(f"{given_number}, to fit, to try and to show: give more.")
    enough = max(LEAST_TRIED, PATCHES_TRIED // model.patch_embed.num_patches)
    tried = min(enough, MOST_TRIED, total // 4)
    if shown is not None:
        fitted, trying = images.parts(total - tried, tried, seed=seed)
        return Split(fitted, trying, images_for(model, shown))
    kept = num_shown(total)
    return Split(*images.parts(total - tried - kept, tried, kept, seed=seed))
