"""A recipe's loss, optimizer and learning rates, which timm makes, and the parameters that it leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vitreuse.config import Config, ConfigError, OptimizerConfig, ScheduleConfig
from vitreuse.io.errors import nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters out of training: those that a pattern matches, or whose module it matches.

    Raises:
        ConfigError: A pattern matches nothing, or together they leave nothing to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        frozen = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not frozen:
            known = [name for name, _ in model.named_modules() if name]
            hint = nearest(pattern, [*known, *parameters]) or "; a name of model.named_parameters() or * in it would."
            raise ConfigError(f"train.freeze {pattern!r} matches no parameter of the model{hint}")
        for name in frozen:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze {', '.join(patterns)} leaves no parameter to train: freeze fewer.")


def create_criterion(config: Config) -> nn.Module:
    """The mean loss of a batch; under mixup the targets come smoothed already."""
    settings = config.train.loss
    smoothing = 0.0 if config.train.mixup is not None else settings.smoothing
    if settings.name == "bce":
        return BinaryCrossEntropy(smoothing, settings.target_threshold)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)  # equals timm's LabelSmoothing- and SoftTargetCrossEntropy


def create_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of the parameters that are not frozen.

    Raises:
        ConfigError: timm does not know its name, cannot make it here, or would pass a keyword over in silence; or it
            cannot take a step.
    """
    settings = config.train.optimizer
    _check_optimizer(settings)
    device, named = next(model.parameters()).device, f"train.optimizer {settings.name!r}"
    try:
        optimizer = _optimizer(settings, model)
    except Exception as error:  # whatever a keyword leads to
        raise ConfigError(f"{named} cannot be made: {_reason(error)}.") from error
    try:
        _take_a_step(settings, device)
    except Exception as error:
        failed = f"{named} cannot take a step on {device.type} ({_reason(error)})"
        raise ConfigError(f"{failed}: change its keywords, or choose another.") from error
    return optimizer


def _optimizer(settings: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        model, settings.name, settings.lr, settings.weight_decay, layer_decay=settings.layer_decay, **settings.keywords
    )


def _take_a_step(settings: OptimizerConfig, device: torch.device) -> None:
    """Moves a layer of its own: an optimizer may be made and be unable to, as with betas of text."""
    layer = nn.Linear(2, 2, device="meta").to_empty(device=device)  # no random numbers are drawn for it
    for parameter in layer.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    _optimizer(replace(settings, layer_decay=None), layer).step()


def _reason(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]).rstrip(".") or type(error).__name__


def _check_optimizer(settings: OptimizerConfig) -> None:
    known = [str(name) for name in list_optimizers()]
    if settings.name not in known:
        hint = nearest(settings.name, known) or "; timm.optim.list_optimizers() has the names."
        raise ConfigError(f"train.optimizer.name {settings.name!r} is not an optimizer of timm{hint}")
    info = get_optimizer_info(settings.name)
    for keyword, has_effect in {"eps": info.has_eps, "betas": info.has_betas, "momentum": info.has_momentum}.items():
        if keyword in settings.keywords and not has_effect:
            raise ConfigError(f"train.optimizer.keywords.{keyword} has no effect on {settings.name}: leave it out.")


def create_scheduler(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule of the learning rate, in optimizer steps.

    Raises:
        ConfigError: The warm-up is as long as the run, or timm refuses so few steps.
    """
    settings, num_steps = config.train.schedule, config.train.epochs * steps_per_epoch
    warmup = settings.warmup_steps or settings.warmup_epochs * steps_per_epoch
    if settings.warmup_steps >= num_steps:
        nothing = f"train.schedule.warmup_steps {settings.warmup_steps} leaves nothing of {num_steps} steps"
        raise ConfigError(f"{nothing}: make it smaller, or train for longer.")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.name,
            # an epoch of one update: every number is one of steps
            num_epochs=num_steps - round(warmup) if settings.warmup_prefix else num_steps,
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=warmup,  # pyright: ignore[reportArgumentType] (any number will do)
            warmup_prefix=settings.warmup_prefix,
            warmup_lr=settings.warmup_lr,
            min_lr=settings.min_lr,
            decay_rate=1.0,  # the power of poly: timm's default of 0.1 ends far above min_lr
        )
    except (ValueError, AssertionError) as error:
        few = f"train.schedule.name {settings.name!r} cannot be of {num_steps} steps ({str(error).rstrip('.')})"
        raise ConfigError(f"{few}: train for longer, or choose another.") from error
    assert scheduler is not None  # only for the name 'none', which the schema does not have
    return scheduler


def step_of_rate(settings: ScheduleConfig, step: int, steps_per_epoch: int) -> int:
    """The step whose rate a step has: its own, or under every: epoch the first one of the epoch before.

    DeiT's scripts call timm's scheduler behind each epoch with that epoch's number, so that the first two have the rate
    that a warm-up begins with.
    """
    return step if settings.every == "step" else max(0, step // steps_per_epoch - 1) * steps_per_epoch


def has_batch_norm(model: nn.Module) -> bool:
    """Whether what a model says of an image in training depends on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
