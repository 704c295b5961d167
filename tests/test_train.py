"""Training as a user runs it: real processes, real signals, and what a run folder holds afterwards."""

import copy
import errno
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from storms.pictures import write_pictures
from storms.processes import CHECKOUT, Run
from timm.models import VisionTransformer

from eval.card import read_card
from eval.distributed import Ranks
from eval.predictions import Predictions, answers
from train.__main__ import main
from train.augmentation import train_decoder, train_transform
from train.checkpoint import Checkpoints
from train.distributed import StopSignal, Watch, ended_with_others
from train.experiment import _check_model
from train.loop import _Loop
from train.order import Draw
from train.pipeline import TrainingImages
from train.run import RunFolder
from train.trainer import Counters, DivergedError, Trainer
from vitreuse.config import Config, ConfigError, load_config, to_yaml
from vitreuse.data import Sample, load_index, open_split
from vitreuse.files.networks import resolve_targets
from vitreuse.model.preprocessing import image_settings

NUM_TRAIN, NUM_VAL = 17, 7  # batches of 8, 8 and 1: under two ranks the second holds no sample of the last

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0, cache_images: true}}
train:
  epochs: 60
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-2}}
  schedule: {{warmup_epochs: 1}}
  checkpoint: {{every_epochs: 10, every_steps: 7}}
  log_every_steps: 1
  ledger: true
