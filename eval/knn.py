"""Accuracy of features: each image is what the images of the training split that are most like it are, weighted.

It needs no head and trains nothing. The training split's features are the memory; an image's votes are those of its k
nearest by cosine similarity, each for its class with the weight exp(similarity / temperature).
Paper: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), 2104.14294.

Here Q images ask M images of the memory, by features of C numbers.
"""

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from torch import Tensor

from eval.distributed import CPU, Ranks, joined
from eval.flops import add_targets
from eval.labelled import (
    Labelled,
    Share,
    add_batches,
    add_data,
    add_weights,
    data_root,
    load,
    open_for,
    refuse_idle,
    refuse_unready,
    share_of,
    shown,
    unfinished,
)
from eval.precision import evaluated_in
from eval.predictions import Answers, Predictions, write_tables
from eval.table import Column, to_rich
from vitreuse.cli.console import add_count, add_output
from vitreuse.cost.measure import top_classes
from vitreuse.data import FolderDataset, ShardDataset
from vitreuse.data.labels import numbered_as
from vitreuse.files.networks import Target, resized, resolve_targets
from vitreuse.io.durable import writable_folder
from vitreuse.io.file_names import stem_of
from vitreuse.model.preprocessing import evaluation_transform, image_settings

HELP = "accuracy of features by their nearest neighbours in the training split, for models without a head too"
COLUMNS = (
    Column("name", "name"),
    Column("image_size_px", "px", "d"),
    Column("num_memory", "memory", ",d"),
    Column("n", "images", ",d"),
    Column("num_neighbours", "k", "d"),
    Column("top1", "top-1 (%)", ".2f"),
    Column("top5", "top-5 (%)", ".2f"),
)
MAX_SIMILARITIES = 2**24  # held at a time, with what chooses among them at 20 bytes each


class Features(NamedTuple):
    """What a model would give its head of images: (M, C), float32; their labels (M,) and samples' keys."""

    values: Tensor
    labels: Tensor
    keys: Sequence[str]


def head_input(model: Any, images: Tensor) -> Tensor:
    """What a model of timm would give its head of images, (B, C), and what it answers where it has none.

    Raises:
        ValueError: It pools nothing.
    """
    found = model.forward_features(images)
    if hasattr(model, "forward_head"):  # timm's encoders have none
        found = model.forward_head(found, pre_logits=True)
    if found.ndim != 2:
        shape = " x ".join(map(str, found.shape[1:]))
        raise ValueError(
            f"{type(model).__name__} gives its head {shape} numbers of an image, not one row: change its keywords, "
            "such as global_pool."
        )
    return found.float()


