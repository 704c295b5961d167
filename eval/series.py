"""Runs by experiment: trainings that differ in nothing but their seeds, and whether two experiments can be compared."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.card import NAME, Card, read_card
from vitreuse.cli.console import local_path
from vitreuse.config import load_config
from vitreuse.data.labels import difference
from vitreuse.files.networks import Target, plain_model, resolve_targets


class Run(NamedTuple):
    """A completed run; its folder is None where only its card was given."""

    card: Card
    folder: Target | None = None


class Series(NamedTuple):
    """One experiment, run once or with several seeds; one row of a table.

    Attributes:
        name: The name of its first run without the seed, with a number where others have that name.
        runs: One per seed, in the order of the seeds.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def card(self) -> Card:
        """The card of the first run, like those of the others in all but the seed and what was measured."""
        return self.runs[0].card

    def correct_images(self) -> np.ndarray:
        """(seeds, images), bool."""
        return np.stack([run.card.correct_images() for run in self.runs])

    def mean(self, key: str) -> float:
        """The mean over the seeds of a number that cards have, such as top1."""
        return float(np.mean([getattr(run.card, key) for run in self.runs]))

    @property
    def top1_sd(self) -> float | None:
        """Standard deviation of top-1 over the seeds, in points; None of one."""
        return float(np.std([run.card.top1 for run in self.runs], ddof=1)) if len(self.runs) > 1 else None


def add_runs(parser: ArgumentParser) -> None:
    """Declares the runs of a command, for read_series."""
    text = "completed run folder, run card, or folder of cards"
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help=text)


def refuse_idle_speed(args: Namespace) -> None:
    """Raises ValueError where it is said how to measure speed, and that it is not to be measured."""
    if args.no_speed and (args.batch_size or args.repeats):
        raise ValueError("--batch-size and --repeats have no effect under --no-speed: leave them out.")


def read_series(paths: Sequence[Path]) -> list[Series]:
    """The runs of completed run folders, of cards and of folders of cards, by experiment, in the order given.

    Raises:
        ValueError: A path leads to no card, or to a seed that another path gives.
    """
    by_experiment: dict[str, list[Run]] = {}
    for path in paths:
        folder = resolve_targets([str(path)])[0] if (path / "config.yaml").exists() else None
        for card in map(read_card, _card_files(path)):
            by_experiment.setdefault(card.experiment, []).append(Run(card, folder))
    counts: Counter[str] = Counter()
    found = []
    for runs in chain.from_iterable(map(_by_name_where_seeds_recur, by_experiment.values())):
        name = runs[0].card.name
        for seed, count in Counter(run.card.seed for run in runs).items():
            if count > 1:
                said = "an unknown seed" if seed is None else f"the seed {seed}"
                raise ValueError(f"{count} runs of {name} have {said}: leave all but one of them out.")
        counts[name] += 1
        numbered = name if counts[name] == 1 else f"{name} ({counts[name]})"
        found.append(Series(numbered, tuple(sorted(runs, key=lambda run: run.card.seed or 0))))
    return found


def _by_name_where_seeds_recur(runs: list[Run]) -> list[list[Run]]:
    """The runs of an experiment as one list; of each name apart where a seed is there twice, as of models whose
    training nothing is known of."""
    if len({run.card.seed for run in runs}) == len(runs):
        return [runs]
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.card.name, []).append(run)
    return [*by_name.values()]


def _card_files(path: Path) -> list[Path]:
    """The card of a completed run folder, those of a folder of cards, or the file itself."""
    if not path.is_dir():
        return [path]
    if (path / NAME).exists():
        return [path / NAME]
    if (path / "config.yaml").exists():
        raise ValueError(f"{path} has no {NAME}: {_way_to_a_card(path)}")
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path} is neither a run folder nor one of run cards: give one that python -m train wrote.")
    return files


def _way_to_a_card(run_dir: Path) -> str:
    try:
        status = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["status"]
        if not load_config(run_dir / "config.yaml").train.reads_labels:
            return "its training read no labels, so that nothing is known of accuracy; eval knn measures its features."
    except (OSError, ValueError, LookupError):
        return "it has no whole run.json either, go on with python -m train."
    if status == "completed":
        return "an older version of this code left it; train it again, in another run_dir=PATH."
    return f"the run is not completed but {status}, go on with python -m train."


def check_same_images(series: Sequence[Series]) -> None:
    """Refuses cards that cannot be compared image by image.

    Raises:
        ValueError: They were measured on different images, or on images of different classes.
    """
    cards = [same.card for same in series]
    first, named = cards[0], [(card.name, card.class_names) for card in cards if card.class_names is not None]
    for card in cards:
        if card.set_digest != first.set_digest:
            raise ValueError(
                f"{first.name} was measured on {first.n:,} images of {first.data} and {card.name} on {card.n:,} others "
                f"of {card.data}: they cannot be compared image by image, measure both on one set."
            )
        if card.counted != first.counted:
            ways = (f"{each.name} as {each.counted or 'plain images'}" for each in (first, card))
            raise ValueError(
                f"images were counted in two ways, {' and '.join(ways)}: measure both with the same --set."
            )
    for name, classes in named:
        whose, known = named[0]
        if classes != known:
            raise ValueError(
                f"the images of {name} are of classes {difference(classes, known, whose)}: measure both on one set, "
                "with eval top1 --by-number if the classes are the same under other names."
            )


def recipe_changes(before: Card, after: Card) -> list[str]:
    """The settings of the training that differ, as `train.epochs 40 -> 80`; an unknown recipe equals no other."""
    if before.recipe is None or after.recipe is None:
        return [f"the recipe of {card.name} is unknown" for card in (before, after) if card.recipe is None]
    return _changes(before.recipe, after.recipe)


def model_changes(before: Card, after: Card) -> list[str]:
    """What differs between two models beside what their plans say: size and keywords."""
    settings = [{"model": plain_model(card.model_config()).name, **card.model["keywords"]} for card in (before, after)]
    return _changes(*settings)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    pairs = ((key, before.get(key), after.get(key)) for key in {**before, **after})
    return [f"{key} {old} -> {new}" for key, old, new in pairs if old != new]
