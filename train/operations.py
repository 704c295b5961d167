"""Augmentation of whole batches on any device: what PIL does to an image, done to each of many by its own arguments.

Every operation takes images of bytes (n, channels, rows, columns) and arguments (n, number of arguments), and returns
bytes. They agree with timm's, which are PIL's, up to a level or two, and more where bicubic kernels differ: PIL's has
the parameter -1, torch's -0.75.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from train.draws import Drawn

Operation = Callable[[Tensor, Tensor], Tensor]
NUM_BOXES, BOX_REACH = 3, 2  # of PIL's blur; pixels to either side at the largest radius that timm draws, 2


def augmented(images: Tensor, drawn: Drawn) -> Tensor:
    """Images of bytes (B, channels, rows, columns), flipped and with the operations done that were drawn for them."""
    if not drawn.groups and not drawn.is_flipped.any():
        return images
    is_flipped = torch.from_numpy(drawn.is_flipped).to(images.device, non_blocking=True)
    images = torch.where(is_flipped.view(-1, 1, 1, 1), images.flip(-1), images).contiguous()
    for operation, rows, arguments in drawn.groups:
        where = torch.from_numpy(rows).to(images.device, non_blocking=True)
        own = torch.from_numpy(arguments).to(images.device, non_blocking=True)
        images.index_copy_(0, where, OPERATIONS[operation](images[where], own))
    return images


def erased(images: Tensor, drawn: Drawn) -> Tensor:
    """Normalised images (B, channels, rows, columns), changed where boxes were drawn for them: noise stands there."""
    if not len(drawn.noise):
        return images
    boxes = torch.from_numpy(drawn.boxes).to(images.device, non_blocking=True)
    noise = drawn.noise.to(images.device, non_blocking=True)
    top, bottom, left, right = boxes.T[..., None, None, None]
    rows = torch.arange(images.shape[2], device=images.device).view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    is_inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return images.masked_scatter_(is_inside, noise)


def _bytes(values: Tensor) -> Tensor:
    """Values as PIL makes bytes of them: cut to what a byte holds, then towards zero."""
    return values.clamp(0, 255).to(torch.uint8)


def _enhancement(weakened: Callable[[Tensor], Tensor]) -> Operation:
    """PIL's ImageEnhance: a blend of an image without some trait (argument 0) and the image itself (1)."""

    def enhance(images: Tensor, factors: Tensor) -> Tensor:
        without = weakened(images).float()
        return _bytes(without + factors.view(-1, 1, 1, 1) * (images - without))

    return enhance


def _affine(images: Tensor, arguments: Tensor, mode: str) -> Tensor:
    """PIL's Image.transform: of each pixel the place it comes from (6 numbers), and the colour where that is outside.

    The edges count as going on for the neighbours of a place inside.
    """
    rows, columns = images.shape[-2:]
    a, b, c, d, e, f = arguments[:, :6, None, None].unbind(1)
    x = torch.arange(columns, device=images.device) + 0.5
    y = torch.arange(rows, device=images.device).view(-1, 1) + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f  # (n, rows, columns), by no product that TF32 would round
    is_inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    grid = torch.stack([2 * x / columns - 1, 2 * y / rows - 1], dim=-1)
    taken = F.grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    return _bytes(torch.where(is_inside[:, None], taken, arguments[:, 6:, None, None]))


def _blur(images: Tensor, radii: Tensor) -> Tensor:
    """PIL's GaussianBlur: boxes laid over each other, as wide as together have the variance of a Gaussian."""
    number, channels, rows, columns = images.shape
    kernel = _box(radii**2 / NUM_BOXES).repeat_interleave(channels, 0)
    values = images.float().view(1, number * channels, rows, columns)
    for _ in range(NUM_BOXES):
        for weights, edges in (
            (kernel[:, None, None], (BOX_REACH, BOX_REACH, 0, 0)),
            (kernel[:, None, :, None], (0, 0, BOX_REACH, BOX_REACH)),
        ):
            values = F.conv2d(F.pad(values, edges, "replicate"), weights, groups=number * channels)
    return _bytes(values.round()).view(images.shape)


def _box(variances: Tensor) -> Tensor:
    """The weights (n, 2 * BOX_REACH + 1) of boxes with these variances (n, 1): 1 inside, less at both ends."""
    inside = ((12 * variances + 1).sqrt() / 2 - 0.5).floor()
    end = (2 * inside + 1) * (inside * (inside + 1) - 3 * variances) / (6 * (variances - (inside + 1) ** 2))
    offsets = torch.arange(-BOX_REACH, BOX_REACH + 1, device=variances.device).abs()
    weights = (inside + end + 1 - offsets).clamp(0, 1)
    return weights / weights.sum(-1, keepdim=True)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only so many of the highest bits of each number."""
    dropped = 2 ** (8 - bits.view(-1, 1, 1, 1).clamp(0, 8).int())
    return _bytes(images - images % dropped)


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Numbers from a threshold on, inverted."""
    return torch.where(images < thresholds.view(-1, 1, 1, 1), images, 255 - images)


def _solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Numbers below 128, with something added."""
    return torch.where(images < 128, _bytes(images + added.view(-1, 1, 1, 1)), images)


OPERATIONS: dict[str, Operation] = {
    "affine bicubic": lambda images, arguments: _affine(images, arguments, "bicubic"),
    "affine bilinear": lambda images, arguments: _affine(images, arguments, "bilinear"),
    "autocontrast": lambda images, _: tv.autocontrast(images),
    "blur": _blur,
    "brightness": _enhancement(torch.zeros_like),
    "color": _enhancement(lambda images: tv.adjust_saturation(images, 0)),
    "contrast": _enhancement(lambda images: tv.adjust_contrast(images, 0)),
    "equalize": lambda images, _: tv.equalize(images),
    "invert": lambda images, _: tv.invert(images),
    "posterize": _posterize,
    "sharpness": _enhancement(lambda images: tv.adjust_sharpness(images, 0)),
    "solarize": _solarize,
    "solarize_add": _solarize_add,
}
