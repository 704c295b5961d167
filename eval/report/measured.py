"""What a report finds out beside the cards: how runs went, how fast models are and where, how alike their maps are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.flops import macs_by_part
from eval.profile import profile_parts
from eval.series import Series
from eval.throughput import speeds
from vitreuse.compress.redundancy import map_similarity
from vitreuse.config import Config
from vitreuse.cost.measure import inference_call
from vitreuse.data import find_split, open_split
from vitreuse.io.progress import WorkProgress
from vitreuse.model.preprocessing import evaluation_transform, example, image_mode

SIMILARITY_IMAGES = 8
CURVE_POINTS = 120  # of a curve, at most: more than a phone has pixels for
Curve = list[tuple[float, float]]  # of (epochs, value)
LAYER_PART = re.compile(r"blocks\.(\d+)\.(norm1|attn|ls1|drop_path1|linear)?")


def curves(series: Series) -> dict[str, Any] | None:
    """Loss and top-1 over the epochs, of each seed and in the mean; None where no run folder was given."""
    by_seed = [(run.card.seed, _read_curves(run.folder.run_dir)) for run in series.runs if run.folder is not None]
    if not by_seed:
        return None
    found: dict[str, Any] = {}
    for name in ("loss", "top1"):
        lines = [(seed, shortened(curve[name])) for seed, curve in by_seed if curve[name]]
        if lines:
            mean = _mean_curve([line for _, line in lines]) if len(lines) > 1 else None
            found[name] = {"seeds": [{"seed": seed, "points": line} for seed, line in lines], "mean": mean}
    return found


def _read_curves(run_dir: Path | None) -> dict[str, Curve]:
    """What metrics.jsonl says: the loss of each step record, top-1 of each evaluated epoch."""
    assert run_dir is not None
    found: dict[str, Curve] = {"loss": [], "top1": []}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = {"step": "loss", "epoch": "top1"}.get(record["kind"])
        if name is not None and record.get(name) is not None:
            found[name].append((record["epoch"], record[name]))
    return found


def shortened(curve: Curve) -> Curve:
    """At most CURVE_POINTS points, each the mean of as many neighbours."""
    pieces = np.array_split(np.array(curve), min(len(curve), CURVE_POINTS))
    means = [piece.mean(0).tolist() for piece in pieces]
    return [(round(x, 3), round(y, 4)) for x, y in means]


def _mean_curve(lines: Sequence[Curve]) -> Curve:
    """The mean at the points of the first line, as far as all of them reach."""
    end = min(line[-1][0] for line in lines)
    places = [x for x, _ in lines[0] if x <= end]
    values = np.mean([np.interp(places, *np.array(line).T) for line in lines], axis=0)
    return [(x, round(y, 4)) for x, y in zip(places, values.tolist(), strict=True)]


def profiled_calls(num_models: int) -> int:
    """Calls per model whose time is broken down by layer, which takes ten times as long as timing them."""
    return max(1, min(3, 20 // num_models))


def costs(
    models: Mapping[str, nn.Module], device: torch.device, batch_size: int, num_repeats: int, progress: WorkProgress
) -> dict[str, dict[str, Any]]:
    """The speed and memory of each model by its key, and the time of each of its layers."""
    found = {}
    for key, speed in speeds(models, device, batch_size, num_repeats).items():
        call = inference_call(models[key], example(models[key], batch_size))
        parts = profile_parts(models[key], call, batch_size, profiled_calls(len(models)))
        found[key] = {
            "images_per_second": speed.images_per_second,
            "spread_percent": speed.spread_percent,
            "memory_mib": speed.peak_memory_mib,
            "ms": by_layer(
                ((row["part"], row["ms"]) for row in parts if row["part"] != "total"), depth_of(models[key])
            ),
        }
        progress.reach(progress.done + 1, "speed")
    return found


def layer_macs(model: nn.Module) -> dict[str, Any]:
    """MACs per image by layer."""
    return by_layer(((part, macs) for part, macs in macs_by_part(model).items() if part), depth_of(model))


def depth_of(model: Any) -> int:
    """How many layers a ViT has."""
    return len(model.blocks)


def by_layer(parts: Iterable[tuple[str, float]], depth: int) -> dict[str, Any]:
    """Amounts by part, summed: of each layer's attention and MLP, their norms included, and of the rest; of a linear
    layer its one matrix stands as attention, of a skipped one there is nothing."""
    halves: dict[str, list[float]] = {"attention": [0] * depth, "mlp": [0] * depth}
    rest = 0.0
    for part, amount in parts:
        if match := LAYER_PART.match(part):
            halves["attention" if match[2] else "mlp"][int(match[1])] += amount
        else:
            rest += amount
    return {**halves, "rest": rest}


def similarity(series: Series, device: torch.device) -> dict[str, Any]:
    """How alike the maps of its first run with a folder are, over a few validation images; else why that is not known.

    Returns:
        seed and rows, of numbers from 0 to 1 and None where maps cannot be compared; or reason, a sentence.
    """
    seed, folder = next(((run.card.seed, run.folder) for run in series.runs if run.folder is not None), (None, None))
    if folder is None:
        return {"reason": "Only cards were given: the weights are in the run folder."}
    assert folder.config is not None
    if find_split(Path(folder.config.data.folder), "val") is None:
        return {"reason": f"The validation images are not at {folder.config.data.folder}."}
    try:
        model = folder.load().to(device).eval()
        rows = map_similarity(model, _some_images(folder.config, model).to(device)).tolist()
    except (ValueError, OSError) as error:
        return {"reason": f"It cannot be computed: {error}"}
    return {"seed": seed, "rows": [[None if math.isnan(x) else round(x, 4) for x in row] for row in rows]}


def _some_images(config: Config, model: nn.Module) -> Tensor:
    """Validation images from all over the set."""
    dataset = open_split(config.data.folder, "val", image_mode(model))
    transform = evaluation_transform(model)
    numbers: Sequence[int] = np.linspace(0, len(dataset) - 1, min(SIMILARITY_IMAGES, len(dataset))).astype(int).tolist()
    return torch.stack([transform(dataset[number].image) for number in numbers])