def features(model: Any, share: Share, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Features:
    """The features of a data set, in order, of which each rank has a share, by a model in inference, in float32."""

    def answer(images: Tensor, labels: Tensor, keys: Sequence[str]) -> Features:
        with evaluated_in(torch.float32, images.device):
            return Features(head_input(model, images).cpu(), labels, keys)

    found = share.answered(answer, progress)
    values, labels, keys = zip(*found, strict=True)
    return Features(torch.cat(values), torch.cat(labels), [key for batch in keys for key in batch])


def knn_votes(
    memory: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The votes for each class, relative to that of the nearest neighbour: exp((similarity - nearest's) / temperature).

    Similarities are cosines, computed in float64 and compared in float32: of equally similar neighbours the first in
    the memory vote. Votes are added from the nearest on, so that classes of the same weights have the same votes.

    Args:
        memory: (M, C), features of any length.
        labels: (M,), the class of each, below num_classes.
        queries: (Q, C).
        num_neighbours: How many vote, at most M.

    Returns:
        (Q, num_classes), float64; 0 for a class that no neighbour has.
    """
    memory, queries = _units(memory), _units(queries)
    votes = queries.new_zeros(len(queries), num_classes)
    num_rows = max(1, MAX_SIMILARITIES // len(memory))
    for asking, found in zip(queries.split(num_rows), votes.split(num_rows), strict=True):
        similarities, numbers = _nearest(memory, asking, num_neighbours)
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        for own, weight in zip(labels[numbers].split(1, 1), weights.split(1, 1), strict=True):
            found.scatter_add_(1, own, weight)
    return votes


def _units(features: Tensor) -> Tensor:
    """Features as float64 of length 1; zeros stay zeros."""
    found = features.to(torch.float64, copy=True)
    return found.div_(found.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(found.dtype).tiny))


def _nearest(memory: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities (Q, k) in float64, the largest first, and their places in the memory (Q, k).

    topk promises no order among equals, so that it only says which similarity is the least. A product in float32 gives
    equal rows of the memory similarities that differ in their last bit where it has one or two queries.
    """
    similarities = (queries @ memory.T).float()
    least = similarities.topk(k).values[:, -1:]
    is_above, is_least = similarities > least, similarities == least
    num_free = k - is_above.sum(1, keepdim=True)
    is_nearest = is_above | (is_least & (is_least.cumsum(1, dtype=torch.int32) <= num_free))
    numbers = is_nearest.nonzero()[:, 1].view(len(queries), k)  # each row's in the memory's order
    values, order = similarities.gather(1, numbers).sort(dim=1, descending=True, stable=True)
    return values.double(), numbers.gather(1, order)


def predict(
    memory: Features,
    queries: Features,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    device: torch.device = CPU,
) -> Predictions:
    """What the memory says of queries: classes by their votes, of equal ones the lower; probabilities are their shares.

    A class without a vote is no answer: -1 stands for it.
    """
    known, labels, asked = (part.to(device) for part in (memory.values, memory.labels, queries.values))
    votes = knn_votes(known, labels, asked, num_classes, num_neighbours, temperature)
    classes = top_classes(votes)
    shares = votes.gather(1, classes) / votes.sum(1, keepdim=True)
    classes = classes.masked_fill(shares == 0, -1)
    return Predictions.of([Answers(queries.keys, queries.labels, classes.cpu(), shares[:, 0].float().cpu())])


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    add_targets(parser, "evaluate")
    add_data(parser, "both splits")
    parser.add_argument("--train-split", default="train", metavar="NAME", help="the memory; default: %(default)s")
    parser.add_argument("--split", default="val", metavar="NAME", help="what is classified; default: %(default)s")
    add_count(parser, "--neighbours", 20, "how many vote on an image")
    text = "of the weights exp(similarity / T); default: %(default)s"
    parser.add_argument("--temperature", type=_temperature, default=0.07, metavar="T", help=text)
    add_weights(parser)
    add_output(parser, "write predictions and classes of each target")
    add_batches(parser)


def _temperature(text: str) -> float:
    """A number above 0, from the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text} is not a number above 0")
    return number


def run(args: Namespace) -> dict[str, Any]:
    """Accuracy of every target at every image size; under torchrun each rank computes its share of the features.

    Raises:
        ValueError: A target, its data or its weights cannot be used; under several ranks see Ranks.together.
    """
    sizes = args.image_size or [None]
    with joined(args.device) as ranks:
        with ranks.together():
            targets = resolve_targets(args.targets, args.plan, sizes)
            refuse_idle(args, targets)
            refuse_unready(targets, args)
            if args.output is not None:
                writable_folder(args.output)
        rows = [_row(target, size, args, ranks) for target, size in product(targets, sizes)]
    return {"command": "knn", "rows": rows}


class Splits(NamedTuple):
    """The two splits of a data set, under the memory's labels."""

    memory: ShardDataset | FolderDataset
    queries: Labelled


def _row(target: Target, image_size_px: int | None, args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """The row of a target at an image size."""
    target = replace(target, model=resized(target.model, image_size_px))
    with ranks.together():
        root, model = data_root(target, args), load(target, args)
        splits = _open_splits(target, model, root, args)
    model.to(ranks.device).eval()
    memory, queries = (_features_of(split, target, model, args, ranks) for split in splits)
    class_names = splits.memory.class_names
    with ranks.together():
        found = predict(memory, queries, len(class_names), args.neighbours, args.temperature, ranks.device)
        if args.output is not None and ranks.is_main:
            size = None if image_size_px is None else f"{image_size_px}px"
            write_tables(args.output / stem_of(target.label, size, "knn"), found, class_names)
    return {
        "name": target.label,
        "plan": str(model.plan) if hasattr(model, "plan") else None,
        "data": root,
        "image_size_px": list(image_settings(model, target.config is None)["input_size"][-2:]),
        "training": unfinished(target, args),
        "num_memory": len(memory.keys),
        "num_neighbours": args.neighbours,
        "temperature": args.temperature,
        "n": found.n,
        "top1": found.top1,
        "top5": found.top5 if len(class_names) >= 5 else None,
    }


def _open_splits(target: Target, model: Any, root: str, args: Namespace) -> Splits:
    """Both splits, opened for a model.

    Raises:
        ValueError: They are one, the memory is too small, or it lacks a class.
    """
    memory, queries = (open_for(target, model, root, split, args) for split in (args.train_split, args.split))
    if memory.folder == queries.folder:
        raise ValueError(
            f"{memory.folder} is both memory and what is classified, so that each image would find itself: give "
            "another --split or --train-split."
        )
    if len(memory) < args.neighbours:
        raise ValueError(
            f"--neighbours {args.neighbours} is more than the {len(memory)} images of {memory.folder}: give at most "
            f"{len(memory)}, or more images."
        )
    way_out = "no neighbour has such a class: add it to the memory, or leave it out"
    return Splits(memory, numbered_as(queries, memory.class_names, str(memory.folder), way_out))


def _features_of(split: Labelled, target: Target, model: Any, args: Namespace, ranks: Ranks) -> Features:
    """The features of a split, by the evaluation's transform, as the target is evaluated otherwise.

    Raises:
        ValueError: Some are not finite.
    """
    transform = evaluation_transform(model, use_test_size=target.config is None)
    found = features(model, share_of(split, transform, args, ranks), shown(target, ranks))
    num_wrong = int((~found.values.isfinite().all(1)).sum())
    with ranks.together():
        if num_wrong:
            raise ValueError(
                f"{target.label} gives {num_wrong} of {len(found.keys)} images features that are not finite, so that "
                "nothing is near them: look at its weights, or at these images."
            )
    return found


def render(result: dict[str, Any]) -> RenderableType:
    """The result as a table for the terminal."""
    rows = result["rows"]
    weight = f"exp(cosine / {rows[0]['temperature']:g})"
    return to_rich(rows, COLUMNS, f"memory: images of the training split, of which the k nearest vote by {weight}.")
