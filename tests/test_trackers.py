"""TensorBoard and Weights & Biases show what metrics.jsonl holds, through kills and failures."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from storms.processes import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import trackers
from train.__main__ import main
from train.mfu import PEAK_TFLOPS, Peak
from train.run import RunFolder
from vitreuse.config import load_config
from vitreuse.cost.macs import count_macs
from vitreuse.cost.measure import device_name, peak_process_memory_mib
from vitreuse.data import open_split
from vitreuse.io import progress as progress_module
from vitreuse.io.progress import WorkProgress
from vitreuse.model.preprocessing import evaluation_transform

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = torch.device("cpu")
NUM_CLASSES = 7  # more than five, so that top-5 is not always 100


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folders of noise in seven classes, and beside them a small experiment."""
    root, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for split, number in {"train": 21, "val": 35}.items():
        for i in range(number):
            label = i if i < NUM_CLASSES else i * i % NUM_CLASSES  # uneven: a constant answer's top-5 says which it is
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (root / "small.yaml").write_text(f"""\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: {NUM_CLASSES}, embed_dim: 12, depth: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  {{epochs: 2, global_batch_size: 8, device: cpu, optimizer: {{lr: 3e-2}}, ema: {{decay: 0.99}}, log_every_steps: 1}}
eval: {{crop_pct: 1.0}}
""")
    return root


def _curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Points by name, as a tracker should show the records of metrics.jsonl."""
    curves = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if record["kind"] != "final" and name not in ("kind", "step") and value is not None:
                curves[f"{record['kind']}/{name}"].append((record["step"], float(value)))
    return dict(curves)


# ---- what a record holds


@pytest.fixture(scope="module")
def trained(pictures) -> list[dict[str, Any]]:
    """The records of a run whose device has a peak of 1 GFLOP/s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEAK_TFLOPS, device_name(CPU), Peak(None, None, 0.001))
        assert main([str(pictures / "small.yaml"), f"run_dir={pictures / 'run'}"]) == 0
    return [json.loads(line) for line in (pictures / "run" / "metrics.jsonl").read_text().splitlines()]


def test_steps_say_what_a_device_is_used_for(trained, pictures):
    steps = [record for record in trained if record["kind"] == "step"]
    model = load_config(pictures / "small.yaml").model.create("meta")
    flops_per_image = 6 * sum(count_macs(model, theoretical=True).values())
    for record in steps:
        expected = 100 * flops_per_image * record["images_per_second"] / 1e9
        rounded = 0.005 + 0.05 * 100 * flops_per_image / 1e9  # both of them
        assert record["mfu_percent"] == pytest.approx(expected, abs=1.01 * rounded)
    assert 50 < steps[0]["peak_memory_mib"] <= steps[-1]["peak_memory_mib"]
    assert steps[-1]["peak_memory_mib"] <= peak_process_memory_mib(CPU) + 0.05  # records are rounded
    assert [record["eta_seconds"] > 0 for record in steps] == [True] * 5 + [False]


