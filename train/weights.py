"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from vitreuse.checkpoint_file import Weights, as_weights, read_weights
from vitreuse.config import Config, ConfigError
from vitreuse.hub import WEIGHTS
from vitreuse.targets import pretrained_weights
from vitreuse.weights import LoadReport, load_checkpoint

State = dict[str, Tensor]


def start_from(model: Any, source: str) -> str:
    """Fills a model with trained weights; where they tell other classes apart, its head stays as it was made.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of weights, a run folder, a hub folder, or a name of timm.list_pretrained().

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    weights = _trained(source)
    head = _fresh_head(weights.state, model)
    report = _load(model, weights._replace(state={**weights.state, **head}), source)
    parts = [f"starts from {source}", *([f"a new head for {model.num_classes} classes"] if head else ())]
    return "; ".join((*parts, *report.said(model))) + "."


def load_weights(model: Any, source: str) -> None:
    """Fills a model with trained weights, its head included.

    Raises:
        ConfigError: As start_from.
    """
    report = _load(model, _trained(source), source)
    if report.new:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: the checkpoint has no {report.new[0]}.")


def weight_files(config: Config) -> dict[str, str]:
    """SHA-256 of each file of weights that an experiment reads, by its path."""
    distill = config.train.distill
    sources = [config.model.weights, distill.teacher.weights if distill is not None else None]
    files = [_file(source) for source in sources if source is not None]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _file(source: str) -> Path:
    """The file that a source means, if it means one: of a folder what a run or an export has left there."""
    path = Path(source)
    return path / WEIGHTS if path.is_dir() else path


def _trained(source: str) -> Weights:
    try:
        file = _file(source)
        if file.exists() or Path(source).is_dir():
            return read_weights(file)
        return as_weights(pretrained_weights(source))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fresh_head(state: State, model: Any) -> State:
    """The model's own entries of its heads, where the state has none for as many classes."""
    classifier = model.pretrained_cfg["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else classifier
    keys = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    own = {key: tensor for key, tensor in model.state_dict().items() if key in keys}
    return {key: tensor for key, tensor in own.items() if key not in state or len(state[key]) != len(tensor)}


def _load(model: Any, weights: Weights, source: str) -> LoadReport:
    try:
        return load_checkpoint(model, weights)
    except ValueError as error:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: {error}") from error
