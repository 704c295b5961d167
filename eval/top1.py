"""Top-1 and top-5 accuracy, every image counted exactly once under any number of ranks."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console, RenderableType
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eval.distributed import Ranks, joined
from eval.inputs import Transform, evaluation_transform, image_settings
from eval.table import Column, to_rich
from eval.targets import Target, resolve_targets
from vitreuse.console import local_path, positive
from vitreuse.data import FolderDataset, Sample, open_split, prepare_source
from vitreuse.measure import count_topk

HELP = "accuracy of run folders, or of a model name with --checkpoint and --data"
COLUMNS = (
    Column("name", "name"),
    Column("data", "data"),
    Column("n", "images", ",d"),
    Column("top1", "top-1 (%)", ".2f"),
    Column("top5", "top-5 (%)", ".2f"),
)
ALONE = Ranks()


class Labelled(Protocol):
    """A map-style data set as vitreuse.data.open_split returns it."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample: ...


@dataclass(frozen=True)
class Top1:
    """Accuracy in percent over n images."""

    n: int
    top1: float
    top5: float


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
) -> Top1:
    """Accuracy of a model on a data set: rank r takes images r, r + world_size, ... and nothing is padded.

    Several ranks call this together, with their models on their devices; the counts are summed once, at the end, and
    every rank returns the same result. A rank may hold no image. The model's mode is restored.

    Raises:
        ValueError: the ranks together did not count each image once, or a label is none of the model's classes.
    """
    share = _Share(dataset, range(ranks.rank, len(dataset), ranks.world_size), transform)
    loader = DataLoader(share, batch_size=batch_size, num_workers=num_workers, worker_init_fn=worker_init_fn)
    counts = torch.zeros(3, dtype=torch.int64)  # images, top-1, top-5
    was_training = model.training
    model.eval()
    with ranks.together(), torch.inference_mode():
        for images, labels in progress(loader):
            logits = model(images.to(ranks.device))
            counts += torch.tensor([len(labels), *count_topk(logits, labels.to(ranks.device))])
    model.train(was_training)
    num_images, top1, top5 = ranks.sum(counts).tolist()
    if num_images != len(dataset) or not num_images:
        raise ValueError(
            f"{ranks.world_size} ranks counted {num_images} of {len(dataset)} images: each must be counted once."
        )
    return Top1(num_images, 100 * top1 / num_images, 100 * top5 / num_images)


class _Share(Dataset[tuple[Tensor, int]]):
    """One rank's images of a data set, as the model's inputs."""

    def __init__(self, dataset: Labelled, numbers: Sequence[int], transform: Transform) -> None:
        self.dataset, self.numbers, self.transform = dataset, numbers, transform

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        sample = self.dataset[self.numbers[number]]
        return self.transform(sample.image), sample.label


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run folder, config or model name")
    parser.add_argument(
        "--data", type=local_path, metavar="DIR", help="folder with SPLIT/; default: the run's own data"
    )
    parser.add_argument("--split", default="val", help="default: %(default)s")
    parser.add_argument("--checkpoint", type=local_path, metavar="FILE", help="weights of a name or config")
    parser.add_argument(
        "--batch-size", type=positive, default=256, help="images per forward pass; default: %(default)s"
    )
    parser.add_argument("--num-workers", type=int, default=0, help="decoding processes; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every target; under torchrun each rank evaluates its share.

    Raises:
        ValueError: a target, its data or its weights cannot be used; under several ranks see Ranks.together.
    """
    with joined(args.device) as ranks:
        with ranks.together():
            targets = resolve_targets(args.targets)
        return {"command": "top1", "rows": [_row(target, args, ranks) for target in targets]}


def _row(target: Target, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    with ranks.together():
        dataset, folder = open_data(target, args.data, args.split)
        model = target.load(args.checkpoint).to(ranks.device)
        _check_class_folders(dataset, model)
    bar = partial(track, description=target.label, console=Console(stderr=True), disable=not ranks.is_main)
    result = evaluate(
        model,
        dataset,
        transform=evaluation_transform(model, target.config and target.config.eval.crop_pct),
        ranks=ranks,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=bar,
    )
    return {"name": target.label, "data": str(folder), **asdict(result)}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    return to_rich(result["rows"], COLUMNS)


def open_data(target: Target, root: Path | None = None, split: str = "val") -> tuple[Labelled, Path]:
    """A split of the given folder, or else of the data that the target was trained on; and where it is.

    Raises:
        ValueError: a model name knows no data.
    """
    if root is None:
        if target.config is None:
            raise ValueError(f"{target.label} is a model name, which knows no data: give --data DIR.")
        root = Path(target.config.data.folder)
        if target.config.data.source is not None:
            prepare_source(target.config.data.source, root)
    in_chans = image_settings(target.model.create("meta"))["input_size"][0]
    return open_split(root, split, "L" if in_chans == 1 else "RGB"), root / split


def _check_class_folders(dataset: Labelled, model: Any) -> None:
    """Refuses class folders that are not as many as the model's classes: their labels, given in order, would be wrong.

    Shards carry their labels, and may lack a class.
    """
    if isinstance(dataset, FolderDataset) and len(dataset.class_names) != model.num_classes:
        raise ValueError(
            f"{dataset.folder} has {len(dataset.class_names)} class folders and the model {model.num_classes} classes: "
            "folders are numbered in order, so each class needs one."
        )
