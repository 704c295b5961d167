"""Distillation: a trained model's answers to the images that a model is trained on, and the loss against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from train.weights import load_weights, start_from
from vitreuse.compress.fidelity import token_cosines
from vitreuse.config import ConfigError, DistillConfig
from vitreuse.io.process import print_note
from vitreuse.model.preprocessing import check_answers, image_settings


def create_teacher(
    settings: DistillConfig, student: Any, student_images: dict[str, Any], class_names: Sequence[str]
) -> Teacher:
    """The teacher of a model, on the model's device; under kind token the model is told to return both its heads.

    It takes images of the student's image_settings, and has its classes in the order of these names; under kind
    features it has its tokens, and any classes.

    Raises:
        ConfigError: The teacher cannot be built, its weights do not fit it, it has other classes, or kind is token and
            the model has no distillation token.
    """
    if settings.kind == "features":
        return _feature_teacher(settings, student, student_images)
    if settings.kind == "token":
        if not hasattr(student, "set_distilled_training"):
            one = "a model with a distillation token, such as deit_reuse_small_distilled_patch16_224"
            raise ConfigError(f"train.distill.kind 'token' needs {one}: choose one, or kind 'hard'.")
        student.set_distilled_training(True)
    fitting = {"num_classes": student.num_classes, "in_chans": student_images["input_size"][0]}
    model: Any = replace(settings.teacher, keywords={**fitting, **settings.teacher.keywords}).create()
    if model.num_classes != student.num_classes:
        found = f"train.distill.teacher has {model.num_classes} classes and the model {student.num_classes}"
        raise ConfigError(f"{found}: a teacher must tell the same classes apart.")
    assert settings.teacher.weights is not None  # its schema's rule
    remark = load_weights(model, settings.teacher.weights, class_names)
    if remark:
        print_note(f"train.distill.teacher: {remark}.")
    device = next(student.parameters()).device
    teacher, images = Teacher(model.to(device), student_images), torch.zeros(1, *student_images["input_size"])
    check_answers(teacher, images.to(device), student.num_classes, f"train.distill.teacher {settings.teacher.name!r}")
    return teacher


def _feature_teacher(settings: DistillConfig, student: Any, student_images: dict[str, Any]) -> Teacher:
    """A teacher whose tokens the model's are compared with; the heads of both are left alone.

    Raises:
        ConfigError: One of the two is no ViT, or their tokens differ in number or width.
    """
    model: Any = settings.teacher.create()
    assert settings.teacher.weights is not None  # its schema's rule
    start_from(model, settings.teacher.weights)
    teacher = Teacher(model.to(next(student.parameters()).device), student_images)
    for whose, network in (("the model", student), ("the teacher", model)):
        if not isinstance(network, VisionTransformer):
            found = f"compares the tokens of two ViTs, and {whose} is a {type(network).__name__}"
            raise ConfigError(f"train.distill.kind 'features' {found}: choose kind 'soft'.")
    own, found = _token_shape(student), _token_shape(model)
    if own != found:
        raise ConfigError(
            f"train.distill.kind 'features' compares tokens, and the teacher has {found} where the model has {own}: "
            "give the model that it was converted from, with the same model.keywords.img_size."
        )
    return teacher


def _token_shape(model: Any) -> str:
    rows, columns = model.patch_embed.grid_size
    return f"{rows} x {columns} patches and {model.num_prefix_tokens} prefix tokens of {model.embed_dim} channels"


class Teacher(nn.Module):
    """A trained model that answers without gradients, for images as another model takes them, by its image_settings."""

    def __init__(self, model: Any, images: dict[str, Any]):
        super().__init__()
        self.model = model
        self.eval()
        own, num_channels, device = image_settings(model), images["input_size"][0], next(model.parameters()).device
        self.size = tuple(own["input_size"][-2:])
        statistics = (images["mean"], images["std"], own["mean"], own["std"])
        mean, std, own_mean, own_std = (_per_channel(each, num_channels, device) for each in statistics)
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        is_convnet = sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1  # a ViT cuts patches by one
        self.memory_format = torch.channels_last if is_convnet else torch.contiguous_format
        model.to(memory_format=self.memory_format)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for normalised images (B, channels, rows, columns) of any size."""
        return self.model(self._as_its_own(images))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """All tokens (B, N, C) after the final norm, for the same images."""
        return self.model.forward_features(self._as_its_own(images))

    def _as_its_own(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return (images * self.scale + self.shift).contiguous(memory_format=self.memory_format)


def _per_channel(statistics: Sequence[float], num_channels: int, device: torch.device) -> Tensor:
    """A mean or deviation as (channels, 1, 1); that of colours becomes their mean for images of other channels."""
    values = statistics if len(statistics) == num_channels else [fmean(statistics)] * num_channels
    return torch.tensor(values, device=device).view(-1, 1, 1)


def features_loss(model: Any, tokens: Tensor, teacher: Any, their_tokens: Tensor) -> Tensor:
    """How far a student's tokens (B, N, C) are from its teacher's: one minus the cosine of the features that a head
    would read, such as the class token, and one minus that of the patch tokens, as means over images and tokens."""
    cosines = token_cosines(teacher, their_tokens, model, tokens)
    return torch.stack([1 - values.mean() for values in cosines.values()]).sum()


def distillation_loss(logits: Tensor, answers: Tensor, settings: DistillConfig) -> Tensor:
    """A student's mean loss against its teacher, both as logits (B, classes).

    soft is the divergence of the probabilities at a temperature, times its square so that gradients keep their size
    (arXiv 1503.02531); hard and token are the cross-entropy with the teacher's class (arXiv 2012.12877).
    """
    if settings.kind != "soft":
        return F.cross_entropy(logits, answers.argmax(-1))
    ours, theirs = (F.log_softmax(side / settings.temperature, dim=-1) for side in (logits, answers))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * settings.temperature**2
