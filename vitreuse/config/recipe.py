"""How a network is trained: the recipe of an experiment, a dataclass for each of its sections."""

from dataclasses import dataclass

from vitreuse.config.augmentation import AffineConfig, CropConfig, MixupConfig, ResolutionConfig
from vitreuse.config.network import ModelConfig
from vitreuse.config.optimization import ClipConfig, EmaConfig, LossConfig, OptimizerConfig, ScheduleConfig
from vitreuse.config.strict_yaml import setting
from vitreuse.io.errors import ConfigError
from vitreuse.io.urls import refuse_url

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")  # in which models are trained and run


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A trained model that teaches: it sees the images that the model sees, and the loss holds its answers too."""

    teacher: ModelConfig = setting("which network teaches, weights included; its classes are the model's")
    kind: str = setting(
        "soft: its probabilities; hard: its most probable class; token: that class, by the distillation token's head; "
        "features: its class token and patch tokens at the output, by their cosines, so that no label is read",
        choices=("soft", "hard", "token", "features"),
    )
    alpha: float = setting("share of the teacher's part in the loss", 0.5, above=0, maximum=1)
    temperature: float = setting("divides the logits of both under kind soft", 3.0, above=0)

    def __post_init__(self):
        if self.teacher.weights is None and not self.teacher.is_folder:
            raise ConfigError(
                "teacher.weights is missing: an untrained teacher has nothing to teach, give a file, a folder or a "
                "name of timm.list_pretrained()."
            )
        if self.kind == "features" and self.alpha != DistillConfig.alpha:
            raise ConfigError(f"alpha {self.alpha:g} has no effect under kind 'features': leave it out.")
        if self.kind != "soft" and self.temperature != DistillConfig.temperature:
            raise ConfigError(f"temperature {self.temperature:g} has no effect under kind {self.kind!r}: leave it out.")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How a converted model wins back accuracy from its original, the teacher of train.distill."""

    parameters: str = setting(
        "what is trained. new: token projections and linear layers; touched: those, attention that is not exact and "
        "MLPs of other hidden units; all",
        "all",
        choices=("new", "touched", "all"),
    )
    outputs: float = setting(
        "weight in the loss of the squared error of each layer's attention output, over the teacher's mean square; "
        "0 is off",
        0.0,
        minimum=0,
    )
    anneal_epochs: float = setting(
        "epochs, or a part of one, over which the plan's attention, MLPs and layers take the place of the original's; "
        "0 is at once",
        0.0,
        minimum=0,
    )

    @property
    def compares_layers(self) -> bool:
        """Whether layers are trained against, or together with, those of the original."""
        return bool(self.outputs or self.anneal_epochs)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved, and how much of it stays."""

    every_epochs: int = setting("save at the end of each so many epochs", 1, above=0, changes_run=False)
    every_steps: int | None = setting("save after each so many steps besides", None, above=0, changes_run=False)
    keep_last: int = setting("newest checkpoints that stay, beside the best one", 2, above=0, changes_run=False)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps that torch.profiler traces on the main rank, into trace.json of the run folder."""

    first_step: int = setting("the first of them, counted from 1", above=0, changes_run=False)
    num_steps: int = setting("how many", 5, above=0, changes_run=False)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """A curve that the loss should follow: training says in one line when it is too far above it, and goes on."""

    curve: str = setting(
        "a CSV with the columns epoch and loss, or the metrics.jsonl of another run", changes_run=False, is_path=True
    )
    tolerance_percent: float = setting("how far above the curve the mean loss may be", 10.0, above=0, changes_run=False)
    num_records: int = setting("newest step records that the mean is taken over", 20, above=0, changes_run=False)

    def __post_init__(self):
        refuse_url("curve", self.curve)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe of a training, all its sections together."""

    seed: int = setting("of the weights, the order and every augmentation", 0, minimum=0, maximum=2**64 - 1)
    epochs: int = setting("passes over the training set", above=0, maximum=1_000_000)
    global_batch_size: int = setting("images per optimizer step, over all ranks", above=0)
    accumulation_steps: int = setting(
        "pieces in which a rank computes its share of a step", 1, above=0, changes_run=False
    )
    repeats: int = setting("repeated augmentation: copies of an image in a batch, fewer images an epoch", 1, above=0)
    device: str = setting("auto takes cuda where there is one", "auto", choices=DEVICES, changes_run=False)
    strategy: str = setting(
        "several ranks: ddp keeps the whole model on each; fsdp2 shares out weights, optimizer and moving average",
        "ddp",
        choices=("ddp", "fsdp2"),
        changes_run=False,
    )
    time_out_minutes: float = setting(
        "how long a rank waits for the others before the run ends; each then tells on standard error where it stands",
        30.0,
        above=0,
        changes_run=False,
    )
    num_threads: int | None = setting(
        "CPU threads per rank; null leaves torch's own number", None, above=0, maximum=1024, changes_run=False
    )
    precision: str = setting(
        "bfloat16 and float16 are mixed: weights stay float32; float16 scales the loss", "float32", choices=DTYPES
    )
    tf32: bool = setting("float32 products and convolutions of CUDA in TF32, with 10 bits of mantissa", False)
    cudnn_benchmark: bool = setting("cuDNN times its convolutions and takes the fastest, which may differ", False)
    compile: bool = setting("torch.compile the model", False)
    grad_checkpointing: bool = setting(
        "recompute activations in the backward pass to save memory", False, changes_run=False
    )
    optimizer: OptimizerConfig = setting("optimizer")
    schedule: ScheduleConfig = setting("learning rate over the run")
    loss: LossConfig = setting("loss")
    crop: CropConfig | None = setting("augmentation of photographs", None)
    augment_on: str | None = setting(
        "where flips and colours of train.crop are carried out, by the same draws; null: on the device if it is a GPU",
        None,
        choices=("device", "workers"),
    )
    affine: AffineConfig | None = setting("augmentation of small centred pictures", None)
    resolution: ResolutionConfig | None = setting("progressive resolution", None)
    mixup: MixupConfig | None = setting("mixing of image pairs", None)
    distill: DistillConfig | None = setting("learning from a trained model", None)
    heal: HealConfig | None = setting("winning back what a conversion cost", None)
    freeze: tuple[str, ...] = setting("parameters or modules that stay as they are, by name; * stands for any text", ())
    ema: EmaConfig | None = setting("moving average of the weights", None)
    clip: ClipConfig | None = setting("gradient clipping", None)
    checkpoint: CheckpointConfig = setting("checkpoints")
    max_skipped_steps: int = setting(
        "steps in a row without a finite loss and gradient before giving up", 5, above=0, changes_run=False
    )
    log_every_steps: int = setting("steps between two step records in metrics.jsonl", 10, above=0, changes_run=False)
    ledger: bool = setting("write the sample keys of every step to ledger.jsonl", False, changes_run=False)
    profile: ProfileConfig | None = setting("a trace of some steps", None, changes_run=False)
    reference: ReferenceConfig | None = setting("a curve that the loss should follow", None, changes_run=False)
    loggers: tuple[str, ...] = setting(
        "what shows the records beside metrics.jsonl", (), choices=("tensorboard", "wandb"), changes_run=False
    )

    def __post_init__(self):
        if self.crop is not None and self.affine is not None:
            raise ConfigError("crop and affine: give at most one of the two, the other null.")
        if self.augment_on is not None and self.crop is None:
            raise ConfigError(f"augment_on {self.augment_on!r} has no effect without train.crop: leave it out.")
        self._check_rates()
        warmup = self.schedule.warmup_epochs
        self._check_share(warmup, f"schedule.warmup_epochs {warmup:g} leaves nothing of {self.epochs} epochs")
        if self.resolution is not None:
            epochs, rest = self.resolution.epochs, f"none of {self.epochs} epochs at the model's own size"
            self._check_share(epochs, f"resolution.epochs {epochs} leaves {rest}")
        if self.distill is not None and self.distill.alpha == 1 and self.loss != LossConfig():
            raise ConfigError(
                "loss has no effect under distill.alpha 1, which is the teacher's part alone: leave it out."
            )
        if self.loss.target_threshold is not None and self.mixup is None:
            raise ConfigError(
                f"loss.target_threshold {self.loss.target_threshold:g} has no effect without train.mixup: leave it out."
            )
        if self.heal is not None:
            self._check_heal(self.heal)
        if not self.reads_labels:
            self._check_without_labels()
        if self.accumulation_steps > self.global_batch_size:
            raise ConfigError(
                f"accumulation_steps {self.accumulation_steps} is more than the batch of {self.global_batch_size}."
            )

    @property
    def reads_labels(self) -> bool:
        """Whether training and its evaluation read labels."""
        return self.distill is None or self.distill.kind != "features"

    def _check_without_labels(self) -> None:
        excluded = {
            "mixup": self.mixup is not None,
            "loss": self.loss != LossConfig(),
            "resolution": self.resolution is not None,
            "compile": self.compile,
            "strategy: fsdp2": self.strategy == "fsdp2",
        }
        for setting_name in (name for name, is_on in excluded.items() if is_on):
            raise ConfigError(
                f"distill.kind 'features' compares the tokens of two models at one size, by no label, and excludes "
                f"{setting_name}: leave that out, or choose another kind."
            )

    def _check_rates(self) -> None:
        """Refuses a rate that would rise over the run, or fall in the warm-up, as that of a recipe under another lr."""
        schedule, lr = self.schedule, self.optimizer.lr
        given = {"min_lr": schedule.min_lr}
        if schedule.warmup_epochs or schedule.warmup_steps:
            given["warmup_lr"] = schedule.warmup_lr
        for name, rate in given.items():
            if rate > lr:
                raise ConfigError(
                    f"schedule.{name} {rate:g} is above optimizer.lr {lr:g}: lower it, or raise the rate."
                )

    def _check_share(self, epochs: float, what_is_left: str) -> None:
        """Refuses a phase of a run that takes all of its epochs."""
        if epochs >= self.epochs:
            raise ConfigError(f"{what_is_left}: make it smaller, or train for longer.")

    def _check_heal(self, heal: HealConfig) -> None:
        if self.distill is None:
            raise ConfigError("heal needs the original as a teacher: give distill.teacher, or leave heal out.")
        rest = f"nothing of {self.epochs} epochs to the plan alone"
        self._check_share(heal.anneal_epochs, f"heal.anneal_epochs {heal.anneal_epochs:g} leaves {rest}")
        excluded = {
            "compile: true": self.compile,
            "grad_checkpointing: true": self.grad_checkpointing,
            "strategy: fsdp2": self.strategy == "fsdp2",
            "resolution": self.resolution is not None,
        }
        for setting_name in (name for name, is_on in excluded.items() if is_on and heal.compares_layers):
            raise ConfigError(
                f"heal.outputs and anneal_epochs run the layers one by one, at the teacher's size, and exclude "
                f"{setting_name}: leave that out, or set both to 0."
            )
