"""What a model said of each image of a set, and the accuracies that follow from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.table import csv_text
from vitreuse.cost.measure import top_classes
from vitreuse.io.durable import write_durably
from vitreuse.io.file_names import to_bytes

NUM_BINS = 15  # of confidence, as Guo et al. have them


class Answers(NamedTuple):
    """What a model said of some images, with the keys of their samples and their labels.

    Attributes:
        labels: (B,), int64; or (B, L) where an image has several, of which some may stand in a row twice.
        classes: (B, 5), or as many as there are; the most probable first, -1 where a logit is NaN, and in the
            place of a class that no neighbour votes for.
        probabilities: (B,), float32, of the first class; 0 where a logit is NaN.
        losses: (B,), float32, cross-entropy of the label in nats; None where an image has several labels, or what was
            said are no logits.
    """

    keys: Sequence[str]
    labels: Tensor
    classes: Tensor
    probabilities: Tensor
    losses: Tensor | None = None


def answers(logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Answers:
    """What logits (B, classes) say of images with the labels (B,) or (B, L), on the CPU.

    Raises:
        ValueError: A label is not one of the classes.
    """
    low, high, num_classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels run from {low} to {high}, but the model has {num_classes} classes: give it more.")
    probabilities = logits.float().softmax(1).amax(1).nan_to_num(0.0)
    losses = None
    if labels.ndim == 1:
        losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none").cpu()
    return Answers(keys, labels, top_classes(logits).cpu(), probabilities.cpu(), losses)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The answers for a whole set, each image once, in the set's order."""

    keys: tuple[str, ...]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray | None = None

    @classmethod
    def of(cls, batches: Sequence[Answers]) -> Predictions:
        """All batches of a set, in order."""
        keys, labels, classes, probabilities, losses = zip(*batches, strict=True)
        parts = (torch.cat(part).numpy() for part in (labels, classes, probabilities))
        known = None if any(part is None for part in losses) else torch.cat(losses).numpy()
        return cls(tuple(key for batch in keys for key in batch), *parts, losses=known)

    @property
    def n(self) -> int:
        """How many images."""
        return len(self.keys)

    @property
    def num_not_finite(self) -> int:
        """How many images got logits of which one is NaN or infinite, so that they have no probabilities."""
        return int((self.probabilities == 0).sum())

    @property
    def is_correct(self) -> np.ndarray:
        """(n,), bool: whether the first class is the label, or one of them."""
        return self._hits[:, 0]

    @property
    def top1(self) -> float:
        """Percent of the images whose label, or one of them, comes first."""
        return 100 * int(self.is_correct.sum()) / self.n

    @property
    def top5(self) -> float:
        """Percent of the images whose label, or one of them, is among the first five."""
        return 100 * int(self._hits.any(1).sum()) / self.n

    @property
    def _hits(self) -> np.ndarray:
        """(n, 5), bool: whether a class is a label of the image."""
        return (self.classes[:, :, None] == self.labels.reshape(self.n, 1, -1)).any(2)

    @property
    def loss(self) -> float | None:
        """The mean cross-entropy of the labels, in nats."""
        return None if self.losses is None else float(self.losses.astype(np.float64).mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: |confidence - accuracy| by bin of confidence, weighted by its images.

        Paper: Guo et al., On Calibration of Modern Neural Networks, 1706.04599.
        """
        bins = np.minimum((self.probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
        gaps = np.bincount(bins, self.probabilities - self.is_correct, minlength=NUM_BINS)
        return 100 * float(np.abs(gaps).sum()) / self.n

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers that a record of an evaluation holds."""
        return {"n": self.n, "top1": self.top1, "top5": self.top5, "calibration_error": self.calibration_error}

    @property
    def set_digest(self) -> str:
        """SHA-256 of keys and labels: predictions of equal digest can be compared image by image."""
        lines = (f"{key}\t{label}\n" for key, label in zip(self.keys, self._label_texts(), strict=True))
        return hashlib.sha256(to_bytes("".join(lines))).hexdigest()

    def _label_texts(self) -> list[str]:
        """The label of each image, or its labels."""
        rows = self.labels.reshape(self.n, -1).tolist()
        return [" ".join(map(str, dict.fromkeys(row))) for row in rows]

    def by_class(self) -> list[tuple[int, int, int]]:
        """Each class that is a label, how many images have it, and on how many of them the model is right."""
        images = np.repeat(np.arange(self.n), self.labels.size // self.n)
        images, labels = np.unique(np.stack([images, self.labels.ravel()]), axis=1)
        counts, correct = np.bincount(labels), np.bincount(labels[self.is_correct[images]], minlength=labels.max() + 1)
        return [(number, int(counts[number]), int(correct[number])) for number in np.flatnonzero(counts).tolist()]

    def to_csv(self) -> str:
        """A line per image: its key and label, or labels, the probability of the first class, and the first five."""
        columns = zip(self.keys, self._label_texts(), self.probabilities.tolist(), self.classes.tolist(), strict=True)
        lines = ((key, label, f"{share:.6f}", " ".join(map(str, classes))) for key, label, share, classes in columns)
        return csv_text([("key", "label", "probability", "top5"), *lines])


def write_tables(stem: Path, found: Predictions, class_names: Sequence[str]) -> None:
    """Writes STEM.predictions.csv, a line per image, and STEM.classes.csv, how many of each class are right."""
    lines = [(number, class_names[number], n, right, 100 * right / n) for number, n, right in found.by_class()]
    classes = csv_text([("class", "name", "n", "correct", "accuracy"), *lines])
    for name, text in (("predictions", found.to_csv()), ("classes", classes)):
        write_durably(Path(f"{stem}.{name}.csv"), to_bytes(text))
