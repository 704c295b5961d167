"""What a report measures: every model's speed, memory and time by layer, and how alike its attention maps are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.flops import macs_by_part
from eval.profile import profile_parts
from eval.series import Series
from vitreuse.compress.redundancy import map_similarity
from vitreuse.cost.measure import inference_call, peak_memory_mib, time_interleaved
from vitreuse.data import find_split, open_split
from vitreuse.export.networks import Target
from vitreuse.model.preprocessing import evaluation_transform, example, image_mode

SIMILARITY_IMAGES = 8
LAYER_PART = re.compile(r"blocks\.(\d+)\.(norm1|attn|ls1|drop_path1)?")
Done = Callable[[str], None]  # told what was done


def timed_calls(num_models: int) -> int:
    """Timed calls per model by default, fewer of many: a report is built in seconds, however many runs it shows."""
    return max(3, min(30, 120 // num_models))


def profiled_calls(num_models: int) -> int:
    """Calls per model whose time is broken down by layer, which takes ten times as long as timing them."""
    return max(1, min(3, 20 // num_models))


def speeds(
    models: Mapping[str, nn.Module], device: torch.device, batch_size: int, num_repeats: int, done: Done
) -> dict[str, dict[str, Any]]:
    """Images per second, memory and the time of each layer by key; all speeds from one interleaved measurement."""
    images = {key: example(model, batch_size) for key, model in models.items()}
    calls = {key: inference_call(model, images[key]) for key, model in models.items()}
    timings = time_interleaved(calls, device, num_repeats)
    found = {}
    for key, model in models.items():
        resident = [*model.parameters(), *model.buffers(), images[key]]
        parts = profile_parts(model, calls[key], batch_size, profiled_calls(len(models)))
        found[key] = {
            "images_per_second": timings[key].images_per_second(batch_size),
            "spread_percent": timings[key].spread_percent,
            "memory_mib": peak_memory_mib(calls[key], resident, device),
            "ms": by_layer((row["part"], row["ms"]) for row in parts if row["part"] != "total"),
        }
        done("speed")
    return found


def layer_macs(model: nn.Module) -> dict[str, Any]:
    """MACs per image by layer."""
    return by_layer(macs_by_part(model).items())


def by_layer(parts: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Amounts by part, summed: of each layer's attention and MLP, their norms included, and of the rest."""
    attention: dict[int, float] = {}
    mlp: dict[int, float] = {}
    rest = 0.0
    for part, amount in parts:
        match = LAYER_PART.match(part)
        if match is None:
            rest += amount
        else:
            half, layer = attention if match[2] else mlp, int(match[1])
            half[layer] = half.get(layer, 0) + amount
    layers = range(1 + max(*attention, *mlp))
    halves = {"attention": attention, "mlp": mlp}
    return {**{name: [half.get(layer, 0) for layer in layers] for name, half in halves.items()}, "rest": rest}


def similarity(series: Series, device: torch.device) -> dict[str, Any]:
    """How alike the maps of its first run with a folder are, over a few validation images; else why that is not known.

    Returns:
        seed and rows, of numbers from 0 to 1 and None where maps cannot be compared; or reason, a sentence.
    """
    run = next((run for run in series.runs if run.folder is not None), None)
    if run is None or run.folder is None:
        return {"reason": "Only cards were given: the weights are in the run folder."}
    assert run.folder.config is not None
    if find_split(Path(run.folder.config.data.folder), "val") is None:
        return {"reason": f"The validation images are not at {run.folder.config.data.folder}."}
    try:
        model = run.folder.load().to(device).eval()
        rows = map_similarity(model, _some_images(run.folder, model).to(device)).tolist()
    except (ValueError, OSError) as error:
        return {"reason": f"It cannot be computed: {error}"}
    return {"seed": run.card.seed, "rows": [[None if math.isnan(x) else round(x, 4) for x in row] for row in rows]}


def _some_images(target: Target, model: nn.Module) -> Tensor:
    """Validation images from all over the set."""
    assert target.config is not None
    mode = image_mode(model)
    dataset = open_split(target.config.data.folder, "val", mode)
    transform = evaluation_transform(model, target.config.eval.crop_pct)
    numbers: Sequence[int] = np.linspace(0, len(dataset) - 1, min(SIMILARITY_IMAGES, len(dataset))).astype(int).tolist()
    return torch.stack([transform(dataset[number].image) for number in numbers])
