"""``vitreuse shards {build|digits|fashion_mnist|index|verify|info}``: write, index and check WebDataset shards."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from vitreuse.cli.console import local_path, positive
from vitreuse.data import (
    BuildSettings,
    Workers,
    build_index,
    build_shards,
    prepare_source,
    shards_info,
    usable_cpus,
    verify_shards,
)

HELP = "build shards from images, the digits or Fashion-MNIST; index, verify or describe a folder of shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's verbs with their own arguments."""
    verbs = parser.add_subparsers(required=True, metavar="{" + "|".join(VERBS) + "}")
    for verb, (action, help_text) in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=help_text, description=help_text)
        verb_parser.set_defaults(action=action)
        if verb == "build":
            _add_build_arguments(verb_parser)
        if verb == "fashion_mnist":
            text = "folder of its four files, or torchvision's root; default: Debian's, else FOLDER/../FashionMNIST/raw"
            verb_parser.add_argument("--from", dest="origin", type=local_path, metavar="DIR", help=text)
        if verb == "index":
            text = "a name a line, of the labels 0, 1, ...; default: those that the index has, else the numbers"
            verb_parser.add_argument("--class-names", type=local_path, metavar="FILE", help=text)
        verb_parser.add_argument("folder", type=local_path, metavar="FOLDER")
        if verb in ("build", "index", "verify"):
            text = "processes; default: one a CPU, here %(default)s"
            verb_parser.add_argument("--workers", type=positive, default=usable_cpus(), metavar="N", help=text)
        # Known before the verb already: a default here would overrule what was given there.
        text = "print one JSON object on standard output"
        verb_parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "a folder of images a class, or splits of these such as train/ and val/; a tar of either; a tar of tars"
    parser.add_argument("source", type=local_path, metavar="SOURCE", help=sources)
    samples, quality, seed = BuildSettings.samples_per_shard, BuildSettings.quality, BuildSettings.seed
    parser.add_argument("--samples-per-shard", type=positive, default=samples, metavar="N", help="default: %(default)s")
    parser.add_argument("--resize", type=positive, metavar="PX", help="shrink images whose shorter side is longer")
    parser.add_argument("--quality", type=positive, metavar="Q", help=f"of the JPEGs they become; default: {quality}")
    parser.add_argument("--seed", type=int, default=seed, metavar="S", help="of the order; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the verb says and sums up the folders that it concerns."""
    return {"folders": [dataclasses.asdict(shards_info(folder)) for folder in args.action(args)]}


def _build(args: argparse.Namespace) -> list[Path]:
    if args.quality is not None and args.resize is None:
        raise ValueError(f"--quality {args.quality} has no effect without --resize: leave it out or shrink images.")
    quality = args.quality or BuildSettings.quality
    settings = BuildSettings(args.samples_per_shard, args.resize, quality, args.seed)
    return build_shards(args.source, args.folder, settings, _workers(args))


def _digits(args: argparse.Namespace) -> list[Path]:
    prepare_source("digits", args.folder)
    return [args.folder / split for split in ("train", "val")]


def _fashion_mnist(args: argparse.Namespace) -> list[Path]:
    prepare_source("fashion_mnist", args.folder, args.origin)
    return [args.folder / split for split in ("train", "val")]


def _index(args: argparse.Namespace) -> list[Path]:
    names = None if args.class_names is None else _read_names(args.class_names)
    build_index(args.folder, names, _workers(args))
    return [args.folder]


def _read_names(path: Path) -> list[str]:
    try:
        return [os.fsdecode(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise ValueError(f"--class-names {path} cannot be read ({error.strerror}): give a file of names.") from error


def _verify(args: argparse.Namespace) -> list[Path]:
    if problems := verify_shards(args.folder, _workers(args)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return [args.folder]


def _workers(args: argparse.Namespace) -> Workers:
    return Workers(args.workers, show_progress=True)


VERBS = {
    "build": (_build, "write images as shards; the same command again goes on where it was stopped"),
    "digits": (_digits, "write scikit-learn's digits as FOLDER/train and FOLDER/val"),
    "fashion_mnist": (_fashion_mnist, "write Fashion-MNIST, from its files, as FOLDER/train and FOLDER/val"),
    "index": (_index, "index the WebDataset tars of a folder"),
    "verify": (_verify, "compare every byte of a folder's shards with their index; exit code 2 if they differ"),
    "info": (lambda args: [args.folder], "sum up a folder of indexed shards"),
}


def render(result: dict[str, Any]) -> Table:
    table = Table("folder")
    for heading in ("samples", "classes", "shards", "samples a shard", "MiB"):
        table.add_column(heading, justify="right")
    for split in result["folders"]:
        smallest, largest = split["smallest_shard"], split["largest_shard"]
        a_shard = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        counts = (str(split[f"num_{what}"]) for what in ("samples", "classes", "shards"))
        table.add_row(split["folder"], *counts, a_shard, f"{split['num_bytes'] / 2**20:.2f}")
    return table
