"""The parts of a recipe, each against timm's own or against numbers by hand."""

import copy
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.distributed_sampler import RepeatAugSampler
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, TanhLRScheduler
from timm.task import LogitDistillationTask, TokenDistillationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eval.distributed import Ranks
from eval.labelled import ALONE, Share
from eval.top1 import evaluate
from train.__main__ import main
from train.augmentation import image_size
from train.distill import Teacher, distillation_loss
from train.findings import look, validation_share
from train.order import RankBatches
from train.pipeline import collate
from train.recipe import create_criterion
from train.trainer import DivergedError, Trainer
from train.weights import start_from
from vitreuse.config import ConfigError, DistillConfig, ModelConfig, ResolutionConfig, load_config
from vitreuse.data import Sample
from vitreuse.model.preprocessing import evaluation_transform, image_settings

SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL = "img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2"
CONFIG = f"""\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{{SMALL}}}
data: {{root: unused, num_workers: 0}}
train:
  epochs: 5
  global_batch_size: 8
  optimizer: {{lr: 1e-2}}
"""
DISTILLED = ["model.name=deit_reuse_small_distilled_patch16_224"]


class Images:
    """Seventeen grey images of three classes in memory: batches of 8, 8 and 1."""

    class_names = ("a", "b", "c")
    shard_sizes = (17,)

    def __len__(self) -> int:
        return 17

    def __getitem__(self, number: int) -> Sample:
        pixels = np.random.default_rng(number).integers(60 * (number % 3), 255, (8, 8), dtype=np.uint8)
        return Sample(Image.fromarray(pixels), number % 3, str(number))


@pytest.fixture
def make(tmp_path) -> Callable[..., Trainer]:
    """Builds the trainer of the small experiment with overrides."""
    (tmp_path / "x.yaml").write_text(CONFIG)

    def make_trainer(*overrides: str, ranks: Ranks = ALONE) -> Trainer:
        config = load_config(tmp_path / "x.yaml", overrides)
        torch.manual_seed(config.train.seed)
        model: Any = config.model.create()
        return Trainer(config, model, Images(), image_settings(model), ranks)

    return make_trainer


@pytest.fixture
def teacher(tmp_path) -> str:
    """A trained teacher, as the value of train.distill.teacher: larger images, other statistics, as many classes."""
    torch.manual_seed(1)
    keywords = {**SIZES, "img_size": 16, "embed_dim": 24}
    model = _scaled(timm.create_model("deit_tiny_patch16_224", **keywords))
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    return (
        f"{{name: deit_tiny_patch16_224, keywords: {{patch_size: 4, img_size: 16, embed_dim: 24, depth: 2, "
        f"num_heads: 2}}, weights: {tmp_path / 'teacher.safetensors'}}}"
    )


def _scaled(model: nn.Module) -> nn.Module:
    """The model with a head large enough that its logits differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head"):
                parameter.normal_(std=0.5)
    return model


def _steps(trainer: Trainer, number: int) -> list[float]:
    """The losses of so many steps, over the ends of epochs."""
    losses: list[float] = []
    while len(losses) < number:
        for batch in trainer.remaining_batches():
            losses.append(trainer.train_step(batch, stop=False).loss)
            if len(losses) == number:
                break
    return losses


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ---- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_timms(make, smoothing):
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    soft = torch.rand(5, 3).softmax(-1)
    criteria = [
        create_criterion(make(f"train.loss={{name: {name}, smoothing: {smoothing}}}", *more).config)
        for name, more in [("ce", ()), ("bce", ()), ("ce", ["train.mixup={}"]), ("bce", ["train.mixup={}"])]
    ]
    losses = [
        criterion(logits, targets) for criterion, targets in zip(criteria, (labels, labels, soft, soft), strict=True)
    ]
    expected = [
        LabelSmoothingCrossEntropy(smoothing)(logits, labels),
        BinaryCrossEntropy(smoothing)(logits, labels),
        SoftTargetCrossEntropy()(logits, soft),
        BinaryCrossEntropy()(logits, soft),
    ]
    torch.testing.assert_close(losses, expected)


def test_a_threshold_makes_shares_of_a_mixed_image_whole(make):
    loss = "train.loss={name: bce, target_threshold: 0.3}"
    logits, shares = torch.randn(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4]])
    criterion = create_criterion(make(loss, "train.mixup={}").config)
    whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(criterion(logits, shares), F.binary_cross_entropy_with_logits(logits, whole))


def test_distillation_losses_by_hand():
    logits, answers = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    config = ModelConfig(name="any", keywords={}, weights="any")

    def divergence(theirs: float, ours: float) -> float:
        p, q = (1 / (1 + math.exp(-gap / 2)) for gap in (theirs, ours))  # of class 1, at temperature 2
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    soft = distillation_loss(logits, answers, DistillConfig(teacher=config, kind="soft", temperature=2.0))
    assert soft.item() == pytest.approx(4 * (divergence(2, -1) + divergence(1, 3)) / 2)
    for kind in ("hard", "token"):  # the teacher says class 1 twice
        hard = distillation_loss(logits, answers, DistillConfig(teacher=config, kind=kind))
        assert hard.item() == pytest.approx((math.log(1 + math.e) + math.log(1 + math.exp(-3))) / 2)


@pytest.mark.parametrize("kind", ["soft", "token"])
def test_distillation_is_timms(make, teacher, kind):
    """One step's loss and gradients, where teacher and student take the same images."""
    same = teacher.replace("img_size: 16", "img_size: 8").replace("teacher.safetensors", "same.safetensors")
    torch.manual_seed(1)
    network = _scaled(timm.create_model("deit_tiny_patch16_224", **{**SIZES, "embed_dim": 24}))
    save_file(network.state_dict(), Path(teacher.partition("weights: ")[2][:-1]).with_name("same.safetensors"))
    temperature = ", temperature: 2.0" if kind == "soft" else ""
    trainer = make(*DISTILLED, f"train.distill={{teacher: {same}, kind: {kind}, alpha: 0.3{temperature}}}")
    student = copy.deepcopy(_scaled(trainer.model)).train()
    batch = next(trainer.remaining_batches())
    weights = {"task_loss_weight": 0.7, "criterion": nn.CrossEntropyLoss(), "verbose": False}
    if kind == "soft":
        task = LogitDistillationTask(student, network, temperature=2.0, **weights)
    else:
        task = TokenDistillationTask(student, network, distill_type="hard", **weights)
    task.student_mean = task.teacher.mean_kd  # both are DeiTs; timm would broadcast three means over a grey image
    task.student_std = task.teacher.std_kd
    expected = task(trainer.on_device(batch).images, batch.labels)["loss"]
    expected.backward()
    assert trainer.train_step(batch, stop=False).loss == pytest.approx(expected.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-7)


