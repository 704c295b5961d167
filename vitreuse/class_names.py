"""Names of classes: kept with the weights that tell them apart, and what labels and heads are matched by.

In memory a model's are ``pretrained_cfg["label_names"]``, timm's place for them. On disk they are with the weights:
metadata of a model.safetensors, an entry of a checkpoint; of a folder that timm wrote, in the config.json beside them.
Shards that nobody gave names to have their numbers as names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from vitreuse.checkpoint_file import read_metadata
from vitreuse.data import DataError, FolderDataset, Sample, ShardDataset
from vitreuse.data.names import find_lookalike
from vitreuse.strict_yaml import nearest

LABEL_NAMES = "label_names"  # as timm calls them
Names = tuple[str, ...]


def names_of(model: Any) -> Names | None:
    """The names of a model's classes; None where they are not known."""
    names = _as_names((getattr(model, "pretrained_cfg", None) or {}).get(LABEL_NAMES))
    return names if names is not None and len(names) == model.num_classes else None


def pack_names(names: Sequence[str]) -> str:
    """Names as they stand beside weights, in JSON, which has an escape for what is no text."""
    return json.dumps(list(names))


def name_classes(model: Any, names: Sequence[str] | None) -> None:
    """Tells a model what its classes are called."""
    model.pretrained_cfg[LABEL_NAMES] = None if names is None else list(names)


def read_names(path: Path) -> Names | None:
    """The names of the classes that the weights in a file tell apart; None where they are not known."""
    try:
        return _as_names(_read_header(path) if path.suffix == ".safetensors" else _read_checkpoint(path))
    except Exception:  # whatever a file that is no such one leads to; who reads its weights says so
        return None


def _read_header(path: Path) -> Any:
    metadata = read_metadata(path)
    if LABEL_NAMES in metadata:
        return json.loads(metadata[LABEL_NAMES])
    config = json.loads(path.with_name("config.json").read_bytes())  # timm's
    return config.get(LABEL_NAMES) or config.get("pretrained_cfg", {}).get(LABEL_NAMES)


def _read_checkpoint(path: Path) -> Any:
    return json.loads(torch.load(path, map_location="cpu", mmap=True, weights_only=True)[LABEL_NAMES])


def _as_names(found: Any) -> Names | None:
    if isinstance(found, dict):  # timm's form for numbers with gaps, of which a whole one has none
        found = [found.get(str(number), found.get(number)) for number in range(len(found))]
    if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
        return tuple(found)
    return None


def are_numbers(names: Sequence[str]) -> bool:
    """Whether names are no more than the numbers of the labels."""
    return [*names] == [str(number) for number in range(len(names))]


def places(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """The number of each name among those that are known; None for one that is not, or is there twice."""
    if tuple(names) == tuple(known):
        return [*range(len(names))]
    counts = Counter(known)
    numbers = {name: number for number, name in enumerate(known) if counts[name] == 1}
    return [numbers.get(name) for name in names]


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def foreign(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of some names that are not known, or known twice."""
    return [name for name, place in zip(names, places(names, known), strict=True) if place is None]


def difference(names: Sequence[str], known: Sequence[str], whose: str) -> str:
    """How some names differ from those that are known, as the end of a sentence that has them.

    Args:
        whose: What has those that are known.
    """
    others = foreign(names, known)
    twin = find_lookalike(others[0], known) if others else None
    if twin is not None:
        return f"{others[0]!a}, which {whose} has as {twin!a}, which differs only in Unicode normalisation"
    if others:
        return f"{listed(others)}, not a class of {whose} ({listed(known, 6)}){nearest(others[0], known).rstrip('?')}"
    return f"{listed(names)}, {len(names)} in all, where {whose} has {listed(known)}, {len(known)} in all"


class Renumbered(Dataset[Sample]):
    """A data set under the labels of a model, or of another data set.

    Args:
        dataset: As vitreuse.data.open_split returns it.
        numbers: The new label of each of its labels.
        class_names: Of the new labels.
    """

    def __init__(self, dataset: ShardDataset | FolderDataset, numbers: Sequence[int], class_names: Names):
        self.dataset, self.numbers, self.class_names = dataset, tuple(numbers), class_names
        self.folder, self.digest, self.key = dataset.folder, dataset.digest, dataset.key
        self.notes = dataset.notes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Sample:
        sample = self.dataset[number]
        return sample._replace(label=self.numbers[sample.label])

    def class_sizes(self) -> list[int]:
        """How many images each class has."""
        sizes = [0] * len(self.class_names)
        for number, size in zip(self.numbers, self.dataset.class_sizes(), strict=True):
            sizes[number] += size
        return sizes


def numbered_as(
    dataset: ShardDataset | FolderDataset, known: Sequence[str], whose: str, way_out: str
) -> ShardDataset | FolderDataset | Renumbered:
    """A data set under the labels by which others know its classes, by name; itself where they are its own.

    Args:
        dataset: As vitreuse.data.open_split returns it.
        known: Names of the classes by their labels.
        whose: For the sentence of the error, what has these classes.
        way_out: For its end.

    Raises:
        DataError: A class is none of those that are known.
    """
    names = dataset.class_names
    if tuple(names) == tuple(known):
        return dataset
    if foreign(names, known):
        raise DataError(f"{dataset.folder} has {difference(names, known, whose)}: {way_out}.")
    return Renumbered(dataset, [place for place in places(names, known) if place is not None], tuple(known))
