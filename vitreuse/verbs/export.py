"""A trained model as files that others load; each program among them is checked on images before it is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.filesize import decimal

from vitreuse.data.samples import Images, images_for
from vitreuse.files import programs
from vitreuse.files.hub import plan_text
from vitreuse.files.model_card import Provenance
from vitreuse.files.programs import FILES, OPSETS, PROGRAMS
from vitreuse.io.tables import Shown, table_of, titled
from vitreuse.model.copies import seeded
from vitreuse.model.keywords import architecture
from vitreuse.model.preprocessing import example

BATCH_SIZE, SEED = 8, 0  # of random images
READERS = {"opset": ("onnx",), "folds": PROGRAMS, "images": PROGRAMS}  # by argument the formats on which it has effect


@dataclass(frozen=True, eq=False, repr=False)
class Exported(Shown):
    """What an export left.

    Attributes:
        files: Where each lies, and the first format that it is of.
        facts: The same with what was measured, as the command has it under --json.
    """

    files: dict[Path, str]
    facts: dict[str, Any]

    def table(self) -> Group:
        return table(self.facts)


def export(
    model: Any,
    folder: str | os.PathLike[str],
    formats: str | Sequence[str] = "hub",
    images: Any = None,
    folds: bool = False,
    opset: int | None = None,
    known: Provenance | None = None,
) -> Exported:
    """Writes a model in each of the formats; each file is whole or not there, and none is if a program is wrong.

    Args:
        model: A ViT of timm or ours in float32 on the CPU, made by timm.create_model; its mode is restored.
        folder: For the files; made where it is missing. What an earlier export left is replaced.
        formats: Of hub, safetensors, torch and onnx.
        images: What Images takes, on which programs are checked; random ones by default.
        folds: Whether programs are of the folded model, see fold.
        opset: The version of ONNX's operators, the newest by default.
        known: What is known of the model beside it, for its card.

    Raises:
        ValueError: The folder holds something else or cannot be written, the model cannot be traced, a package is
            missing, a program's logits are not the model's, or an argument has no effect on the formats.
    """
    formats = [formats] if isinstance(formats, str) else [*formats]
    _refuse_odd(model, formats, {"opset": opset, "folds": folds or None, "images": images})
    known, path, newest = known or Provenance(architecture(model)), Path(folder), OPSETS[-1]
    with seeded(SEED):
        batches = _batches(model, images) if {*formats} & {*PROGRAMS} else None
        checks = programs.export(model, known, path, formats, batches or (), folds, opset or newest)
    files = {path / file: of for of in reversed(formats) for file in FILES[of]}
    num_images, what = len(batches or ()), "random images" if images is None else "images"
    facts = {
        "name": known.name,
        "plan": plan_text(model),
        "training": known.training,
        "files": [{"path": str(at), "format": of, "num_bytes": at.stat().st_size} for at, of in sorted(files.items())],
        "opset": (opset or newest) if "onnx" in formats else None,
        "images": f"{num_images} {what}" if batches else None,
        "num_images": num_images,
        "differences": {of: check.difference for of, check in checks.items()},
        "num_left_out": {of: check.num_left_out for of, check in checks.items()},
    }
    return Exported(files, facts)


def _refuse_odd(model: Any, formats: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises ValueError for a model elsewhere, formats that are none, and what has no effect on those given."""
    device, dtype = (getattr(next(model.parameters()), name) for name in ("device", "dtype"))
    if device.type != "cpu":
        raise ValueError(f"the model is on {device}: export it from the CPU, as model.cpu().")
    if dtype != torch.float32:
        raise ValueError(f"the model is in {dtype}: export it in float32, as model.float().")
    for of in formats:
        if of not in FILES:
            raise ValueError(f"{of!r} is no format: give any of {', '.join(FILES)}.")
    for name, value in given.items():
        if value is not None and not {*READERS[name]} & {*formats}:
            raise ValueError(f"{name} has no effect without the format {' or '.join(READERS[name])}: leave it out.")


def _batches(model: Any, images: Any) -> Images:
    """Images to check on, random ones of none."""
    return images_for(model, example(model, BATCH_SIZE) if images is None else images, BATCH_SIZE)


def table(result: dict[str, Any]) -> Group:
    """The files, and what they were checked on."""
    plan = f", plan {result['plan']}" if result["plan"] else ""
    shown = {of: f"{difference:.1e}" for of, difference in result["differences"].items()}
    rows = ((file["path"], decimal(file["num_bytes"]), shown.get(file["format"], "-")) for file in result["files"])
    files = table_of(("file", "size", "difference"), rows, ("file",))
    return titled(f"{result['name']}{plan}", files, *_remarks(result))


def _remarks(result: dict[str, Any]) -> list[str]:
    """What the programs were checked on, and how fast ONNX is."""
    lines = [] if result["training"] is None else [result["training"]]
    if result["images"] is not None:
        what = "largest of a program's logits over their standard deviation"
        lines.append(f"difference: {what}, on {result['images']}")
    for of, number in result["num_left_out"].items():
        if number:
            text = f"{number} of {result['num_images']} images, of whose tokens rounding decides which merge"
            lines.append(f"left out of the difference of {of}: {text}")
    if speed := result.get("speed"):
        by_label = speed["images_per_second"].items()
        rates = (f"{label} {rate:,.1f} ({speed['speedup'][label]:.2f})" for label, rate in by_label)
        lines.append(f"images/s (over eager, by minimum times): {', '.join(rates)}")
        lines.append(f"float32, batch {speed['batch_size']}, CPU threads: {speed['threads']}, medians of turns")
    return lines
