"""`python -m train CONFIG --doctor`: a sound experiment passes, and what would spoil a run is found for real."""

import io
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from storms.pictures import write_pictures
from storms.processes import CHECKOUT

from eval.distributed import Ranks
from train.__main__ import main
from train.doctor import _duration
from train.experiment import set_up
from train.run import RunFolder
from train.trainer import Trainer
from train.verdicts import (
    Pace,
    judge_batches,
    judge_images,
    judge_memory,
    judge_pace,
    judge_shards,
    judge_shared_memory,
)
from vitreuse.config import ModelConfig, load_config
from vitreuse.data import load_index

NUM_TRAIN, NUM_VAL = 17, 7  # batches of 8, 8 and 1; 4 shards

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
  checkpoint: {{every_epochs: 10, every_steps: 7, keep_last: 3}}
eval: {{crop_pct: 1.0, every_epochs: 20}}
"""
UNREAD = """
import sys
from torch import nn
from train.__main__ import main
from train.doctor import _duration
from train.experiment import set_up
from vitreuse.config import ModelConfig
create = ModelConfig.create
def create_with_unread(*args, **kwargs):
    model = create(*args, **kwargs)
    model.unread = nn.Linear(2, 3)
    return model
ModelConfig.create = create_with_unread
"""
Table = dict[str, tuple[str, str]]  # state and finding by subject


@pytest.fixture
def root(tmp_path) -> Path:
    write_pictures(tmp_path / "data", NUM_TRAIN, NUM_VAL, per_shard=5)
    return tmp_path / "data"


@pytest.fixture
def config_path(root) -> Path:
    path = root.parent / "tiny.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


@pytest.fixture
def examine(config_path, tmp_path, capsys):
    """The exit code and the table of an examination with overrides; it leaves nothing behind."""

    def run(*overrides: str) -> tuple[int, Table]:
        before = _files(tmp_path)
        code = main([str(config_path), "--doctor", f"run_dir={tmp_path / 'run'}", *overrides])
        assert _files(tmp_path) == before
        return code, _rows(capsys.readouterr().out)

    return run


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def _rows(text: str) -> Table:
    cells = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return {row[0]: (row[1], row[2]) for row in cells if len(row) == 3 and row[0] != "what"}


def test_a_sound_experiment_passes(examine, tmp_path):
    code, table = examine()
    assert code == 0
    assert list(table) == [
        "run folder", "data", "classes", "batches", "images", "augmentation", "shared memory", "parameters", "memory",
        "speed", "disk", "duration",
    ]  # fmt: skip
    assert {state for subject, (state, _) in table.items() if subject != "speed"} == {"ok"}
    findings = {subject: finding for subject, (_, finding) in table.items()}
    assert findings["run folder"] == f"{tmp_path / 'run'} holds no checkpoint: a run starts from step 0."
    assert findings["data"].startswith("17 images of 3 classes to train on, 7 to validate with; the index of 4 shards")
    assert findings["batches"] == "3 steps an epoch of 8 images, 1 in the last."
    assert findings["images"].startswith("24 of them")
    assert findings["augmentation"] == "2,000 draws of it, and none failed."
    assert findings["shared memory"] == "without workers none is needed."
    assert findings["parameters"] == "all 32, 6,467 numbers, get a gradient."
    assert "5 more of 7" in findings["disk"]  # kB: weights and two moments of 6,467 numbers
    for part in ("180 steps", "3 evaluations", "31 checkpoints"):
        assert f"for {part}" in findings["duration"]


def test_the_table_says_what_a_run_goes_on_from(examine, config_path, tmp_path):
    folder = RunFolder(tmp_path / "run", load_config(config_path))
    folder.path.mkdir()
    folder.begin(90, {})
    folder.save({"counters": {"step": 90}}, 90)
    folder.writing.settle()
    code, table = examine()
    assert code == 0
    assert table["run folder"] == ("ok", f"{folder.path}: a run goes on after step 90 of 180.")
    for part in ("90 steps", "2 evaluations", "16 checkpoints"):  # after steps 91, 98, ... 175, and 120, 150, 180
        assert f"for {part}" in table["duration"][1]
    code, table = examine("train.optimizer.lr=2e-2")
    assert code == 2
    assert table["run folder"][0] == "wrong" and "(train.optimizer.lr 0.01 -> 0.02)" in table["run folder"][1]
    folder.describe(status="completed")
    _, table = examine()
    assert "nothing left to train" in table["run folder"][1]
    assert table["duration"][1] == "no step is left to train."


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_found_and_named(examine, root, split):
    path, record = load_index(root / split).locate(3)
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, record.offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), record.offset)
    code, table = examine()
    assert (code, table["images"][0], list(table)[-1]) == (2, "wrong", "images")
    assert table["images"][1].startswith(f"1 of 24 sampled ones cannot be used: sample {record.key!r} of shard {path}")


def test_an_image_that_only_the_loader_meets_is_found_too(examine, root, monkeypatch):
    monkeypatch.setattr("train.doctor.NUM_SAMPLED", 2)  # the first and the last
    path, record = load_index(root / "train").locate(3)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"?", record.offset)
    code, table = examine("data.num_workers=1")
    assert (code, table["images"][0]) == (2, "wrong")
    assert table["images"][1].startswith(f"sample {record.key!r} of shard {path} is not what was indexed")


def test_a_parameter_without_gradient_is_named(examine, monkeypatch):
    monkeypatch.setattr(ModelConfig, "create", ModelConfig.create)  # put back what UNREAD sets
    exec(UNREAD, {})
    code, table = examine()
    assert (code, table["parameters"][0]) == (0, "warning")  # one rank alone can train it
    assert table["parameters"][1].startswith(
        "no gradient reaches unread.weight, unread.bias, which would end a run of several ranks: "
    )
    code, table = examine("train.freeze=[unread]")
    assert (code, table["parameters"][0]) == (0, "ok")


def test_a_parameter_without_gradient_ends_the_examination_of_several_ranks(config_path, tmp_path):
    """DistributedDataParallel fails in the step after it."""
    (tmp_path / "unread.py").write_text(UNREAD + "sys.exit(main(sys.argv[1:]))")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "unread.py")]
    settings = ["data.shuffle_window=6", "train.global_batch_size=9", f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [sys.executable, *launch, str(config_path), "--doctor", *settings],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    table = _rows(result.stdout)
    assert result.returncode and "exitcode  : 2" in result.stderr
    assert table["parameters"][0] == "wrong" and "unread.weight, unread.bias, which ends" in table["parameters"][1]
    assert table["shards"] == ("ok", "4 shards for 2 reading processes.")
    assert table["batches"][0] == "warning" and "2 ranks do not share evenly" in table["batches"][1]
    assert list(table)[-1] == "parameters"


def test_fewer_shards_than_readers_are_found(examine, tmp_path):
    write_pictures(tmp_path / "few", NUM_TRAIN, NUM_VAL, per_shard=NUM_TRAIN)
    code, table = examine(f"data.root={tmp_path / 'few'}", "data.shuffle_window=6", "data.num_workers=2")
    assert (code, table["shards"][0]) == (0, "warning")
    assert table["shards"][1].startswith("1 shards for 2 reading processes, which data.shuffle_window sends to ")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_cannot_keep_up_is_found(examine, tmp_path, num_workers):
    """Images that take longer to decode than to train on, in class folders."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(255, size=(1800, 1800), dtype=np.uint8)).save(content, "PNG")
    for place in ("train/a", "train/b", "train/c", "val/a", "val/b", "val/c"):
        (tmp_path / "large" / place).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "large" / place / f"{number}.png").write_bytes(content.getvalue())
    code, table = examine(
        f"data.root={tmp_path / 'large'}", f"data.num_workers={num_workers}", "data.cache_images=false"
    )
    assert (code, table["speed"][0]) == (0, "warning")
    assert f"1 x {num_workers} workers yield" in table["speed"][1]
    needed = re.search(r"data\.num_workers=(\d+) would do", table["speed"][1])
    assert needed is not None and int(needed[1]) > 1
    assert table["data"][1] == "9 images of 3 classes to train on, 9 to validate with, in class folders."


