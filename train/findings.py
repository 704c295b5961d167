"""What the images that nobody trains on say of a model: its accuracy or, where no label is read, its likeness to a
teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eval.distributed import Ranks
from eval.labelled import Labelled, Share
from eval.precision import evaluated_in
from eval.predictions import Predictions
from eval.top1 import evaluate
from train.distill import Teacher
from train.pipeline import ignore_stop_signals
from train.sharding import unsharded
from vitreuse.compress.fidelity import token_cosines, worst_tenth
from vitreuse.config import Config
from vitreuse.model.copies import evaluating
from vitreuse.model.preprocessing import evaluation_transform


class DivergedError(RuntimeError):
    """Training that leads nowhere: weights, logits, or the losses and gradients of many steps, are not finite."""


class Findings(NamedTuple):
    """What was found of a model.

    Attributes:
        figures: All numbers, by the names under which records hold them.
        name: Of the one by which models are compared, of which more is better.
        form: The words for that one.
        predictions: What the model says of each image; None where no label is read.
    """

    figures: Mapping[str, float]
    name: str
    form: str
    predictions: Predictions | None = None

    @property
    def score(self) -> float:
        """The figure by which models are compared."""
        return self.figures[self.name]

    @property
    def text(self) -> str:
        """The score in words."""
        return self.form.format(self.score)


Look = Callable[[nn.Module], Findings]


def validation_share(config: Config, model: nn.Module, val_set: Labelled, ranks: Ranks) -> Share:
    """This rank's share of the validation set as an experiment reads it."""
    transform = evaluation_transform(model, config.eval.crop_pct)
    return Share(
        val_set,
        transform=transform.to_bytes,
        prepare=transform.normalize,
        ranks=ranks,
        batch_size=config.eval.batch_size,
        num_workers=config.data.num_workers,
        worker_init_fn=ignore_stop_signals,
        fills_up=config.train.compile,
    )


def look(config: Config, model: nn.Module, teacher: Teacher | None, share: Share) -> Findings:
    """What is found of a model on the validation set as an experiment measures it, by all ranks together.

    Args:
        teacher: What the model's features are compared with; None where labels are read.

    Raises:
        DivergedError: Of some images it says nothing: its logits or features are not finite.
    """
    precision = getattr(torch, config.eval.precision)
    with unsharded(model):
        if teacher is not None:
            return _alikeness(model, teacher, share, precision)
        found = evaluate(model, share, precision)
    if found.num_not_finite:
        raise _diverged(f"the logits of {found.num_not_finite} of {found.n} validation images are")
    figures = found.figures if found.loss is None else {**found.figures, "val_loss": found.loss}
    return Findings(figures, "top1", "top-1 {:.2f} %", found)


def _alikeness(model: Any, teacher: Teacher, share: Share, precision: torch.dtype) -> Findings:
    """The cosines of a model's features with its teacher's."""

    def compare(images: Tensor, _: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        with evaluated_in(precision, images.device):
            cosines = token_cosines(teacher.model, teacher.tokens(images), model, model.forward_features(images))
        return {name: values[: len(keys)].cpu() for name, values in cosines.items()}

    with evaluating(model):
        batches = share.answered(compare)
    columns = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
    means = {name: float(column.mean()) for name, column in columns.items()}
    if not all(column.isfinite().all() for column in columns.values()):
        raise _diverged("the features of some validation images are")
    worst = {f"worst_{name}": worst_tenth(column) for name, column in columns.items()}
    figures = {"n": len(share.dataset), **means, **worst, "mean_cosine": sum(means.values()) / len(means)}
    return Findings(figures, "mean_cosine", "mean cosine {:.4f}")


def _diverged(what: str) -> DivergedError:
    cure = "look at these images, or lower train.optimizer.lr in another run folder (run_dir=PATH)"
    return DivergedError(f"{what} not finite, so that no figure would mean anything: {cure}.")