def test_hard_distillation_mixes_two_cross_entropies(make, teacher):
    trainer = make(f"train.distill={{teacher: {teacher}, kind: hard, alpha: 0.2}}")
    batch = next(trainer.remaining_batches())
    student = copy.deepcopy(_scaled(trainer.model)).train()
    images = trainer.on_device(batch).images
    logits, said = student(images), trainer.objective.teacher(images).argmax(-1)
    assert not torch.equal(said, batch.labels)
    expected = 0.8 * F.cross_entropy(logits, batch.labels) + 0.2 * F.cross_entropy(logits, said)
    assert trainer.train_step(batch, stop=False).loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_teacher_sees_the_image_at_its_own_size_and_statistics():
    class Seeing(nn.Module):
        pretrained_cfg: ClassVar = {"input_size": (3, 12, 20), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 2.0)}

        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled() and not self.training
            self.seen.append(images)
            return images.mean((2, 3))

    student = {"input_size": (3, 6, 10), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.5, 1.0)}
    teacher = Teacher(Seeing(), student)
    pixels = torch.rand(2, 3, 6, 10)
    normalised = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.5, 1.0])[:, None, None]
    teacher(normalised)
    teacher(F.interpolate(normalised, (12, 20), mode="nearest"))
    small, large = teacher.model.seen
    assert small.shape == large.shape == (2, 3, 12, 20)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.25, 2.0])[:, None, None]
    torch.testing.assert_close(large, (F.interpolate(pixels, (12, 20), mode="nearest") - mean) / std)
    resized = F.interpolate(pixels, (12, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(small, (resized - mean) / std, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_colours_takes_grey_images_by_the_mean_of_its_statistics():
    model: Any = timm.create_model("test_resnet", in_chans=1, num_classes=3).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.7)}
    teacher = Teacher(model, {"input_size": (1, 160, 160), "mean": (0.5,), "std": (0.5,)})
    pixels = torch.rand(2, 1, 160, 160)
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.5), model((pixels - 0.3) / 0.4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16])
def test_healing_measures_its_teacher_on_images_as_the_teacher_takes_them(make, teacher, side):
    """Of other statistics than the model; of the model's size, or of another."""
    sized = f"train.distill.teacher.keywords.img_size={side}"
    trainer = make(f"train.distill={{teacher: {teacher}, kind: soft}}", "train.heal={}", sized)
    images = [Images()[number] for number in range(17)]
    transform = evaluation_transform(trainer.model, trainer.config.eval.crop_pct)
    answers = trainer.objective.teacher(torch.stack([transform(image.image) for image in images])).argmax(-1)
    taught = [image._replace(label=int(label)) for image, label in zip(images, answers, strict=True)]
    share = validation_share(trainer.config, trainer.model, taught, ALONE)
    facts = trainer.objective.facts_before(trainer.model, partial(look, trainer.config, teacher=None, share=share))
    assert facts.values["teacher_top1"] == 100 > facts.values["before_top1"]
    assert not trainer.objective.teacher.model.training


def test_a_teacher_is_a_constant_that_no_checkpoint_holds(make, teacher):
    trainer = make(f"train.distill={{teacher: {teacher}, kind: soft}}", "train.precision=bfloat16")
    before, keys = _state(trainer.objective.teacher.model), make().state_dict().keys()
    _steps(trainer, 2)
    assert not trainer.objective.teacher.model.training and trainer.model.training
    torch.testing.assert_close(_state(trainer.objective.teacher.model), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in trainer.objective.teacher.model.parameters())
    assert trainer.state_dict().keys() == keys
    num_owned = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert num_owned == len(list(trainer.model.parameters()))


