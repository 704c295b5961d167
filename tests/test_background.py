"""Checkpoints written while training goes on: whole states of their step, errors that are told, nothing lost."""

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from storms.pictures import write_pictures
from torch.utils.data import DataLoader

import train.checkpoint
from eval.distributed import Ranks
from train.__main__ import main
from train.checkpoint import Background, Checkpoints
from train.run import RunFolder
from train.sharding import whole_state
from train.trainer import Trainer
from vitreuse.config import load_config
from vitreuse.files.hub import save_hub_folder

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 3
  global_batch_size: 4
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-2}}
  checkpoint: {{every_steps: 2, keep_last: 20}}
  log_every_steps: 1
eval: {{crop_pct: 1.0}}
"""
PATIENCE_S = 60


@pytest.fixture
def config_path(tmp_path) -> Path:
    write_pictures(tmp_path / "data", 12, 5, per_shard=5)
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "data"))
    return path


def test_training_goes_on_while_a_checkpoint_is_written(config_path, tmp_path, monkeypatch):
    """The writer waits until the next step is done, which would never come if that waited for the writer."""
    write, train_step, steps, waited = train.checkpoint.save_tensors, Trainer.train_step, [0], []

    def slow(state: dict[str, Any], file: Any) -> None:
        step, deadline = state["counters"]["step"], time.monotonic() + PATIENCE_S
        while steps[-1] <= min(step, 8) and time.monotonic() < deadline:  # behind the ninth none comes
            time.sleep(0.001)
        waited.append(steps[-1] > min(step, 8))
        write(state, file)

    def counted(trainer: Trainer, *args: Any) -> Any:
        result = train_step(trainer, *args)
        steps.append(trainer.counters.step)
        return result

    monkeypatch.setattr("train.checkpoint.save_tensors", slow)
    monkeypatch.setattr("train.loop._Loop._end_epoch", lambda *_: None)  # an evaluation's first workers wait
    monkeypatch.setattr("train.loop._Loop._finish", lambda loop: loop.folder.writing.settle())
    monkeypatch.setattr(Trainer, "train_step", counted)
    assert main([str(config_path), f"run_dir={tmp_path / 'run'}"]) == 0
    assert waited == [True] * 6  # after steps 2, 3, 4, 6, 8 and 9


def test_a_checkpoint_is_the_state_of_its_step(config_path, tmp_path):
    """As one of a run that ends there."""
    run = tmp_path / "run"
    assert main([str(config_path), f"run_dir={run}"]) == 0
    for step in (2, 4, 6, 8):
        state = torch.load(run / f"checkpoints/step-{step:09d}/state.pt", weights_only=True)
        assert state["counters"]["step"] == step
        moments = state["optimizer"]["state"].values()
        assert {int(moment["step"]) for moment in moments} == {step}
    states = [torch.load(path, weights_only=True) for path in sorted(run.glob("checkpoints/*/state.pt"))]
    weights = [state["model"]["head.weight"] for state in states]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(states) == 6


@pytest.fixture
def is_writing(monkeypatch):
    """Whether something was being written when each loader was first asked for batches, and so forks its workers."""
    found, loaders, writers, ask = [], [], [], DataLoader.__iter__

    def slow(write: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: time.sleep(0.1) or write(*args)

    class Noted(Background):
        def __init__(self) -> None:
            super().__init__()
            writers.append(self)

    def first_asked(loader: DataLoader) -> Iterator[Any]:
        if loader not in loaders:
            loaders.append(loader)
            found.append(any(not begun.done() for writer in writers for begun in writer._begun))
        return ask(loader)

    monkeypatch.setattr("train.run.Background", Noted)
    monkeypatch.setattr("train.checkpoint.save_tensors", slow(train.checkpoint.save_tensors))
    monkeypatch.setattr(Checkpoints, "rate", slow(Checkpoints.rate))
    monkeypatch.setattr(DataLoader, "__iter__", first_asked)
    return found


def test_nothing_is_written_while_workers_for_images_held_out_are_forked(config_path, tmp_path, is_writing):
    """A healing has looked at the validation images before the first step."""
    save_hub_folder(load_config(config_path).model.create(), tmp_path / "teacher")
    teacher = f"{{name: 'local-dir:{tmp_path / 'teacher'}'}}"
    heal = [f"train.distill={{kind: soft, teacher: {teacher}}}", "train.heal={}", "data.holdout=0.25"]
    assert main([str(config_path), *heal, "train.epochs=1", f"run_dir={tmp_path / 'run'}"]) == 0
    assert is_writing == [False] * 3


def test_nothing_is_written_while_workers_for_training_are_forked(config_path, tmp_path, monkeypatch, is_writing):
    """An epoch's end that a start before has left to this one is measured first."""
    with monkeypatch.context() as patch:
        patch.setattr("train.loop._Loop._end_epoch", Mock(side_effect=MemoryError))
        assert main([str(config_path), f"run_dir={tmp_path / 'run'}"]) == 1
    is_writing.clear()
    assert main([str(config_path), f"run_dir={tmp_path / 'run'}"]) == 0
    assert is_writing == [False] * 2


