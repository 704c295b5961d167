"""How redundant a model's attention is on somebody's images: how alike maps are, and what a change of them would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from torch import Tensor

from vitreuse.compress.damage import Change, check_specs, has_exact_layers, measure_damage
from vitreuse.compress.head_matching import match_heads
from vitreuse.compress.redundancy import Redundancy, measure_redundancy
from vitreuse.compress.row_sample import NUM_ROWS, count_rows
from vitreuse.data.samples import images_for
from vitreuse.files.hub import plan_text
from vitreuse.io.progress import WorkProgress
from vitreuse.io.tables import Shown, table_of, titled
from vitreuse.model.keywords import architecture
from vitreuse.plan import EXACT, Spec
from vitreuse.verbs.plots import heatmaps
from vitreuse.verbs.words import default_words, parse_words


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Shown):
    """How redundant a model is.

    Attributes:
        redundancy: What the maps of its layers have in common.
        damage: By change of a layer; of nothing where layers are not exact.
        facts: The same in words and numbers, as the command has them under --json.
    """

    redundancy: Redundancy
    damage: Mapping[Change, float]
    facts: dict[str, Any]

    def table(self) -> Group:
        return table(self.facts)

    def picture(self) -> bytes:
        """Heat maps, as a PNG."""
        return heatmaps(self.facts)


def similarity(
    model: Any,
    images: Any,
    words: str | Sequence[Spec] | None = None,
    num_rows: int = NUM_ROWS,
    seed: int = 0,
) -> Similarity:
    """How alike the attention maps of a model's layers are, and the damage of each change of a layer to its output.

    Args:
        model: One of timm's ViTs, or one with a plan, on any device; its mode is restored.
        images: What Images takes: a tensor, a data set, a loader; or Images.
        words: What a layer may become, as "reuse,none"; by default reuse, lowrank, span and none of exact layers.
        num_rows: Patches of each image whose rows of the maps are looked at, beside all prefix tokens.
        seed: Of their choice.

    Raises:
        ValueError: There are no such images, or a word does not fit the model.
    """
    specs = parse_words(words) if isinstance(words, str) else words
    if specs is not None:
        check_specs(model, specs)
    elif has_exact_layers(model):
        specs = default_words(model)
    batches, damage = images_for(model, images), {}
    with WorkProgress("similarity", "images", len(batches)) as progress:
        redundancy = measure_redundancy(model, batches.labelled(), progress, num_rows, seed)
    if specs is not None:
        with WorkProgress("damage", "images", len(batches)) as progress:
            damage = measure_damage(model, batches.labelled(), specs, redundancy, progress, num_rows, seed)
    facts = {
        "name": architecture(model),
        "plan": plan_text(model),
        "num_images": len(batches),
        "rows": count_rows(model, num_rows),
        **_facts(redundancy, damage),
    }
    return Similarity(redundancy, damage, facts)


def _facts(redundancy: Redundancy, damage: Mapping[Change, float]) -> dict[str, Any]:
    """What was measured, layer by layer as the table shows it, and in full."""
    return {
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


def table(facts: dict[str, Any]) -> Group:
    """What was measured of each layer."""
    remarks = [
        *rows_remarks(facts["rows"]),
        "entropy in nats, distance in patches, means over heads",
        "same head, best head: the earlier layer of most alike maps, 0 to 1, as they stand and matched",
    ]
    specs = [*facts["layers"][-1]["damage"]]
    if specs:
        remarks.append(f"{', '.join(specs)}: the damage, which ranks changes; of reuse the best exact anchor's")
    plan = "" if facts["plan"] is None else f", {facts['plan']}"
    title = f"{facts['name']}{plan}, {facts['num_images']:,} images"
    headings = ("layer", "entropy", "distance", "same head", "best head", *specs)
    rows = (_cells(layer, specs) for layer in facts["layers"])
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


def rows_remarks(rows: tuple[int, int] | None) -> list[str]:
    """What a table says of the rows of maps that were looked at, of how many, where they are not all."""
    return [f"of each image's maps {rows[0]:,} of {rows[1]:,} rows"] if rows and rows[0] < rows[1] else []
