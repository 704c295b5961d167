"""``vitreuse plan "TEXT"``: what a plan means, layer by layer."""

import argparse
from itertools import groupby
from textwrap import fill
from typing import Any

from rich.console import Group

from vitreuse.attention import ATTENTION
from vitreuse.cli.console import add_image_size, table_of, titled
from vitreuse.cost.summary import PARTS, describe, equal_macs

SUMMED = {  # the parts of a layer whose MACs are shown as one number, by its heading
    "qkv": ("qkv",),
    "tokens": ("token_projection",),
    "logits": ("logits",),
    "values": ("values",),
    "proj": ("proj",),
    "mlp": ("fc1", "fc2"),
}
HELP = "show what a plan costs, per layer and part"
EXAMPLES = """
examples:
  vitreuse plan "exact reuse*6 exact*5"
  vitreuse plan "(lowrank:64 reuse*2)*4" --model deit_base_patch16_224
  vitreuse plan "(span:7*2 exact)*4" --image-size 384 --equal-macs width"""


def _explained(word: str, kind: type) -> str:
    """A word as the first line of its kind's docstring has it."""
    meaning = str(kind.__doc__).partition("\n")[0]
    return fill(meaning, 80, initial_indent=f"  {word:<10}", subsequent_indent=" " * 12)


EPILOG = "\n".join(
    [
        "words, one per layer; *N repeats a word or a group in brackets; a number after",
        "reuse:, lowrank: and span: is that of the heads, of k, and of the width:",
        *(_explained(word, kind) for word, kind in ATTENTION.items()),
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
    return describe(args.model, args.plan, args.image_size, larger)


def render(result: dict[str, Any]) -> Group:
    """The table for a terminal: MACs in millions, equal layers in one row."""
    gmacs = result["theoretical_macs"] / 1e9
    remarks = (
        f"{result['params'] / 1e6:.2f} M params ({result['params_ratio']:.3f} of exact), "
        f"{gmacs:.3f} GMACs, {2 * gmacs:.3f} GFLOPs ({result['macs_ratio']:.3f} of exact)",
        f"{result['macs'] / 1e9:.3f} GMACs run on a CPU; layers in MMACs of one image",
    )
    larger = "".join(f", {keyword} {value:g}" for keyword, value in result["keywords"].items())
    rows, columns = result["image_size_px"]
    title = f"{result['plan']}  in {result['name']} at {rows} x {columns} px{larger}"
    text = ("layer", "attention", "map of")
    groups = groupby(result["layers"], key=lambda row: {**row, "layer": None})
    rows = (_cells(list(group)) for _, group in groups)
    return titled(title, table_of((*text, *SUMMED, "total", "of exact"), rows, text), *remarks)


def _cells(equal_layers: list[dict[str, Any]]) -> list[str]:
    """A row of the table for consecutive layers that differ in nothing but their number."""
    first, last = equal_layers[0], equal_layers[-1]
    layers = str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']}"
    anchor = "" if first["anchor"] is None else str(first["anchor"])
    macs = first["theoretical_macs"]
    counts = [sum(macs.get(part, 0) for part in parts) for parts in SUMMED.values()]
    shown = [f"{count / 1e6:.1f}" if count else "" for count in counts]
    return [layers, first["spec"], anchor, *shown, f"{sum(macs.values()) / 1e6:.1f}", f"{first['macs_ratio']:.3f}"]
