"""Labelled images before a model: the arguments that name both, a split opened, its batches shared among ranks."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate, get_worker_info

from eval.distributed import Ranks
from vitreuse.cli.console import add_allow, add_count, local_path
from vitreuse.config import DataConfig
from vitreuse.data import FolderDataset, ShardDataset, open_split, prepare_source
from vitreuse.files.networks import Target
from vitreuse.io.process import print_note
from vitreuse.io.progress import WorkProgress
from vitreuse.io.urls import refuse_idle_allow
from vitreuse.model.preprocessing import EvaluationTransform, Transform, image_mode

ALONE, AS_IT_IS = Ranks(), nn.Identity()
Answer = TypeVar("Answer")


class Labelled(Protocol):
    """A map-style data set of image, label and key, as vitreuse.data.open_split returns it; or with several labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[Any, Any, str]: ...


class Share:
    """A rank's batches of a data set, in order: r, r + world_size, ...; read by workers that stay.

    An image is computed in the same batch under any number of ranks, so that they agree to the bit.

    Args:
        transform: Of each image, in the workers.
        prepare: Of a batch of what transform gave, on the rank's device.
        fills_up: Whether a smaller last batch has black images behind its own, so that a compiled model sees one size.
    """

    def __init__(
        self,
        dataset: Labelled,
        *,
        transform: Transform,
        prepare: Callable[[Tensor], Tensor] = AS_IT_IS,
        ranks: Ranks = ALONE,
        batch_size: int = 256,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        fills_up: bool = False,
    ):
        self.dataset, self.prepare, self.ranks = dataset, prepare, ranks
        self.least_images = batch_size if fills_up else 0
        batches = [*BatchSampler(range(len(dataset)), batch_size, drop_last=False)]
        self.num_batches, self.own = len(batches), range(ranks.rank, len(batches), ranks.world_size)
        self.loader = DataLoader(
            _Images(dataset, transform),
            batch_sampler=[batches[number] for number in self.own],
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=worker_init_fn,
            collate_fn=_collate,
            pin_memory=ranks.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a base seed each time: not from that of the model
        )

    def answered(
        self,
        answer: Callable[[Tensor, Tensor, Sequence[str]], Answer],
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> list[Answer]:
        """The answer to each batch of the data set, in order.

        Several ranks call this together; their answers are gathered once, at the end, and every rank returns the same.
        A rank may hold none.

        Args:
            answer: What is said of images (B, channels, rows, columns) on the rank's device, their labels and their
                keys, of which there are fewer where a batch is filled up; called in inference mode. It should be on the
                CPU.

        Raises:
            ValueError: The ranks together did not answer each image once, or what answer raises.
        """
        found: list[tuple[int, Answer]] = []  # and the number of their batch
        with self.ranks.together(), torch.inference_mode():
            self.ranks.settle()
            for number, (inputs, labels, keys) in zip(self.own, progress(self.loader), strict=True):
                images = self.prepare(inputs.to(self.ranks.device, non_blocking=True))
                if len(images) < self.least_images:
                    black = images.new_zeros(self.least_images - len(images), *images.shape[1:])
                    images = torch.cat([images, black])
                found.append((number, answer(images, labels, keys)))
        found = sorted(chain(*self.ranks.gather(found)), key=lambda batch: batch[0])
        numbers = [number for number, _ in found]
        if not numbers or numbers != [*range(self.num_batches)]:
            raise ValueError(
                f"{self.ranks.world_size} ranks answered {len(set(numbers))} of {self.num_batches} batches, "
                f"{len(numbers)} in all: a set must have an image, and each must be answered once."
            )
        return [batch for _, batch in found]


def in_shared_memory(batch: Any) -> Any:
    """A batch of a worker, whose tensors are where the rank can read them; elsewhere the batch as it is.

    A worker's queue would move them there too, but in a thread whose errors nobody hears, and the rank would wait for
    ever for a batch that found no room.
    """
    return batch if get_worker_info() is None else tree_map_only(Tensor, Tensor.share_memory_, batch)


def _collate(items: list[Any]) -> Any:
    return in_shared_memory(default_collate(items))


class _Images(Dataset[tuple[Tensor, Any, str]]):
    """A data set's images as the model's inputs."""

    def __init__(self, dataset: Labelled, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, number: int) -> tuple[Tensor, Any, str]:
        image, label, key = self.dataset[number]
        return self.transform(image), label, key


def share_of(dataset: Labelled, transform: EvaluationTransform, args: Namespace, ranks: Ranks) -> Share:
    """This rank's share of a data set, read as the arguments of add_batches say."""
    reading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    return Share(dataset, transform=transform.to_bytes, prepare=transform.normalize, ranks=ranks, **reading)


def shown(target: Target, ranks: Ranks) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Shows, on the main rank alone, how many of its batches of a target's images are answered."""

    def watched(batches: Any) -> Iterator[Any]:
        with WorkProgress(target.label, "batches", len(batches), enabled=ranks.is_main) as progress:
            for number, batch in enumerate(batches, 1):
                yield batch
                progress.reach(number)

    return watched


def add_data(parser: ArgumentParser, folders: str) -> None:
    """Declares --data, a folder with these folders or its URL, and the kinds of URL that are allowed."""
    text = f"folder with {folders}, or its URL; default: the run's own data"
    parser.add_argument("--data", type=os.path.expanduser, metavar="DIR", help=text)
    add_allow(parser)


def add_weights(parser: ArgumentParser) -> None:
    """Declares --checkpoint and --pretrained, of which one may be given."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=local_path, metavar="FILE", help="weights of a name or config")
    weights.add_argument("--pretrained", action="store_true", help="the weights that timm publishes under a name")


def add_batches(parser: ArgumentParser) -> None:
    """Declares how images are read and computed."""
    add_count(parser, "--batch-size", 256, "images per forward pass")
    parser.add_argument("--num-workers", type=int, default=0, help="decoding processes; default: %(default)s")


def refuse_idle(args: Namespace, targets: Sequence[Target]) -> None:
    """Raises ConfigError where --allow is given and neither --data nor a run's own data are a URL of that kind."""
    own = [target.config.data.root for target in targets if target.config]
    refuse_idle_allow(args.allow, [args.data] if args.data else own)


def refuse_unready(targets: Sequence[Target], args: Namespace) -> None:
    """Raises ValueError where a target has no weights or no data, before the first of them is evaluated."""
    for target in targets:
        if args.data is None and target.config is None:
            data_root(target, args)
        if args.checkpoint is None and not args.pretrained:
            target.own_weights()


def load(target: Target, args: Namespace) -> Any:
    """The model with the weights that the arguments name; raises as Target.load and load_pretrained do."""
    return target.load_pretrained() if args.pretrained else target.load(args.checkpoint)


def unfinished(target: Target, args: Namespace) -> str | None:
    """What is to be known of how far these weights were trained, where they are those that a run left."""
    return None if args.checkpoint is not None or args.pretrained else target.unfinished


def data_root(target: Target, args: Namespace) -> str:
    """The folder or URL of --data or, without it, of the data that a target was trained on."""
    if args.data is not None:
        return args.data
    if target.config is None:
        raise ValueError(f"{target.label} is a model name, which knows no data: give --data DIR.")
    if target.config.data.source is not None:
        prepare_source(target.config.data.source, Path(target.config.data.folder))
    return target.config.data.folder


def open_for(target: Target, model: Any, root: str, split: str, args: Namespace) -> ShardDataset | FolderDataset:
    """A split of images such as a model takes; what is left out of it is said on standard error."""
    cache_root = DataConfig.cache_root if target.config is None else target.config.data.cache_root
    dataset = open_split(root, split, image_mode(model), cache_root=cache_root, allow=args.allow)
    for note in dataset.notes:
        print_note(note)
    return dataset
