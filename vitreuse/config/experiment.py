"""A whole experiment: the sections data and eval, all sections together, how files are read and compared."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from vitreuse.config.network import ModelConfig
from vitreuse.config.recipe import DTYPES, TrainConfig
from vitreuse.config.strict_yaml import build, overridden, read_tree, setting
from vitreuse.data import CACHE_ROOT, SOURCES
from vitreuse.io.errors import ConfigError
from vitreuse.io.urls import refuse_url


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are read."""

    root: str | None = setting(
        "folder with train/ and val/, each shards with an index or one folder per class; or a URL of such shards, with "
        "{} for SPLIT/NAME, which the command line must --allow; shards may move during a run",
        None,
        changes_run=False,
        is_path=True,
    )
    cache_root: str = setting("folder for what is fetched from a URL", CACHE_ROOT, changes_run=False, is_path=True)
    source: str | None = setting("built-in data set, written as shards on first use", None, choices=SOURCES)
    source_root: str = setting("folder in which a built-in data set is made", "data", changes_run=False, is_path=True)
    num_workers: int = setting(
        "decoding processes per rank; 0 decodes in the rank itself", 4, minimum=0, maximum=1024, changes_run=False
    )
    cache_images: bool = setting("keep decoded images in memory; for small sets", False, changes_run=False)
    max_bad_images: int = setting(
        "undecodable training images that are replaced before a run ends; 0: none", 0, minimum=0, changes_run=False
    )
    shuffle_window: int | None = setting(
        "shuffle the shards, then samples within stretches of this many, to read from few at a time; null shuffles all",
        None,
        above=0,
    )

    holdout: float | None = setting(
        "share of the training images, drawn by train.seed, that are not trained on and say which checkpoint is the "
        "best, so that it is not chosen on what is reported; null chooses by the validation images",
        None,
        above=0,
        maximum=0.5,
    )

    def __post_init__(self):
        if (self.root is None) == (self.source is None):
            raise ConfigError("root and source: give exactly one of the two, the other null.")
        refuse_url("source_root", self.source_root)
        refuse_url("cache_root", self.cache_root)

    @property
    def folder(self) -> str:
        """The folder that holds train/ and val/, or its URL."""
        return self.root if self.root is not None else str(Path(self.source_root) / str(self.source))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How top-1 is measured, while training and after."""

    batch_size: int = setting("images per forward pass and rank", 256, above=0, changes_run=False)
    crop_pct: float | None = setting(
        "share of the resized image that the crop keeps; null for the model's own", None, above=0, maximum=1
    )
    precision: str = setting(
        "in which images are answered; published figures are float32's", "float32", choices=DTYPES, changes_run=False
    )
    every_epochs: int = setting("evaluate after each so many epochs, and the last", 1, above=0, changes_run=False)
    raw_every_epochs: int = setting(
        "of these evaluations, those after each so many epochs, and the last, are of the raw weights too, which the "
        "moving average is of",
        1,
        above=0,
        changes_run=False,
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: a network, its images, its training and its evaluation."""

    model: ModelConfig = setting("which network")
    data: DataConfig = setting("which images")
    train: TrainConfig = setting("the recipe")
    eval: EvalConfig = setting("the measurement")

    def __post_init__(self):
        if self.data.holdout is not None and not self.train.reads_labels:
            raise ConfigError(
                f"data.holdout {self.data.holdout:g} has no effect under train.distill.kind 'features', which holds "
                "images out by itself: leave it out."
            )
        raw = self.eval.raw_every_epochs
        if raw != EvalConfig.raw_every_epochs and self.train.ema is None:
            raise ConfigError(f"eval.raw_every_epochs {raw} has no effect without train.ema: leave it out.")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The experiment of a YAML file, its bases and overrides such as `train.epochs=5`, as they are written.

    Raises:
        ConfigError: One sentence with the file, the dotted path, the broken rule and the nearest valid spelling.
    """
    tree, sources = read_tree(Path(path))
    for override in overrides:
        tree, sources = overridden(tree, sources, override)
    return build(Config, tree, sources)


def changed_settings(before: Any, after: Any, path: str = "") -> list[str]:
    """The settings that differ and give another run, as `train.epochs 40 -> 50`."""
    changes = []
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        dotted = f"{path}{field.name}"
        if is_dataclass(old) and is_dataclass(new):
            changes += changed_settings(old, new, f"{dotted}.")
        elif old != new and field.metadata["changes_run"]:
            changes.append(f"{dotted} {old!r} -> {new!r}")
    return changes
