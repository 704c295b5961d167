"""Teachers of the study searched, converted and healed, and the table of it: a part of `make study`.

A line of conversion/runs.jsonl is one teacher in one plan: that of a preset, or the one that `vitreuse search` finds
for a share of the MACs over all words; then `vitreuse convert` and `python -m train configs/study/heal_TASK.yaml`, as a
user types them. The teachers are the exact models of configs/study under five seeds, trained on this machine: another
processor trains others, so that a line says what its own teacher got wrong. Lines that are there are not made again:
with all of them, this takes a second and needs no teacher.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.card import NAME as CARD
from eval.card import read_card
from eval.statistics import difference, verdict
from eval.table import Column, to_markdown
from vitreuse.cost.measure import describe_machine
from vitreuse.io.durable import write_durably

FOLDER = Path(__file__).parent / "conversion"
LINES = FOLDER / "runs.jsonl"
RUNS = Path("runs/conversion")
TEACHERS = Path("runs/study")
TASKS = ("digits", "pointer")
SEEDS = range(5)
MINUTES = 1.0  # of a search by real distances, which ends before where nothing improves
NUM_IMAGES = 1024  # of the training split, that plans are chosen and conversions fitted on
UNFITTED = ("--no-fit",)  # layers stay as they come out of the teacher, for what heals is compared here

Lines = dict[tuple[str, int, str], dict[str, Any]]  # by task, seed and name


class Variant(NamedTuple):
    """What becomes of every teacher.

    Attributes:
        name: In the table.
        plan: Or None, to search for one.
        budget: Of the search, a share of the MACs.
        options: Of the conversion.
    """

    name: str
    plan: str | None = None
    budget: float = 0.75
    options: tuple[str, ...] = UNFITTED


# Every preset costs more MACs than the searched plans: 0.850, 0.826, 0.845 and 0.975 of the exact model's.
VARIANTS = (
    Variant("searched, 0.75", options=()),
    Variant("searched, 0.5", budget=0.5, options=()),
    Variant("searched, 0.975", budget=0.975, options=()),  # of mixspan's MACs, the one that 0.75 does not beat
    Variant("reuse", "exact reuse*3 exact*2"),
    Variant("lazy", "(exact reuse*2)*2"),
    Variant("lowrank", "lowrank:8*6"),
    Variant("mixspan", "(span:3*2 exact)*2"),
    Variant("reuse, fitted", "exact reuse*3 exact*2", options=()),
    Variant("lazy, fitted", "(exact reuse*2)*2", options=()),
    Variant("lowrank, fitted", "lowrank:8*6", options=()),
    Variant("mixspan, fitted", "(span:3*2 exact)*2", options=()),
    Variant("lazy, heads in order", "(exact reuse*2)*2", options=(*UNFITTED, "--no-match-heads")),
    Variant("lazy, heads matched by variation", "(exact reuse*2)*2", options=(*UNFITTED, "--match-by", "variation")),
    Variant("lowrank, random projections", "lowrank:8*6", options=(*UNFITTED, "--lowrank-start", "random")),
    Variant("lowrank, pooled projections", "lowrank:8*6", options=(*UNFITTED, "--lowrank-start", "pooled")),
)
COLUMNS = (
    Column("name", "method"),
    Column("plan", "plan"),
    Column("count", "of 5", "d"),
    Column("share", "MACs / exact", ".3f"),
    Column("teacher", "teacher (%)", ".2f"),
    Column("before", "converted (%)", ".2f"),
    Column("healed", "healed (%)", ".2f"),
    Column("points", "healed - teacher", "+.2f"),
    Column("worst", "worst of 5", "+.2f"),
    Column("verdict", "verdict"),
)


def main() -> None:
    """Makes what is missing, and writes the table of each task."""
    FOLDER.mkdir(exist_ok=True)
    found = _read_lines()
    keys = ((task, seed, variant) for variant, task, seed in product(VARIANTS, TASKS, SEEDS))
    missing = [key for key in keys if (*key[:2], key[2].name) not in found]
    if missing:
        configs = [f"configs/study/{task}_exact.yaml" for task in TASKS]
        _call("-m", "train.sweep", *configs, f"seeds={len(SEEDS)}", f"runs={TEACHERS}", "jobs=2")
    with ThreadPoolExecutor(2) as pool:
        for number, line in enumerate(pool.map(lambda key: _make(*key), missing), 1):
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(missing)}: {line['task']}, seed {line['seed']}, {line['name']}", flush=True)
    found = _read_lines()
    for task in TASKS:
        write_durably(FOLDER / f"{task}.md", _table(task, found).encode())


def _read_lines() -> Lines:
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    return {(line["task"], line["seed"], line["name"]): line for line in lines}


def _make(task: str, seed: int, variant: Variant) -> dict[str, Any]:
    """One line: a plan, its conversion and its healing."""
    teacher = TEACHERS / f"{task}_exact-seed{seed}"
    folder = RUNS / f"{task}-{variant.name.replace(', ', '-').replace(' ', '_')}-seed{seed}"
    converted, healed = folder / "converted", folder / "healed"
    plan = variant.plan or _search(teacher, variant)
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was broken off has left
    options = ("--plan", plan, "-o", str(converted), "--images", str(NUM_IMAGES), *variant.options)
    macs = json.loads(_call("-m", "vitreuse", "convert", str(teacher), *options, "--json"))["macs"]
    names = (f"model.name=local-dir:{converted}", f"train.distill.teacher.name=local-dir:{teacher}")
    _call("-m", "train", f"configs/study/heal_{task}.yaml", *names, f"train.seed={seed}", f"run_dir={healed}")
    records = map(json.loads, (healed / "metrics.jsonl").read_text().splitlines())
    taught, found = (read_card(run / CARD).correct_images() for run in (teacher, healed))
    return {
        "task": task,
        "seed": seed,
        "name": variant.name,
        "plan": plan,
        "share": macs[1] / macs[0],
        "machine": describe_machine(torch.device("cpu")),
        "before_top1": next(record["before_top1"] for record in records if record["kind"] == "heal"),
        "num_images": len(found),
        "teacher_wrong": np.flatnonzero(~taught).tolist(),
        "wrong": np.flatnonzero(~found).tolist(),
    }


def _search(teacher: Path, variant: Variant) -> str:
    options = ("--budget", str(variant.budget), "--images", str(NUM_IMAGES), "--minutes", str(MINUTES))
    return json.loads(_call("-m", "vitreuse", "search", str(teacher), *options, "--json"))["chosen"]["plan"]


def _call(*arguments: str) -> str:
    """What a Python command on one thread says on standard output; its errors are shown."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with exit code {done.returncode}.")
    return done.stdout


