"""Top-1 and top-5 accuracy, every image counted exactly once under any number of ranks.

With -o DIR, of each target LABEL and, where one is given, --set NAME:
DIR/LABEL[.NAME].predictions.csv   a line per image
                .classes.csv       a line per class: its images, and how many of them are right
                .card.json         see card.py
A corrupted split stands for NAME as CORRUPTION-SEVERITY.
"""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from eval import sets
from eval.card import Card, make_card
from eval.distributed import Ranks, joined
from eval.predictions import Answers, Predictions, answers
from eval.sets import NUM_CLASSES, SETS, Labelled
from eval.table import Column, csv_text, to_rich
from vitreuse.cli.console import add_allow, add_count, add_image_size, add_output, local_path
from vitreuse.config import DataConfig
from vitreuse.cost.measure import describe_machine
from vitreuse.data import find_split, open_split, prepare_source
from vitreuse.export.networks import Target, resolve_targets
from vitreuse.io.durable import write_durably
from vitreuse.io.file_names import for_terminal, printable, to_bytes
from vitreuse.io.process import print_note
from vitreuse.io.urls import refuse_idle_allow, refuse_url, url_kind
from vitreuse.model.class_names import names_of
from vitreuse.model.preprocessing import Transform, evaluation_transform, image_mode

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
ALONE = Ranks()


def evaluate(
    model: nn.Module,
    dataset: Labelled,
    *,
    transform: Transform,
    ranks: Ranks = ALONE,
    batch_size: int = 256,
    num_workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Predictions:
    """What a model says of a data set: rank r takes batches r, r + world_size, ... and nothing is padded.

    An image is computed in the same batch under any number of ranks, so that they agree to the bit. Several ranks call
    this together, with their models on their devices; their answers are gathered once, at the end, and every rank
    returns the same. A rank may hold no image. The model's mode is restored.

    Raises:
        ValueError: The ranks together did not answer each image once, or a label is none of the model's classes.
    """
    images, batches = _Images(dataset, transform), [*BatchSampler(range(len(dataset)), batch_size, drop_last=False)]
    own = range(ranks.rank, len(batches), ranks.world_size)
    share = [batches[number] for number in own]
    loader = DataLoader(images, batch_sampler=share, num_workers=num_workers, worker_init_fn=worker_init_fn)
    found: list[tuple[int, Answers]] = []  # and the number of their batch
    was_training = model.training
    model.eval()
    with ranks.together(), torch.inference_mode():
        ranks.settle()
        for number, (inputs, labels, keys) in zip(own, progress(loader), strict=True):
            found.append((number, answers(model(inputs.to(ranks.device)), labels, keys)))
    model.train(was_training)
    found = sorted(chain(*ranks.gather(found)), key=lambda batch: batch[0])
    numbers = [number for number, _ in found]
    if not numbers or numbers != [*range(len(batches))]:
        raise ValueError(
            f"{ranks.world_size} ranks answered {len(set(numbers))} of {len(batches)} batches, {len(numbers)} in all: "
            "a set must have an image, and each must be answered once."
        )
    return Predictions.of([batch for _, batch in found])


class _Images(Dataset[tuple[Tensor, Any, str]]):
    """A data set's images as the model's inputs."""

    def __init__(self, dataset: Labelled, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, number: int) -> tuple[Tensor, Any, str]:
        image, label, key = self.dataset[number]
        return self.transform(image), label, key


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run folder, config or model name")
    text = "folder with SPLIT/, or its URL; default: the run's own data"
    parser.add_argument("--data", type=os.path.expanduser, metavar="DIR", help=text)
    add_allow(parser)
    parser.add_argument("--split", default="val", help="default: %(default)s")
    parser.add_argument("--set", choices=SETS, help="ImageNet's set that it is, with classes by name; default: none")
    parser.add_argument("--subset", action="store_true", help="not all of the set's images need be there")
    text = "take labels for the numbers of the model's classes, whatever the names of both"
    parser.add_argument("--by-number", action="store_true", help=text)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=local_path, metavar="FILE", help="weights of a name or config")
    weights.add_argument("--pretrained", action="store_true", help="the weights that timm publishes under a name")
    add_output(parser, "write predictions, classes and card of each target")
    add_image_size(parser)
    add_count(parser, "--batch-size", 256, "images per forward pass")
    parser.add_argument("--num-workers", type=int, default=0, help="decoding processes; default: %(default)s")


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
            own = [target.config.data.root for target in targets if target.config]
            refuse_idle_allow(args.allow, [args.data] if args.data else own)
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
        return {"command": "top1", "rows": [row for target in targets for row in _rows(target, args, ranks)]}


