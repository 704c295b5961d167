"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes.

The rows of a trained head go to the classes that they stand for, by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitreuse.config import Config, ConfigError
from vitreuse.data.labels import are_numbers, difference, listed, places
from vitreuse.files.hub import WEIGHTS
from vitreuse.files.networks import pretrained_weights
from vitreuse.io.checkpoint_file import Weights, as_weights, read_weights
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.class_names import Names, read_names


def start_from(model: Any, source: str, class_names: Sequence[str] | None = None) -> str:
    """Fills a model with trained weights; its head with the rows of the classes that they know by name.

    Rows of classes that they do not know stay as they were initialised. Where names are not known, so does a whole head
    for another number of classes.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of weights, a run folder, a hub folder, or a name of timm.list_pretrained().
        class_names: Of the model's classes; None where they are not known.

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    weights, names = _trained(source)
    rows, remark = known_rows(names, class_names, _num_head_rows(weights.state, model), model.num_classes)
    report = _load(model, _with_head(weights, model, rows), source)
    heads = _heads(model)
    missing = [head for head in heads if f"{head}.weight" not in weights.state]  # a plain model has one of two
    new = [f"a new {head}" for head in missing] if len(missing) < len(heads) else []
    return "; ".join((f"starts from {source}", *([remark] if remark else ()), *new, *report.said(model))) + "."


def load_weights(model: Any, source: str, class_names: Sequence[str]) -> str:
    """Fills a model with all of start_from's weights, for classes that it must tell apart, in their order.

    Returns:
        What is to be said of its classes, if anything is.

    Raises:
        ConfigError: As start_from; or its classes are others.
    """
    weights, names = _trained(source)
    rows, remark = known_rows(names, class_names, _num_head_rows(weights.state, model), model.num_classes)
    if names is not None and None in rows:
        others = difference(class_names, names, source)
        raise ConfigError(f"the data have {others}: a teacher must tell the same classes apart.")
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


def _trained(source: str) -> tuple[Weights, Names | None]:
    """A source's weights, and the names of the classes that they tell apart; None where these are not known."""
    file = _file(source)
    try:
        if file.exists() or Path(source).is_dir():
            return read_weights(file), read_names(file)
        return as_weights(pretrained_weights(source)), None
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(model: Any, weights: Weights, source: str) -> LoadReport:
    try:
        return load_checkpoint(model, weights)
    except ValueError as error:
        raise ConfigError(f"{source} does not fit {type(model).__name__}: {error}") from error


def known_rows(
    names: Names | None, class_names: Sequence[str] | None, num_rows: int, num_classes: int
) -> tuple[list[int | None], str]:
    """For each class the row of a trained head that is its own, None for a new one; and what is to be said of them.

    Names are None where they are not known.
    """
    fresh: list[int | None] = [None] * num_classes
    a_new_head = f"a new head for {num_classes} classes"
    if names is None or class_names is None or len(names) != num_rows:
        if num_rows != num_classes:
            return fresh, a_new_head
        unknown = "" if class_names is None else f"its {num_rows} classes, whose names are not known, go by number"
        return [*range(num_rows)], unknown
    if names == tuple(class_names):
        numbers = "its classes are numbers, taken for those of the same number here"
        return [*range(num_rows)], numbers if are_numbers(names) else ""
    rows = places(class_names, names)
    one_is_numbered = are_numbers(names) or are_numbers(class_names)
    if not any(row is not None for row in rows) or (one_is_numbered and {*names} != {*class_names}):
        return fresh, f"{a_new_head}, {listed(class_names)} and not {listed(names)}"
    new = [name for name, row in zip(class_names, rows, strict=True) if row is None]
    known = f"the head's rows of {len(rows) - len(new)} classes by their names"
    return rows, known + (f", new ones for {len(new)} ({listed(new)})" if new else "")


def _heads(model: Any) -> tuple[str, ...]:
    classifier = model.pretrained_cfg["classifier"]
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _head_keys(model: Any) -> list[str]:
    return [f"{head}.{part}" for head in _heads(model) for part in ("weight", "bias")]


def _num_head_rows(state: dict[str, Tensor], model: Any) -> int:
    """The number of rows of a state's head; 0 where it has none."""
    return next((len(state[key]) for key in _head_keys(model) if key in state), 0)


def _with_head(weights: Weights, model: Any, rows: Sequence[int | None]) -> Weights:
    """Weights with heads of these rows, the model's own for what has none."""
    own = {key: tensor for key, tensor in model.state_dict().items() if key in _head_keys(model)}
    heads = {key: _with_rows(tensor, weights.state.get(key), rows) for key, tensor in own.items()}
    return weights._replace(state={**weights.state, **heads})


def _with_rows(own: Tensor, trained: Tensor | None, rows: Sequence[int | None]) -> Tensor:
    """A tensor with rows of another; itself where they have other columns, whose misfit is for others to say."""
    if trained is None or trained.shape[1:] != own.shape[1:] or len(rows) != len(own):
        return own
    kept = [number for number, row in enumerate(rows) if row is not None]
    fitted = own.clone()
    fitted[kept] = trained[[rows[number] for number in kept]].to(own)
    return fitted
