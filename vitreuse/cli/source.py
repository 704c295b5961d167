"""What the commands that measure a trained model share: the model that they are given, and its images.

A model has its weights from timm, a file, a run folder or a hub folder. Its images lie in a folder, or are those that a
run was trained on.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import VisionTransformer

from vitreuse.cli.console import add_count, add_device, add_image_size, local_path, positive
from vitreuse.compress.row_sample import NUM_ROWS
from vitreuse.data import DataError, choose_split, find_split, open_images, prepare_source
from vitreuse.data.labels import numbered_as
from vitreuse.data.samples import Images, ImageSample
from vitreuse.files.networks import Target, resolve_targets
from vitreuse.io.durable import writable_folder
from vitreuse.io.process import choose_device
from vitreuse.model.class_names import names_of
from vitreuse.model.keywords import unsupported
from vitreuse.model.preprocessing import evaluation_transform, image_mode

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
        target: What the model is of.
        model: The model itself, which crops images as its run did while it was evaluated.
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
    return ImageSample(dataset, evaluation_transform(model), num_images, seed, remark)


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
    images: Images  # the sample in batches, on the CPU
    split: str
    training: str | None  # see training_note
    num_rows: int  # of patches, see measure_redundancy


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
    images, training = Images(sample, args.batch_size), training_note(args, target)
    return Source(target, model.to(device).eval(), sample, images, split, training, args.rows or NUM_ROWS)


def as_argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse of what raises a sentence as a ValueError, which argparse would not show."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error

    return convert


def prepare_folder(folder: Path | None) -> None:
    """Makes the folder for a result and its picture, where one is asked for, before any work is done.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: The folder cannot be made.
    """
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "pictures need matplotlib: install it with pip install 'vitreuse[plots]', or take --json without -o."
        )
    writable_folder(folder)
