"""Trained weights for a model: those of a file or of timm, fitted to its plan, image size and classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from vitreuse.class_names import Names, are_numbers, difference, listed, places, read_names
from vitreuse.config import Config, ConfigError
from vitreuse.hub import WEIGHTS
from vitreuse.targets import load_exactly, pretrained_weights, read_weights
from vitreuse.weights import LoadReport, load_checkpoint

State = dict[str, Tensor]


def start_from(model: Any, source: str, class_names: Sequence[str]) -> str:
    """Fills a model with trained weights; its head with the rows of the classes that they know by name.

    Of classes that they do not know the rows stay as they were made; where names are not known, all of a head for
    another number of classes.

    Args:
        model: One of timm's or ours; a plain checkpoint fits any plan.
        source: A file of ours, of timm or of DeiT, a run folder, a hub folder, or a name of timm.list_pretrained().
        class_names: Of the model's classes.

    Returns:
        One line that names what is new, and what the model has no use for.

    Raises:
        ConfigError: There are no such weights, or they are another model's.
    """
    state = _trained(source)
    rows, remark = _known_rows(_source_names(source), class_names, _num_rows(state, model))
    report = _load(model, {**state, **_fitted_head(state, model, rows)}, source)
    parts = [f"starts from {source}"]
    if remark:
        parts.append(remark)
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
    rows, remark = _known_rows(names, class_names, _num_rows(state, model))
    if names is not None and None in rows:
        raise ConfigError(
            f"the data have {difference(class_names, names, source)}: a teacher must tell the same classes apart."
        )
    _load(model, {**state, **(_fitted_head(state, model, rows) if names is not None else {})}, source)
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


def _known_rows(names: Names | None, class_names: Sequence[str], num_rows: int) -> tuple[list[int | None], str]:
    """For each class the row of a trained head that is its own, None for a new one; and what is to be said of them."""
    fresh: list[int | None] = [None] * len(class_names)
    a_new_head = f"a new head for {len(class_names)} classes"
    if names is None or len(names) != num_rows:
        if num_rows != len(class_names):
            return fresh, a_new_head
        return [*range(num_rows)], f"a head for {num_rows} classes, whose names are not known: they go by number"
    if names == tuple(class_names):
        return [*range(num_rows)], "classes are known by number alone" if are_numbers(names) else ""
    rows = places(class_names, names)
    one_is_numbered = are_numbers(names) or are_numbers(class_names)
    if not any(row is not None for row in rows) or (one_is_numbered and {*names} != {*class_names}):
        return fresh, f"{a_new_head}, {listed(class_names)} and not {listed(names)}"
    new = [name for name, row in zip(class_names, rows, strict=True) if row is None]
    known = f"the head's rows of {len(rows) - len(new)} classes by their names"
    return rows, known + (f", new ones for {len(new)} ({listed(new)})" if new else "")


def _head_keys(model: Any) -> list[str]:
    classifier = model.pretrained_cfg["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else classifier
    return [f"{head}.{part}" for head in heads for part in ("weight", "bias")]


def _num_rows(state: State, model: Any) -> int:
    """Of the state's head; 0 where it has none."""
    return next((len(state[key]) for key in _head_keys(model) if key in state), 0)


def _fitted_head(state: State, model: Any, rows: Sequence[int | None]) -> State:
    """The entries of a model's heads: rows of the state's, and the model's own for the rest."""
    own = {key: tensor for key, tensor in model.state_dict().items() if key in _head_keys(model)}
    return {key: _with_rows(tensor, state.get(key), rows) for key, tensor in own.items()}


def _with_rows(own: Tensor, trained: Tensor | None, rows: Sequence[int | None]) -> Tensor:
    """A tensor with rows of another; itself where they have other columns, whose misfit is for others to say."""
    if trained is None or trained.shape[1:] != own.shape[1:] or len(rows) != len(own):
        return own
    kept = [number for number, row in enumerate(rows) if row is not None]
    fitted = own.clone()
    fitted[kept] = trained[[rows[number] for number in kept]].to(own)
    return fitted


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
