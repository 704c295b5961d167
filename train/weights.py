"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn

from train.head_rows import State, fitted_head, known_rows, missing_heads, num_head_rows
from vitreuse.class_names import Names, difference, read_names
from vitreuse.config import Config, ConfigError
from vitreuse.hub import WEIGHTS
from vitreuse.targets import load_exactly, pretrained_weights, read_weights
from vitreuse.weights import LoadReport, load_checkpoint


def start_from(model: Any, source: str, class_names: Sequence[str] | None = None) -> str:
    """Fills a model with trained weights; its head with the rows of the classes that they know by name.

    Of classes that they do not know the rows stay as they were made; where names are not known, all of a head for
    another number of classes.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of ours, of timm or of DeiT, a run folder, a hub folder, or a name of timm.list_pretrained().
        class_names: Of the model's classes; None where they are not known.

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    state = _trained(source)
    rows, remark = known_rows(_source_names(source), class_names, num_head_rows(state, model), model.num_classes)
    report = _load(model, {**state, **fitted_head(state, model, rows)}, source)
    parts = [f"starts from {source}"]
    if remark:
        parts.append(remark)
    parts += [f"a new {head}" for head in missing_heads(state, model)]
    if report.new:
        parts.append(f"new: {_listed(report.new)}")
    if report.dropped:
        parts.append(f"left out: {_listed(report.dropped)}")
    return "; ".join(parts) + "."


def load_weights(model: Any, source: str, class_names: Sequence[str]) -> str:
    """Fills a model with trained weights, its head included, with its classes in the order of others.

    Args:
        model: One of timm's or ours.
        source: As for start_from.
        class_names: Those that it must tell apart, in their order.

    Returns:
        What is to be said of its classes, if anything is.

    Raises:
        ConfigError: As start_from; or its classes are others.
    """
    state, names = _trained(source), _source_names(source)
    rows, remark = known_rows(names, class_names, num_head_rows(state, model), model.num_classes)
    if names is not None and None in rows:
        raise ConfigError(
            f"the data have {difference(class_names, names, source)}: a teacher must tell the same classes apart."
        )
    _load(model, {**state, **(fitted_head(state, model, rows) if names is not None else {})}, source)
    return remark


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


def _source_names(source: str) -> Names | None:
    """The names of the classes that a source's weights tell apart; None where they are not known, as of timm's."""
    file = _file(source)
    return read_names(file) if file.exists() else None


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