def _table(task: str, lines: Lines) -> str:
    """One row per variant, against the five teachers."""
    rows = [_row(variant.name, [lines[task, seed, variant.name] for seed in SEEDS]) for variant in VARIANTS]
    machines = sorted({_machine(line) for (of, *_), line in lines.items() if of == task})
    caption = (
        f"{lines[task, 0, VARIANTS[0].name]['num_images']:,} images, means over {len(SEEDS)} teachers; the worst is "
        "against its own teacher. Verdicts are those of eval compare: over images and seeds. The plan is the one that "
        f"most teachers got. {'; '.join(machines)}."
    )
    return to_markdown(rows, COLUMNS, caption)


def _machine(line: dict[str, Any]) -> str:
    return f"{line['machine']['device']}, {line['machine']['date']}"


def _correct(line: dict[str, Any], key: str) -> np.ndarray:
    """Which images are not among those of a key, (num_images,)."""
    correct = np.ones(line["num_images"], dtype=bool)
    correct[line[key]] = False
    return correct


def _row(name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    teachers, healed = (np.stack([_correct(line, key) for line in lines]) for key in ("teacher_wrong", "wrong"))
    found = difference(teachers, healed)
    (plan, count), *_ = Counter(line["plan"] for line in lines).most_common(1)
    return {
        "name": name,
        "plan": plan,
        "count": count,
        "share": np.mean([line["share"] for line in lines]),
        "teacher": 100 * teachers.mean(),
        "before": np.mean([line["before_top1"] for line in lines]),
        "healed": 100 * healed.mean(),
        "points": found.points,
        "worst": 100 * (healed.mean(1) - teachers.mean(1)).min(),
        "verdict": verdict(found.points, found.p),
    }


if __name__ == "__main__":
    main()