eval: {{crop_pct: 1.0, every_epochs: 20}}
"""
# Whatever draws random numbers or keeps state between steps.
EVERYTHING = [
    "model.keywords.proj_drop_rate=0.1",
    "model.keywords.drop_path_rate=0.1",
    "train.affine={degrees: 10, shift: 0.1, scale: [0.9, 1.1]}",
    "train.ema={decay: 0.9}",
    "train.clip={limit: 1.0}",
    "train.accumulation_steps=2",
    "data.shuffle_window=6",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small data set as shards."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, NUM_TRAIN, NUM_VAL, per_shard=5)
    return folder


@pytest.fixture(scope="module")
def config_path(root) -> Path:
    path = root / "tiny.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


@pytest.fixture(scope="module")
def whole(config_path, tmp_path_factory) -> Run:
    """A run that nothing interrupted."""
    run = _run(tmp_path_factory.mktemp("runs") / "whole", config_path)
    run.complete()
    return run


def _run(folder: Path, config_path: Path) -> Run:
    return Run(folder, (str(config_path), *EVERYTHING))


def test_a_run_leaves_a_whole_folder(whole, config_path):
    assert {path.name for path in whole.folder.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "run.json", "metrics.jsonl", "ledger.jsonl", "checkpoints", "model.safetensors",
        "predictions.csv", "card.json",
    }  # fmt: skip
    config = load_config(whole.folder / "config.yaml")
    assert config == load_config(config_path, EVERYTHING)
    facts = whole.record
    assert (facts["status"], facts["plan"], facts["num_params"]) == ("completed", "exact reuse", 6467)
    assert facts["command"].startswith("python -m train") and "torch" in facts["versions"]
    records = whole.records()
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 181))
    assert [record["epoch"] for record in records if "top1" in record] == [20, 40, 60, 60]
    assert records[-1]["kind"] == "final" and records[-1]["n"] == NUM_VAL
    with safe_open(whole.folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["name"], metadata["plan"]) == ("vit_reuse_tiny_patch16_224", "exact reuse")
    assert json.loads(metadata["keywords"])["embed_dim"] == 16
    config.model.create().load_state_dict(load_file(whole.folder / "model.safetensors"))


def test_the_card_and_the_predictions_are_those_of_the_last_evaluation(whole):
    card, last = read_card(whole.folder / "card.json"), whole.records()[-1]
    assert (card.name, card.seed, card.plan, card.params) == ("whole", 0, "exact reuse", 6467)
    assert (card.n, card.top1, card.top5) == (NUM_VAL, last["top1"], last["top5"])
    assert card.facts["seconds"] == last["seconds"] and card.facts["command"] == whole.record["command"]
    rows = [line.split(",") for line in (whole.folder / "predictions.csv").read_text().splitlines()[1:]]
    assert [label == top5.split()[0] for _, label, _, top5 in rows] == card.correct_images().tolist()


def test_a_plain_model_leaves_no_plan(config_path, tmp_path):
    """What `python -m eval` reads back as timm's own model."""
    overrides = ["model.name=vit_tiny_patch16_224", "model.plan=null"]
    folder = RunFolder(tmp_path / "run", load_config(config_path, overrides))
    model = folder.config.model.create()
    folder.path.mkdir()
    folder.begin(0, {})
    one = Predictions.of([answers(torch.eye(10)[:1], torch.tensor([0]), ["one"])])
    folder.finish(model, model.state_dict(), one, seconds=1.0)
    assert read_card(folder.path / "card.json").plan is None
    with safe_open(folder.path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    keywords = json.loads(metadata.pop("keywords"))
    assert metadata == {"name": "vit_tiny_patch16_224", "plan": "", "format": "pt"}
    assert keywords == folder.config.model.keywords
    (target,) = resolve_targets([str(folder.path)])
    assert type(target.load()) is VisionTransformer
    torch.testing.assert_close(target.load().state_dict(), model.state_dict(), rtol=0, atol=0)


def test_every_epoch_uses_every_sample_once(whole):
    ledger = whole.records("ledger")
    for epoch in range(60):
        keys = [key for record in ledger[3 * epoch : 3 * epoch + 3] for key in record["keys"]]
        assert sorted(keys) == sorted(f"train-{i}" for i in range(NUM_TRAIN))


def test_a_killed_run_resumes_bit_for_bit(whole, config_path, tmp_path):
    run = _run(tmp_path / "killed", config_path)
    start = run.start()
    start.wait_for_step(24)
    assert start.kill() == -signal.SIGKILL
    assert run.record["status"] == "running"
    assert not (run.folder / "model.safetensors").exists()
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')  # a line the kill cut off
    said = Run(run.folder, (*run.arguments, "data.num_workers=2")).complete()  # free to change
    went_on = re.search(r"goes on after step (\d+)", said)  # the newest that was whole: it is written beside the steps
    assert went_on is not None and 0 < int(went_on[1]) < 180
    run.check_equals(whole)


def test_a_terminated_run_saves_everything(whole, config_path, tmp_path):
    run = _run(tmp_path / "terminated", config_path)
    start = run.start()
    start.wait_for_step(24)
    assert start.end(signal.SIGTERM) == 75
    assert run.record["status"] == "stopped" and run.saved_step == run.last_step
    stopped_at = run.last_step
    assert f"goes on after step {stopped_at} of 180" in run.complete()
    run.check_equals(whole)


def test_a_run_killed_in_an_evaluation_has_saved_its_epoch(config_path, tmp_path, monkeypatch):
    recipe = (str(config_path), "train.epochs=3", "eval.every_epochs=1", "train.checkpoint.every_epochs=1")
    whole, killed = (Run(tmp_path / name, recipe) for name in ("whole", "killed"))
    assert main([*recipe, f"run_dir={whole.folder}"]) == 0

    def die(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.look", die)
        assert main([*recipe, f"run_dir={killed.folder}"]) == 1
    assert killed.saved_step == killed.last_step > 0
    assert main([*recipe, f"run_dir={killed.folder}"]) == 0
    killed.check_equals(whole)
    markers = [path / "complete.json" for run in (whole, killed) for path in run.checkpoints]
    noted = [json.loads(marker.read_text())["score"] for marker in markers]
    assert len(noted) == 4 and noted[:2] == noted[2:] and isinstance(noted[1], float)


def test_two_ranks_follow_the_curve_of_one(config_path, tmp_path):
    recipe = ["train.epochs=4", "train.accumulation_steps=2", "eval.every_epochs=1", "train.loss.smoothing=0.1"]
    one, two = (Run(tmp_path / ranks, (str(config_path), *recipe)) for ranks in "12")
    for ranks, run in enumerate((one, two), 1):
        assert "FutureWarning" not in run.complete(ranks)
    for key in ("loss", "grad_norm", "lr", "train_loss", "top1", "n"):
        expected = [record[key] for record in one.records() if key in record]
        assert expected == pytest.approx([record[key] for record in two.records() if key in record], rel=2e-4), key
    weights, others = (load_file(run.folder / "model.safetensors") for run in (one, two))
    torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-4)
    shares = {(r["step"], r["rank"]): r["keys"] for r in two.records("ledger")}
    for record in one.records("ledger"):
        assert [shares[record["step"], rank] for rank in (0, 1)] == [record["keys"][rank::2] for rank in (0, 1)]
    assert shares[3, 1] == []


def test_a_completed_run_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    assert main([*whole.arguments, f"run_dir={whole.folder}"]) == 0
    assert "completed already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.yaml"], "missing.yaml: cannot be read"),
        ([], "no config is given"),
        (["tiny.yaml", "train.epoch=3"], "train.epoch is not a key, did you mean 'epochs'?"),
        (["tiny.yaml", "model.plan=exact*3"], "vit_reuse_tiny_patch16_224"),
        (["tiny.yaml", "model.keywords.num_classes=4"], "has 3 classes and the model 4"),
        (["tiny.yaml", "model.keywords.global_pool=averaged"], "cannot be built: Only avg"),
        (["tiny.yaml", "model.keywords.weight_init=ones"], "cannot be built: timm refuses one of its keywords"),
        (["tiny.yaml", "model.weights=vit_tny"], "weights 'vit_tny' are neither a file nor pretrained weights of timm"),
        (["tiny.yaml", "train.crop={auto_augment: rend-m9}"], "'rend-m9' is no policy of timm's"),
        (["tiny.yaml", "train.affine={scale: [1.1, 0.9]}"], "train.affine.scale: runs from 1.1 to 0.9"),
        (["tiny.yaml", "data.root=nowhere"], "nowhere"),
        (["tiny.yaml", "train.optimizer.name=adamww"], "did you mean 'adamw"),
        (["tiny.yaml", "train.mixup={}", "train.global_batch_size=9"], "must be a multiple of 2"),
        (["tiny.yaml", "train.mixup={}", "train.global_batch_size=18"], "17 training images do not fill one batch"),
    ],
)
def test_wrong_input_writes_nothing(config_path, tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "tiny.yaml").write_text(config_path.read_text())
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("train: ")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_splits_of_other_classes_are_refused(config_path, tmp_path, capsys):
    for split, names in {"train": "abc", "val": "abd"}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / "0.png")
    run_dir = tmp_path / "run"
    assert main([str(config_path), f"data.root={tmp_path}", f"run_dir={run_dir}"]) == 2
    assert "val has 'd', not a class of " in capsys.readouterr().err
    assert not run_dir.exists()