def test_the_distillation_token_alone_learns_from_the_teacher(make, teacher):
    trainer = make(*DISTILLED, f"train.distill={{teacher: {teacher}, kind: token, alpha: 1.0}}")
    trainer.train_step(next(trainer.remaining_batches()), stop=False)
    assert trainer.model.head_dist.weight.grad.abs().sum() > 0
    assert trainer.model.head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["kind: token"], "train.distill.kind 'token' needs a model with a distillation token, such as deit_"),
        (
            ["kind: soft", "classes"],
            "train.distill.teacher has 4 classes and the model 3: a teacher must tell",
        ),
        (
            ["kind: soft", "name"],
            "'deit_tinny_patch16_224' is not a model of timm or vitreuse, did you mean",
        ),
        (["kind: soft", "weights"], "weights 'nowhere.pth' are neither a file nor pretrained weights of timm"),
        (
            ["kind: soft", "depth"],
            "does not fit VisionTransformer: the checkpoint has no blocks.2.norm1.weight",
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_sentence(make, teacher, overrides, sentence):
    kind, *change = overrides
    changes = {
        "classes": ("num_heads: 2", "num_heads: 2, num_classes: 4"),
        "name": ("deit_tiny", "deit_tinny"),
        "weights": (teacher.partition("weights: ")[2][:-1], "nowhere.pth"),
        "depth": ("depth: 2", "depth: 3"),
    }
    for name in change:
        teacher = teacher.replace(*changes[name])
    with pytest.raises(ConfigError) as caught:
        make(f"train.distill={{teacher: {teacher}, {kind}}}")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


# ---- weights to start from


def test_a_plan_starts_from_a_plain_checkpoint_of_other_classes_and_size(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **{**SIZES, "img_size": 16, "num_classes": 5})
    torch.save({"model": plain.state_dict(), "optimizer": {}}, tmp_path / "plain.pth")
    model: Any = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="lowrank:2 reuse", keywords=SIZES).create()
    head = _state(model.head)
    said = start_from(model, str(tmp_path / "plain.pth"))
    assert said == (
        f"starts from {tmp_path / 'plain.pth'}; a new head for 3 classes; new: blocks.0.attn.key_proj; left out: "
        "blocks.1.attn.qkv.weight (all but attn.v.weight), blocks.1.attn.qkv.bias (all but attn.v.bias); "
        "resampled to 2 x 2 from 4 x 4 patches, a guess by their number."
    )
    torch.testing.assert_close(_state(model.head), head, rtol=0, atol=0)
    state, expected = model.state_dict(), plain.state_dict()
    shared = {key for key in state if key in expected and key not in ("head.weight", "head.bias", "pos_embed")}
    assert len(shared) > 20 and all(torch.equal(state[key], expected[key]) for key in shared)
    assert torch.equal(state["blocks.1.attn.v.weight"], expected["blocks.1.attn.qkv.weight"][32:])
    plain.set_input_size((8, 8))
    torch.testing.assert_close(state["pos_embed"], plain.pos_embed.detach())


@pytest.mark.parametrize("side", [8, 16])
def test_a_plain_model_starts_from_plain_weights_of_any_size(tmp_path, side):
    source, model = (timm.create_model("vit_tiny_patch16_224", **{**SIZES, "img_size": px}) for px in (side, 8))
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    resampled = "; resampled to 2 x 2 from 4 x 4 patches, a guess by their number" if side == 16 else ""
    assert start_from(model, str(tmp_path / "x.safetensors")) == f"starts from {tmp_path / 'x.safetensors'}{resampled}."
    source.set_input_size((8, 8))
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_pretrained_weights_are_fetched_by_name(monkeypatch):
    plain = timm.create_model("vit_tiny_patch16_224", **SIZES)
    model: Any = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="exact reuse", keywords=SIZES).create()
    name = "deit_tiny_patch16_224.fb_in1k"

    def create_model(asked: str, pretrained: bool) -> nn.Module:
        assert (asked, pretrained) == (name, True)
        return plain

    def offline(asked: str, pretrained: bool) -> nn.Module:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    assert start_from(model, name).startswith(f"starts from {name}; left out: blocks.1.attn.qkv.weight (all but")
    assert torch.equal(model.head.weight, plain.head.weight)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError) as caught:
        start_from(model, name)
    assert str(caught.value) == f"weights '{name}' cannot be fetched (We couldn't connect): give them as a file."


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"depth": 3}, "does not fit PlanVisionTransformer: the checkpoint has a blocks.2."),
        ({"embed_dim": 24}, "in the checkpoint and (16,) in the model: create the model with the checkpoint's sizes"),
        ({"qk_norm": True}, "that the model lacks (0 keys missing, 4 unknown): it is of another model"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, keywords, sentence):
    plain = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **keywords})
    save_file(plain.state_dict(), tmp_path / "x.safetensors")
    model: Any = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="exact reuse", keywords=SIZES).create()
    before = _state(model)
    with pytest.raises(ConfigError) as caught:
        start_from(model, str(tmp_path / "x.safetensors"))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)


def test_a_file_that_holds_no_weights_is_one_sentence(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no archive")
    model = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="exact reuse", keywords=SIZES).create()
    with pytest.raises(ConfigError, match="cannot be read as weights: ") as caught:
        start_from(model, str(tmp_path / "x.pth"))
    assert "\n" not in str(caught.value)


