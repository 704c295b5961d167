"""The objective of an experiment: the loss of each step, and the facts to record before the first one and at the end.

It is one of three: the recipe's criterion alone, distillation, or healing. Everything else about training is the same
under all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eval.precision import computed_in
from train.distill import Teacher, create_teacher, distillation_loss, features_loss
from train.findings import Findings, Look
from train.heal import create_healing, outputs_loss, plan_share
from train.recipe import create_criterion
from vitreuse.compress.recording import recorded_attention
from vitreuse.config import Config, DistillConfig, HealConfig
from vitreuse.model.checkpoint import HEADS


class Facts(NamedTuple):
    """What an objective adds to a run's records, and the sentence that says it."""

    values: Mapping[str, float | None]
    sentence: str


NOTHING = Facts({}, "")


def first(said: Any, number: int) -> Any:
    """What is said of so many of the first images, by one head or two."""
    return tuple(logits[:number] for logits in said) if isinstance(said, tuple) else said[:number]


class Objective(nn.Module):
    """The loss by the recipe's criterion alone; a module around the model, of which each rank has a replica."""

    record_kind: str | None = None  # of the record with facts_before, if there is one
    feature_teacher: Teacher | None = None  # whose features the model is measured by, where no label is read

    def __init__(self, config: Config, model: Any):
        super().__init__()
        self.model: Any = model
        self.criterion = create_criterion(config)
        self.constants: dict[str, nn.Module] = {}  # networks that the loss reads and nobody trains, by name
        self.precision = getattr(torch, config.train.precision)

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """The mean loss of images (B, channels, rows, columns), in the step that comes after ``step`` others.

        Images beyond the number of targets only fill a batch up.
        """
        with self.autocast(images):
            logits = first(self.model(images), len(targets))
        return self.criterion(logits.float(), targets)

    def autocast(self, images: Tensor) -> torch.autocast:
        """The recipe's precision, for forward passes alone."""
        return computed_in(self.precision, images.device)

    def facts_before(self, model: nn.Module, look: Look) -> Facts:
        """What is recorded before the first step of the model that the run would leave; ``look`` measures a network."""
        return NOTHING

    def facts_after(self, before: Mapping[str, Any] | None, found: Findings) -> Facts:
        """What is recorded at the end, by the record of facts_before and what is found of the model that is left."""
        return NOTHING


class DistillationObjective(Objective):
    """The criterion mixed with the loss against a teacher; of a model's two heads the last learns from the teacher."""

    teacher: Teacher

    def __init__(self, config: Config, model: Any, settings: DistillConfig, teacher: Teacher):
        super().__init__(config, model)
        self.settings, self.asks_tokens = settings, settings.kind == "features"
        # past nn.Module, which would register it: nobody trains, saves or replicates it
        vars(self).update(teacher=teacher, feature_teacher=teacher if self.asks_tokens else None)
        self.constants = {"teacher": teacher.model}

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        with self.autocast(images):
            said = self.model.forward_features(images) if self.asks_tokens else self.model(images)
            answers = self.answers(images)
        return self.mixed_loss(first(said, len(targets)), first(answers, len(targets)), targets)

    def answers(self, images: Tensor) -> Tensor:
        """What the teacher says of images: logits, or all tokens."""
        return self.teacher.tokens(images) if self.asks_tokens else self.teacher(images)

    def mixed_loss(self, logits: Any, answers: Tensor, targets: Tensor) -> Tensor:
        """The loss of what the model and the teacher say; a model with a distillation token says two things."""
        if self.asks_tokens:
            return features_loss(self.model, logits, self.teacher.model, answers)
        heads, alpha = logits if isinstance(logits, tuple) else (logits,), self.settings.alpha
        taught = distillation_loss(heads[-1].float(), answers.float(), self.settings)
        return (1 - alpha) * self.criterion(heads[0].float(), targets) + alpha * taught


class HealingObjective(DistillationObjective):
    """Distillation of a converted model from its original; layers may be compared too, and the plan annealed in."""

    record_kind = "heal"

    def __init__(
        self, config: Config, model: Any, settings: DistillConfig, teacher: Teacher, heal: HealConfig, epoch_steps: int
    ):
        super().__init__(config, model, settings, teacher)
        self.weight, self.num_annealed_steps = heal.outputs, round(heal.anneal_epochs * epoch_steps)
        self.healing = create_healing(heal, model, teacher.model, self.asks_tokens)

    def forward(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        if self.healing is None:
            return super().forward(images, targets, step)
        watched = recorded_attention(self.teacher.model) if self.weight else nullcontext({})
        with self.autocast(images), watched as calls:
            said, outputs = self.healing(images, plan_share(step, self.num_annealed_steps))
            answers = self.answers(images)
        loss = self.mixed_loss(said, answers, targets)
        if not self.weight:
            return loss
        return loss + self.weight * outputs_loss(outputs, {layer: call.output for layer, call in calls.items()})

    def facts_before(self, model: nn.Module, look: Look) -> Facts:
        own = look(model)
        teacher = 1.0 if self.asks_tokens else look(self.teacher).score  # whose features are its own
        sentence = f"the teacher {own.form.format(teacher)}, before healing {own.text}"
        return Facts({f"teacher_{own.name}": teacher, f"before_{own.name}": own.score}, sentence)

    def facts_after(self, before: Mapping[str, Any] | None, found: Findings) -> Facts:
        """The share of what was lost that is regained; of a model that had lost nothing none is known."""
        if before is None:
            return NOTHING
        teacher, own = (before[f"{when}_{found.name}"] for when in ("teacher", "before"))
        share = 100 * (found.score - own) / (teacher - own) if teacher > own else None
        scores = f"the teacher {found.form.format(teacher)}, before healing {found.form.format(own)}"
        values = {f"teacher_{found.name}": teacher, f"before_{found.name}": own, "regained_percent": share}
        return Facts(values, f"{scores}, after it {found.text}: {regained(share)}.")


def regained(share: float | None) -> str:
    """What healing did, by the percentage of what was lost that it regained: negative where it lost more."""
    if share is None:
        return "nothing had been lost"
    if share < 0:
        return f"{-share:.0f} % of what was lost is lost besides: lower train.optimizer.lr, or heal on more images"
    return f"{share:.0f} % of what was lost is regained"


def create_objective(
    config: Config, model: Any, settings: dict[str, Any], class_names: Sequence[str], steps_per_epoch: int
) -> Objective:
    """The objective of an experiment, which may take parameters out of training, by the model's image_settings.

    Raises:
        ConfigError: As create_teacher and create_healing.
    """
    distill, heal = config.train.distill, config.train.heal
    if distill is None:
        return Objective(config, model)
    teacher = create_teacher(distill, model, settings, class_names)
    if config.train.compile:
        teacher.model.compile()
    if not config.train.reads_labels:
        for name, parameter in model.named_parameters():  # no gradient reaches a head
            parameter.requires_grad_(parameter.requires_grad and not name.startswith(HEADS))
    if heal is None:
        return DistillationObjective(config, model, distill, teacher)
    return HealingObjective(config, model, distill, teacher, heal, steps_per_epoch)
