"""The objective of an experiment: the loss of each step, and the facts to record before the first one and at the end.

It is one of three: the recipe's criterion alone, distillation, or healing. Everything else about training is the same
under all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.distill import Teacher, create_teacher, distillation_loss
from train.heal import create_healing, outputs_loss, plan_share
from train.recipe import create_criterion
from vitreuse.config import Config, DistillConfig, HealConfig
from vitreuse.model.recording import recorded_attention


class Facts(NamedTuple):
    """What an objective adds to a run's records, and the sentence that says it."""

    values: Mapping[str, float | None]
    sentence: str


NOTHING = Facts({}, "")


class Objective(nn.Module):
    """The recipe's criterion of a model that is trained; as a module, it is what ranks have replicas of."""

    record_kind: str | None = None  # of the record with facts_before, if there is one

    def __init__(self, config: Config, model: nn.Module):
        super().__init__()
        self.model, self.criterion = model, create_criterion(config)
        self.constants: dict[str, nn.Module] = {}  # networks that are read beside the model, by what they are
        self.precision = getattr(torch, config.train.precision)

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """The mean loss of images (B, channels, rows, columns) in a step that comes after so many."""
        with self.autocast(images):
            logits = self.model(images)
        return self.criterion(logits.float(), targets)

    def autocast(self, images: Tensor) -> torch.autocast:
        """The recipe's precision, for forward passes alone."""
        return torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32)

    def facts_before(self, model: nn.Module, top1: Callable[[nn.Module], float]) -> Facts:
        """What is known before the first step, by the top-1 of networks such as the model that the run would leave."""
        return NOTHING

    def facts_after(self, before: Mapping[str, Any] | None, top1: float) -> Facts:
        """What is known at the end, by the record of facts_before and the top-1 of the model that the run leaves."""
        return NOTHING


class DistillationObjective(Objective):
    """The criterion mixed with the loss against a teacher, from which the last head of a model of two learns."""

    def __init__(self, config: Config, model: nn.Module, settings: DistillConfig, teacher: Teacher):
        super().__init__(config, model)
        self.settings, self.teacher = settings, teacher  # which is no module: nobody trains, saves or replicates it
        self.constants = {"teacher": teacher.model}

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        with self.autocast(images):
            logits, answers = self.model(images), self.teacher(images)
        return self.mixed_loss(logits, answers, targets)

    def mixed_loss(self, logits: Any, answers: Tensor, targets: Tensor) -> Tensor:
        """The loss of what the model and the teacher say; a model with a distillation token says two things."""
        heads, alpha = logits if isinstance(logits, tuple) else (logits,), self.settings.alpha
        taught = distillation_loss(heads[-1].float(), answers.float(), self.settings)
        return (1 - alpha) * self.criterion(heads[0].float(), targets) + alpha * taught


class HealingObjective(DistillationObjective):
    """Distillation of a converted model from its original, whose layers it may be compared with and go over from."""

    record_kind = "heal"

    def __init__(
        self, config: Config, model: Any, settings: DistillConfig, teacher: Teacher, heal: HealConfig, epoch_steps: int
    ):
        super().__init__(config, model, settings, teacher)
        self.weight, self.num_annealed_steps = heal.outputs, round(heal.anneal_epochs * epoch_steps)
        self.healing = create_healing(heal, model, teacher.model)

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        if self.healing is None:
            return super().forward(images, targets, step)
        with self.autocast(images), recorded_attention(self.teacher.model) as calls:
            logits, outputs = self.healing(images, plan_share(step, self.num_annealed_steps))
            answers = self.teacher(images)
        loss = self.mixed_loss(logits, answers, targets)
        if not self.weight:
            return loss
        return loss + self.weight * outputs_loss(outputs, {layer: call.output for layer, call in calls.items()})

    def facts_before(self, model: nn.Module, top1: Callable[[nn.Module], float]) -> Facts:
        own, teacher = top1(model), top1(self.teacher.model)
        sentence = f"top-1 {teacher:.2f} % of the teacher, {own:.2f} % before healing"
        return Facts({"teacher_top1": teacher, "before_top1": own}, sentence)

    def facts_after(self, before: Mapping[str, Any] | None, top1: float) -> Facts:
        """The share of what was lost that is regained; of a model that had lost nothing none is known."""
        if before is None:
            return NOTHING
        teacher, own = before["teacher_top1"], before["before_top1"]
        share = 100 * (top1 - own) / (teacher - own) if teacher > own else None
        regained = "nothing had been lost" if share is None else f"{share:.0f} % of what was lost is regained"
        tops = f"{teacher:.2f} % of the teacher, {own:.2f} % before healing, {top1:.2f} % after"
        values = {"teacher_top1": teacher, "before_top1": own, "regained_percent": share}
        return Facts(values, f"top-1 {tops}: {regained}.")


def create_objective(
    config: Config, model: Any, settings: dict[str, Any], class_names: Sequence[str], steps_per_epoch: int
) -> Objective:
    """The objective of an experiment, which may take parameters out of training; settings are the model's of images.

    Raises:
        ConfigError: As create_teacher and create_healing.
    """
    distill, heal = config.train.distill, config.train.heal
    if distill is None:
        return Objective(config, model)
    teacher = create_teacher(distill, model, settings, class_names)
    if heal is None:
        return DistillationObjective(config, model, distill, teacher)
    return HealingObjective(config, model, distill, teacher, heal, steps_per_epoch)
