"""How alike the attention maps of a model's layers are, and what it costs to read another's: what reuse lives on.

All that is measured is a mean over images, of which a few at a time are looked at.

Shapes: L layers, B images, H heads, N queries, M keys, C channels, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitreuse.compress.head_matching import match_heads
from vitreuse.io.progress import WorkProgress
from vitreuse.model.recording import attention_maps, attentions, project_heads, recorded_attention

Batches = Iterable[Any]  # of images (B, channels, rows, columns) and whatever else, as a loader or ImageSample has them
MAP_NUMBERS = 2**23  # of all maps computed at a time, 32 MiB; carried ones come on top, and one image may have more


@dataclass(frozen=True)
class Redundancy:
    """What the maps of a model have in common, as means over images and query rows, on the CPU; NaN where a layer has
    no map.

    Attributes:
        variation: (L, L, H, H), total variation between each head of a layer and each head of another, 0 to 1; NaN
            where the columns of one are not those of the other, as before and after a merge of tokens.
        entropy: (L, H), mean entropy of the rows over the tokens that are left, in nats.
        distance: (L, H), from a query's patch to the patches that it attends to, weighted by the map over patches, in
            patches; NaN where keys are no patches, as in low-rank layers and after a merge.
    """

    variation: Tensor
    entropy: Tensor
    distance: Tensor

    @property
    def same_head(self) -> Tensor:
        """One minus the variation between heads of equal number: (L, L)."""
        return 1 - self.variation.diagonal(dim1=2, dim2=3).mean(-1)

    @property
    def best_head(self) -> Tensor:
        """One minus the variation between each head of the first layer and the one of the second that it matches."""
        found = torch.full_like(self.same_head, torch.nan)
        for first, second in (~self.same_head.isnan()).nonzero().tolist():
            variation = self.variation[first, second]
            found[first, second] = 1 - variation[torch.arange(len(variation)), match_heads(variation)].mean()
        return found


@torch.inference_mode()
def measure_redundancy(model: Any, batches: Batches, progress: WorkProgress) -> Redundancy:
    """How alike, how spread and how local the maps of a model are, in one pass that holds a few images' maps at a time.

    A reuse layer has its anchor's map, so that the two are 1 alike. Maps of low-rank layers that project the tokens
    each in its own way cannot be compared.

    Args:
        model: One of timm's ViTs, fused or not, or one with a plan, on any device; its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.

    Raises:
        ValueError: No ViT, an attention of another kind, or no images.
    """
    means = mean_over_images(model, batches, progress, lambda images: _measured(model, images))
    return Redundancy(*(mean.float() for mean in means))


def map_similarity(model: nn.Module, images: Tensor) -> Tensor:
    """One minus the mean total variation between the rows of each two layers' maps, head by head: (L, L), 0 to 1.

    See measure_redundancy, for images (B, channels, rows, columns).

    Paper: Bhojanapalli et al., 2021, Reuse Transformer (arXiv 2110.06821).
    """
    progress = WorkProgress("similarity", "images", len(images), enabled=False)
    return measure_redundancy(model, [(images,)], progress).same_head


@torch.inference_mode()
def measure_head_errors(model: Any, batches: Batches, progress: WorkProgress) -> Tensor:
    """Squared error of a layer's attention, a mean over images, when one head reads the map of an earlier layer's head.

    Unlike a distance between maps it does not count differences where values are alike or are hardly read. Only the
    rows count that the model reads: of a last layer under token pooling those of the class tokens.

    Args:
        model: With exact attention in all layers, as copies.exact_copy makes it; its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.

    Returns:
        (L, L, H, H): at [anchor, layer, i, j] head j of a layer reads the map of head i of the anchor layer; 0 where
        the anchor does not come before the layer.

    Raises:
        ValueError: There are no images.
    """
    (errors,) = mean_over_images(model, batches, progress, lambda images: [_reading_errors(model, images)])
    return errors.float()


def mean_over_images(
    model: Any, batches: Batches, progress: WorkProgress, measure: Callable[[Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """Means over all images, on the CPU, of numbers that are measured on a few images at a time.

    Args:
        model: Its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.
        measure: Gives the sums over some images on the model's device, so few that all their maps have MAP_NUMBERS.

    Raises:
        ValueError: The model is none that attentions takes, or there are no images.
    """
    own = [attn for attn in attentions(model) if attn is not None]
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    size = max(1, MAP_NUMBERS // (sum(attn.num_heads for attn in own) * num_tokens**2 or 1))
    device, was_training = next(model.parameters()).device, model.training
    sums, count = [], 0
    model.eval()
    try:
        for few in (few for images, *_ in batches for few in images.split(size)):
            parts = [part.double().cpu() for part in measure(few.to(device))]
            sums = [total + part for total, part in zip(sums, parts, strict=True)] if count else parts
            count += len(few)
            progress.reach(count)
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("there are no images to measure on: give at least one.")
    return [total / count for total in sums]


def _measured(model: Any, images: Tensor) -> list[Tensor]:
    """Variation, entropy and distance, as Redundancy has them, summed over images."""
    maps = attention_maps(model, images)
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    places = torch.cartesian_prod(*(torch.arange(size, device=images.device) for size in grid)).float()
    distances = torch.cdist(places, places)  # between patches
    known = {layer: of for layer, of in enumerate(maps) if of is not None}
    num_heads = max((of.weights.shape[1] for of in known.values()), default=0)
    variation = distances.new_full((len(maps), len(maps), num_heads, num_heads), torch.nan)
    entropy, distance = (distances.new_full((len(maps), num_heads), torch.nan) for _ in range(2))
    for layer, (weights, keys) in known.items():
        entropy[layer] = torch.special.entr(weights.float()).sum(-1).mean((0, 2))
        if keys == "tokens":
            patches = weights[:, :, -len(places) :, -len(places) :].float()
            distance[layer] = ((patches * distances).sum((2, 3)) / patches.sum((2, 3))).mean(0)
    for keys in {of.keys for of in known.values()}:
        alike = [layer for layer, of in known.items() if of.keys == keys]
        members = torch.tensor(alike, device=images.device)
        variation[members[:, None], members] = _variation([known[layer].weights for layer in alike])
    return [len(images) * part for part in (variation, entropy, distance)]


def _variation(maps: list[Tensor]) -> Tensor:
    """Total variation between the rows of each head of each map and each of each other, (layers, layers, H, H)."""
    rows = torch.cat(maps, dim=1).float().transpose(1, 2).flatten(0, 1)  # (B * N, layers * H, M)
    between = torch.cdist(rows, rows, p=1).mean(0) / 2
    return between.unflatten(1, (len(maps), -1)).unflatten(0, (len(maps), -1)).transpose(1, 2)


def _reading_errors(model: Any, images: Tensor) -> Tensor:
    """What measure_head_errors returns, as a sum over images."""
    with recorded_attention(model) as calls:
        maps = [made.weights for made in attention_maps(model, images) if made is not None]
    errors = images.new_zeros(len(maps), len(maps), maps[0].shape[1], maps[0].shape[1])
    for layer, block in enumerate(model.blocks):
        values = _values(block, calls[layer].inputs[0])
        rows = model.num_class_rows if block is model.blocks[-1] and model.reads_class_rows else None
        own = maps[layer][:, :, :rows] @ values
        for anchor in range(layer):
            read = torch.einsum("binm,bjmd->bijnd", maps[anchor][:, :, :rows], values)
            errors[anchor, layer] = (read - own[:, None]).square().sum((0, 3, 4))
    return errors


def _values(block: Any, x: Tensor) -> Tensor:
    """A layer's values (B, H, N, D), turned so that they are as long as what the output projection makes of them."""
    columns = block.attn.proj.weight.unflatten(1, (block.attn.num_heads, -1)).transpose(0, 1)  # (H, C, D)
    scale = getattr(block.ls1, "gamma", None)
    turned = torch.linalg.qr(columns if scale is None else scale[:, None] * columns).R  # |R v| = |W v|
    return project_heads(block.attn, x).v @ turned.mT
