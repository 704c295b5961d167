"""``vitreuse plan "TEXT"``: what a plan means, layer by layer."""

import argparse
from itertools import groupby, starmap
from textwrap import fill
from typing import Any

from rich.console import Group

from vitreuse.attention import ATTENTION
from vitreuse.cli.console import add_image_size
from vitreuse.cost.summary import PARTS, describe, equal_macs
from vitreuse.io.file_names import for_terminal
from vitreuse.io.tables import table_of, titled
from vitreuse.model.block import LinearBlock
from vitreuse.plan.language import WHOLE

SUMMED = {  # the parts of a layer whose MACs are shown as one number, by its heading
    "qkv": ("qkv",),
    "lowrank": ("token_projection",),
    "logits": ("logits",),
    "values": ("values",),
    "proj": ("proj",),
    "merge": ("merge",),
    "mlp": ("fc1", "fc1_g", "fc1_x", "fc2"),
    "linear": ("linear",),
}
STRIP = 12  # characters that stand for all tokens
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a character
PARTS_OF_WORD = {
    "-r": "Behind exact, span or reuse: r patch tokens merge into others, between the layer's attention and its MLP.",
    "/h": "Behind every word but linear and skip: the layer's MLP has h hidden units; /0 is a layer without an MLP.",
}
HELP = "show what a plan costs, per layer and part"
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
    return describe(args.model, args.plan, args.image_size, larger)


def render(result: dict[str, Any]) -> Group:
    """The table for a terminal: MACs in millions, equal layers in one row, columns that say nothing left out."""
    gmacs = result["theoretical_macs"] / 1e9
    remarks = (
        f"{result['params'] / 1e6:.2f} M params ({result['params_ratio']:.3f} of exact), "
        f"{gmacs:.3f} GMACs, {2 * gmacs:.3f} GFLOPs ({result['macs_ratio']:.3f} of exact)",
        f"{result['macs'] / 1e9:.3f} GMACs run on a CPU; layers in MMACs of one image",
    )
    larger = "".join(f", {keyword} {value:g}" for keyword, value in result["keywords"].items())
    rows, columns = result["image_size_px"]
    title = f"{result['plan']}  in {result['name']} at {rows} x {columns} px{larger}"
    layers = result["layers"]
    groups = groupby(layers, key=lambda row: {**row, "layer": None})
    table = [_cells(list(group), layers[0]["tokens"]) for _, group in groups]
    idle = set() if any(row["merged"] for row in layers) else {"tokens", "left"}
    idle |= set() if any("/" in row["spec"] for row in layers) else {"hidden"}
    headings = [heading for heading in table[0] if heading not in idle and any(row[heading] for row in table)]
    rows = ([row[heading] for heading in headings] for row in table)
    return titled(title, table_of(headings, rows, ("layer", "word", "map of", "left")), *remarks)


def _cells(equal_layers: list[dict[str, Any]], most_tokens: int) -> dict[str, str]:
    """A row of the table by its headings, for consecutive layers that differ in nothing but their number."""
    first, last = equal_layers[0], equal_layers[-1]
    macs = first["theoretical_macs"]
    counts = {heading: sum(macs.get(part, 0) for part in parts) for heading, parts in SUMMED.items()}
    return {
        "layer": str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']}",
        "word": first["spec"],
        "map of": "" if first["anchor"] is None else str(first["anchor"]),
        "tokens": str(first["tokens"]),
        "left": _strip(first["tokens"] / most_tokens),
        "hidden": str(first["hidden"] or ""),
        **{heading: f"{count / 1e6:.1f}" if count else "" for heading, count in counts.items()},
        "total": f"{sum(macs.values()) / 1e6:.1f}",
        "of exact": f"{first['macs_ratio']:.3f}",
    }


def _strip(share: float) -> str:
    """A bar as long as a share of STRIP characters, in eighths of one where standard output can show them."""
    if for_terminal(EIGHTHS) != EIGHTHS:
        return "#" * round(STRIP * share)
    whole, eighths = divmod(round(8 * STRIP * share), 8)
    return (whole * EIGHTHS[8] + EIGHTHS[eighths]).rstrip()
