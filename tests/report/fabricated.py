"""Run folders that nobody trained: the digits models with weights, cards and curves made up in moments."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from eval.card import NAME, make_card
from eval.predictions import Predictions, answers
from vitreuse.config import load_config, to_yaml
from vitreuse.data import prepare_source

PLANS = ("exact*6", "(exact reuse*2)*2", "lowrank:16*6", "(span:3*2 exact)*2", "exact reuse:2 none linear span:3 skip")
CONFIG = "configs/digits/_base.yaml"
NUM_STEPS, STEPS_PER_EPOCH, EPOCHS = 112, 4.5, 25


def make_runs(root: Path, plans: Sequence[str], num_seeds: int) -> list[str]:
    """A run folder per plan and seed under a folder, which gets the digits too."""
    prepare_source("digits", root / "data" / "digits")
    return [str(_make_run(root, number, plan, seed)) for number, plan in enumerate(plans) for seed in range(num_seeds)]


def _make_run(root: Path, number: int, plan: str, seed: int) -> Path:
    path = root / f"model{number}-seed{seed}"
    path.mkdir()
    settings = (f"model.plan={plan}", f"train.seed={seed}", f"data.source_root={root / 'data'}")
    config = load_config(CONFIG, ("model.name=vit_reuse_tiny_patch16_224", *settings))
    torch.manual_seed(number)
    model = config.model.create()
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    card = make_card(path.name, config.model, "digits/val", _predictions(number, seed), _facts(plan), config)
    card.write(path / NAME)
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "run.json").write_text('{"status": "completed"}')
    (path / "metrics.jsonl").write_text("".join(_records(number, seed, card.top1)))
    return path


def _predictions(number: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(10 * number + seed)
    labels = torch.arange(360) % 10
    wrong = torch.rand(360, generator=generator) < 0.02 + 0.006 * (number % 7)
    logits = torch.eye(10)[(labels + wrong.long()) % 10]
    return Predictions.of([answers(logits, labels, [f"digits-{i}" for i in range(360)])])


def _facts(plan: str) -> dict[str, object]:
    hardware = {"device": "a made-up device", "num_ranks": 1, "threads": 1}
    facts = {"command": f"python -m train {CONFIG} 'model.plan={plan}'", "git_commit": "0123456789abcdef"}
    return {**facts, "versions": {"torch": "2.14.1"}, "hardware": hardware, "seconds": 155.0}


def _records(number: int, seed: int, top1: float) -> list[str]:
    """A curve that falls, and one that rises to a top-1."""
    records: list[dict[str, object]] = []
    for step in range(1, NUM_STEPS + 1):
        epoch = step / STEPS_PER_EPOCH
        loss = 0.4 + 1.9 * math.exp(-epoch / (4 + number % 5)) + 0.03 * math.sin(step * (1 + seed))
        records.append({"kind": "step", "step": step, "epoch": epoch, "loss": loss})
    for epoch in range(1, EPOCHS + 1):
        reached = top1 * (1 - math.exp(-epoch / (2 + number % 3)))
        records.append({"kind": "epoch", "step": 0, "epoch": epoch, "top1": reached})
    records.append({"kind": "final", "step": NUM_STEPS, "top1": top1})
    return [json.dumps(record) + "\n" for record in records]
