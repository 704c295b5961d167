"""`python -m train CONFIG --verify-resume`: passes where a run resumes exactly, and says why where it does not."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from storms.pictures import write_pictures
from storms.processes import CHECKOUT
from torch import Tensor, nn

from train.__main__ import main
from train.recipe import create_criterion
from train.verify import first_difference

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 4
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-2}}
"""
# Whatever draws random numbers, keeps state between steps or works beside them.
EVERYTHING = (
    "model.keywords.proj_drop_rate=0.1",
    "model.keywords.drop_path_rate=0.1",
    "train.affine={degrees: 10, shift: 0.1, scale: [0.9, 1.1]}",
    "train.mixup={}",
    "train.ema={decay: 0.9}",
    "train.precision=float16",
    "data.num_workers=2",
)


@pytest.fixture
def config_path(tmp_path) -> Path:
    """Batches of 8, 8 and 1: six steps go on into the second epoch."""
    write_pictures(tmp_path / "data", 17, 7, per_shard=5)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "data"))
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """What is broken here is broken in every part of the proof."""
    monkeypatch.setattr("train.verify._in_fresh_process", lambda environment, function, *args: function(*args))


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_recipe_with_everything_resumes_exactly(config_path, tmp_path, capfd):
    assert main([str(config_path), "--verify-resume", f"run_dir={tmp_path / 'run'}", *EVERYTHING]) == 0
    told = capfd.readouterr().out
    assert told.startswith("resume is exact: saved after step 3 and gone on in a fresh process, the run is after ")
    assert "(model, optimizer, ema), the losses of 3 steps and the keys of 24 samples are equal to the bit" in told
    assert "(device cpu, float16, 1 x 2 workers)" in told
    assert _left(tmp_path) == {"data", "tiny.yaml"}


@pytest.mark.proof
def test_two_ranks_resume_exactly(config_path, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train", str(config_path)]
    settings = [f"run_dir={tmp_path / 'run'}", "model.keywords.proj_drop_rate=0.1"]
    result = subprocess.run(
        [sys.executable, *command, "--verify-resume", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("resume is exact") and "2 x 0 workers" in result.stdout
    assert "the keys of 17 samples" in result.stdout  # steps 4 to 6 are the second epoch
    assert _left(tmp_path) == {"data", "tiny.yaml"}


def test_sigterm_leaves_no_temporary_folder(config_path, tmp_path):
    command = [sys.executable, "-m", "train", str(config_path), "--verify-resume", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".verify-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.communicate()[1] == "train: interrupted.\n" and process.returncode == 130
    assert _left(tmp_path) == {"data", "tiny.yaml"}


class _Growing(nn.Module):
    """A loss that grows with every call, which no checkpoint knows of."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion, self.calls = criterion, 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return self.criterion(logits, targets) * (1 + 0.01 * self.calls)


def test_state_that_no_checkpoint_holds_is_found(config_path, tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setattr("train.objective.create_criterion", lambda config: _Growing(create_criterion(config)))
    assert main([str(config_path), "--verify-resume", f"run_dir={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("resume is not exact: ['steps'][0]['loss'] is ")
    assert "repeat themselves to the bit, so that a checkpoint lacks what training goes by" in told
    assert _left(tmp_path) == {"data", "tiny.yaml"}


def test_kernels_that_do_not_repeat_are_told_from_a_broken_checkpoint(
    config_path, tmp_path, capsys, monkeypatch, in_this_process
):
    device = random.SystemRandom()

    class Noisy(_Growing):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return self.criterion(logits, targets) * (1 + 1e-3 * device.random())

    monkeypatch.setattr("train.objective.create_criterion", lambda config: Noisy(create_criterion(config)))
    assert main([str(config_path), "--verify-resume", f"run_dir={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("resume is not exact: ")
    assert "nor do uninterrupted steps repeat themselves" in told
    assert "torch.use_deterministic_algorithms(True)" in told


def test_the_first_difference_is_named_with_its_size():
    weights, nan = torch.tensor([1.0, 2.0, -0.0]), float("nan")
    state = {"loss": nan, "weights": weights, "step": 3}
    assert first_difference(state, {**state, "weights": weights.clone()}) is None
    others = {
        "differs in 1 of 3 numbers, by up to 5.0e-01": torch.tensor([1.0, 2.5, -0.0]),
        "differs in 0 of 3 numbers, by up to 0.0e+00": torch.tensor([1.0, 2.0, 0.0]),  # in the sign of a zero
        "is a tensor (2,) instead of a tensor (3,)": weights[:2],
        "is None instead of a tensor (3,)": None,
    }
    for how, other in others.items():
        assert first_difference(state, {**state, "weights": other}) == f"weights {how}"
    changed = {"loss": 1.0, "weights": weights, "step": 4}
    assert first_difference(state, changed) == "loss is 1.0 instead of nan, as do 1 of the other 2 tensors and numbers"
