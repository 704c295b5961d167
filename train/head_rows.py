"""The rows of a trained head, by the names of the classes that they stand for, for a model of other classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vitreuse.data.labels import are_numbers, listed, places
from vitreuse.model.class_names import Names

State = dict[str, Tensor]


def known_rows(
    names: Names | None, class_names: Sequence[str] | None, num_rows: int, num_classes: int
) -> tuple[list[int | None], str]:
    """For each class the row of a trained head that is its own, None for a new one; and what is to be said of them.

    Args:
        names: Of the head's rows, where they are known.
        class_names: Of the classes, where they are known.
        num_rows: Of the head.
        num_classes: As many as class_names.
    """
    fresh: list[int | None] = [None] * num_classes
    a_new_head = f"a new head for {num_classes} classes"
    if names is None or class_names is None or len(names) != num_rows:
        if num_rows != num_classes:
            return fresh, a_new_head
        unknown = "" if class_names is None else f"its {num_rows} classes, whose names are not known, go by number"
        return [*range(num_rows)], unknown
    if names == tuple(class_names):
        return [*range(num_rows)], "its classes are known by number alone" if are_numbers(names) else ""
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


def num_head_rows(state: State, model: Any) -> int:
    """Of the state's head; 0 where it has none."""
    return next((len(state[key]) for key in _head_keys(model) if key in state), 0)


def missing_heads(state: State, model: Any) -> list[str]:
    """Those of a model's heads that a state lacks where it has another, as a plain one of a distilled model."""
    missing = [head for head in _heads(model) if f"{head}.weight" not in state]
    return missing if len(missing) < len(_heads(model)) else []


def fitted_head(state: State, model: Any, rows: Sequence[int | None]) -> State:
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
