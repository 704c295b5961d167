"""What the commands that measure a trained model share: the model that they are given, and its images.

A model has its weights from timm, a file, a run folder or a hub folder. Its images lie in a folder, or are those that a
run was trained on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor

from vitreuse.cli.console import add_count, add_device, add_image_size, local_path, positive
from vitreuse.compress.damage import Change, measure_damage
from vitreuse.compress.redundancy import Redundancy, measure_redundancy
from vitreuse.compress.row_sample import NUM_ROWS
from vitreuse.data import DataError, choose_split, find_split, open_images, prepare_source
from vitreuse.data.labels import numbered_as
from vitreuse.data.samples import ImageSample
from vitreuse.files.networks import Target, resolve_targets
from vitreuse.io.process import choose_device
from vitreuse.io.progress import WorkProgress
from vitreuse.model.class_names import names_of
from vitreuse.model.keywords import unsupported
from vitreuse.model.preprocessing import evaluation_transform, image_mode
from vitreuse.plan import Spec, parse_plan

OWN = "train, for what is chosen on them should not be measured on them; val where there is no train"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares MODEL and its weights."""
    meaning = "a name, with timm's weights or --checkpoint; a run folder or a hub folder, with its own"
    parser.add_argument("model", metavar="MODEL", help=meaning)
    parser.add_argument("--checkpoint", type=local_path, metavar="FILE", help="a file of weights, of a name or config")
    add_image_size(parser)


def load_model(args: argparse.Namespace) -> tuple[Target, Any]:
    """What the arguments name, and its model with weights, for images of the size that they give.

    Raises:
        ValueError: The model is no ViT of timm or ours, or has no weights.
    """
    (target,) = resolve_targets([args.model])
    model = target.model.create("meta")  # before its weights are fetched
    if not isinstance(model, VisionTransformer):
        raise unsupported(model, "is no VisionTransformer of timm")
    target = target.at(args.image_size)
    target.model.create("meta")
    is_of_timm = target.is_name and args.checkpoint is None
    return target, target.load_pretrained() if is_of_timm else target.load(args.checkpoint)


def training_note(args: argparse.Namespace, target: Target) -> str | None:
    """What is to be known of how far a model's weights were trained, where that is not to the end of a run."""
    if args.checkpoint is None:
        return target.unfinished
    is_run = target.run_dir is not None
    return f"weights of {args.checkpoint.name}, not those that the run {target.label} left" if is_run else None


def add_image_arguments(
    parser: argparse.ArgumentParser, num_images: int = 256, batch_size: int = 32, split: str | None = "val"
) -> None:
    """Declares the images, with how many there are by default, and of which split; None: one to learn from."""
    parser.add_argument("--data", type=local_path, metavar="DIR", help="images (default: those a run was trained on)")
    meaning = f"sub-folder of DIR, where there is one; default: {split or OWN}"
    parser.add_argument("--split", default=split, metavar="NAME", help=meaning)
    add_count(parser, "--images", num_images, "how many")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice; default: %(default)s")
    add_count(parser, "--batch-size", batch_size, "images per forward pass")


def load_sample(args: argparse.Namespace, target: Target, model: Any, split: str) -> ImageSample:
    """The images of a split that the arguments name; what of them is left out is said on standard error."""
    sample = sample_images(target, model, args.data, args.images, split, args.seed)
    for note in sample.dataset.notes:
        print(note, file=sys.stderr)
    return sample


def sample_images(
    target: Target, model: Any, root: Path | None, num_images: int, split: str = "val", seed: int = 0
) -> ImageSample:
    """A sample of the images of a folder, or by default of the data that a run was trained on.

    Labels are those that the model has for its classes, by name; where that cannot be, the sample's remark says why.

    Args:
        target: What the model is of: a run crops images as it did while it was evaluated.
        model: The model itself.
        root: Shards, class folders, or images alone; or a folder that has splits of these.
        num_images: How many.
        split: The split to look for.
        seed: Of the choice.

    Raises:
        ValueError: There is no folder, no image in it, or no run that would know of one.
    """
    dataset = open_images(choose_split(root or _own_root(target), split), image_mode(model))
    names, remark = names_of(model), None
    if names is not None and dataset.class_names:
        try:
            dataset = numbered_as(dataset, names, target.label, "no top-1 is measured on them")
        except ValueError as error:
            remark = str(error)
    return ImageSample(dataset, evaluation_transform(model, target.crop_pct), num_images, seed, remark)


