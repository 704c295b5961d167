"""Training on the device: how fast sixty steps on made-up photographs are, and whether a resume is exact."""

from __future__ import annotations

import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from vitreuse.data import EncodedSample, write_shards

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "imagenet" / "deit_300_small_exact.yaml"
PLANS = {
    "exact": (),
    "reuse": ("model.name=deit_reuse_small_patch16_224", "model.plan=exact reuse*6 exact*5"),
    "merge": ("model.name=deit_merge_small_patch16_224", "model.plan=exact-8*12"),
}
NUM_CLASSES, NUM_DISTINCT, SIZE = 1000, 128, (500, 375)
MEDIANS = ("images_per_second", "data_wait_percent")
SMALL_PLANS = {"exact": "exact*2", "reuse": "exact reuse", "merge": "exact-1 exact"}
TINY = ("model.keywords={img_size: 32, depth: 2, embed_dim: 48, num_heads: 3}", "train.crop.auto_augment=null")


def photographs(folder: Path, num_images: int, num_distinct: int, size: tuple[int, int]) -> None:
    """Writes shards of made-up photographs: smooth noise, of which each stands there several times."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(num_distinct):
        content = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(content, "jpeg", quality=90)
        encoded.append(content.getvalue())
    names = tuple(f"class {number:04d}" for number in range(NUM_CLASSES))
    samples = [EncodedSample(f"{i:06d}", encoded[i % num_distinct], "jpg", i % NUM_CLASSES) for i in range(num_images)]
    write_shards(samples, folder, names, 512)


def _arguments(setting: Any) -> list[str]:
    """The recipe, shrunk: as many epochs as make sixty steps."""
    root = setting.scratch / "photographs"
    num_images, batch, steps_an_epoch = (64, 16, 4) if setting.is_small else (2560, 256, 10)
    if not root.exists():
        distinct, size = (4, (40, 30)) if setting.is_small else (NUM_DISTINCT, SIZE)
        photographs(root / "train", num_images, distinct, size)
        photographs(root / "val", 64, distinct, size)
    epochs = (8 if setting.is_small else 60) // steps_an_epoch
    recipe = [f"data.root={root}", f"train.epochs={epochs}", f"train.global_batch_size={batch}"]
    recipe += ["train.schedule.warmup_epochs=1", "train.log_every_steps=1", f"train.device={setting.device}"]
    workers, precision = (0, "float32") if setting.is_small else (12, "bfloat16")
    recipe += [f"data.num_workers={workers}", f"train.precision={precision}", f"eval.every_epochs={epochs}"]
    return [str(RECIPE), *recipe, *(TINY if setting.is_small else ())]


def train(setting: Any) -> Iterator[dict[str, Any]]:
    """A row for each plan: images/s and MFU in the median step after the first ten, and time spent waiting for data."""
    for name, overrides in PLANS.items():
        run = setting.scratch / f"train-{name}"
        plan = (*overrides, f"model.plan={SMALL_PLANS[name]}") if setting.is_small else overrides
        setting.call("-m", "train", *_arguments(setting), *plan, f"run_dir={run}")
        records = [record for record in _records(run) if record["kind"] == "step"]
        steps = records[len(records) // 6 :]
        median = {key: statistics.median(step[key] for step in steps) for key in MEDIANS}
        mfu = [step["mfu_percent"] for step in steps if step["mfu_percent"] is not None]
        row = {"name": name, "steps": len(records), **median, "mfu_percent": statistics.median(mfu) if mfu else None}
        row["peak_memory_mib"] = max(step["peak_memory_mib"] for step in records)
        row["augmented_on"] = json.loads((run / "run.json").read_text())["augmented_on"]
        is_finite = all(step["loss"] is not None for step in records)
        yield {**row, "wrong": None if is_finite else f"{name} had steps without a finite loss"}


def resume(setting: Any) -> list[dict[str, Any]]:
    """Whether a run that was killed and went on has the weights, to the bit, of one that nothing disturbed."""
    whole, killed = (setting.scratch / f"resume-{name}" for name in ("whole", "killed"))
    plan = ["model.plan=exact*2"] if setting.is_small else []
    arguments = [*_arguments(setting), *plan, "train.checkpoint={every_steps: 3}", "train.epochs=2"]
    setting.call("-m", "train", *arguments, f"run_dir={whole}")
    setting.call("-m", "train", *arguments, f"run_dir={whole}-again")
    command = [sys.executable, "-m", "train", *arguments, f"run_dir={killed}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not _saved(killed) and process.poll() is None and setting.seconds_left > 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    saved = max(_saved(killed), default=0)
    setting.call("-m", "train", *arguments, f"run_dir={killed}")
    resumed, again = _difference(whole, killed), _difference(whole, Path(f"{whole}-again"))
    row = {"killed_after_step": saved, "resumed_apart": resumed, "undisturbed_apart": again}
    # what two undisturbed runs differ by is CUDA's, and a resumed one may differ by as much
    wrong = None if process.returncode == -signal.SIGKILL else "the run had ended before it could be killed"
    if resumed > 10 * again:
        wrong = f"a resumed run is {resumed:.2g} apart, two undisturbed ones {again:.2g}"
    return [{**row, "wrong": wrong}]


def _saved(run: Path) -> list[int]:
    """The steps of a run's whole checkpoints."""
    return [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/*/complete.json")]


def _difference(one: Path, other: Path) -> float:
    """The largest difference of a weight; 0 where they are equal to the bit."""
    weights, others = (load_file(run / "model.safetensors") for run in (one, other))
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