def _rows(target: Target, args: Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """One row; of corrupted images one for each corruption and severity, and their mean."""
    with ranks.together():
        root = _own_data(target) if args.data is None else args.data
        model: Any = target.load_pretrained() if args.pretrained else target.load(args.checkpoint)
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
    return [*rows, _mean_row(rows, Path(root, args.split))] if args.set == "corruptions" else rows


def _own_data(target: Target) -> str:
    """The folder or URL of the data that a target was trained on."""
    if target.config is None:
        raise ValueError(f"{target.label} is a model name, which knows no data: give --data DIR.")
    if target.config.data.source is not None:
        prepare_source(target.config.data.source, Path(target.config.data.folder))
    return target.config.data.folder


def _row(target: Target, model: Any, root: str, part: str, args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """The row of a split or, where it has corrupted parts, of one of them."""
    split = str(Path(args.split, part))
    with ranks.together():
        test_set = _open(target, model, root, split, args)
    # As timm has it for a name of its own, as the run had it for a run; corrupted images are cropped already.
    crop_pct = 1.0 if args.set == "corruptions" else target.config and target.config.eval.crop_pct
    label = escape(printable(target.label))
    found = evaluate(
        model if args.set is None else sets.Among(model, test_set.classes, test_set.order),
        test_set.images,
        transform=evaluation_transform(model, crop_pct, use_test_size=target.config is None),
        ranks=ranks,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=partial(track, description=label, console=Console(stderr=True), disable=not ranks.is_main),
    )
    data = root if url_kind(root) else str(find_split(Path(root), split) or Path(root, split))
    training = None if args.checkpoint is not None or args.pretrained else target.unfinished
    row = {"name": target.label, "data": data, "set": test_set.title, "remark": test_set.remark, "training": training}
    row |= found.figures
    with ranks.together():
        if found.num_not_finite:
            raise ValueError(
                f"{target.label} gives {found.num_not_finite} of {found.n} images logits that are not finite, so that "
                "no accuracy would mean anything: look at its weights, or at these images."
            )
        if args.output is not None and ranks.is_main:
            name = part.replace("/", "-") or args.set
            stem = target.label.replace("/", "_") + (f".{name}" if name else "")
            _write(args.output / stem, found, test_set.class_names)
            _card(target, model, row, found, args, ranks).write(args.output / f"{stem}.card.json")
    return row


def _open(target: Target, model: Any, root: str, split: str, args: Namespace) -> sets.TestSet:
    cache_root = DataConfig.cache_root if target.config is None else target.config.data.cache_root
    dataset = open_split(root, split, image_mode(model), cache_root=cache_root, allow=args.allow)
    for note in dataset.notes:
        print_note(note)
    names = _class_names(model, args)
    if args.set is not None:
        test_set = sets.named_set(SETS[args.set], dataset, whole=not args.subset)
        return test_set if names is None else test_set._replace(order=sets.imagenet_order(names, target.label))
    if names is not None:
        return sets.matched_set(dataset, names, target.label)
    return sets.plain_set(dataset, model.num_classes, is_own=args.data is None and not args.by_number)


def _class_names(model: Any, args: Namespace) -> Sequence[str] | None:
    """The names by which labels go; None where they go by number."""
    return None if args.by_number else names_of(model)


def _write(stem: Path, found: Predictions, class_names: Sequence[str]) -> None:
    """The tables of images and of classes."""
    lines = [(number, class_names[number], n, right, 100 * right / n) for number, n, right in found.by_class()]
    classes = csv_text([("class", "name", "n", "correct", "accuracy"), *lines])
    for name, text in (("predictions", found.to_csv()), ("classes", classes)):
        write_durably(Path(f"{stem}.{name}.csv"), to_bytes(text))


def _card(target: Target, model: Any, row: dict[str, Any], found: Predictions, args: Namespace, ranks: Ranks) -> Card:
    weights = "timm" if args.pretrained else str(args.checkpoint or target.run_dir or target.hub_dir)
    facts = {"weights": weights, "set": row["set"], "training": row["training"], **describe_machine(ranks.device)}
    training = None if target.run_dir is None or args.checkpoint is not None else target.config
    return make_card(target.label, target.model, row["data"], found, facts, training, _class_names(model, args))


def _mean_row(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The mean over all corruptions and severities, with the corruption error."""
    means = {key: mean(row[key] for row in rows) for key in ("top1", "top5", "calibration_error")}
    top1 = {str(Path(row["data"]).relative_to(folder)): row["top1"] for row in rows}
    counts = {"set": f"mean of {len(rows)}", "remark": None, "n": sum(row["n"] for row in rows)}
    return {"name": rows[0]["name"], "data": str(folder), **counts, **means, "mce": sets.mean_corruption_error(top1)}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as a table for the terminal."""
    rows = result["rows"]
    if "mce" in rows[-1]:
        return to_rich([{"mce": None, **row} for row in rows], (*COLUMNS, Column("mce", "mCE (%)", ".2f")))
    remarks = [f"{row['name']}: {row['remark']}" for row in rows if row["remark"]]
    return to_rich(rows, COLUMNS, for_terminal("; ".join(remarks)) or None)
