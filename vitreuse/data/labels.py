"""Labels by the names of their classes: a model and its data, or two data sets, may number the same classes otherwise.

Here two lists of names are compared, and a data set is given the labels of another list; eval and train ask it.
"""

from collections import Counter
from collections.abc import Sequence

from torch.utils.data import Dataset

from vitreuse.data.datasets import FolderDataset, ShardDataset
from vitreuse.data.decode import Sample
from vitreuse.data.names import find_lookalike
from vitreuse.data.tree import shortened
from vitreuse.io.errors import DataError, nearest


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
    return shortened([*map(repr, names)], limit)


def foreign(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of some names that are not known, or known twice."""
    return [name for name, place in zip(names, places(names, known), strict=True) if place is None]


def difference(names: Sequence[str], known: Sequence[str], whose: str) -> str:
    """How some names differ from the known ones of ``whose``: the end of a sentence that begins with who has them."""
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
        dataset: The data set under its own labels.
        numbers: The new label of each of these.
        class_names: The names of the new labels.
    """

    def __init__(self, dataset: ShardDataset | FolderDataset, numbers: Sequence[int], class_names: tuple[str, ...]):
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
        dataset: As open_split returns it.
        known: The names of the classes by their labels.
        whose: What has these classes, for the sentence of the error.
        way_out: The end of that sentence.

    Raises:
        DataError: A class is none of those that are known.
    """
    names = dataset.class_names
    if tuple(names) == tuple(known):
        return dataset
    if foreign(names, known):
        raise DataError(f"{dataset.folder} has {difference(names, known, whose)}: {way_out}.")
    return Renumbered(dataset, [place for place in places(names, known) if place is not None], tuple(known))
