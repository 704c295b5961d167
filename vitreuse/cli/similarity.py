"""``vitreuse similarity MODEL --data DIR``: how redundant a model's attention is on somebody's images."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from vitreuse.cli.console import add_output
from vitreuse.cli.source import add_source_arguments, as_argument, load_source, prepare_folder
from vitreuse.io.durable import write_durably
from vitreuse.verbs.similarity import similarity, table
from vitreuse.verbs.words import parse_words

HELP = "measure how alike the attention maps of a model's layers are, and what a change of each layer would do"
render = table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    meaning = "what a layer may become, for its damage; default: reuse,lowrank:64,span:7,none, less for few patches"
    parser.add_argument("--words", type=as_argument(parse_words), metavar="TEXT", help=meaning)
    add_output(parser, "write similarity.json and similarity.png, heat maps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Redundancy and damage of a model on its images."""
    prepare_folder(args.output)
    source = load_source(args)
    found = similarity(source.model, source.images, args.words, source.num_rows, args.seed)
    found = replace(found, facts={**found.facts, "name": source.target.label, "training": source.training})
    if args.output is not None:
        write_durably(args.output / "similarity.json", json.dumps(found.facts).encode())
        write_durably(args.output / "similarity.png", found.picture())
        print(f"{args.output}: similarity.json, similarity.png", file=sys.stderr)
    return found.facts
