"""Which classes each split of an experiment has images of, and what is to be said where one has none."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vitreuse.config import ConfigError
from vitreuse.data.labels import are_numbers, listed

# By whether there are images to train on and images to validate with.
REMARKS = {
    (False, True): "no image to train on, only some to validate with: no model can learn",
    (True, False): "no image to validate with: top-1 says nothing of",
    (False, False): "no image in either split:",
}


def coverage(train_set: Any, val_set: Any) -> dict[tuple[bool, bool], list[str]]:
    """Names of the classes by whether each split, both under the same labels, has images of them."""
    found = defaultdict(list)
    sizes = zip(train_set.class_names, train_set.class_sizes(), val_set.class_sizes(), strict=True)
    for name, num_trained, num_measured in sizes:
        found[num_trained > 0, num_measured > 0].append(name)
    return found


def remarks(train_set: Any, val_set: Any) -> list[str]:
    """A sentence for each kind of gap."""
    found = coverage(train_set, val_set)
    return [f"{what} {_counted(found[gap])}." for gap, what in REMARKS.items() if found[gap]]


def _counted(names: list[str]) -> str:
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({listed(names)})"


def check_numbers(train_set: Any, val_set: Any) -> None:
    """Refuses labels without names of which some are validated and none trained: one split may count from 1.

    Raises:
        ConfigError: They are such.
    """
    names = coverage(train_set, val_set)[False, True]
    if names and are_numbers(train_set.class_names):
        raise ConfigError(
            f"{val_set.folder} has images of the label{'s' if len(names) > 1 else ''} {listed(names)} and "
            f"{train_set.folder} has none, and without names nothing tells whether a label means the same class in "
            "both: count both from 0, or name the classes of both with vitreuse shards index FOLDER --class-names FILE."
        )
