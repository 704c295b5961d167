"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.head_rows import fitted_head, known_rows, missing_heads, num_head_rows
from vitreuse.config import Config, ConfigError
from vitreuse.data.labels import difference
from vitreuse.export.hub import WEIGHTS
from vitreuse.export.networks import pretrained_weights
from vitreuse.io.checkpoint_file import Weights, as_weights, read_weights
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.class_names import Names, read_names


def start_from(model: Any, source: str, class_names: Sequence[str] | None = None) -> str:
    """Fills a model with trained weights; its head with the rows of the classes that they know by name.

    Of classes that they do not know the rows stay as they were made; where names are not known, all of a head for
    another number of classes.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of weights, a run folder, a hub folder, or a name of timm.list_pretrained().
        class_names: Of the model's classes; None where they are not known.

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    weights = _trained(source)
    num_rows = num_head_rows(weights.state, model)
    rows, remark = known_rows(_source_names(source), class_names, num_rows, model.num_classes)
    report = _load(model, _with_head(weights, model, rows), source)
    parts = [f"starts from {source}", *([remark] if remark else ())]
    parts += [f"a new {head}" for head in missing_heads(weights.state, model)]
    return "; ".join((*parts, *report.said(model))) + "."


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
    weights, names = _trained(source), _source_names(source)
    rows, remark = known_rows(names, class_names, num_head_rows(weights.state, model), model.num_classes)
    if names is not None and None in rows:
        raise ConfigError(
            f"the data have {difference(class_names, names, source)}: a teacher must tell the same classes apart."
        )
    report = _load(model, weights if names is None else _with_head(weights, model, rows), source)
    if report.new:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: the checkpoint has no {report.new[0]}.")
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


def _trained(source: str) -> Weights:
    try:
        file = _file(source)
        if file.exists() or Path(source).is_dir():
            return read_weights(file)
        return as_weights(pretrained_weights(source))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _source_names(source: str) -> Names | None:
    """The names of the classes that a source's weights tell apart; None where they are not known, as of timm's."""
    file = _file(source)
    return read_names(file) if file.exists() else None


def _with_head(weights: Weights, model: Any, rows: Sequence[int | None]) -> Weights:
    """Weights with a head of these rows, the model's own for what has none."""
    return weights._replace(state={**weights.state, **fitted_head(weights.state, model, rows)})


def _load(model: Any, weights: Weights, source: str) -> LoadReport:
    try:
        return load_checkpoint(model, weights)
    except ValueError as error:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: {error}") from error
