"""The README's five commands on this model, one after the other, and what the healed one keeps of the original.

What a command has left already is not made again; training goes on by itself. Healing learns from 224/train, is watched
on 224/val, and what it is worth is measured on the tests, whose objects and backgrounds it never saw.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from docs.study.dinov2.measure import TESTS, Original, images_of
from docs.study.dinov2.packages import HERE
from eval.table import Column, to_markdown
from vitreuse import convert
from vitreuse.attention import EMPTY_CARRY
from vitreuse.compress.closed_form import merged_alike
from vitreuse.cost.measure import describe_machine
from vitreuse.files.networks import resolve_targets
from vitreuse.io.durable import write_durably
from vitreuse.model.block import all_tokens

ROOT = HERE.parents[2]
MODEL, CONVERTED, HEALED = "vit_small_patch14_dinov2", "runs/dinov2/converted", "runs/dinov2/healed"
HEALED_PX = 224
COLUMNS = (
    Column("name", "model"),
    *(
        Column(f"{test}.{key}", f"{test}: {heading}", ".4f")
        for test in TESTS
        for key, heading in (("class_cosine", "class"), ("patch_cosine", "patches"))
    ),
)


def _at(found: dict[str, dict[str, float]], key: str) -> float:
    test, name = key.split(".")
    return found[test][name]


def five_commands() -> list[list[str]]:
    """The README's, as arguments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if f"vitreuse similarity {MODEL}" in block]
    return [shlex.split(line) for line in block.splitlines()]


def run_commands() -> None:
    """Runs those that have left nothing yet.

    Raises:
        OSError: One of them failed.
    """
    for argv in five_commands():
        left = Path(argv[argv.index("-o") + 1]) if "-o" in argv else None
        if left is not None and left.is_dir() and any(left.iterdir()):
            continue
        print(shlex.join(argv), flush=True)
        code = subprocess.run([sys.executable, "-m", *_module(argv)], cwd=ROOT, check=False).returncode
        if code:
            raise OSError(f"{shlex.join(argv)} ended with {code}: see what it said, and run this again.")


def _module(argv: list[str]) -> list[str]:
    """A command of the README as python -m has it."""
    return ["vitreuse", *argv[1:]] if argv[0].endswith("vitreuse") else argv[2:]


def measure_healed() -> None:
    """Writes healing.md: cosines to the original on both tests, of the plan as it comes out of the original, of the
    converted model, whose layers are fitted, and of the healed one; with the best that merged tokens could be."""
    original = Original(HEALED_PX)
    models = {name: _model_of(folder) for name, folder in (("fitted", CONVERTED), ("healed", HEALED))}
    models = {"as it comes": convert(original.model, str(models["fitted"].plan)).model, **models}
    rows = []
    for name, model in models.items():
        found = {test: asdict(original.agreement(model, test)[0]) for test in TESTS}
        cosines = {column.key: _at(found, column.key) for column in COLUMNS[1:]}
        rows.append({"name": f"{model.plan}, {name}", **cosines})
    before, *_, after = rows
    lost = {column.key: (1 - after[column.key]) / (1 - before[column.key]) for column in COLUMNS[1:]}
    best = {f"{test}.patch_cosine": best_of_merged(original, models["as it comes"], test) for test in TESTS}
    blank = dict.fromkeys(column.key for column in COLUMNS)
    rows += [{**blank, "name": "upper bound: the best values of merged tokens", **best}]
    rows += [{"name": "left of what was lost", **lost}]
    records = [json.loads(line) for line in (ROOT / HEALED / "metrics.jsonl").read_text().splitlines()]
    machine, seconds = describe_machine(original.model.cls_token.device), records[-1]["seconds"]
    how = f"{seconds / 60:.1f} minutes of training ({records[-1]['step']} steps) without labels"
    where = f"{machine['device']}, {machine['threads']} threads, {machine['date']}"
    caption = f"Cosine to the original's features at {HEALED_PX} px, means over images. Healed in {how}. {where}."
    write_durably(HERE / "healing.md", ("# Healing without labels\n\n" + to_markdown(rows, COLUMNS, caption)).encode())


def _model_of(folder: str) -> Any:
    (target,) = resolve_targets([str(ROOT / folder)])
    return target.load().eval()


@torch.inference_mode()
def best_of_merged(original: Original, model: Any, test: str) -> float:
    """The mean cosine of patch tokens where those that the model merges have the mean direction of the original's."""
    found, batches = [], images_of(TESTS[test].format(px=original.image_size_px), model).batches(original.batch_size)
    for (images, _), tokens in zip(batches, original.tokens[test].split(original.batch_size), strict=True):
        x, grid = model.embed(images)
        carry = EMPTY_CARRY
        for block in model.blocks:
            x, carry = block(x, carry, grid)
        best = all_tokens(merged_alike(F.normalize(tokens, dim=-1), carry), carry)
        found.append(F.cosine_similarity(best, tokens, dim=-1)[:, 1:].mean(1))
    return float(torch.cat(found).double().mean())