def _cut_short(folder: Path) -> None:
    os.truncate(folder / "shard-000001.tar", 1000)


def _lose_a_member(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    with tarfile.open(path) as whole:
        kept = [(info, whole.extractfile(info)) for info in whole if info.name != "train-6.png"]
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as rest:
            for info, file in kept:
                rest.addfile(info, file)
    path.write_bytes(content.getvalue()[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))


def _outdate_the_index(folder: Path) -> None:
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000009.tar")


def _lose_a_class_name(folder: Path) -> None:
    header = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**header, "class_names": ["a", "b"]}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_cut_short, "shard-000001.tar has 1000 bytes, its index says "),
        (_outdate_the_index, "shard-000009.tar is not in the index"),
        (_lose_a_class_name, "'train-2' of shard {}/shard-000000.tar has label 2, but there are 2 class names"),
    ],
)
def test_shards_that_do_not_fit_their_index_end_a_run_before_it_starts(
    root, config_path, tmp_path, capsys, damage, sentence
):
    data, run_dir = shutil.copytree(root, tmp_path / "data"), tmp_path / "run"
    damage(data / "train")
    assert main([str(config_path), f"data.root={data}", f"run_dir={run_dir}"]) == 2
    told = capsys.readouterr().err
    assert sentence.format(data / "train") in told and told.startswith("train: ") and told.count("\n") == 1
    assert not run_dir.exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_is_gone_from_its_shard_ends_a_run(root, config_path, tmp_path, capsys, num_workers):
    """A tar of the size that the index knows, without one of its images."""
    data, run_dir = shutil.copytree(root, tmp_path / "data"), tmp_path / "run"
    _lose_a_member(data / "train")
    arguments = [str(config_path), f"data.root={data}", f"data.num_workers={num_workers}", f"run_dir={run_dir}"]
    assert main(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("train: sample 'train-")] == told[-1:]
    assert "is not what was indexed: vitreuse shards verify " in told[-1]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"


def test_a_damaged_image_of_an_evaluation_leaves_no_worker_behind(root, config_path, tmp_path, capsys):
    """One that lived on would keep the process from ending: it waits for its children, and they ignore SIGTERM."""
    data = shutil.copytree(root, tmp_path / "data")
    path, record = load_index(data / "val").locate(3)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"?", record.offset)
    overrides = [f"data.root={data}", "data.num_workers=2", "eval.every_epochs=1", f"run_dir={tmp_path / 'run'}"]
    assert main([str(config_path), *overrides]) == 2
    assert f"sample {record.key!r} of shard" in capsys.readouterr().err
    assert multiprocessing.active_children() == []