def test_a_disk_that_checkpoints_would_fill_is_found(examine, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 300_000, 300_000))
    code, table = examine()
    assert (code, table["disk"][0]) == (2, "wrong")
    assert "has 300.0 kB free, checkpoints need 5 more of 7" in table["disk"][1]


def test_a_step_that_does_not_fit_into_memory_is_found(examine, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "train_step", too_large)
    code, table = examine()
    assert (code, table["memory"][0]) == (2, "wrong")
    assert "a step does not fit into the" in table["memory"][1] and "train.grad_checkpointing" in table["memory"][1]


def test_what_training_refuses_is_refused_in_the_same_words(config_path, tmp_path, capsys):
    arguments = [str(config_path), "model.keywords.num_classes=4", f"run_dir={tmp_path / 'run'}"]
    told = []
    for option in ([], ["--doctor"], ["--verify-resume"]):
        assert main([*arguments, *option]) == 2
        told.append(capsys.readouterr().err)
    assert told == ["train: " + told[0].removeprefix("train: ")] * 3 and "has 3 classes and the model 4" in told[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--docter"], "--docter is not an option, did you mean '--doctor'?"),
        (["--jobs"], "--jobs is not an option; usage: python -m train CONFIG "),
        (["--doctor", "--verify-resume"], "--doctor and --verify-resume: give one at a time."),
    ],
)
def test_options_that_do_not_exist_are_refused(config_path, capsys, options, sentence):
    assert main([*options, str(config_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_help_tells_what_the_options_are_for(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "--doctor " in told and "--verify-resume " in told


# ---- judgements, by hand


def test_workers_are_enough_when_data_take_no_longer_than_steps():
    check = judge_pace(Pace(data=0.4, step=0.4, answer=1.0, num_workers=2), 100, Ranks())
    assert check.state == "ok" and "1 x 2 workers yield 250 images/s" in check.finding
    check = judge_pace(Pace(data=0.9, step=0.4, answer=1.0, num_workers=2), 100, Ranks())
    assert check.state == "warning" and "so that 56% of the time" in check.finding  # (0.9 - 0.4) / 0.9
    assert "data.num_workers=5 would do" in check.finding  # 2 * 0.9 / 0.4, rounded up


def test_without_workers_data_and_steps_take_turns():
    assert Pace(data=0.1, step=1.0, answer=1.0, num_workers=0).waiting == 0.1
    assert Pace(data=0.1, step=1.0, answer=1.0, num_workers=1).waiting == 0.0
    check = judge_pace(Pace(data=0.2, step=1.0, answer=1.0, num_workers=0), 100, Ranks())
    assert check.state == "warning" and "data.num_workers=1 would do" in check.finding


@pytest.mark.parametrize(
    ("overrides", "done", "num_answers"),
    [
        ([], 0, 3 * 7),
        (["train.ema.decay=0.9"], 0, 3 * 2 * 7),
        (["train.ema.decay=0.9", "eval.raw_every_epochs=40"], 0, 3 * 7 + 2 * 7),  # after 20, 40, 60 epochs; 40, 60
        (["train.ema.decay=0.9", "eval.raw_every_epochs=7", "data.holdout=0.25"], 0, 3 * (7 + 4) + 7),
        ([], 60, 2 * 7),
    ],
)
def test_evaluations_are_as_long_as_the_images_that_each_is_of(config_path, overrides, done, num_answers):
    experiment = set_up(load_config(config_path, overrides), Ranks())
    pace = Pace(data=0.0, step=0.0, answer=60.0, num_workers=1)
    num_evaluations = 3 - done // 60
    expected = f"0:{num_answers:02d}:00 for {num_evaluations} evaluations"
    assert expected in _duration(experiment, done, pace, saving=0.0).finding


def test_batches_name_what_is_left_over(config_path):
    config = load_config(config_path, ["train.global_batch_size=6", "train.mixup={}"])
    assert judge_batches(15, 17, config, 3) == (
        "batches",
        "ok",
        "3 steps an epoch of 6 images, 3 in the last, train.mixup leaves out the 2 that fill no batch.",
    )
    check = judge_batches(18, 18, config, 4)
    assert check.state == "warning" and "some wait for those with 2: make " in check.finding


def test_images_that_training_replaces_are_a_warning_up_to_their_ceiling():
    in_train, in_val = (True, "a is no whole image."), (False, "b is no whole image.")
    found = [judge_images(errors, 512, 1) for errors in ([], [in_train], [in_train, in_train], [in_val])]
    assert [check.state for check in found] == ["ok", "warning", "wrong", "wrong"]
    assert found[1].finding.endswith("a is no whole image. data.max_bad_images=1 lets others take their place.")


def test_memory_is_judged_by_its_share():
    states = [judge_memory(peak, 1000, "a device").state for peak in (900, 901, 1001, math.inf)]
    assert states == ["ok", "warning", "wrong", "wrong"]
    assert "takes 900 bytes of the 1.0 kB of a device" in judge_memory(900, 1000, "a device").finding


def test_as_many_shards_as_readers_are_enough():
    assert [judge_shards(4, num_readers).state for num_readers in (4, 5)] == ["ok", "warning"]


def test_an_augmentation_that_fails_now_and_then_is_found(examine, monkeypatch):
    """Once in some hundred draws: training would meet it within the first epochs."""
    draw = torchvision.transforms.RandomAffine.get_params

    def seldom(*args: Any) -> Any:
        if random.random() < 0.005:
            raise ValueError("bits must be between 1 and 8")
        return draw(*args)

    monkeypatch.setattr(torchvision.transforms.RandomAffine, "get_params", staticmethod(seldom))
    code, table = examine("train.affine={degrees: 9}")
    assert code == 2
    assert table["augmentation"] == (
        "wrong", "it fails for what it may draw (bits must be between 1 and 8): change train.crop or affine."
    )  # fmt: skip


def test_batches_that_do_not_fit_into_shared_memory_are_found(examine, monkeypatch):
    """Two workers have two batches each ready, of 8 images of 64 bytes to train on or 256 to evaluate."""
    usage = shutil.disk_usage("/")
    for free, state in ((10**6, "ok"), (68_000, "warning"), (60_000, "wrong")):
        monkeypatch.setattr("train.doctor.shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        check = judge_shared_memory(2 * 2 * 64 * 256, free, 2)
        assert check.state == state and ("docker run --shm-size" in check.finding) == (state != "ok")
    monkeypatch.undo()
    _, table = examine("data.num_workers=2", "data.cache_images=false")
    assert table["shared memory"][1].startswith("batches that workers have ready take 65.5 kB of /dev/shm, ")
    _, table = examine("data.num_workers=2", "data.cache_images=false", "eval.batch_size=4")
    assert table["shared memory"][1].startswith("batches that workers have ready take 2.0 kB of /dev/shm, ")
