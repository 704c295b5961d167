"""How alike the attention maps of a model's layers are, and what it costs to read another's: what reuse lives on.

All that is measured is a mean over images, of which a few at a time are looked at, and over rows of their maps, which
are sampled where there are many (row_sample.py).

Shapes: L layers, B images, H heads, N tokens, R query rows, M keys, C channels, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from vitreuse.compress.head_matching import match_heads
from vitreuse.compress.recording import attention_maps, attentions, dense_map, project_map, recorded_attention
from vitreuse.compress.ridge import images_of
from vitreuse.compress.row_sample import NUM_ROWS, RowSample, count_rows, draw_rows
from vitreuse.io.progress import WorkProgress
from vitreuse.model.class_names import has_classes
from vitreuse.model.copies import evaluating

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
def measure_redundancy(
    model: Any, batches: Batches, progress: WorkProgress, num_rows: int | None = NUM_ROWS, seed: int = 0
) -> Redundancy:
    """How alike, how spread and how local the maps of a model are, in one pass that holds a few images' maps at a time.

    A reuse layer has its anchor's map, so that the two are 1 alike. Maps of low-rank layers that project the tokens
    each in its own way cannot be compared. The sample of rows leaves all means unbiased but the distance, which is a
    ratio of two and nearly so.

    Args:
        model: One of timm's ViTs, fused or not, or one with a plan, on any device; its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.
        num_rows: Patches of each image whose rows of the maps are looked at, beside all prefix tokens; all when None.
        seed: Of their choice.

    Raises:
        ValueError: No ViT, an attention of another kind, no images, or no rows.
    """
    means = mean_over_images(model, batches, progress, partial(_measured, model), num_rows, seed)
    return Redundancy(*(mean.float() for mean in means))


def map_similarity(model: nn.Module, images: Tensor) -> Tensor:
    """One minus the mean total variation between the rows of each two layers' maps, head by head: (L, L), 0 to 1.

    See measure_redundancy, for images (B, channels, rows, columns).

    Paper: Bhojanapalli et al., 2021, Reuse Transformer (arXiv 2110.06821).
    """
    progress = WorkProgress("similarity", "images", len(images), enabled=False)
    return measure_redundancy(model, [(images,)], progress).same_head


@torch.inference_mode()
def measure_head_errors(
    model: Any, batches: Batches, progress: WorkProgress, num_rows: int | None = NUM_ROWS, seed: int = 0
) -> Tensor:
    """Squared error of a layer's attention, a mean over images, when one head reads the map of an earlier layer's head.

    Unlike a distance between maps it does not count differences where values are alike or are hardly read. Only the
    rows count that the model reads: of a last layer before a head under token pooling those of the class tokens.

    Args:
        model: With exact attention in all layers, as copies.exact_copy makes it; its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.
        num_rows, seed: Of the rows that are looked at, as measure_redundancy takes them.

    Returns:
        (L, L, H, H): at [anchor, layer, i, j] head j of a layer reads the map of head i of the anchor layer; 0 where
        the anchor does not come before the layer.

    Raises:
        ValueError: There are no images, or no rows.
    """
    (errors,) = mean_over_images(model, batches, progress, partial(_reading_errors, model), num_rows, seed)
    return errors.float()


def mean_over_images(
    model: Any,
    batches: Batches,
    progress: WorkProgress,
    measure: Callable[[Tensor, RowSample], Sequence[Tensor]],
    num_rows: int | None,
    seed: int,
) -> list[Tensor]:
    """Means over all images, on the CPU, of numbers that are measured on a few images at a time.

    Args:
        model: Its mode is restored.
        batches: Of images first.
        progress: Told how many images are done.
        measure: Gives the sums over some images on the model's device, so few that the rows that are looked at of all
            their maps have MAP_NUMBERS.
        num_rows, seed: Of the rows that are looked at, as measure_redundancy takes them.

    Raises:
        ValueError: The model is none that attentions takes, there are no images, or no rows.
    """
    own = [attn for attn in attentions(model) if attn is not None]
    looked_at, num_tokens = count_rows(model, num_rows)
    size = max(1, MAP_NUMBERS // (sum(attn.num_heads for attn in own) * looked_at * num_tokens or 1))
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    sums, count = [], 0
    with evaluating(model):
        for few in (few for batch in batches for few in images_of(batch).split(size)):
            grid = model.patch_embed.dynamic_feat_size(few.shape[-2:])
            sample = draw_rows(len(few), math.prod(grid), model.num_prefix_tokens, num_rows, generator)
            parts = [part.double().cpu() for part in measure(few.to(device), sample.to(device))]
            sums = [total + part for total, part in zip(sums, parts, strict=True)] if count else parts
            count += len(few)
            progress.reach(count)
    if not count:
        raise ValueError("there are no images to measure on: give at least one.")
    return [total / count for total in sums]


def _measured(model: Any, images: Tensor, sample: RowSample) -> list[Tensor]:
    """Variation, entropy and distance, as Redundancy has them, summed over images."""
    maps = attention_maps(model, images, sample.rows)
    known = {layer: of for layer, of in enumerate(maps) if of is not None}
    num_heads = max((of.weights.shape[1] for of in known.values()), default=0)
    variation = images.new_full((len(maps), len(maps), num_heads, num_heads), torch.nan, dtype=torch.float32)
    entropy, distance = (variation.new_full((len(maps), num_heads), torch.nan) for _ in range(2))
    distances = _distances(model, images, sample)
    for layer, of in known.items():
        entropy[layer] = sample.mean(torch.special.entr(of.weights.float()).sum(-1), of.num_tokens).sum(0)
        if of.keys == "tokens":
            patches = of.weights[:, :, model.num_prefix_tokens :, model.num_prefix_tokens :].float()
            distance[layer] = ((patches * distances).sum((2, 3)) / patches.sum((2, 3))).sum(0)
    by_row = {layer: of.weights.float().transpose(1, 2).contiguous() for layer, of in known.items()}  # (B, R, H, M)
    for first, second in combinations_with_replacement(known, 2):
        if known[first].keys == known[second].keys:
            between = torch.cdist(by_row[first], by_row[second], p=1).permute(0, 2, 3, 1) / 2
            found = sample.mean(between, known[first].num_tokens).sum(0)
            variation[first, second], variation[second, first] = found, found.T
    return [variation, entropy, distance]


def _distances(model: Any, images: Tensor, sample: RowSample) -> Tensor:
    """From the patches whose rows are looked at to all patches, in patches: (B, 1, R - P, patches)."""
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    places = torch.cartesian_prod(*(torch.arange(size, device=images.device) for size in grid)).float()
    num_prefix = model.num_prefix_tokens
    return torch.cdist(places, places)[sample.rows(num_prefix + len(places))[:, num_prefix:] - num_prefix][:, None]


def _reading_errors(model: Any, images: Tensor, sample: RowSample) -> list[Tensor]:
    """What measure_head_errors returns, as a sum over images."""
    with recorded_attention(model) as calls:
        model.forward_features(images)
    num_tokens = calls[0].inputs[0].shape[1]
    dtype = torch.promote_types(images.dtype, torch.float32)  # in which sums of half precision are made
    rows, counts = sample.rows(num_tokens), sample.counts(num_tokens).to(images.device, dtype)
    errors = counts.new_zeros(len(calls), len(calls), *[model.blocks[0].attn.num_heads] * 2)
    maps: list[Tensor] = []
    reads_class_rows = model.reads_class_rows and has_classes(model)
    for layer, block in enumerate(model.blocks):
        q, k, v = project_map(block.attn, calls[layer].inputs[0], block.attn.grid)
        maps.append(dense_map(block.attn, q, k, block.attn.grid, rows).to(dtype))
        read_rows = model.num_class_rows if block is model.blocks[-1] and reads_class_rows else None
        values = v.to(dtype) @ _turn(block, dtype).mT
        own = maps[layer][:, :, :read_rows] @ values
        for anchor in range(layer):
            read = torch.einsum("binm,bjmd->bijnd", maps[anchor][:, :, :read_rows], values)
            errors[anchor, layer] = (read - own[:, None]).square().sum((0, 4)) @ counts[:read_rows]
    return [errors]


def _turn(block: Any, dtype: torch.dtype) -> Tensor:
    """What turns a layer's values (H, D, D) so that they are as long as what the output projection makes of them."""
    weight = block.attn.proj.weight.to(dtype)
    columns = weight.unflatten(1, (block.attn.num_heads, -1)).transpose(0, 1)  # (H, C, D)
    scale = getattr(block.ls1, "gamma", None)
    return torch.linalg.qr(columns if scale is None else scale[:, None] * columns).R  # |R v| = |W v|