def learning_split(target: Target, root: Path | None, otherwise: str = "val") -> str:
    """The split that a model may learn from, or a plan be chosen on: train where there is one; arguments as above."""
    return otherwise if find_split(root or _own_root(target), "train") is None else "train"


def _own_root(target: Target) -> Path:
    """The folder of the data that a run was trained on."""
    if target.config is None:
        raise DataError(f"{target.label} is no run, which would know its data: give --data DIR with images.")
    if target.config.data.source is not None:
        prepare_source(target.config.data.source, target.config.data.folder)
    return Path(target.config.data.folder)


class Source(NamedTuple):
    """A model that was trained, for inference on its device, and images of a split for it."""

    target: Target
    model: Any
    sample: ImageSample
    split: str
    device: torch.device
    batch_size: int
    training: str | None  # see training_note
    num_rows: int  # of patches, see measure_redundancy
    seed: int  # of these

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (B, channels, rows, columns) and their labels (B,), on the CPU."""
        return self.sample.batches(self.batch_size)


def add_source_arguments(parser: argparse.ArgumentParser, split: str | None = "val") -> None:
    """Declares MODEL and its weights, the images, by default of that split, and the device."""
    add_model_arguments(parser)
    add_image_arguments(parser, split=split)
    meaning = (
        "patches of each image, drawn by --seed, whose rows of the attention maps are looked at, beside all class and "
        f"register tokens; default: {NUM_ROWS}, all where there are fewer"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help=meaning)
    add_device(parser)


def load_source(args: argparse.Namespace) -> Source:
    """The model and the images that the arguments name; raises as load_model and sample_images do."""
    device = choose_device(args.device)
    target, model = load_model(args)
    split = args.split or learning_split(target, args.data)
    sample = load_sample(args, target, model, split)
    return Source(
        target,
        model.to(device).eval(),
        sample,
        split,
        device,
        args.batch_size,
        training_note(args, target),
        args.rows or NUM_ROWS,
        args.seed,
    )


def rows_remarks(rows: tuple[int, int] | None) -> list[str]:
    """What a table says of the rows of maps that were looked at, of how many, where they are not all."""
    return [f"of each image's maps {rows[0]:,} of {rows[1]:,} rows"] if rows and rows[0] < rows[1] else []


def words(text: str) -> tuple[Spec, ...]:
    """What a layer may become, specs of the plan language between commas, from the command line."""
    try:
        return tuple(parse_plan(f"exact {item}", depth=2)[1] for item in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"in {text}, {str(error).rstrip('.')}") from error


def default_words(model: Any) -> tuple[Spec, ...]:
    """What an exact layer of a model may become: with 14 x 14 patches or more reuse, lowrank:64, span:7 and none."""
    num_tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    k, width = max(1, min(64, num_tokens // 3)), min(7, max(model.patch_embed.grid_size) // 2 | 1)
    return words(f"reuse,lowrank:{k},span:{width},none")


def measure(source: Source, specs: Sequence[Spec] | None) -> tuple[Redundancy, dict[Change, float]]:
    """How redundant a model is, and the damage of each change of a layer to one of the specs; no damage for None."""
    model, rows = source.model, (source.num_rows, source.seed)
    with WorkProgress("similarity", "images", len(source.sample)) as progress:
        redundancy = measure_redundancy(model, source.batches(), progress, *rows)
    if specs is None:
        return redundancy, {}
    with WorkProgress("damage", "images", len(source.sample)) as progress:
        return redundancy, measure_damage(model, source.batches(), specs, redundancy, progress, *rows)
