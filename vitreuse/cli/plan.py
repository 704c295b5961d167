"""``vitreuse plan "TEXT"``: what a plan means, layer by layer."""

import argparse
from itertools import starmap
from textwrap import fill
from typing import Any

from vitreuse.attention import ATTENTION
from vitreuse.cli.console import add_image_size
from vitreuse.cost.summary import PARTS, equal_macs
from vitreuse.model.block import LinearBlock
from vitreuse.plan.language import WHOLE
from vitreuse.verbs.describe import describe, table

PARTS_OF_WORD = {
    "-r": "Behind exact, span or reuse: r patch tokens merge into others, between the layer's attention and its MLP.",
    "/h": "Behind every word but linear and skip: the layer's MLP has h hidden units; /0 is a layer without an MLP.",
}
HELP = "show what a plan costs, per layer and part"
render = table
EXAMPLES = """
examples:
  vitreuse plan "exact reuse*6 exact*5"
  vitreuse plan "exact*3 exact-16/768*8 linear" --model deit_base_patch16_224
  vitreuse plan "(span:7*2 exact)*4" --image-size 384 --equal-macs width"""


def _explained(word: str, kind: type) -> str:
    """A word as the first line of its kind's docstring has it."""
    return _entry(word, str(kind.__doc__).partition("\n")[0])


def _entry(word: str, meaning: str) -> str:
    return fill(meaning, 80, initial_indent=f"  {word:<10}", subsequent_indent=" " * 12)


EPILOG = "\n".join(
    [
        "words, one per layer; *N repeats a word or a group in brackets; a number after",
        "reuse:, lowrank: and span: is that of the heads, of k, and of the width:",
        *(_explained(word, kind) for word, kind in ATTENTION.items() if word not in WHOLE),
        _explained("linear", LinearBlock),
        _entry("skip", "No layer: it does nothing, the control that linear must beat."),
        "",
        "what may follow a word, in this order:",
        *starmap(_entry, PARTS_OF_WORD.items()),
        EXAMPLES,
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="TEXT", help="a word for each layer, see below")
    meaning = "a model name, ours or timm's (%(default)s)"
    parser.add_argument("--model", default="vit_small_patch16_224", metavar="NAME", help=meaning)
    add_image_size(parser, int)
    meaning = "make the layers, or their MLPs, as wide as the MACs of the exact plan allow"
    parser.add_argument("--equal-macs", choices=PARTS, help=meaning)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The plan in that model, or in the larger one of equal MACs."""
    larger = equal_macs(args.model, args.plan, args.equal_macs, args.image_size) if args.equal_macs else {}
    return describe(args.model, args.plan, args.image_size, larger).facts
