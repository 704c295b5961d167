"""``vitreuse similarity MODEL --data DIR``: how redundant a model's attention is on somebody's images."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from torch import Tensor

from vitreuse.cli.console import add_output
from vitreuse.cli.plots import heatmaps, prepare_folder
from vitreuse.cli.source import Source, add_source_arguments, default_words, load_source, measure, rows_remarks, words
from vitreuse.compress.damage import Change, check_specs, has_exact_layers
from vitreuse.compress.head_matching import match_heads
from vitreuse.compress.redundancy import Redundancy
from vitreuse.compress.row_sample import count_rows
from vitreuse.files.hub import plan_text
from vitreuse.io.durable import write_durably
from vitreuse.io.tables import table_of, titled
from vitreuse.plan import EXACT

HELP = "measure how alike the attention maps of a model's layers are, and what a change of each layer would do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    meaning = "what a layer may become, for its damage; default: reuse,lowrank:64,span:7,none, less for few patches"
    parser.add_argument("--words", type=words, metavar="TEXT", help=meaning)
    add_output(parser, "write similarity.json and similarity.png, heat maps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Redundancy and damage of a model on its images."""
    prepare_folder(args.output)
    source = load_source(args)
    if args.words:
        check_specs(source.model, args.words)
    specs = args.words or (default_words(source.model) if has_exact_layers(source.model) else None)
    result = _result(source, *measure(source, specs))
    if args.output is not None:
        write_durably(args.output / "similarity.json", json.dumps(result).encode())
        write_durably(args.output / "similarity.png", heatmaps(result))
    return result


def _result(source: Source, redundancy: Redundancy, damage: Mapping[Change, float]) -> dict[str, Any]:
    return {
        "name": source.target.label,
        "training": source.training,
        "plan": plan_text(source.model),
        "num_images": len(source.sample),
        "rows": count_rows(source.model, source.num_rows),
        "layers": [_layer(number, redundancy, damage) for number in range(len(redundancy.entropy))],
        **{name: _numbers(getattr(redundancy, name)) for name in ("same_head", "best_head", "entropy", "distance")},
        "matched_heads": _matches(redundancy),
        "damage": [
            {
                "layer": change.layer,
                "spec": str(change.spec),
                "anchor": change.anchor,
                "anchor_spec": None if change.anchor_spec is None else str(change.anchor_spec),
                "damage": amount,
            }
            for change, amount in damage.items()
        ],
    }


def _layer(layer: int, redundancy: Redundancy, damage: Mapping[Change, float]) -> dict[str, Any]:
    """What the table shows of a layer; a reuse is that of the best exact anchor."""
    best: dict[str, dict[str, Any]] = {}
    for change, amount in damage.items():
        word, is_shown = str(change.spec), change.anchor_spec in (None, EXACT)
        if change.layer == layer and is_shown and (word not in best or amount < best[word]["damage"]):
            best[word] = {"anchor": change.anchor, "damage": amount}
    return {
        "layer": layer,
        "entropy": _number(redundancy.entropy[layer].mean()),
        "distance": _number(redundancy.distance[layer].mean()),
        "same_head": _most_similar(redundancy.same_head[:layer, layer]),
        "best_head": _most_similar(redundancy.best_head[:layer, layer]),
        "damage": best,
    }


def _most_similar(similarity: Tensor) -> dict[str, Any] | None:
    """The earlier layer whose maps are most like a layer's; None where none can be compared."""
    if similarity.isnan().all():
        return None
    anchor = int(similarity.nan_to_num(-1).argmax())
    return {"anchor": anchor, "similarity": _number(similarity[anchor])}


def _matches(redundancy: Redundancy) -> list[dict[str, Any]]:
    """For each layer and each one before it, which of its heads matches each of the other's."""
    pairs = [(anchor, layer) for layer in range(len(redundancy.entropy)) for anchor in range(layer)]
    can_match = redundancy.best_head.isfinite()
    return [
        {"layer": layer, "anchor": anchor, "heads": match_heads(redundancy.variation[anchor, layer])}
        for anchor, layer in pairs
        if can_match[anchor, layer]
    ]


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else round(float(value), 6)


def _numbers(matrix: Tensor) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in matrix]


def render(result: dict[str, Any]) -> Group:
    remarks = [
        *rows_remarks(result["rows"]),
        "entropy in nats, distance in patches, means over heads",
        "same head, best head: the earlier layer of most alike maps, 0 to 1, as they stand and matched",
    ]
    specs = [*result["layers"][-1]["damage"]]
    if specs:
        remarks.append(f"{', '.join(specs)}: the damage, which ranks changes; of reuse the best exact anchor's")
    plan = "" if result["plan"] is None else f", {result['plan']}"
    title = f"{result['name']}{plan}, {result['num_images']:,} images"
    headings = ("layer", "entropy", "distance", "same head", "best head", *specs)
    rows = (_cells(layer, specs) for layer in result["layers"])
    return titled(title, table_of(headings, rows, ()), *remarks)


def _cells(layer: dict[str, Any], specs: list[str]) -> list[str]:
    means = ["-" if layer[name] is None else f"{layer[name]:.2f}" for name in ("entropy", "distance")]
    found = (layer["same_head"], layer["best_head"])
    alike = ["-" if of is None else f"{of['anchor']}: {of['similarity']:.2f}" for of in found]
    return [str(layer["layer"]), *means, *alike, *(_damage_cell(layer["damage"].get(spec)) for spec in specs)]


def _damage_cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "-"
    anchor = "" if best["anchor"] is None else f"{best['anchor']}: "
    return f"{anchor}{best['damage']:.1e}"
