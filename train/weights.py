"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from vitreuse.config import Config, ConfigError
from vitreuse.hub import WEIGHTS
from vitreuse.targets import load_exactly, pretrained_weights, read_weights
from vitreuse.weights import LoadReport, load_checkpoint

State = dict[str, Tensor]


def start_from(model: Any, source: str) -> str:
    """Fills a model with trained weights; where they tell other classes apart, its head stays as it was made.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of ours, of timm or of DeiT, a run folder, a hub folder, or a name of timm.list_pretrained().

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    state = _trained(source)
    head = _fresh_head(state, model)
    report = _load(model, {**state, **head}, source)
    parts = [f"starts from {source}"]
    if head:
        parts.append(f"a new head for {model.num_classes} classes")
    if report.new:
        parts.append(f"new: {_listed(report.new)}")
    if report.dropped:
        parts.append(f"left out: {_listed(report.dropped)}")
    return "; ".join(parts) + "."


def load_weights(model: Any, source: str) -> None:
    """Fills a model with trained weights, its head included.

    Raises:
        ConfigError: As start_from.
    """
    _load(model, _trained(source), source)


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


def _trained(source: str) -> State:
    try:
        file = _file(source)
        return read_weights(file) if file.exists() or Path(source).is_dir() else pretrained_weights(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fresh_head(state: State, model: Any) -> State:
    """The model's own entries of its heads, where the state has none for as many classes."""
    classifier = model.pretrained_cfg["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else classifier
    keys = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    own = {key: tensor for key, tensor in model.state_dict().items() if key in keys}
    return {key: tensor for key, tensor in own.items() if key not in state or len(state[key]) != len(tensor)}


def _load(model: Any, state: State, source: str) -> LoadReport:
    try:
        if hasattr(model, "plan"):
            return load_checkpoint(model, state)
        if isinstance(model, VisionTransformer):
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        load_exactly(model, state)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: {error}") from error
    return LoadReport((), ())


def _listed(keys: Sequence[str]) -> str:
    """The first keys by name, and how many more there are."""
    rest = len(keys) - 2
    return ", ".join(keys[:2]) + (f" and {rest} more" if rest > 0 else "")
