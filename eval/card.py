"""A run on one card: what was trained, how, on what, and what it said right, image by image; all that a table needs.

A training leaves it as card.json in its run folder. Cards outlive run folders: they are small, and can be committed.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.flops import model_macs
from eval.predictions import Predictions
from vitreuse.config import Config, ModelConfig
from vitreuse.cost.macs import count_params
from vitreuse.files.hub import plan_text
from vitreuse.io.durable import write_durably

VERSION = 1
NAME = "card.json"
PLAIN_SET = "ImageNet"  # whose images a training counts without a name
# The model and the seed stand beside it, and the folder of the data is a place.
OF_MEMORY = ("train.accumulation_steps", "train.grad_checkpointing", "train.max_skipped_steps")  # in older cards
NOT_RECIPE = ("model.name", "model.plan", "model.keywords", "train.seed", "data.root")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One trained model.

    Attributes:
        name: The run's name without its seed: cards of one name are told apart by it alone.
        seed: The seed of the training; None where it is not known.
        model: Its name, its plan even if it is the preset's, and its keywords.
        recipe: The settings of the training that give another model, by dotted name, without model and seed; None where
            they are not known.
        params: Number of the model's parameters.
        macs: Multiply-adds of the products that run, per image.
        data: The set that it was measured on, for the reader.
        set_digest: Predictions.set_digest: of equal ones, images can be compared one by one.
        n: Images of that set.
        top1, top5, calibration_error: Percent.
        is_correct: n bits, one per image in the set's order, compressed and in base64.
        facts: What else is worth knowing of how it was made: command, commit, versions, hardware, seconds.
        class_names: Names of the labels; None where they are unknown, or were taken for the model's by their number.
    """

    name: str
    seed: int | None
    model: dict[str, Any]
    recipe: dict[str, Any] | None
    params: int
    macs: int
    data: str
    set_digest: str
    n: int
    top1: float
    top5: float
    calibration_error: float
    is_correct: str
    facts: dict[str, Any]
    class_names: list[str] | None = None

    @property
    def plan(self) -> str | None:
        """The model's plan; None for timm's own models."""
        return self.model["plan"]

    @property
    def experiment(self) -> str:
        """Equal in cards of runs that differ in seed and name alone, were trained as far, and measured on the same
        images by the same rules."""
        measured = [self.set_digest, self.counted, self.facts.get("training")]
        return json.dumps([self.model, _stated(self.recipe), *measured], sort_keys=True)

    @property
    def counted(self) -> str | None:
        """The published set by whose rules its images were counted; None without one, and of ImageNet itself."""
        title = (self.facts.get("set") or PLAIN_SET).removesuffix(" (part)")
        return None if title == PLAIN_SET else title

    def correct_images(self) -> np.ndarray:
        """(n,), bool: which images the model is right on."""
        packed = np.frombuffer(zlib.decompress(base64.b64decode(self.is_correct)), np.uint8)
        return np.unpackbits(packed)[: self.n].astype(bool)

    def model_config(self) -> ModelConfig:
        """The untrained model."""
        return ModelConfig(**self.model)

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        write_durably(path, (json.dumps({"card": VERSION, **asdict(self)}, indent=2) + "\n").encode())


def make_card(
    name: str,
    model: ModelConfig,
    data: str,
    predictions: Predictions,
    facts: dict[str, Any],
    training: Config | None = None,
    class_names: Sequence[str] | None = None,
) -> Card:
    """The card of a model, by what it says of a set.

    Args:
        training: The experiment that gave it its weights, where it is known.
        class_names: Names of the labels, where they are known.
    """
    built: Any = model.create("meta")
    packed = np.packbits(predictions.is_correct).tobytes()
    return Card(
        name=name if training is None else name.removesuffix(f"-seed{training.train.seed}"),
        seed=None if training is None else training.train.seed,
        model=_model_settings(model, built),
        recipe=None if training is None else recipe_of(training),
        params=count_params(built),
        macs=model_macs(built),
        data=data,
        facts=facts,
        class_names=None if class_names is None else list(class_names),
        set_digest=predictions.set_digest,
        is_correct=base64.b64encode(zlib.compress(packed, 9)).decode(),
        **predictions.figures,
    )


def _model_settings(config: ModelConfig, model: Any) -> dict[str, Any]:
    """What builds a model, with the plan that it was built with, its preset's too."""
    return {"name": config.name, "plan": plan_text(model), "keywords": config.keywords}


def read_card(path: Path) -> Card:
    """The card in a file.

    Raises:
        ValueError: The file holds no card, or one of another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.pop("card")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no run card: give one that python -m train or eval top1 wrote.") from error
    record = {"class_names": None, **record}  # which older cards lack
    if record.get("recipe"):
        record["recipe"] = {key: value for key, value in record["recipe"].items() if key not in OF_MEMORY}
    if version != VERSION or set(record) != {field.name for field in fields(Card)}:
        raise ValueError(f"{path} is a card of version {version}, this code reads version {VERSION}: write it again.")
    card = Card(**record)
    try:
        if len(card.correct_images()) != card.n:
            raise ValueError("it does not say of each image whether it is right")
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged run card ({error}): write it again.") from error
    return card


def is_of(card: Card, config: Config) -> bool:
    """Whether a card is of an experiment: the same model, recipe and seed."""
    found = [card.model, _stated(card.recipe), card.seed]
    model = _model_settings(config.model, config.model.create("meta"))
    wanted = [model, _stated(recipe_of(config)), config.train.seed]
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)  # a file's lists equal tuples


def _stated(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """A recipe without what is null: settings that an older card could not know are null unless they are used."""
    return None if recipe is None else {key: value for key, value in recipe.items() if value is not None}


def recipe_of(config: Config) -> dict[str, Any]:
    """The settings of an experiment that give another model, by dotted name, without the model itself and the seed."""
    return {key: value for key, value in _flat(config).items() if key not in NOT_RECIPE}


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            settings |= _flat(value, f"{prefix}{field.name}.")
        elif field.metadata["changes_run"]:
            settings[prefix + field.name] = value
    return settings
