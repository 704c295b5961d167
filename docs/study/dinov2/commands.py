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

from docs.study.dinov2.measure import TESTS, Original
from docs.study.dinov2.packages import HERE
from eval.table import Column, to_markdown
from vitreuse.cost.measure import describe_machine
from vitreuse.export.networks import resolve_targets
from vitreuse.io.durable import write_durably

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
    """Writes healing.md: the converted model's cosines to the original on both tests, before and after healing."""
    original, rows = Original(HEALED_PX), []
    for name, folder in (("before", CONVERTED), ("after", HEALED)):
        (target,) = resolve_targets([str(ROOT / folder)])
        model: Any = target.load().eval()
        found = {test: asdict(original.agreement(model, test)[0]) for test in TESTS}
        cosines = {column.key: _at(found, column.key) for column in COLUMNS[1:]}
        rows.append({"name": f"{model.plan}, {name}", **cosines})
    before, after = rows
    lost = {column.key: (1 - after[column.key]) / (1 - before[column.key]) for column in COLUMNS[1:]}
    rows.append({"name": "left of what was lost", **lost})
    records = [json.loads(line) for line in (ROOT / HEALED / "metrics.jsonl").read_text().splitlines()]
    machine, seconds = describe_machine(original.model.cls_token.device), records[-1]["seconds"]
    how = f"{seconds / 60:.1f} minutes of training ({records[-1]['step']} steps) without labels"
    where = f"{machine['device']}, {machine['threads']} threads, {machine['date']}"
    caption = f"Cosine to the original's features at {HEALED_PX} px, means over images. Healed in {how}. {where}."
    write_durably(HERE / "healing.md", ("# Healing without labels\n\n" + to_markdown(rows, COLUMNS, caption)).encode())