def test_a_moving_average_and_the_raw_weights_are_both_measured(trained, pictures):
    """top-1 and top-5 of the weights in the last checkpoint and in model.safetensors, by torch's own topk."""
    model: Any = load_config(pictures / "small.yaml").model.create().eval()
    samples, transform = open_split(str(pictures), "val", "L"), evaluation_transform(model, 1.0)
    images = torch.stack([transform(samples[i].image) for i in range(35)])
    labels = torch.tensor([samples[i].label for i in range(35)])
    raw = torch.load(pictures / "run/checkpoints/step-000000006/state.pt", weights_only=True)["model"]
    (epoch,) = (record for record in trained if record["kind"] == "epoch" and record["epoch"] == 2)
    for prefix, weights in {"raw_": raw, "": load_file(pictures / "run/model.safetensors")}.items():
        model.load_state_dict(weights)
        with torch.inference_mode():
            best = model(images).topk(5).indices
        for k in (1, 5):
            expected = 100 * (best[:, :k] == labels[:, None]).any(1).double().mean().item()
            assert epoch[f"{prefix}top{k}"] == pytest.approx(expected)
        with torch.inference_mode():
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        assert epoch[f"{prefix}val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trained[-1]["raw_top5"] == epoch["raw_top5"] != epoch["top5"]


def test_time_left_is_that_of_the_remaining_steps(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = WorkProgress("run", "steps", total=10, done=2, enabled=False)
    now = 106.0
    progress.reach(5)
    assert progress.seconds_left == 2.0 * 5


# ---- what a tracker shows


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Run:
    """A run on the digits that was killed after a checkpoint, and then completed."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = ["model.keywords.depth=1", "model.plan=exact", "train.ema={decay: 0.9}", "train.epochs=1"]
    overrides += ["train.schedule.warmup_epochs=0", "train.checkpoint.every_steps=10", "train.log_every_steps=1"]
    overrides += ["train.loggers=[tensorboard, wandb]"]
    run = Run(folder / "digits", (str(CONFIGS / "digits/exact.yaml"), *overrides, f"data.source_root={folder}"))
    offline = {"WANDB_MODE": "offline"}
    start = run.start(environment=offline)
    start.wait_for_step(15)
    start.wait_until(lambda: run.saved_step, "its first checkpoint")  # which is written beside the steps
    assert start.kill() == -signal.SIGKILL
    second = run.start(environment=offline)
    assert second.end() == 0, second.said
    assert "goes on after step" in second.said and "left out" not in second.said
    return run


def test_tensorboard_shows_a_resumed_run_as_one(resumed):
    events = EventAccumulator(str(resumed.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert len([*(resumed.folder / "tensorboard").iterdir()]) == 2
    expected = _curves(resumed.records())
    assert events.Tags()["scalars"] == [*expected] and len(expected["step/loss"]) == 45
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points], name
        assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-6), name


READ_WANDB = """
import json, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def payloads(log):  # a LevelDB log: blocks of 32 KiB; crc, length and kind before each fragment
    position, parts = 7, b""
    while position < len(log):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        parts += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""

starts = []
for path in sorted(Path(sys.argv[1]).glob("offline-run-*/*.wandb")):
    records = [Record.FromString(payload) for payload in payloads(path.read_bytes())]
    ids = [record.run.run_id for record in records if record.WhichOneof("record_type") == "run"]
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    items = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]
    starts.append({"ids": ids, "rows": items})
print(json.dumps(starts))
"""


def test_wandb_gets_both_starts_under_one_id(resumed):
    """All of the second start, and of the first what its service had written when it was killed."""
    command = [sys.executable, "-c", READ_WANDB, resumed.folder / "wandb"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout)
    assert {*first["ids"], *second["ids"]} == {(resumed.folder / "wandb/id").read_text()}
    points = {name: dict(points) for name, points in _curves(resumed.records()).items()}
    assert [row["_step"] for row in second["rows"]] == list(range(second["rows"][0]["_step"], 46))
    assert second["rows"][0]["_step"] % 10 == 1
    for row in second["rows"]:
        numbers = {name: value for name, value in row.items() if not name.startswith("_")}
        assert numbers == {name: of_step[row["_step"]] for name, of_step in points.items() if row["_step"] in of_step}


# ---- what goes wrong


def test_a_tracker_that_fails_is_named_once_and_left_out(pictures, tmp_path, capsys):
    """Its disk is full, while metrics.jsonl still has room; then that is an error."""
    folder = RunFolder(tmp_path / "run", load_config(pictures / "small.yaml", ["train.loggers=[tensorboard]"]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with folder.claimed():
        folder.begin(0, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            for step in range(1, 11):
                folder.log("step", step, **dict.fromkeys("abcdefghij", 1.0))
            assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 10
            with pytest.raises(OSError, match="File too large"):
                for step in range(11, 41):
                    folder.log("step", step, **dict.fromkeys("abcdefghij", 1.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("tensorboard fails (") and "File too large" in told


def test_a_tracker_that_cannot_start_is_left_out(pictures, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run", load_config(pictures / "small.yaml", ["train.loggers=[tensorboard]"]))
    with folder.claimed():
        (folder.path / "tensorboard").touch()
        folder.begin(0, {})
        folder.log("step", 1, loss=2.0)
    assert capsys.readouterr().err.count("tensorboard fails (") == 1
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == {"kind": "step", "step": 1, "loss": 2.0}


def test_a_missing_package_and_an_unknown_name_are_one_sentence_before_anything_is_written(
    pictures, tmp_path, monkeypatch, capsys
):
    arguments = [str(pictures / "small.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, "train.loggers=[tensorbord]"]) == 2
    sentence = "train.loggers is 'tensorbord', allowed are tensorboard, wandb, did you mean 'tensorboard'?"
    assert capsys.readouterr().err == f"train: command line: {sentence}\n"

    def missing(name):
        raise trackers.PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", missing)
    assert main([*arguments, "train.loggers=[wandb]"]) == 2
    sentence = "train.loggers has wandb, which is not installed: pip install 'vitreuse[wandb]', or leave it out."
    assert capsys.readouterr().err == f"train: {sentence}\n"
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []


def test_raw_weights_are_measured_as_often_as_the_recipe_says(pictures, tmp_path):
    overrides = ["train.epochs=5", "eval.raw_every_epochs=2", f"run_dir={tmp_path / 'run'}"]
    assert main([str(pictures / "small.yaml"), *overrides]) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    raw = {record["epoch"]: "raw_top1" in record for record in records if record["kind"] == "epoch"}
    assert raw == {1: False, 2: True, 3: False, 4: True, 5: True}
    assert all("top1" in record for record in records if record["kind"] == "epoch") and "raw_top1" in records[-1]


def test_a_run_says_how_it_multiplies(pictures, tmp_path):
    recipe = ["train.epochs=1", "train.tf32=true", "train.cudnn_benchmark=true", f"run_dir={tmp_path / 'run'}"]
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        assert main([str(pictures / "small.yaml"), *recipe]) == 0
        assert (cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (True, True, True)
        facts = json.loads((tmp_path / "run/run.json").read_text())
        assert facts["precision"] == {"autocast": "float32", "tf32": True, "cudnn_benchmark": True}
        assert facts["augmented_on"] == "workers"
        assert main([str(pictures / "small.yaml"), "train.epochs=1", f"run_dir={tmp_path / 'other'}"]) == 0
        assert (cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (False, False, False)
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_a_trace_is_of_the_steps_that_are_named(pictures, tmp_path, monkeypatch, capsys):
    """Two of six steps, over the end of an epoch: each has one optimizer step and one forward pass of the stem."""
    recipe = ["train.profile={first_step: 3, num_steps: 2}", f"run_dir={tmp_path / 'run'}"]
    assert main([str(pictures / "small.yaml"), *recipe]) == 0
    events = json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == 2 and "trace.json has the trace" in capsys.readouterr().err
    first = ["train.profile={first_step: 4, num_steps: 1}", f"run_dir={tmp_path / 'first'}"]
    assert main([str(pictures / "small.yaml"), *first]) == 0  # of an epoch, behind an evaluation
    events = json.loads((tmp_path / "first/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::conv2d" for event in events) == 1
    late = ["train.profile={first_step: 6}", f"run_dir={tmp_path / 'late'}"]
    assert main([str(pictures / "small.yaml"), *late]) == 0
    events = json.loads((tmp_path / "late/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#") for event in events) == 1  # the run ends amid them
    assert main([str(pictures / "small.yaml"), f"run_dir={tmp_path / 'none'}"]) == 0
    assert not (tmp_path / "none/trace.json").exists()


def test_a_trace_that_will_not_be_is_told(pictures, tmp_path, monkeypatch, capsys):
    """Of steps beyond the run, and of steps that a start before has done."""
    arguments = [str(pictures / "small.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, "train.profile={first_step: 7}"]) == 2
    beyond = "train.profile.first_step 7 is beyond the 6 steps of the run: choose an earlier one, or leave profile out."
    assert capsys.readouterr().err == f"train: {beyond}\n" and not (tmp_path / "run").exists()
    monkeypatch.setattr("train.loop._Loop._finish", Mock(side_effect=MemoryError))
    said = "train.profile traces nothing: step 5 was done before this start."
    for traced, is_said in (([], False), (["train.profile={first_step: 5}"], True)):
        assert main([*arguments, *traced]) == 1
        assert (said in capsys.readouterr().err) is is_said
