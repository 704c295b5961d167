"""The page that says what was found on a GPU."""

from __future__ import annotations

from typing import Any

from eval.table import Column, to_markdown

SPEED = (
    Column("name", "model"),
    Column("image_size_px", "px"),
    Column("batch_size", "batch", "d"),
    Column("images_per_second", "images/s", ",.0f"),
    Column("median_ms", "median (ms)", ".2f"),
    Column("peak_memory_mib", "memory (MiB)", ",.0f"),
    Column("speedup", "speed-up", ".2f"),
    Column("predicted", "by MACs", ".2f"),
)
TRAINING = (
    Column("name", "plan"),
    Column("steps", "steps", "d"),
    Column("images_per_second", "images/s", ",.0f"),
    Column("mfu_percent", "MFU (%)", ".1f"),
    Column("data_wait_percent", "waiting for data (%)", ".1f"),
    Column("peak_memory_mib", "memory (MiB)", ",.0f"),
    Column("augmented_on", "augmented on"),
)
RESUME = (
    Column("killed_after_step", "killed after step", "d"),
    Column("resumed_apart", "resumed, largest difference of a weight", ".2g"),
    Column("undisturbed_apart", "two undisturbed runs", ".2g"),
)
WORST = (Column("precision", "precision"), Column("number", "plans", "d"), Column("apart", "largest difference", ".2g"))
NOT_RUN = "# On a GPU\n\nNot yet run: `make gpu` writes this page on a machine with an NVIDIA card.\n"


def written(found: dict[str, Any]) -> str:
    """The page, in Markdown; parts that were not done are not on it."""
    machine = found["machine"]
    said = ", ".join(str(machine[key]) for key in ("device", "torch", "timm", "date") if machine.get(key))
    parts = [_part(name, part) for name, part in found["parts"].items()]
    return "\n\n".join(["# On a GPU", f"Written by `make gpu`: {said}.", *parts]) + "\n"


def summary(part: dict[str, Any]) -> str:
    """One line about a part."""
    failed = f", FAILED: {part['error']}" if part["error"] else ""
    return f"{len(part['rows'])} rows in {part['seconds']:.0f} s{failed}"


def _part(name: str, part: dict[str, Any]) -> str:
    error = f"\n\n**Failed:** {part['error']}" if part["error"] else ""
    return f"## {name.capitalize()}\n\n{_table(name, part['rows'])}{error}"


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    if name == "tune":
        return "The costs of attention were measured; they are in gpu.json."
    if name == "correctness":
        return to_markdown(_worst(rows), WORST, "Against the CPU in float32, relative to the largest number.")
    columns = {"speed": SPEED, "training": TRAINING, "resume": RESUME}[name]
    caption = "Speed-up: against the best plain model of the same run." if name == "speed" else ""
    return to_markdown(rows, columns, caption)


def _worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest difference in each precision."""
    precisions = dict.fromkeys(row["precision"] for row in rows)
    of = {precision: [row["apart"] for row in rows if row["precision"] == precision] for precision in precisions}
    return [{"precision": precision, "number": len(apart), "apart": max(apart)} for precision, apart in of.items()]
