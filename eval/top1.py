"""Top-1 and top-5 accuracy, every image counted exactly once under any number of ranks.

With -o DIR, of each target LABEL and, where one is given, --set NAME:
DIR/LABEL[.NAME].predictions.csv   a line per image
                .classes.csv       a line per class: its images, and how many of them are right
                .card.json         see card.py
A corrupted split stands for NAME as CORRUPTION-SEVERITY.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from eval import sets
from eval.card import Card, make_card, read_card
from eval.distributed import Ranks, joined
from eval.labelled import (
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
from eval.predictions import Answers, Predictions, answers, write_tables
from eval.sets import NUM_CLASSES, SETS
from eval.table import Column, to_rich
from vitreuse.cli.console import add_image_size, add_output
from vitreuse.config import EvalConfig
from vitreuse.cost.measure import describe_machine
from vitreuse.data import find_split
from vitreuse.files.networks import Target, resolve_targets
from vitreuse.io.durable import writable_folder
from vitreuse.io.file_names import for_terminal, stem_of
from vitreuse.io.urls import refuse_url, url_kind
from vitreuse.model.class_names import has_classes, names_of
from vitreuse.model.copies import evaluating
from vitreuse.model.preprocessing import evaluation_transform

SPLIT = "val"
HELP = "accuracy of run folders, or of a model name with --data and --checkpoint or --pretrained"
COLUMNS = (
    Column("name", "name"),
    Column("data", "data"),
    Column("set", "set"),
    Column("n", "images", ",d"),
    Column("top1", "top-1 (%)", ".2f"),
    Column("top5", "top-5 (%)", ".2f"),
    Column("calibration_error", "calibration error (%)", ".2f"),
)


def evaluate(
    model: nn.Module,
    share: Share,
    precision: torch.dtype = torch.float32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Predictions:
    """What a model says of a data set, of which each rank has a share; its mode is restored.

    Several ranks call this together, with their models on their devices, and every rank returns the same.

    Args:
        precision: Of products, by torch.autocast; float32 is without, and without TF32.

    Raises:
        ValueError: The ranks together did not answer each image once, or a label is none of the model's classes.
    """

    def answer(images: Tensor, labels: Tensor, keys: Sequence[str]) -> Answers:
        with evaluated_in(precision, images.device):
            logits = model(images)[: len(keys)]
        return answers(logits, labels, keys)

    with evaluating(model):
        return Predictions.of(share.answered(answer, progress))


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run folder, config or model name")
    add_data(parser, "SPLIT/")
    parser.add_argument("--split", default=SPLIT, help="default: %(default)s")
    parser.add_argument("--set", choices=SETS, help="ImageNet's set that it is, with classes by name; default: none")
    parser.add_argument("--subset", action="store_true", help="not all of the set's images need be there")
    text = "take labels for the numbers of the model's classes, whatever the names of both"
    parser.add_argument("--by-number", action="store_true", help=text)
    add_weights(parser)
    add_output(parser, "write predictions, classes and card of each target")
    add_image_size(parser)
    add_batches(parser)


def run(args: Namespace) -> dict[str, Any]:
    """Accuracy of every target; under torchrun each rank evaluates its share.

    Raises:
        ValueError: A target, its data or its weights cannot be used; under several ranks see Ranks.together.
    """
    with joined(args.device) as ranks:
        with ranks.together():
            if args.subset and args.set is None:
                raise ValueError("--subset has no effect without --set, which says how many images there are.")
            targets = [target.at(args.image_size) for target in resolve_targets(args.targets)]
            refuse_idle(args, targets)
            refuse_unready(targets, args)
            if args.output is not None:
                writable_folder(args.output)
        return {"command": "top1", "rows": [row for target in targets for row in _rows(target, args, ranks)]}


def _rows(target: Target, args: Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """One row; of corrupted images one for each corruption and severity, and their mean."""
    with ranks.together():
        root, model = data_root(target, args), load(target, args)
        if not has_classes(model):
            raise ValueError(
                f"{target.label} has no head, so that nothing it says is a class: python -m eval knn measures features."
            )
        if args.set is not None and model.num_classes != NUM_CLASSES:
            raise ValueError(
                f"--set {args.set} needs a model of ImageNet's {NUM_CLASSES:,} classes, {target.label} has "
                f"{model.num_classes}: leave it out for classes of your own."
            )
        splits = [""]
        if args.set == "corruptions":
            refuse_url("corruptions", root)
            splits = sets.corrupted_splits(Path(root, args.split), whole=not args.subset)
    model.to(ranks.device)
    rows = [_row(target, model, root, split, args, ranks) for split in splits]
    return [*rows, _mean_row(rows, Path(root, args.split), args.subset)] if args.set == "corruptions" else rows


def _row(target: Target, model: Any, root: str, part: str, args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """The row of a split or, where it has corrupted parts, of one of them."""
    split = str(Path(args.split, part))
    with ranks.together():
        test_set = _open(target, model, root, split, args)
    data = root if url_kind(root) else str(find_split(Path(root), split) or Path(root, split))
    if args.output is not None:
        with ranks.together():
            _refuse_other(_stem(target, part, args), data)
    # As timm has it for a name of its own, as the run had it for a run; corrupted images are cropped already.
    crop_pct = 1.0 if args.set == "corruptions" else None
    share = share_of(test_set.images, evaluation_transform(model, crop_pct, target.config is None), args, ranks)
    answering = model if args.set is None else sets.Among(model, test_set.classes, test_set.order)
    found = evaluate(answering, share, getattr(torch, _precision(target)), shown(target, ranks))
    title = " ".join(filter(None, (test_set.title, part))) or None
    row = {"name": target.label, "data": data, "set": title, "remark": test_set.remark}
    row |= {"training": unfinished(target, args), **found.figures}
    with ranks.together():
        if found.num_not_finite:
            raise ValueError(
                f"{target.label} gives {found.num_not_finite} of {found.n} images logits that are not finite, so that "
                "no accuracy would mean anything: look at its weights, or at these images."
            )
        if args.output is not None and ranks.is_main:
            stem = _stem(target, part, args)
            write_tables(stem, found, test_set.class_names)
            _card(target, model, row, found, args, ranks).write(Path(f"{stem}.card.json"))
    return row


def _stem(target: Target, part: str, args: Namespace) -> Path:
    """Of the files of a row, in the output folder."""
    of_set = part or args.set or (args.split if args.split != SPLIT else None)
    of_size = None if args.image_size is None else f"{args.image_size}px"
    return args.output / stem_of(target.label, of_set, of_size)


def _refuse_other(stem: Path, data: str) -> None:
    """Raises ValueError where the card that would be written is there, and of other images."""
    path = Path(f"{stem}.card.json")
    if path.exists() and (measured := read_card(path).data) != data:
        raise ValueError(f"{path} is of {measured} and would be replaced by that of {data}: give another -o DIR.")


def _open(target: Target, model: Any, root: str, split: str, args: Namespace) -> sets.TestSet:
    dataset, names = open_for(target, model, root, split, args), _class_names(model, args)
    if args.set is not None:
        test_set = sets.named_set(SETS[args.set], dataset, whole=not args.subset)
        return test_set if names is None else test_set._replace(order=sets.imagenet_order(names, target.label))
    if names is not None:
        return sets.matched_set(dataset, names, target.label)
    return sets.plain_set(dataset, model.num_classes, is_own=args.data is None and not args.by_number)


def _class_names(model: Any, args: Namespace) -> Sequence[str] | None:
    """The names by which labels go; None where they go by number."""
    return None if args.by_number else names_of(model)


def _card(target: Target, model: Any, row: dict[str, Any], found: Predictions, args: Namespace, ranks: Ranks) -> Card:
    weights = "timm" if args.pretrained else str(args.checkpoint or target.run_dir or target.hub_dir)
    facts = {"weights": weights, "set": row["set"], "training": row["training"], "precision": _precision(target)}
    facts |= describe_machine(ranks.device)
    training = None if target.run_dir is None or args.checkpoint is not None else target.config
    names = _class_names(model, args)
    return make_card(target.label, target.settings_of(model), row["data"], found, facts, training, names)


def _precision(target: Target) -> str:
    """In which a target is evaluated: as its run was, or in float32."""
    return EvalConfig.precision if target.config is None else target.config.eval.precision


def _mean_row(rows: Sequence[dict[str, Any]], folder: Path, is_part: bool) -> dict[str, Any]:
    """The mean over all corruptions and severities, with the corruption error where these are the whole set."""
    means = {key: mean(row[key] for row in rows) for key in ("top1", "top5", "calibration_error")}
    top1 = {str(Path(row["data"]).relative_to(folder)): row["top1"] for row in rows}
    title = f"mean of {len(rows)}{' (part)' if is_part else ''}"
    counts = {"set": title, "remark": None, "n": sum(row["n"] for row in rows)}
    mce = None if is_part else sets.mean_corruption_error(top1)
    return {"name": rows[0]["name"], "data": str(folder), **counts, **means, "mce": mce}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as a table for the terminal."""
    rows = result["rows"]
    if "mce" in rows[-1]:
        return to_rich([{"mce": None, **row} for row in rows], (*COLUMNS, Column("mce", "mCE (%)", ".2f")))
    remarks = [f"{row['name']}: {row[key]}" for row in rows for key in ("remark", "training") if row[key]]
    return to_rich(rows, COLUMNS, for_terminal("; ".join(remarks)) or None)
