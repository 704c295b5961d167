"""Labels by the names of their classes: how two lists of names differ, and a data set under the labels of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.utils.data import Dataset

from vitreuse.data import DataError, FolderDataset, Sample, ShardDataset
from vitreuse.data.names import find_lookalike
from vitreuse.io.errors import nearest
from vitreuse.model.class_names import Names


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
