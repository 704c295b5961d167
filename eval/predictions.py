"""What a model said of each image of a set, and the accuracies that follow from it."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitreuse.measure import top_classes

NUM_BINS = 15  # of confidence, as Guo et al. have them


class Answers(NamedTuple):
    """Of some images: their labels and keys, and what a model said of them.

    Attributes:
        keys: Of the samples.
        labels: (B,), int64.
        classes: (B, 5), or as many as there are; the most probable first, -1 where a logit is NaN.
        probabilities: (B,), float32, of the first class; 0 where a logit is NaN.
    """

    keys: Sequence[str]
    labels: Tensor
    classes: Tensor
    probabilities: Tensor


def answers(logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Answers:
    """What logits (B, classes) say, on the CPU.

    Raises:
        ValueError: a label is not one of the classes.
    """
    num_classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels run from {low} to {high}, but the model has {num_classes} classes: give it more.")
    probabilities = logits.float().softmax(1).amax(1).nan_to_num(0.0)
    return Answers(keys, labels, top_classes(logits).cpu(), probabilities.cpu())


@dataclass(frozen=True, eq=False)
class Predictions:
    """The answers for a whole set, each image once, in the set's order."""

    keys: tuple[str, ...]
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, batches: Sequence[Answers]) -> Predictions:
        """All batches of a set, in order."""
        keys, labels, classes, probabilities = zip(*batches, strict=True)
        parts = (torch.cat(part).numpy() for part in (labels, classes, probabilities))
        return cls(tuple(key for batch in keys for key in batch), *parts)

    @property
    def n(self) -> int:
        """How many images."""
        return len(self.keys)

    @property
    def is_correct(self) -> np.ndarray:
        """(n,), bool: whether the first class is the label."""
        return self.classes[:, 0] == self.labels

    @property
    def top1(self) -> float:
        """Percent of the images whose label comes first."""
        return 100 * int(self.is_correct.sum()) / self.n

    @property
    def top5(self) -> float:
        """Percent of the images whose label is among the first five."""
        return 100 * int((self.classes == self.labels[:, None]).any(1).sum()) / self.n

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: |confidence - accuracy| by bin of confidence, weighted by its images.

        Paper: Guo et al., On Calibration of Modern Neural Networks, 1706.04599.
        """
        bins = np.minimum((self.probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
        gaps = np.bincount(bins, self.probabilities - self.is_correct, minlength=NUM_BINS)
        return 100 * float(np.abs(gaps).sum()) / self.n

    @property
    def set_digest(self) -> str:
        """SHA-256 of keys and labels: predictions of equal digest can be compared image by image."""
        lines = (f"{key}\t{label}\n" for key, label in zip(self.keys, self.labels.tolist(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_csv(self) -> str:
        """A line per image: its key and label, the probability of the first class, and the first five."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("key", "label", "probability", "top5"))
        columns = (self.labels.tolist(), self.probabilities.tolist(), self.classes.tolist())
        for key, label, probability, classes in zip(self.keys, *columns, strict=True):
            writer.writerow((key, label, f"{probability:.6f}", " ".join(map(str, classes))))
        return stream.getvalue()
