"""Run cards by model: trainings that differ in nothing but their seeds, and whether two models can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.card import NAME, Card, read_card
from vitreuse.targets import plain_model


@dataclass(frozen=True)
class Series:
    """One model, trained once or with several seeds; one row of a table.

    Attributes:
        cards: One per seed, in the order of the seeds.
    """

    cards: tuple[Card, ...]

    @property
    def card(self) -> Card:
        """What stands in all of them alike: anything but the seed and what was measured."""
        return self.cards[0]

    @property
    def name(self) -> str:
        """Of the runs, without the seed."""
        return self.card.name

    def correct_images(self) -> np.ndarray:
        """(seeds, images), bool."""
        return np.stack([card.correct_images() for card in self.cards])

    @property
    def top1(self) -> float:
        """Percent, mean over the seeds."""
        return self._mean("top1")

    @property
    def top1_sd(self) -> float | None:
        """Standard deviation of top-1 over the seeds, in points; None of one."""
        return float(np.std([card.top1 for card in self.cards], ddof=1)) if len(self.cards) > 1 else None

    @property
    def top5(self) -> float:
        """Percent, mean over the seeds."""
        return self._mean("top5")

    @property
    def calibration_error(self) -> float:
        """Percent, mean over the seeds."""
        return self._mean("calibration_error")

    def _mean(self, key: str) -> float:
        return float(np.mean([getattr(card, key) for card in self.cards]))


def read_series(paths: Sequence[Path]) -> list[Series]:
    """The cards of completed run folders, of files and of folders of such files, by name, in the order given.

    Raises:
        ValueError: A path leads to no card, or cards of one name differ in more than the seed, or not even in that.
    """
    by_name: dict[str, list[tuple[Path, Card]]] = {}
    for path in (file for given in paths for file in card_files(given)):
        card = read_card(path)
        by_name.setdefault(card.name, []).append((path, card))
    for found in by_name.values():
        for number, (path, card) in enumerate(found):
            for other_path, other in found[:number]:
                _check_alike(other_path, other, path, card)
    cards = ([card for _, card in found] for found in by_name.values())
    return [Series(tuple(sorted(same, key=lambda card: card.seed or 0))) for same in cards]


def card_files(path: Path) -> list[Path]:
    """The card of a completed run folder, those of a folder of cards, or the file itself.

    Raises:
        ValueError: It is a folder without a card; it says how to get one.
    """
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
    except (OSError, ValueError, LookupError):
        return "it has no whole run.json either, go on with python -m train."
    if status == "completed":
        return "an older version of this code left it; train it again, in another run_dir=PATH."
    return f"the run is not completed but {status}, go on with python -m train."


def _check_alike(path: Path, card: Card, other_path: Path, other: Card) -> None:
    """Refuses two cards of one name that are not of two seeds of the same model."""
    changes = [*_changes(card.model, other.model), *recipe_changes(card, other)]
    if changes:
        raise ValueError(
            f"{path} and {other_path} are both named {card.name} but differ in more than the seed "
            f"({'; '.join(changes)}): give one of them another name, in its card."
        )
    if card.seed == other.seed:
        seed = "an unknown seed" if card.seed is None else f"seed {card.seed}"
        raise ValueError(f"{path} and {other_path} are both {seed} of {card.name}: leave one of them out.")


def check_same_images(series: Sequence[Series]) -> None:
    """Refuses cards that cannot be compared image by image.

    Raises:
        ValueError: They were measured on different images.
    """
    first, *others = [card for same in series for card in same.cards]
    for card in others:
        if card.set_digest != first.set_digest:
            raise ValueError(
                f"{first.name} was measured on {first.n:,} images of {first.data} and {card.name} on {card.n:,} others "
                f"of {card.data}: they cannot be compared image by image, measure both on one set."
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
    keys = [*before, *(key for key in after if key not in before)]
    pairs = ((key, before.get(key), after.get(key)) for key in keys)
    return [f"{key} {old} -> {new}" for key, old, new in pairs if old != new]