# ---- frozen parameters


def test_frozen_parameters_stay_as_they_are(make):
    trainer = make(
        "train.freeze=[patch_embed, pos_embed, 'blocks.*.mlp.fc?.weight']", "train.optimizer.weight_decay=0.5"
    )
    before = _state(trainer.model)
    _steps(trainer, 3)
    moved = {name for name, tensor in _state(trainer.model).items() if not torch.equal(tensor, before[name])}
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    frozen |= {f"blocks.{layer}.mlp.fc{i}.weight" for layer in (0, 1) for i in (1, 2)}
    assert moved == before.keys() - frozen
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.grad is None} == frozen
    owned = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not any(id(parameter) in owned for parameter in trainer.model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize(
    ("freeze", "sentence"),
    [
        (
            "[patch_embedd]",
            "train.freeze 'patch_embedd' matches no parameter of the model, did you mean 'patch_embed'?",
        ),
        ("[pos_embed, 'blocks.[7-9]']", "train.freeze 'blocks.[7-9]' matches no parameter of the model"),
        ("['*']", "train.freeze * leaves no parameter to train: freeze fewer."),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(make, freeze, sentence):
    with pytest.raises(ConfigError) as caught:
        make(f"train.freeze={freeze}")
    assert str(caught.value).startswith(sentence)


# ---- float16


def test_float16_steps_on_gradients_of_the_scaled_loss(make):
    recipe = ["train.clip={limit: 0.5}", "train.optimizer={name: sgd, lr: 0.1}"]
    half, whole = make("train.precision=float16", *recipe), make(*recipe)
    torch.testing.assert_close(_steps(half, 2), _steps(whole, 2), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(_state(half.model), _state(whole.model), rtol=1e-2, atol=1e-3)
    assert half.scaler.state_dict()["_growth_tracker"] == 2 and half.counters.skipped == 0
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())
    batch, dtypes = half.on_device(next(half.remaining_batches())), []
    with half.objective.autocast(batch.images):
        assert half.model(batch.images).dtype == torch.float16
    half.objective.criterion.register_forward_pre_hook(lambda criterion, args: dtypes.append(args[0].dtype))
    half._loss(batch.images, batch.labels)
    assert dtypes == [torch.float32]


def _overflowing(model: nn.Module) -> Any:
    """Makes the gradients of a model overflow; removed by its remove()."""
    return model.get_parameter("pos_embed").register_hook(lambda gradient: gradient * float("inf"))


def test_overflow_halves_the_scale_and_is_no_divergence_while_that_can_help(make):
    trainer = make("train.precision=float16", "train.max_skipped_steps=2", "train.epochs=9")
    before, overflow = _state(trainer.model), _overflowing(trainer.model)
    for step in range(16):
        _steps(trainer, 1)
        assert trainer.scaler.get_scale() == 2.0 ** (15 - step)
        assert (trainer.counters.skipped, trainer.counters.skipped_in_a_row) == (step + 1, 0)
    torch.testing.assert_close(_state(trainer.model), before, rtol=0, atol=0)
    _steps(trainer, 1)
    assert trainer.counters.skipped_in_a_row == 1
    with pytest.raises(DivergedError, match="2 steps in a row up to step 18"):
        _steps(trainer, 1)
    overflow.remove()
    _steps(trainer, 1)
    assert (trainer.counters.skipped, trainer.counters.skipped_in_a_row) == (18, 0)
    assert not torch.equal(trainer.model.pos_embed, before["pos_embed"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_that_overflow_without_a_scale_are_a_divergence(make, precision):
    trainer = make(f"train.precision={precision}", "train.max_skipped_steps=2")
    _overflowing(trainer.model)
    with pytest.raises(DivergedError, match="2 steps in a row up to step 2"):
        _steps(trainer, 3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_rank_without_images_takes_part_with_gradients_of_zero(make, teacher, precision):
    trainer = make(*DISTILLED, f"train.precision={precision}", f"train.distill={{teacher: {teacher}, kind: token}}")
    result = trainer.train_step(collate([]), stop=False)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, False)
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_a_loss_that_is_not_finite_is_a_divergence_in_float16_too(make):
    trainer = make("train.precision=float16", "train.max_skipped_steps=2")
    batch = next(trainer.remaining_batches())
    broken = batch._replace(images=batch.images * float("nan"))
    trainer.train_step(broken, stop=False)
    with pytest.raises(DivergedError, match="2 steps in a row"):
        trainer.train_step(broken, stop=False)


# ---- learning rates

CLOSED_FORMS = {
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "tanh": lambda share: (1 - math.tanh(-7.0 * (1 - share) + 3.0 * share)) / 2,
    "poly": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}
TIMMS = {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler, "poly": PolyLRScheduler}


def _rates(trainer: Trainer) -> list[float]:
    rates = []
    for step in range(trainer.num_steps):
        trainer.scheduler.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_follow_their_closed_form(make, name, warmup):
    floor = 0.0 if name == "constant" else 1e-4
    trainer = make(f"train.schedule={{name: {name}, warmup_steps: {warmup}, min_lr: {floor}}}")
    peak = CLOSED_FORMS["tanh"](4 / 15) * (1e-2 - floor) + floor if name == "tanh" else 1e-2
    expected = [1e-6 + (peak - 1e-6) * step / warmup for step in range(warmup)]
    expected += [floor + (1e-2 - floor) * CLOSED_FORMS[name](step / 15) for step in range(warmup, 15)]
    assert _rates(trainer) == pytest.approx(expected)


@pytest.mark.parametrize("name", TIMMS)
def test_rates_are_those_of_timms_scheduler(make, name):
    trainer = make(f"train.schedule={{name: {name}, warmup_epochs: 1.5, warmup_lr: 1e-5, min_lr: 1e-4}}")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-2)
    more = {"power": 1.0} if name == "poly" else {}
    timms = TIMMS[name](
        optimizer, t_initial=15, lr_min=1e-4, warmup_t=4.5, warmup_lr_init=1e-5, t_in_epochs=False, **more
    )
    rates = []
    for step in range(15):
        timms.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert _rates(trainer) == rates


def test_wsd_is_stable_and_decays_over_the_last_fifth(make):
    trainer = make("train.schedule={name: wsd, warmup_steps: 5, warmup_lr: 0, min_lr: 1e-3}")
    decay = [1e-3 + 9e-3 * (1 - math.sqrt(step / 2)) for step in (0, 1)]
    assert _rates(trainer) == pytest.approx([2e-3 * step for step in range(5)] + [1e-2] * 8 + decay)


def test_warm_up_by_steps_is_that_by_epochs(make):
    by_steps, by_epochs = (make(f"train.schedule={{{text}}}") for text in ("warmup_steps: 6", "warmup_epochs: 2"))
    assert _rates(by_steps) == _rates(by_epochs)


def test_a_warm_up_as_long_as_the_run_is_refused(make):
    with pytest.raises(ConfigError, match=r"^train\.schedule\.warmup_steps 15 leaves nothing of 15 steps: make it"):
        make("train.schedule={warmup_steps: 15}")


# ---- optimizers


def test_layer_decay_scales_the_rate_by_the_distance_from_the_head(make):
    trainer = make("train.optimizer.layer_decay=0.5", "train.optimizer.weight_decay=0.1")
    trainer.scheduler.step_update(0)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    by_hand = {
        "patch_embed.proj.weight": (1e-2 / 8, 0.1),
        "pos_embed": (1e-2 / 8, 0.0),
        "blocks.0.mlp.fc1.weight": (1e-2 / 4, 0.1),
        "blocks.1.attn.v.weight": (1e-2 / 2, 0.1),
        "blocks.1.attn.v.bias": (1e-2 / 2, 0.0),
        "norm.weight": (1e-2 / 2, 0.0),
        "head.weight": (1e-2, 0.1),
    }
    assert {name: rates[name] for name in by_hand} == by_hand and rates.keys() == set(names.values())


def test_keywords_reach_the_optimizer(make):
    trainer = make("train.optimizer={name: lamb, keywords: {eps: 1e-8, betas: [0.9, 0.95], max_grad_norm: null}}")
    assert trainer.optimizer.param_groups[0]["eps"] == 1e-8
    assert list(trainer.optimizer.param_groups[0]["betas"]) == [0.9, 0.95]
    assert trainer.optimizer.defaults["max_grad_norm"] is None
    before = _state(trainer.model)
    _steps(trainer, 1)
    assert not torch.equal(trainer.model.head.weight, before["head.weight"])


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        (
            "{name: adamw, keywords: {momentum: 0.9}}",
            "train.optimizer.keywords.momentum has no effect on adamw: leave it",
        ),
        (
            "{name: sgd, keywords: {betas: [0.9, 0.95]}}",
            "train.optimizer.keywords.betas has no effect on sgd: leave it",
        ),
        ("{name: adamw, keywords: {beta: 0.9}}", "train.optimizer 'adamw' cannot be made: "),
        ("{name: adamw, keywords: {lr: 0.9}}", "train.optimizer 'adamw' cannot be made: "),
        ("{name: adamw, keywords: {betas: [0.9, 2]}}", "train.optimizer 'adamw' cannot be made: Invalid beta"),
        ("{name: fusedadam}", "train.optimizer 'fusedadam' cannot be made: "),  # apex is not installed
    ],
)
def test_an_optimizer_that_cannot_be_made_is_one_sentence(make, optimizer, sentence):
    with pytest.raises(ConfigError) as caught:
        make(f"train.optimizer={optimizer}")
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


# ---- progressive resolution

GROWING = [
    "model.keywords.dynamic_img_size=true",
    "model.keywords.img_size=16",
    "train.resolution={from_px: 4, epochs: 4}",
]


def test_sizes_grow_linearly_by_whole_patches():
    resolution = ResolutionConfig(from_px=160, epochs=3)
    sizes = [image_size(epoch, resolution, (224, 224), (16, 16)) for epoch in range(5)]
    assert sizes == [(160, 160), (176, 176), (192, 192), (224, 224), (224, 224)]  # 160, 181.3, 202.7, 224
    wide = [image_size(epoch, resolution, (224, 448), (16, 32)) for epoch in range(4)]
    assert wide == [(160, 320), (176, 352), (192, 384), (224, 448)]


@pytest.mark.parametrize("plan", ["exact reuse", "lowrank:3 reuse", "span:3 reuse"])
def test_the_images_of_an_epoch_have_its_size(make, plan):
    trainer = make(*GROWING, f"model.plan={plan}")
    for epoch, side in enumerate((4, 4, 8, 12, 16)):  # 4, 7, 10, 13
        batches = list(trainer.remaining_batches())
        assert {batch.images.shape[1:] for batch in batches} == {(1, side, side)}
        assert all(math.isfinite(trainer.train_step(batch, stop=False).loss) for batch in batches)
        assert trainer.epoch == epoch + 1
    assert trainer.model.patch_embed.img_size == (16, 16) and trainer.model.pos_embed.shape[1] == 17


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            [GROWING[2]],
            "train.resolution changes the size of the images, which the model must take: set model.keywords.",
        ),
        ([*GROWING, "train.resolution.from_px=16"], "train.resolution.from_px 16 must be below the 16 px of the model"),
        (
            [*GROWING, "train.resolution.from_px=6"],
            "train.resolution.from_px 6 must be below the 16 px of the model and a",
        ),
    ],
)
def test_a_resolution_that_does_not_fit_the_model_is_refused(make, overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


# ---- averages, accumulation, repeats


@pytest.mark.parametrize("warmup", [False, True])
def test_the_moving_average_is_timms_and_by_hand(make, warmup):
    trainer = make(f"train.ema={{decay: 0.6, warmup: {str(warmup).lower()}}}")
    timms = ModelEmaV3(trainer.model, 0.6, use_warmup=warmup)
    expected = None
    for step in range(4):
        _steps(trainer, 1)
        timms.update(trainer.model, step + 1)
        weight = trainer.model.head.weight.detach().clone()
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.6
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(_state(trainer.final_model), _state(timms.module), rtol=0, atol=0)
    torch.testing.assert_close(trainer.final_model.head.weight.detach(), expected)


def test_a_step_leaves_its_batch_as_it_was(make):
    """As bytes: what is done to images on the device is part of each step, and of its time."""
    losses = []
    for num_before in (0, 3):
        trainer = make("train.mixup={}", "train.optimizer.lr=1e-30")
        batch = next(trainer.remaining_batches())
        images = batch.images.clone()
        for _ in range(num_before):
            trainer.train_step(batch, stop=False)
            trainer.counters.step = 0
        losses.append(trainer.train_step(batch, stop=False).loss)
        assert batch.images.dtype == torch.uint8 and torch.equal(batch.images, images)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_accumulated_gradients_are_those_of_the_mean_loss(make):
    trainer = make("train.accumulation_steps=3")
    batch = next(trainer.remaining_batches())
    model = copy.deepcopy(trainer.model).train()
    F.cross_entropy(model(trainer.on_device(batch).images), batch.labels).backward()
    trainer.train_step(batch, stop=False)  # pieces of 3, 3 and 2
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    torch.testing.assert_close(found, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeated_augmentation_is_timms(monkeypatch, world_size):
    """The images of every rank, from the same permutation; timm's sampler ends an epoch at a multiple of 256."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(600, generator=generator).numpy()
    monkeypatch.setattr("train.order.epoch_permutation", lambda *_: order)
    for rank in range(world_size):
        timms = RepeatAugSampler(range(600), world_size, rank, num_repeats=3)
        timms.set_epoch(2)
        ours = RankBatches(0, (600,), 8 * world_size, repeats=3, rank=rank, world_size=world_size)
        ours.start_at(2, 0)
        samples = [draw.sample for batch in ours for draw in batch]
        expected = list(timms)
        assert len(expected) == 512 // world_size
        assert samples[: len(expected)] == expected and len(samples) == 600 // world_size


# ---- all of it


@pytest.fixture
def everything(teacher) -> list[str]:
    """Every part of a recipe that keeps or reads a state."""
    return [
        *DISTILLED,
        f"train.distill={{teacher: {teacher}, kind: token}}",
        "model.keywords.drop_path_rate=0.1",
        "train.freeze=[patch_embed]",
        "train.precision=float16",
        "train.optimizer={name: nmuon, layer_decay: 0.8}",
        "train.schedule={name: wsd, warmup_steps: 3}",
        "train.ema={decay: 0.9}",
        "train.clip={limit: 1.0}",
        "train.mixup={}",
        "train.accumulation_steps=2",
        "train.repeats=2",
        "model.keywords.dynamic_img_size=true",
        "train.resolution={from_px: 4, epochs: 3}",
    ]


def test_a_state_goes_on_as_if_nothing_had_happened(make, everything):
    whole, first, second = (make(*everything) for _ in range(3))
    overflows = [_overflowing(trainer.model) for trainer in (whole, first)]
    losses = _steps(whole, 1)
    assert _steps(first, 1) == losses and first.counters.skipped == 1  # the scale is not the one it starts from
    for overflow in overflows:
        overflow.remove()
    _steps(whole, 2), _steps(first, 2)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert _steps(second, 4) == _steps(whole, 4)
    state, expected = second.state_dict(), whole.state_dict()
    assert state["scaler"] == expected["scaler"] and state["scaler"]["scale"] == 2.0**15
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for part in ("model", "ema"):
        torch.testing.assert_close(state[part], expected[part], rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=0)


@pytest.fixture
def on_disk(tmp_path) -> list[str]:
    """The arguments of a run of the small experiment, with its images in folders."""
    (tmp_path / "x.yaml").write_text(CONFIG)
    for split, number in {"train": 17, "val": 3}.items():
        for i in range(number):
            folder = tmp_path / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Images()[i].image.save(folder / f"{i}.png")
    return [str(tmp_path / "x.yaml"), f"data.root={tmp_path}", "train.device=cpu", f"run_dir={tmp_path / 'run'}"]


def _records(run_dir: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def test_two_ranks_share_a_teacher_a_scaler_and_what_is_frozen(on_disk, tmp_path, make, teacher):
    """The second rank has no image of an epoch's last batch."""
    recipe = [*DISTILLED, f"train.distill={{teacher: {teacher}, kind: token}}", "train.freeze=[blocks.0, pos_embed]"]
    recipe += ["train.precision=float16", "train.epochs=2", "train.log_every_steps=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkout = Path(__file__).parent.parent
    result = subprocess.run([*launch, *on_disk, *recipe], env=environment, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert main([*on_disk, *recipe, f"run_dir={tmp_path / 'alone'}"]) == 0
    shared, alone = ([record["loss"] for record in _records(tmp_path / name, "step")] for name in ("run", "alone"))
    assert len(shared) == len(alone) == 6 and shared[:3] == pytest.approx(alone[:3], rel=2e-3)
    state = torch.load(tmp_path / "run/checkpoints/step-000000006/state.pt", weights_only=True)
    assert set(state["scaler"]) == {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    untouched, moved = _state(make(*recipe).model), state["model"]
    still = {name for name in moved if torch.equal(moved[name], untouched[name])}
    assert still == {name for name in moved if name.startswith("blocks.0.")} | {"pos_embed"}


def test_a_run_goes_on_from_the_inputs_that_it_was_begun_with(on_disk, tmp_path, teacher, capsys):
    recipe = [f"train.distill={{teacher: {teacher}, kind: soft}}", "train.epochs=2"]
    assert main([*on_disk, *recipe]) == 0
    weights = tmp_path / "teacher.safetensors"
    taught = load_file(weights)
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"completed"', '"stopped"'))
    save_file({name: tensor + 1 for name, tensor in taught.items()}, weights)
    assert main([*on_disk, *recipe]) == 2
    assert f"was begun with other {weights}, of digest " in capsys.readouterr().err
    save_file(taught, weights)
    assert main([*on_disk, *recipe]) == 0


def test_a_run_goes_on_without_the_weights_that_it_was_begun_with(on_disk, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict(), plain)
    recipe = [*on_disk, f"model.weights={plain}", "train.epochs=2"]
    assert main(recipe) == 0
    expected = load_file(tmp_path / "run/model.safetensors")
    record = tmp_path / "run/run.json"
    first = json.loads(record.read_text())
    shutil.rmtree(tmp_path / "run/checkpoints/step-000000006")
    record.write_text(json.dumps({**first, "status": "stopped"}))
    plain.unlink()
    assert main(recipe) == 0
    found = load_file(tmp_path / "run/model.safetensors")
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    starts = json.loads(record.read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3] and starts[0] == first["starts"][0]
    assert all(start["versions"] == first["versions"] for start in starts)
    assert main([*recipe, f"run_dir={tmp_path / 'new'}"]) == 2  # which would begin with them


def test_more_pieces_than_images_are_refused(make):
    assert make("train.accumulation_steps=8")
    with pytest.raises(ConfigError, match="accumulation_steps 8 would cut a rank's 4 images into more pieces"):
        make("train.accumulation_steps=8", ranks=Ranks(0, 2))


def test_a_run_says_what_it_starts_from_and_keeps_the_checksums(on_disk, tmp_path, teacher, capsys):
    plain = timm.create_model("vit_tiny_patch16_224", **SIZES)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    start = [f"model.weights={tmp_path / 'plain.safetensors'}", f"train.distill={{teacher: {teacher}, kind: soft}}"]
    assert main([*on_disk, *start, "train.epochs=1", "train.optimizer.lr=1e-9"]) == 0
    told = capsys.readouterr().err
    by_number = "its 3 classes, whose names are not known, go by number"
    assert f"starts from {tmp_path / 'plain.safetensors'}; {by_number}; left out: blocks.1.attn.qkv." in told
    assert f"train.distill.teacher: {by_number}." in told
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    files = [str(tmp_path / "plain.safetensors"), str(tmp_path / "teacher.safetensors")]
    assert list(inputs) == ["training images", "validation images", *files]
    assert all(len(digest) == 64 for digest in inputs.values()) and len(set(inputs.values())) == 4
    state = torch.load(tmp_path / "run/checkpoints/step-000000003/state.pt", weights_only=True)
    torch.testing.assert_close(state["model"]["head.weight"], plain.head.weight.detach(), rtol=0, atol=1e-6)


def test_workers_are_forked_when_a_collective_has_come_to_its_end(make, monkeypatch):
    events = []
    monkeypatch.setattr(Ranks, "settle", lambda ranks: events.append(f"settled with {ranks.world_size}"))
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: events.append("forked") or iter(()))
    assert [*make(ranks=Ranks(0, 2)).remaining_batches()] == []
    with pytest.raises(ValueError, match="an image"):
        evaluate(torch.nn.Flatten(), Share([], transform=torch.tensor))
    assert events == ["settled with 2", "forked", "settled with 1", "forked"]
    monkeypatch.undo()
    start = time.monotonic()
    Ranks(0, 2).settle()
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize("mixing", ["mixup: 0.8, cutmix: 0", "mixup: 0, cutmix: 1.0", "mixup: 0.5, cutmix: 0.5"])
def test_groups_are_mixed_alike_on_any_number_of_ranks(make, mixing):
    """Rank r of W has every W-th image of the global batch, and its images and targets are those of one process."""
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    settings = ["train.global_batch_size=16", f"train.mixup={{{mixing}, groups: 4}}"]
    whole, targets = make(*settings)._mixed(images.clone(), labels)
    for world_size in (2, 4):
        for rank in range(world_size):
            trainer = make(*settings, ranks=Ranks(rank, world_size))
            own, own_targets = trainer._mixed(images[rank::world_size].clone(), labels[rank::world_size])
            assert torch.equal(own, whole[rank::world_size]) and torch.equal(own_targets, targets[rank::world_size])
    assert not torch.equal(whole, images) and len({tuple(row) for row in targets.tolist()}) > 4
    before = torch.get_rng_state(), np.random.get_state()[1]
    make(*settings)._mixed(images.clone(), labels)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("groups", [3, 1, 8])
def test_groups_are_a_multiple_of_the_ranks_and_each_pairs_its_images(make, groups):
    with pytest.raises(ConfigError, match=f"train.mixup.groups {groups} must be a multiple of the 2 ranks"):
        make("train.global_batch_size=8", f"train.mixup={{groups: {groups}}}", ranks=Ranks(0, 2))


def test_a_rate_that_moves_behind_each_epoch_stays_through_one(make):
    trainer = make("train.schedule={warmup_epochs: 2, warmup_lr: 1e-5, every: epoch}", "train.epochs=4")
    steps = trainer.batches.steps_per_epoch
    rates = []
    while len(rates) < trainer.num_steps:
        rates += [trainer.train_step(batch, stop=False).lr for batch in trainer.remaining_batches()]
    by_epoch = [{*rates[first : first + steps]} for first in range(0, len(rates), steps)]
    peak = trainer.config.train.optimizer.lr
    assert steps > 1 and [len(found) for found in by_epoch] == [1] * 4
    assert [*by_epoch[0], *by_epoch[1], *by_epoch[2]] == pytest.approx([1e-5, 1e-5, (1e-5 + peak) / 2])


# ---- compiled


@pytest.fixture
def compiled(monkeypatch):
    """Compiles by Dynamo alone, which is quick, and counts the graphs that it makes."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("more", [[], ["train.accumulation_steps=3"]])
def test_the_smaller_last_batch_is_not_compiled_anew(make, compiled, more):
    losses = _steps(make(*more), 6)  # batches of 8, 8 and 1
    assert compiled() == 0
    trainer = make("train.compile=true", *more)
    assert _steps(trainer, 1) == pytest.approx(losses[:1], rel=1e-5)
    num_graphs = compiled()
    assert num_graphs > 0
    assert _steps(trainer, 5) == pytest.approx(losses[1:], rel=1e-4)
    assert compiled() == num_graphs


def test_a_teacher_is_compiled_with_its_student(make, compiled, teacher):
    distill = f"train.distill={{teacher: {teacher}, kind: soft}}"
    losses = _steps(make(distill), 4)
    trainer = make(distill, "train.compile=true")
    assert _steps(trainer, 4) == pytest.approx(losses, rel=1e-4)
    assert trainer.objective.teacher.model._compiled_call_impl is not None and compiled() == 2


def test_batch_statistics_are_of_images_alone(make, compiled, tmp_path):
    """A model with batch normalisation is compiled anew rather than shown images that are none."""
    other = CONFIG.replace("vit_reuse_tiny_patch16_224", "resnet10t").replace("  plan: exact reuse\n", "")
    (tmp_path / "x.yaml").write_text(other.replace(SMALL, "num_classes: 3, in_chans: 1"))
    losses = _steps(make("train.optimizer.lr=1e-4"), 3)
    assert _steps(make("train.optimizer.lr=1e-4", "train.compile=true"), 3) == pytest.approx(losses, rel=1e-3)


def test_a_convolutional_teacher_lies_pixel_by_pixel(make, tmp_path):
    torch.manual_seed(2)
    save_file(timm.create_model("resnet10t", num_classes=3, in_chans=1).state_dict(), tmp_path / "teacher.safetensors")
    teacher = f"{{name: resnet10t, weights: {tmp_path / 'teacher.safetensors'}}}"
    trainer = make(f"train.distill={{kind: hard, teacher: {teacher}}}")
    seen = []
    trainer.objective.teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _steps(trainer, 1)
    kernels = [weight for weight in trainer.objective.teacher.model.parameters() if weight.ndim == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
