"""How weights move: the sections of a recipe on the optimizer, its rate, the loss, clipping and the moving average."""

from dataclasses import dataclass

from vitreuse.config.strict_yaml import setting
from vitreuse.io.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, as timm.optim.create_optimizer_v2 makes it."""

    name: str = setting("a name of timm.optim.list_optimizers()", "adamw")
    lr: float = setting("peak learning rate at the global batch size, not rescaled", above=0, maximum=1e30)
    weight_decay: float = setting("decoupled for adamw; biases, norms, embeddings exempt", 0.05, minimum=0, maximum=1e6)
    layer_decay: float | None = setting("factor on the rate per layer below the head", None, above=0, maximum=1)
    keywords: dict = setting("further keywords of the optimizer, such as betas, eps or momentum")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over optimizer steps, as timm.scheduler.create_scheduler_v2 makes it."""

    name: str = setting("shape after the warm-up", "cosine", choices=("cosine", "tanh", "poly", "wsd", "constant"))
    warmup_epochs: float = setting("linear warm-up, part of the epochs", 0.0, minimum=0)
    warmup_steps: int = setting("the same in optimizer steps", 0, minimum=0)
    warmup_lr: float = setting("learning rate of the first step when there is a warm-up", 1e-6, minimum=0, maximum=1e30)
    warmup_prefix: bool = setting("the shape begins after the warm-up, and not below it", False)
    min_lr: float = setting("learning rate at the end", 0.0, minimum=0, maximum=1e30)
    every: str = setting(
        "how often the rate moves: at each step; or after each epoch to where it stood before that epoch, as in the "
        "scripts of DeiT and DeiT III",
        "step",
        choices=("step", "epoch"),
    )

    def __post_init__(self):
        if self.warmup_prefix and self.name in ("wsd", "constant"):
            raise ConfigError(f"warmup_prefix has no effect on the schedule {self.name!r}: leave it out.")
        if self.warmup_prefix and not (self.warmup_epochs or self.warmup_steps):
            raise ConfigError("warmup_prefix has no effect without a warm-up: set warmup_epochs or warmup_steps.")
        if self.warmup_epochs and self.warmup_steps:
            raise ConfigError("warmup_epochs and warmup_steps: give at most one of the two, the other 0.")
        if not (self.warmup_epochs or self.warmup_steps) and self.warmup_lr != ScheduleConfig.warmup_lr:
            way_out = "set warmup_epochs or warmup_steps, or leave it out"
            raise ConfigError(f"warmup_lr {self.warmup_lr:g} has no effect without a warm-up: {way_out}.")
        if self.name == "constant" and self.min_lr:
            raise ConfigError(
                f"min_lr {self.min_lr:g} is never reached by the schedule 'constant': set it to 0, or choose another."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss, one of timm.loss; its targets are soft under mixup."""

    name: str = setting("softmax cross-entropy, or a binary one per class", "ce", choices=("ce", "bce"))
    smoothing: float = setting("label smoothing", 0.0, minimum=0, maximum=0.999)
    target_threshold: float | None = setting(
        "under bce, a class with more than this share of a mixed image is its target in full; null for the share",
        None,
        minimum=0,
        maximum=0.999,
    )

    def __post_init__(self):
        if self.target_threshold is None:
            return
        if self.name != "bce":
            raise ConfigError(
                f"target_threshold {self.target_threshold:g} has no effect on the loss {self.name!r}: leave it out."
            )
        if self.smoothing:
            raise ConfigError("target_threshold undoes smoothing: leave one of the two out.")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Clipping of gradients by timm.utils.dispatch_clip_grad."""

    mode: str = setting(
        "total norm, each value, or adaptive by the size of the weights", "norm", choices=("norm", "value", "agc")
    )
    limit: float = setting("largest norm, value, or ratio to the weights", 1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A moving average of the weights by timm.utils.ModelEmaV3, which is the model that a run leaves."""

    decay: float = setting("share of the average that one step keeps", above=0, maximum=0.999999)
    warmup: bool = setting("start with a smaller decay, (1 + step)^(-2/3) away from 1", False)
