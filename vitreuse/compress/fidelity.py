"""How far a converted model still says what the original says, image by image.

Shapes: B images, N tokens (prefix tokens first), C channels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from vitreuse.cost.measure import top_classes
from vitreuse.model.class_names import has_classes


@dataclass(frozen=True)
class Agreement:
    """How far two models agree, as means over images; None where a number is not known.

    Attributes:
        num_images: How many were compared.
        equal_top1: Percent of images of which both models say the same class.
        kl_divergence_nats: Divergence of the original's probabilities from the converted model's.
        cosine: Similarity of the features of models without classes: of the class token, or of what else they pool.
        worst_cosine: The same over the tenth of the images in which it is least.
        patch_cosine: Similarity of their patch tokens, a mean over the tokens of an image.
        worst_patch_cosine: The same over the tenth of the images in which it is least.
        original_top1: Percent of images whose label the original says.
        converted_top1: The same of the converted model.
    """

    num_images: int
    equal_top1: float | None = None
    kl_divergence_nats: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    patch_cosine: float | None = None
    worst_patch_cosine: float | None = None
    original_top1: float | None = None
    converted_top1: float | None = None

    @property
    def distance(self) -> float:
        """The mean of output_distance over the images, of ViTs."""
        if self.kl_divergence_nats is not None:
            return self.kl_divergence_nats
        assert self.cosine is not None and self.patch_cosine is not None
        return 1 - (self.cosine + self.patch_cosine) / 2


def agreement(
    original: Any,
    converted: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    has_labels: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Agreement:
    """Compares two models, as agreements does."""
    return agreements(original, {"converted": converted}, batches, has_labels, progress)["converted"]


@torch.inference_mode()
def agreements(
    original: Any,
    models: Mapping[str, Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    has_labels: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Agreement]:
    """Compares models in evaluation mode with the original, which answers once for all of them, on its device.

    Args:
        original: The model that was converted.
        models: What became of it, by name; of as many classes, or of none too.
        batches: Images (B, channels, rows, columns) and labels (B,), which are gone over once.
        has_labels: Whether the labels are classes of the models.
        progress: Told how many images are compared.

    Raises:
        ValueError: There are no images.
    """
    device, num_images = next(original.parameters()).device, 0
    rows: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in models}
    for images, labels in batches:
        compared = _comparison(original, images.to(device), labels.to(device), has_labels)
        for name, model in models.items():
            for column, values in compared(model).items():
                rows[name][column].append(values.double())
        num_images += len(images)
        progress(num_images)
    if not num_images:
        raise ValueError("there are no images to compare on: give at least one.")
    return {name: _mean_agreement(columns) for name, columns in rows.items()}


def _comparison(original: Any, images: Tensor, labels: Tensor, has_labels: bool) -> Callable[[Any], dict[str, Tensor]]:
    """What compares a model's answers for images with the original's, which are asked for once."""
    wanted = original(images) if has_classes(original) else None
    if wanted is not None and wanted.ndim == 2:
        return lambda model: _of_classes(wanted, model(images), labels, has_labels)
    if not isinstance(original, VisionTransformer):
        answers = original(images).flatten(1)
        return lambda model: {"cosine": F.cosine_similarity(answers, model(images).flatten(1))}
    tokens = original.forward_features(images)  # without classes, or with those of each token
    return lambda model: token_cosines(original, tokens, model, model.forward_features(images))


def _mean_agreement(rows: Mapping[str, list[Tensor]]) -> Agreement:
    """Means over images, and of cosines over the tenth in which they are least."""
    columns = {name: torch.cat(values) for name, values in rows.items()}
    means = {name: float(column.mean()) for name, column in columns.items()}
    worst = {f"worst_{name}": worst_tenth(column) for name, column in columns.items() if name.endswith("cosine")}
    return Agreement(len(next(iter(columns.values()))), **means, **worst)


def token_cosines(original: Any, wanted: Tensor, converted: Any, found: Tensor) -> dict[str, Tensor]:
    """For each image (B,) how alike the features of two ViTs are, and how alike their patch tokens.

    Features are what a head would read: the class token, or the tokens pooled; where nothing is pooled the class token,
    or without one all tokens.

    Args:
        original: One ViT.
        wanted: Its tokens (B, N, C) after the final norm.
        converted: The other one.
        found: Its tokens.
    """
    features, others = _features(original, wanted), _features(converted, found)
    patches, other_patches = (tokens[:, original.num_prefix_tokens :] for tokens in (wanted, found))
    return {
        "cosine": F.cosine_similarity(features.flatten(1).float(), others.flatten(1).float()),
        "patch_cosine": F.cosine_similarity(patches.float(), other_patches.float(), dim=-1).mean(1),
    }


def _features(model: Any, tokens: Tensor) -> Tensor:
    """What a head would read of tokens (B, N, C); of a model that pools nothing the first one, its class token."""
    features = model.forward_head(tokens, pre_logits=True)
    return features[:, 0] if features.ndim == 3 and model.num_prefix_tokens else features


def answer_of_tokens(model: Any, tokens: Tensor) -> Tensor:
    """What two ViTs are compared by, of tokens (B, N, C) after the final norm: logits, without classes the tokens."""
    return model.forward_head(tokens) if has_classes(model) else tokens


def output_distance(original: Any, wanted: Tensor, found: Tensor) -> Tensor:
    """For each image (B,) how far an answer is from the original's, see answer_of_tokens.

    Of logits it is the divergence of the original's probabilities from the other's, in nats; of tokens one minus the
    cosine, the mean of that of the features and that of the patch tokens.
    """
    if wanted.ndim == 2:
        return _divergence(wanted, found)
    return 1 - torch.stack(list(token_cosines(original, wanted, original, found).values())).mean(0)


@torch.inference_mode()
def mean_distance(original: Any, converted: Any, batches: Iterable[Tensor]) -> float:
    """How far the answers of a ViT are from the original's, see output_distance, a mean over the images of batches
    (B, channels, rows, columns); both models on one device and in evaluation mode."""
    device, parts = next(original.parameters()).device, []
    for images in batches:
        seen = images.to(device)
        wanted, found = (answer_of_tokens(each, each.forward_features(seen)) for each in (original, converted))
        parts.append(output_distance(original, wanted, found))
    return float(torch.cat(parts).double().mean())


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """The divergence (B,) of the probabilities of logits (B, classes) from those of others, in nats."""
    ours, theirs = (logits.float().log_softmax(1) for logits in (found, wanted))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def worst_tenth(values: Tensor) -> float:
    """The mean of the least tenth of some numbers, of at least one."""
    return float(values.sort().values[: math.ceil(len(values) / 10)].mean())


def _of_classes(wanted: Tensor, found: Tensor, labels: Tensor, has_labels: bool) -> dict[str, Tensor]:
    """For each attribute of Agreement that logits can tell, its values image by image."""
    classes, found_classes = (top_classes(logits, 1)[:, 0] for logits in (wanted, found))
    columns = {"equal_top1": 100.0 * (classes == found_classes), "kl_divergence_nats": _divergence(wanted, found)}
    if has_labels:
        columns |= {"original_top1": 100.0 * (classes == labels), "converted_top1": 100.0 * (found_classes == labels)}
    return columns
