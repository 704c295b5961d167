"""The speed of plans over image size, beside timm's best plain model and what the MACs predict: README.md and a chart.

    python -m docs.speed    # make speed: measures what speed.jsonl lacks, then draws

Times want a machine that does nothing else. A line that lies in speed.jsonl is not measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from eval.figures import STYLES, framed, kind_of
from eval.table import Column, to_markdown
from eval.throughput import Condition, measure
from vitreuse import parse_plan, preset_plan
from vitreuse.cost.measure import describe_machine
from vitreuse.files.networks import resolve_targets
from vitreuse.io.durable import durable_file, write_durably

HERE = Path(__file__).parent
LINES = HERE / "speed.jsonl"
MODEL, DEPTH = "vit_small_patch16_224", 12
BATCH = {224: 8, 384: 4, 512: 2}  # by image size in pixels
PLANS = ("exact*12", "exact reuse*6 exact*5", "(exact reuse*5)*2", "lowrank:64*12", "(lowrank:64 reuse*2)*4")
SPAN = "(span:7*2 exact)*4"
DTYPES = ("float32", "bfloat16")
NUM_REPEATS = 10
COLUMNS = (
    Column("plan", "plan"),
    *(Column(f"{dtype} {size_px}", f"{dtype}, {size_px} px") for dtype in DTYPES for size_px in BATCH),
)


def plans(image_size_px: int) -> dict[str, str]:
    """Plans by what they are called: a merge of as many tokens as the preset has at a size is one row."""
    merging = preset_plan("merge", DEPTH, num_patches=(image_size_px // 16) ** 2)
    return {**{plan: plan for plan in (*PLANS, SPAN)}, "merge": str(merging)}


def measure_missing() -> None:
    """Completes speed.jsonl, a size and precision at a time."""
    device = torch.device("cpu")
    there = {(line["image_size_px"], line["dtype"]) for line in read_lines()}
    for size_px, batch_size in BATCH.items():
        named = plans(size_px)
        for dtype in DTYPES:
            if (size_px, dtype) in there:
                continue
            print(f"timing {len(named)} plans at {size_px} px in {dtype}", file=sys.stderr, flush=True)
            targets = resolve_targets([MODEL], list(named.values()), [size_px])
            rows = measure(targets, Condition(size_px, dtype, "inference", batch_size, device), NUM_REPEATS)
            found = [row for row in rows if row["name"] == row["measured_with"]]
            speeds = [
                {"plan": name, **{key: row[key] for key in ("speedup", "predicted", "baseline", "spread_percent")}}
                for name, row in zip(named, found, strict=True)
            ]
            about = {"image_size_px": size_px, "dtype": dtype, "batch_size": batch_size}
            with LINES.open("a") as file:
                file.write(json.dumps({**about, "rows": speeds, "machine": describe_machine(device)}) + "\n")


def read_lines() -> list[dict[str, Any]]:
    """The lines that are there: a size and precision each."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def show() -> None:
    """Writes README.md and speed.png."""
    lines = read_lines()
    if not lines:
        return
    machine = lines[-1]["machine"]
    how = "Inference; speed-up over the better of timm's fused and unfused model in the same run, by minimum times."
    keys = ("device", "threads", "torch", "timm", "date")
    where = ", ".join(f"{key} {machine[key]}" for key in keys)
    caption = f"{how} Batch {', '.join(f'{size} at {px} px' for px, size in BATCH.items())}. {where}."
    table = {}
    for line in lines:
        for row in line["rows"]:
            text = f"{row['speedup']:.2f} ({row['predicted']:.2f})"
            table.setdefault(row["plan"], {})[f"{line['dtype']} {line['image_size_px']}"] = text
    blank = dict.fromkeys(column.key for column in COLUMNS)
    rows = [{**blank, "plan": plan, **cells} for plan, cells in table.items()]
    heading = f"# Speed of {MODEL} under a plan\n\nIn brackets what the MACs predict.\n\n"
    picture = "![speed-up of each plan over image size; the larger the images, the more a plan gains](speed.png)\n"
    write_durably(HERE / "README.md", (heading + to_markdown(rows, COLUMNS, caption) + "\n" + picture).encode())
    draw(lines, caption)


def draw(lines: list[dict[str, Any]], caption: str) -> None:
    """Draws speed.png: a panel for each precision, a line for each plan."""
    figure, first = framed((10, 4.6), [caption])
    first.remove()
    for place, dtype in enumerate(DTYPES, 1):
        panel: Any = figure.add_subplot(1, len(DTYPES), place)
        of_dtype = sorted((line for line in lines if line["dtype"] == dtype), key=lambda line: line["image_size_px"])
        for plan in dict.fromkeys(row["plan"] for line in of_dtype for row in line["rows"]):
            kind = "merging" if plan == "merge" else kind_of(parse_plan(plan))
            colour, mark = STYLES[kind]
            rows = [(line["image_size_px"], row) for line in of_dtype for row in line["rows"] if row["plan"] == plan]
            points = [(size_px, row["speedup"]) for size_px, row in rows]
            style = "--" if plan == "(exact reuse*5)*2" else "-"  # the second of its kind
            panel.plot(*zip(*points, strict=True), color=colour, marker=mark, linestyle=style, label=plan)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set(title=dtype, xlabel="image size (px)", ylabel="speed-up over timm's best", xticks=list(BATCH))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if place == 1:
            panel.legend(frameon=False, fontsize=7)
    with durable_file(HERE / "speed.png") as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    measure_missing()
    show()
