"""Top-1 and top-5 accuracy, every image counted exactly once under any number of ranks."""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from rich.console import Console, RenderableType
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from eval.distributed import Ranks, joined
from eval.inputs import Transform, evaluation_transform, image_settings
from eval.predictions import Answers, Predictions, answers
from eval.table import Column, to_rich
from eval.targets import Target, resolve_targets
from vitreuse.config import DataConfig
from vitreuse.console import add_allow, local_path, positive
from vitreuse.data import FolderDataset, Sample, open_split, prepare_source
from vitreuse.local import refuse_idle_allow, url_kind

HELP = "accuracy of run folders, or of a model name with --checkpoint and --data"
COLUMNS = (
    Column("name", "name"),
    Column("data", "data"),
    Column("n", "images", ",d"),
    Column("top1", "top-1 (%)", ".2f"),
    Column("top5", "top-5 (%)", ".2f"),
    Column("calibration_error", "calibration error (%)", ".2f"),
)
ALONE = Ranks()


class Labelled(Protocol):
    """A map-style data set as vitreuse.data.open_split returns it."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample: ...


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
        ValueError: the ranks together did not answer each image once, or a label is none of the model's classes.
    """
    share = _Share(len(dataset), batch_size, ranks)
    images = _Images(dataset, transform)
    loader = DataLoader(images, batch_sampler=share, num_workers=num_workers, worker_init_fn=worker_init_fn)
    found: dict[int, Answers] = {}  # by the batch's number in the set
    was_training = model.training
    model.eval()
    with ranks.together(), torch.inference_mode():
        for number, (inputs, labels, keys) in zip(share.numbers, progress(loader), strict=True):
            found[number] = answers(model(inputs.to(ranks.device)), labels, keys)
    model.train(was_training)
    gathered = [batch for share in ranks.gather([*found.items()]) for batch in share]
    batches = sorted(gathered, key=lambda batch: batch[0])
    _check_each_once([number for number, _ in batches], share.num_batches, ranks)
    return Predictions.of([batch for _, batch in batches])


def _check_each_once(numbers: Sequence[int], num_batches: int, ranks: Ranks) -> None:
    if not numbers or list(numbers) != [*range(num_batches)]:
        raise ValueError(
            f"{ranks.world_size} ranks answered {len(set(numbers))} of {num_batches} batches, {len(numbers)} in all: a "
            "set must have an image, and each must be answered once."
        )


class _Share(Sampler[list[int]]):
    """One rank's batches of a data set: their images, and as ``numbers`` which of the set's batches they are."""

    def __init__(self, num_images: int, batch_size: int, ranks: Ranks) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.num_batches = -(-num_images // batch_size)
        self.numbers = range(ranks.rank, self.num_batches, ranks.world_size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            first = number * self.batch_size
            yield [*range(first, min(first + self.batch_size, self.num_images))]


class _Images(Dataset[tuple[Tensor, int, str]]):
    """A data set's images as the model's inputs."""

    def __init__(self, dataset: Labelled, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, number: int) -> tuple[Tensor, int, str]:
        sample = self.dataset[number]
        return self.transform(sample.image), sample.label, sample.key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run folder, config or model name")
    parser.add_argument("--data", metavar="DIR", help="folder with SPLIT/, or its URL; default: the run's own data")
    add_allow(parser)
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
            own = [target.config.data.root for target in targets if target.config]
            refuse_idle_allow(args.allow, [args.data] if args.data else own)
        return {"command": "top1", "rows": [_row(target, args, ranks) for target in targets]}


def _row(target: Target, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    with ranks.together():
        dataset, place = open_data(target, args.data, args.split, args.allow)
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
    measured = {"n": result.n, "top1": result.top1, "top5": result.top5}
    return {"name": target.label, "data": place, **measured, "calibration_error": result.calibration_error}


def render(result: dict[str, Any]) -> RenderableType:
    """The result as tables for the terminal."""
    return to_rich(result["rows"], COLUMNS)


def open_data(
    target: Target, root: str | None = None, split: str = "val", allow: Collection[str] = ()
) -> tuple[Labelled, str]:
    """A split of the given folder or URL, or else of the data that the target was trained on; and where it is.

    Raises:
        ValueError: a model name knows no data, or they are behind a URL of a kind that is not allowed.
    """
    if root is None:
        if target.config is None:
            raise ValueError(f"{target.label} is a model name, which knows no data: give --data DIR.")
        root = target.config.data.folder
        if target.config.data.source is not None:
            prepare_source(target.config.data.source, root)
    in_chans = image_settings(target.model.create("meta"))["input_size"][0]
    mode = "L" if in_chans == 1 else "RGB"
    cache_root = DataConfig.cache_root if target.config is None else target.config.data.cache_root
    dataset = open_split(root, split, mode, cache_root=cache_root, allow=allow)
    return dataset, root if url_kind(root) else str(dataset.folder)


def _check_class_folders(dataset: Labelled, model: Any) -> None:
    """Refuses class folders that are not as many as the model's classes: their labels, given in order, would be wrong.

    Shards carry their labels, and may lack a class.
    """
    if isinstance(dataset, FolderDataset) and len(dataset.class_names) != model.num_classes:
        raise ValueError(
            f"{dataset.folder} has {len(dataset.class_names)} class folders and the model {model.num_classes} classes: "
            "folders are numbered in order, so each class needs one."
        )