def test_a_score_is_noted_before_the_record_that_it_was_measured(config_path, tmp_path, monkeypatch):
    """Of a checkpoint that was measured when the run ended, the next start measures it."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "rate", Mock(side_effect=MemoryError))
        assert main([str(config_path), f"run_dir={run}"]) == 1
    assert main([str(config_path), f"run_dir={run}"]) == 0
    marker = json.loads((run / "checkpoints/step-000000003/complete.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert marker["score"] == next(record["top1"] for record in records if record["kind"] == "epoch")


def test_there_is_one_copy_of_a_state(config_path, tmp_path, monkeypatch):
    """Of the main rank: none is left of the one before when the next is made, and it is that one which is written."""
    write, state_dict, copies, left, written = train.checkpoint.save_tensors, Trainer.state_dict, [], [], []

    def made(trainer: Trainer) -> Any:
        time.sleep(0.01)  # for the writer to let go of what it has written
        left.append(sum(copy() is not None for copy in copies))
        state = state_dict(trainer)
        copies.append(weakref.ref(state["model"]["head.weight"]))
        return state

    def slow(state: dict[str, Any], file: Any) -> None:
        time.sleep(0.05)
        written.append(copies[-1]() is state["model"]["head.weight"])
        write(state, file)

    monkeypatch.setattr(Trainer, "state_dict", made)
    monkeypatch.setattr("train.checkpoint.save_tensors", slow)
    assert main([str(config_path), f"run_dir={tmp_path / 'run'}"]) == 0
    assert left == [0] * 6 and written == [True] * 6


def test_a_state_is_a_copy_of_the_main_rank():
    state = {"a": torch.ones(3), "b": {"c": torch.arange(4).view(2, 2), "d": "text", "e": [torch.zeros(())]}, "f": 3}
    taken, other = whole_state(state, Ranks(0, 2)), whole_state(state, Ranks(1, 2))
    state["a"].zero_(), state["b"]["c"].zero_(), state["b"]["e"][0].fill_(7)
    assert taken["a"].tolist() == [1, 1, 1] and taken["b"]["c"].tolist() == [[0, 1], [2, 3]]
    assert taken["b"]["e"][0] == 0 and (taken["b"]["d"], taken["f"]) == ("text", 3)
    assert other == {"a": None, "b": {"c": None, "d": "text", "e": [None]}, "f": 3}


@pytest.mark.parametrize("step", [2, 8])
def test_a_disk_that_fills_up_meanwhile_ends_the_run_in_a_sentence(config_path, tmp_path, capsys, monkeypatch, step):
    """In the middle, or behind the last step but one."""
    write = train.checkpoint.save_tensors

    def full(state: dict[str, Any], file: Any) -> None:
        if state["counters"]["step"] == step:
            raise OSError(28, "No space left on device")
        write(state, file)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.save_tensors", full)
        assert main([str(config_path), f"run_dir={run}"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in told and "run it again to go on" in told
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not list(run.rglob("*.tmp"))
    assert main([str(config_path), f"run_dir={run}"]) == 0
    whole = tmp_path / "whole"
    assert main([str(config_path), f"run_dir={whole}"]) == 0
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_is_being_written_when_training_fails_is_written_to_its_end(config_path, tmp_path):
    folder, begun, go_on = RunFolder(tmp_path / "run", load_config(config_path)), threading.Event(), threading.Event()
    folder.path.mkdir()
    written = []

    def write() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        written.append(1)

    folder.writing.do(write)
    assert begun.wait(PATIENCE_S)
    threading.Timer(0.2, go_on.set).start()
    folder.fail("another reason")
    assert written == [1]


def test_writing_is_in_order_and_each_error_is_told_once():
    writing, done = Background(), []

    def fail() -> None:
        raise OSError("full")

    for write in (lambda: done.append(1), fail, lambda: done.append(2)):
        writing.do(write)
    with pytest.raises(OSError, match="full"):
        writing.settle()
    writing.settle()
    writing.check()
    assert done == [1, 2]
    writing.do(fail)
    with pytest.raises(OSError, match="full"):
        for _ in range(10_000):
            writing.check()
            threading.Event().wait(0.001)