def test_an_error_of_the_code_keeps_its_traceback(config_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError(f"Caught TypeError in DataLoader worker process 0.\n{WORKERS_TRACEBACK}")

    monkeypatch.setattr("train.__main__.train", broken)
    assert main([str(config_path)]) == 1
    *traceback, told = capsys.readouterr().err.splitlines()
    assert traceback[0].startswith("Traceback") and '  File "x.py", line 1, in item' in traceback
    assert told.startswith("train: TypeError: sizes do not match, or types: what runs/tiny held before is whole")


ERRORS = {
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."): "CUDA out of memory. Tried to allocate",
    MemoryError(): "MemoryError",
    AssertionError(): "AssertionError",
    KeyError("blocks.0"): "KeyError: 'blocks.0'",
    KeyboardInterrupt(): "KeyboardInterrupt",  # which no signal raises here
    SystemExit(0): "SystemExit: 0",
    OSError(errno.EIO, "Input/output error"): "[Errno 5] Input/output error",
    ValueError("two\nlines"): "two lines",
}
PLACES = {
    "in a step": "train.trainer.Trainer.train_step",
    "in the loss": "train.trainer.Trainer._loss",
    "in an update": "train.trainer.Trainer._update",
    "in the loader": "train.pipeline.TrainingImages.__getitems__",
    "in an evaluation": "train.loop.look",
    "while saving": "train.checkpoint.save_tensors",
    "while logging": "train.run.RunFolder.log",
    "while finishing": "train.run.pack_weights",
}


@pytest.mark.parametrize(
    ("place", "error"),
    [*(pair for pair in zip(PLACES, ERRORS, strict=True)), *(("in a step", error) for error in ERRORS)],
)
def test_any_error_ends_a_run_with_code_1_and_its_reason(config_path, tmp_path, monkeypatch, capsys, place, error):
    run = Run(tmp_path / "run", (str(config_path), "train.epochs=2", "train.checkpoint.every_epochs=1"))
    arguments = [*run.arguments, f"run_dir={run.folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(PLACES[place], Mock(side_effect=error))
        assert main(arguments) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert len(told) == 1 and ERRORS[error] in told[0] and "run it again to go on" in told[0]
    assert run.record["status"] == "failed" and ERRORS[error] in run.record["error"]
    assert not list(run.folder.rglob(".*.tmp"))
    assert main(arguments) == 0
    assert run.record["status"] == "completed" and "error" not in run.record


@pytest.mark.parametrize(("place", "error"), [("step", "memory"), ("stuck", "exit")])
def test_an_error_ends_a_process_that_has_workers(config_path, tmp_path, place, error):
    """They ignore the SIGTERM by which an exit as usual would end them, and it would wait for them."""
    program = (str(CHECKOUT / "tests/storms/raising.py"), "0", "4", place, error)  # amid the second epoch
    run = Run(tmp_path / "run", (str(config_path), "data.num_workers=2"))
    start = run.start(program=program)
    start.wait_for_step(2)
    assert len(start.pids) == 3
    assert start.end() == 1
    assert start.pids == []
    assert run.record["status"] == "failed"


WORKERS_TRACEBACK = """Original Traceback (most recent call last):
  File "x.py", line 1, in item
    torch.stack(items)
TypeError: sizes do not match,
or types"""


class _SlowImages:
    """Seven images; reading one of them brings the reading process a SIGTERM."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, number: int) -> Sample:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends it to the whole process group
        return Sample(Image.new("L", (8, 8)), 0, str(number))


def test_a_signal_in_an_evaluation_does_not_kill_its_workers(config_path):
    config = load_config(config_path, ["data.num_workers=1"])
    loop = _Loop(_trainer(config), _SlowImages(), RunFolder(Path("unused"), config), StopSignal())
    assert loop._look(loop.trainer.model, loop.share).figures["n"] == 7


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "wsd"])
def test_every_shape_of_schedule_ends_near_the_smallest_rate(name, config_path):
    trainer = _trainer(load_config(config_path, [f"train.schedule.name={name}"]))
    trainer.scheduler.step_update(trainer.num_steps - 1)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.1 * trainer.config.train.optimizer.lr


def test_a_schedule_that_timm_refuses_for_so_few_steps_is_one_sentence(config_path):
    few = ["train.schedule.name=wsd", "train.epochs=2", "train.global_batch_size=4096"]
    with pytest.raises(ConfigError, match=r"train.schedule.name 'wsd' cannot be of 2 steps .*: train for longer, or"):
        _trainer(load_config(config_path, few))


def test_batch_statistics_are_of_one_rank_alone(config_path):
    ranks = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    model = timm.create_model("resnet10t", num_classes=3)
    with pytest.raises(ConfigError, match="model 'resnet10t' has batch norm, whose statistics each of 2 ranks would"):
        _check_model(model, {"input_size": (3, 32, 32)}, "resnet10t", ranks)


def _train_apart(*runs: Run) -> list[tuple[int, str]]:
    """Exit code and errors of ranks with a run folder each, as on machines that share no file system."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(runs))]
    starts = [run.start(environment=rank) for run, rank in zip(runs, ranks, strict=True)]
    return [(start.end(), start.said) for start in starts]


@pytest.mark.proof
def test_the_main_rank_reads_the_checkpoint_for_those_that_see_no_folder(config_path, tmp_path):
    alone = Run(tmp_path / "alone", (str(config_path), "train.epochs=20", "train.ema={decay: 0.9}"))
    alone.complete()
    ours = Run(shutil.copytree(alone.folder, tmp_path / "a"), alone.arguments)
    shutil.rmtree(ours.checkpoints[-1])
    (ours.folder / "run.json").write_text(json.dumps({**ours.record, "status": "stopped"}))
    (one, told), (other, silence) = _train_apart(ours, Run(tmp_path / "b", ours.arguments))
    assert (one, other, silence) == (0, 0, "") and not (tmp_path / "b").exists()
    assert "goes on after step 56 of 60" in told and ours.record["status"] == "completed"
    expected, found = ([record["loss"] for record in run.records() if "loss" in record] for run in (alone, ours))
    assert found == pytest.approx(expected, rel=2e-4)
    weights, others = (load_file(run.folder / "model.safetensors") for run in (alone, ours))
    torch.testing.assert_close(weights, others, rtol=1e-3, atol=1e-4)


def test_what_only_a_later_rank_refuses_is_told_by_it(config_path, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").touch()
    (one, silence), (other, told) = _train_apart(_run(tmp_path / "a", config_path), _run(tmp_path / "b", config_path))
    assert (one, other, silence) == (2, 2, "")
    assert told == f"train: {tmp_path / 'b'} is not a run folder: choose another with run_dir=PATH.\n"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("damage", ['{"status": "comp', "[]", "\ud800"])
def test_a_damaged_run_json_does_not_keep_a_run_from_its_checkpoints(whole, config_path, tmp_path, capsys, damage):
    run = _run(shutil.copytree(whole.folder, tmp_path / "run"), config_path)
    (run.folder / "run.json").write_text(damage, errors="surrogatepass")
    assert main([*run.arguments, f"run_dir={run.folder}"]) == 0
    told = capsys.readouterr().err
    assert told.count("run.json is damaged; the run goes on from its checkpoints") == 1
    assert "goes on after step 180 of 180" in told
    assert told.count("attention on cpu in float32, training: ") == 1
    assert run.record["plan"] == "exact reuse" and run.record["status"] == "completed"
    run.check_equals(whole)


def test_a_run_that_ended_before_it_wrote_anything_starts_again(config_path, tmp_path):
    folder = RunFolder(tmp_path / "run", load_config(config_path))
    with folder.claimed():
        pass
    (tmp_path / "run" / ".config.yaml.7.tmp").touch()  # a kill came while it wrote its first file
    folder.refuse_other_run()
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(ConfigError, match="is not a run folder"):
        folder.refuse_other_run()


def test_a_start_clears_up_what_a_kill_left_half_written(config_path, tmp_path):
    folder = RunFolder(tmp_path / "run", load_config(config_path))
    kept = ["state.pt", "complete.json", ".run.json.swp"]
    left = [".state.pt.7.tmp", ".complete.json.7.tmp"]
    checkpoint = folder.checkpoints.folder / "step-000000007"
    checkpoint.mkdir(parents=True)
    for name in (*kept, *left):
        (checkpoint / name).touch()
    (folder.path / ".metrics.jsonl.7.tmp").touch()
    with folder.claimed():
        assert sorted(path.name for path in checkpoint.iterdir()) == sorted(kept)
        assert {path.name for path in folder.path.iterdir()} == {".lock", "checkpoints"}


def test_a_run_goes_on_where_its_shards_lie_at_another_path(config_path, tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    arguments = [str(config_path), "train.epochs=2", f"run_dir={run_dir}"]
    assert main(arguments) == 0
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    shutil.copytree(str(load_config(config_path).data.root), elsewhere)
    assert main([*arguments, f"data.root={elsewhere}"]) == 0
    inputs = {**record["inputs"], "training images": "others"}
    (run_dir / "run.json").write_text(json.dumps({**record, "status": "stopped", "inputs": inputs}))
    assert main([*arguments, f"data.root={elsewhere}"]) == 2


def test_a_folder_of_images_may_be_spelt_in_another_way(config_path, tmp_path):
    """A shell completes a slash, and a script for a cluster has the absolute path."""
    root, run_dir = tmp_path / "images", tmp_path / "run"
    (root / "train/cat").mkdir(parents=True)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(load_config(config_path, [f"data.root={root}"])))
    (tmp_path / "link").symlink_to(root)
    for spelling in (f"{root}/", os.path.relpath(root), tmp_path / "link"):
        RunFolder(run_dir, load_config(config_path, [f"data.root={spelling}"])).refuse_other_run()
    with pytest.raises(ConfigError, match="of which only names are compared"):
        RunFolder(run_dir, load_config(config_path, [f"data.root={root}/train"])).refuse_other_run()


def test_images_of_which_only_names_are_compared_stay_where_they_were(whole, tmp_path, capsys):
    """A folder of the same names may hold the same images in another size."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "train/cat").mkdir(parents=True)
    Image.new("L", (8, 8)).save(elsewhere / "train/cat/1.png")
    assert main([*whole.arguments, f"data.root={elsewhere}", f"run_dir={whole.folder}"]) == 2
    told = capsys.readouterr().err
    assert f"-> {elsewhere}, of which only names are compared): choose another folder with run_dir=PATH." in told


def test_another_experiment_is_refused_in_the_same_folder(whole, config_path, capsys):
    assert main([*whole.arguments, "train.optimizer.lr=2e-2", f"run_dir={whole.folder}"]) == 2
    assert "(train.optimizer.lr 0.01 -> 0.02)" in capsys.readouterr().err
    assert main([str(config_path), f"run_dir={config_path.parent}"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_folder_takes_one_process_at_a_time(config_path, tmp_path):
    run_dir = tmp_path / "held"
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(config_path.read_text())
    holder = subprocess.Popen([sys.executable, "-c", lock, str(run_dir / ".lock")], stdin=-1, stdout=-1)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        assert main([str(config_path), f"run_dir={run_dir}"]) == 2
    finally:
        holder.kill()
        holder.communicate()
    assert not (run_dir / "metrics.jsonl").exists()


def _trainer(config: Config) -> Trainer:
    torch.manual_seed(config.train.seed)
    model = config.model.create()
    samples = open_split(config.data.folder, "train", "L")
    return Trainer(config, model, samples, image_settings(model), Ranks(0, 1, 0, torch.device("cpu")))


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_accumulation_changes_nothing_but_rounding(config_path):
    results = []
    for pieces in (1, 3):
        trainer = _trainer(load_config(config_path, [f"train.accumulation_steps={pieces}"]))
        losses = [trainer.train_step(batch, stop=False).loss for batch in trainer.remaining_batches()]
        weights = _weights(trainer)
        weights["blocks.0.attn.qkv.bias"][16:32] = 0  # of the keys: softmax does not see it, so Adam steps by rounding
        results.append((losses, weights))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_skips_the_step_and_then_ends_the_run(config_path):
    trainer = _trainer(load_config(config_path, ["train.max_skipped_steps=2", "train.ema={decay: 0.5}"]))
    batches = list(trainer.remaining_batches())
    trainer.train_step(batches[0], stop=False)
    before, moments = _weights(trainer), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    broken = batches[1]._replace(images=batches[1].images.float().index_fill(0, torch.tensor([3]), float("nan")))
    assert trainer.train_step(broken, stop=False).skipped
    torch.testing.assert_close(_weights(trainer), before, rtol=0, atol=0)
    torch.testing.assert_close(trainer.optimizer.state_dict()["state"], moments, rtol=0, atol=0)
    assert not trainer.train_step(batches[2], stop=False).skipped
    assert (trainer.counters.skipped, trainer.counters.skipped_in_a_row) == (1, 0)
    trainer.train_step(broken, stop=False)
    with pytest.raises(DivergedError, match=f"2 steps in a row up to step 5, with {broken.keys[0]}, "):
        trainer.train_step(broken, stop=False)


BRIEF = ["train.epochs=1", "eval.every_epochs=1", "train.schedule.warmup_epochs=0"]  # 3 steps


def _fails(arguments: list[str], run_dir: Path, capsys) -> str:
    """What is said, and noted, of a run that fails, each time that it is started."""
    for _ in range(2):
        assert main([*arguments, f"run_dir={run_dir}"]) == 1
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
        record = json.loads((run_dir / "run.json").read_text())
        assert record["status"] == "failed" and f"train: {record['error']}" == told
        assert not (run_dir / "model.safetensors").exists()
    return told


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_weights_that_are_not_finite_are_not_trained(config_path, tmp_path, capsys, number, whose):
    """Nor learned from: under kind hard the most probable of classes of NaN would be one."""
    config = load_config(config_path, ["model.name=vit_tiny_patch16_224", "model.plan=null"])
    state = config.model.create().state_dict()
    state["blocks.1.mlp.fc2.bias"][3] = number
    torch.save(state, tmp_path / "broken.pt")
    source = "model.weights" if whose == "model" else "train.distill.teacher.weights"
    teacher = config.model if whose == "teacher" else None
    distill = [] if teacher is None else [
        "train.distill.kind=hard", f"train.distill.teacher.name={teacher.name}",
        f"train.distill.teacher.keywords={json.dumps(teacher.keywords)}",
    ]  # fmt: skip
    arguments = [str(config_path), *BRIEF, *distill, f"{source}={tmp_path / 'broken.pt'}"]
    told = _fails(arguments, tmp_path / "run", capsys)
    assert f"the {whose}'s weights are not finite in 1 tensors, the first blocks.1.mlp.fc2.bias" in told
    assert main([*arguments, f"run_dir={tmp_path / 'other'}", "--doctor"]) == 1
    assert f"the {whose}'s weights are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_of_which_every_step_was_skipped_fails(config_path, tmp_path, capsys, monkeypatch, precision):
    monkeypatch.setattr("train.pipeline.Normalize", lambda settings: lambda images: images.float() * math.nan)
    told = _fails([str(config_path), *BRIEF, f"train.precision={precision}"], tmp_path / "run", capsys)
    assert "all 3 of 3 steps were skipped" in told


def test_a_run_whose_last_steps_were_skipped_fails_once_they_are_too_many(config_path):
    trainer = _trainer(load_config(config_path, ["train.max_skipped_steps=3"]))
    for since_update, fails in ((0, False), (2, False), (3, True), (17, True)):
        trainer.counters = Counters(step=180, skipped=20, skipped_since_update=since_update)
        with pytest.raises(DivergedError, match="the last") if fails else nullcontext():
            trainer.check_updated()
    trainer.counters = Counters(step=2, skipped=2, skipped_since_update=2)
    with pytest.raises(DivergedError, match="all 2 of 2"):
        trainer.check_updated()


@pytest.mark.parametrize("more", [[], ["train.ema={decay: 0.5}"]])
def test_a_run_whose_logits_are_not_finite_fails(config_path, tmp_path, capsys, more):
    """Weights that the last step made infinite give no loss that would show it."""
    huge = ["train.optimizer={name: sgd, lr: 1e30}", "train.global_batch_size=17", "train.loss.smoothing=0.1"]
    arguments = [str(config_path), *BRIEF, *huge, *more]
    assert main([*arguments, f"run_dir={tmp_path / 'run'}"]) == 1
    assert "the logits of 7 of 7 validation images are not finite" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert main([*arguments, f"run_dir={tmp_path / 'run'}"]) == 1


def test_warm_up_rises_and_the_cosine_ends_near_zero(config_path):
    trainer = _trainer(load_config(config_path, ["train.epochs=4", "train.schedule.min_lr=1e-5"]))
    rates = []
    for _ in range(4):
        rates += [trainer.train_step(batch, stop=False).lr for batch in trainer.remaining_batches()]
    cosine = [1e-5 + (1e-2 - 1e-5) * (1 + np.cos(np.pi * step / 12)) / 2 for step in range(3, 12)]
    warm_up = [1e-6 + (1e-2 - 1e-6) * step / 3 for step in range(3)]
    assert rates == pytest.approx(warm_up + cosine)


@pytest.mark.parametrize("transform", ["affine={degrees: 20, shift: 0.2}", "crop={auto_augment: rand-m9-n2}"])
def test_augmentation_is_a_function_of_seed_epoch_and_sample(config_path, transform):
    config = load_config(config_path, [f"train.{transform}"])
    settings = image_settings(config.model.create("meta"))
    transforms = [train_transform(config, settings)] * 3
    images = TrainingImages(open_split(config.data.folder, "train", "L", train_decoder(config)), transforms, seed=5)
    first = images[Draw(1, 3, 0)][0].image
    others = [Draw(2, 3, 0), Draw(1, 4, 0), Draw(1, 3, 1)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert not any(torch.equal(first, item[0].image) for item in images.__getitems__(others))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.equal(images[Draw(1, 3, 0)][0].image, first)


def test_mixup_drops_the_batch_it_cannot_pair(config_path):
    trainer = _trainer(load_config(config_path, ["train.mixup={}"]))
    batches = list(trainer.remaining_batches())
    assert [len(batch.keys) for batch in batches] == [8, 8]
    assert all(np.isfinite(trainer.train_step(batch, stop=False).loss) for batch in batches)


def test_ctrl_c_is_answered_and_at_the_second_time_obeyed_at_once(monkeypatch, capfd):
    """torchrun passes the signal on beside the terminal: two of one moment are one."""
    now = 100.0
    monkeypatch.setattr("train.distributed.time.monotonic", lambda: now)
    with StopSignal().listening() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received and capfd.readouterr().err == ""
        signal.raise_signal(signal.SIGINT)
        assert "press Ctrl-C again to end at once" in capfd.readouterr().err
        now += 0.1
        signal.raise_signal(signal.SIGINT)
        now += 1
        signal.raise_signal(signal.SIGTERM)
        assert not stop.is_urgent
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.is_urgent and capfd.readouterr().err == ""


def _states(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(checkpoints.folder.glob("step-*"))]


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.load_newest() is None
    for step, top1 in [(1, 50.0), (2, 80.0), (3, None), (4, 70.0), (5, None)]:
        checkpoints.save({"step": step, "weights": torch.full((3,), float(step))}, step)
        if top1 is not None:
            checkpoints.rate(step, top1)
    checkpoints.rate(3, 90.0)  # gone: nothing to note
    assert _states(checkpoints) == [2, 4, 5] and checkpoints.best() == (2, 80.0)
    assert checkpoints.load_newest()["step"] == 5


def test_copies_that_somebody_keeps_are_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    checkpoints.save({"step": 1}, 1)
    copy = checkpoints.folder / "step-000000001-keep"
    shutil.copytree(checkpoints.folder / "step-000000001", copy)
    for step in (2, 3):
        checkpoints.save({"step": step}, step)
    assert (copy / "state.pt").exists() and checkpoints.load_newest()["step"] == 3
    assert {path.name for path in checkpoints.folder.iterdir()} == {copy.name, "step-000000003"}


def test_a_checkpoint_that_cannot_be_removed_now_goes_later(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    checkpoints.save({"step": 1}, 1)
    real = os.unlink

    def busy(path, **at):
        if "state.pt" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, **at)

    monkeypatch.setattr(os, "unlink", busy)

    checkpoints.save({"step": 2}, 2)
    assert checkpoints.load_newest()["step"] == 2
    monkeypatch.undo()
    checkpoints.save({"step": 3}, 3)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000000003"]


def test_a_whole_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in (1, 2):
        checkpoints.save({"step": step}, step)

    def short_of_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("train.checkpoint.torch.load", short_of_memory)
    with pytest.raises(RuntimeError, match="allocate memory"):
        checkpoints.load_newest()
    assert capsys.readouterr().err == "" and _states(checkpoints) == [1, 2]


def test_the_score_of_a_checkpoint_was_once_its_top1(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, score in ((1, 50.0), (2, 40.0)):
        checkpoints.save({"step": step}, step)
        marker = json.loads((tmp_path / f"step-{step:09d}/complete.json").read_text())
        del marker["score"]
        (tmp_path / f"step-{step:09d}/complete.json").write_text(json.dumps({**marker, "top1": score}))
    assert checkpoints.best() == (1, 50.0)
    checkpoints.rate(2, 60.0)
    assert checkpoints.best() == (2, 60.0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no marker", "no state", "half a marker"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save({"step": step, "weights": torch.arange(1000.0)}, step)
    newest = tmp_path / "step-000000002"
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "truncated":
        (newest / "state.pt").write_bytes(content[:-100])
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    if damage == "no marker":
        (newest / "complete.json").unlink()
    if damage == "no state":
        (newest / "state.pt").unlink()
    if damage == "half a marker":
        (newest / "complete.json").write_text('{"step": 2, "by')
    assert checkpoints.load_newest()["step"] == 1
    assert ("is damaged" in capsys.readouterr().err) == (damage in ("truncated", "flipped", "no state"))
    checkpoints.save({"step": 2, "weights": torch.arange(1000.0)}, 2)
    assert checkpoints.load_newest()["step"] == 2


def test_checkpoints_of_which_none_is_whole_are_no_reason_to_start_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save({"step": step}, step)
        (tmp_path / f"step-{step:09d}" / "state.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds 2 checkpoints and none that is whole: put one back"):
        checkpoints.load_newest()


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save({"step": step}, step)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("train.checkpoint._crc32", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.load_newest()


def test_a_checkpoint_before_one_that_was_passed_over_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save({"step": 7}, 7)
    (tmp_path / "step-000000007" / "state.pt").write_bytes(b"")
    checkpoints.save({"step": 3}, 3)  # by a start that found nothing to go on from, and a signal
    assert _states(checkpoints) == [3]
    assert checkpoints.load_newest() == {"step": 3}


@pytest.mark.parametrize("num_weights", [1_000, 1_000_000])  # what torch makes of a full disk depends on the size
def test_a_checkpoint_without_room_is_one_error_and_leaves_those_before(tmp_path, num_weights):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save({"step": 1}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * num_weights, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save({"step": 2, "weights": torch.zeros(num_weights)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "step-000000002").iterdir()) == []
    assert checkpoints.load_newest() == {"step": 1}


class _Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, capsys):
    checkpoints, canary = Checkpoints(tmp_path / "checkpoints", keep_last=3), tmp_path / "canary"
    checkpoints.save({"step": 1}, 1)
    checkpoints.save({"step": 2, "code": _Canary(canary)}, 2)
    assert checkpoints.load_newest() == {"step": 1}
    assert "step-000000002/state.pt is damaged (Weights only load failed" in capsys.readouterr().err
    assert not canary.exists()
    torch.load(tmp_path / "checkpoints/step-000000002/state.pt", weights_only=False)
    assert canary.exists()


class StalledStore:
    """Where ranks meet, when it does not answer a new connection."""

    def __init__(self):
        self.words = []

    def clone(self):
        threading.Event().wait()

    def set(self, word, value):
        self.words.append(word)


def test_training_does_not_wait_for_the_connection_by_which_it_hears_of_others():
    store = StalledStore()
    start = time.monotonic()
    with pytest.raises(KeyError), ended_with_others(Ranks(world_size=2, store=store)):
        raise KeyError
    assert time.monotonic() - start < 60
    assert store.words == ["a rank has failed"]


def test_all_ranks_are_watched_from_before_the_newest_checkpoint_is_read(config_path, tmp_path, monkeypatch):
    events = []

    def noted(owner: type, name: str, event: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: events.append(event) or method(*args))

    noted(Watch, "progress", "watched")
    noted(Checkpoints, "load_newest", "read")
    noted(Trainer, "remaining_batches", "batches")
    noted(Trainer, "train_step", "step")
    assert main([str(config_path), "train.epochs=2", f"run_dir={tmp_path / 'run'}"]) == 0
    assert events[:5] == ["watched", "read", "watched", "batches", "step"]
