"""Images held out of the training set: never trained on, and by them the best checkpoint is chosen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from storms.pictures import write_pictures
from storms.processes import CHECKOUT

from eval.__main__ import main as eval_main
from eval.labelled import Share
from eval.top1 import evaluate
from train.__main__ import main
from vitreuse.config import ConfigError, load_config
from vitreuse.data import DataError, hold_out, open_split
from vitreuse.model.preprocessing import evaluation_transform

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0, holdout: 0.25}}
train:
  epochs: 4
  global_batch_size: 8
  device: cpu
  optimizer: {{lr: 1e-2}}
  checkpoint: {{keep_last: 10}}
  ledger: true
eval: {{crop_pct: 1.0}}
"""


@pytest.fixture
def config_path(tmp_path) -> Path:
    write_pictures(tmp_path / "data", 43, 13, per_shard=5)
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "data"))
    return path


@pytest.mark.parametrize("more", [[], ["data.shuffle_window=6"]])
def test_what_is_held_out_is_not_trained_on_and_chooses_the_best(config_path, tmp_path, capsys, more):
    run = tmp_path / "run"
    assert main([str(config_path), *more, f"run_dir={run}"]) == 0
    images = open_split(tmp_path / "data", "train", "L")
    _, held_out = hold_out(images, images, 0.25, seed=0)
    keys = {held_out.key(number) for number in range(len(held_out))}
    trained = {key for line in (run / "ledger.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]}
    assert len(keys) == 11 and not keys & trained and len(keys | trained) == 43
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    noted = [json.loads(path.read_text())["score"] for path in sorted(run.glob("checkpoints/*/complete.json"))]
    assert noted == [record["holdout_top1"] for record in epochs] and {record["n"] for record in epochs} == {13}
    model = load_config(config_path).model.create()
    for path, record in zip(sorted(run.glob("checkpoints/*/state.pt")), epochs, strict=True):
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        for name, part in (("holdout_", held_out), ("", open_split(tmp_path / "data", "val", "L"))):
            found = evaluate(model, Share(part, transform=evaluation_transform(model, 1.0)))
            assert (found.top1, found.loss) == pytest.approx((record[f"{name}top1"], record[f"{name}val_loss"]))
    best = {"best_step": max(epochs, key=lambda record: (record["holdout_top1"], record["step"]))["step"]}
    best["best_score"] = max(noted)
    facts = json.loads((run / "run.json").read_text())
    assert best.items() <= records[-1].items() and best.items() <= facts.items()
    assert {"training images", "validation images", "images held out"} <= facts["inputs"].keys()
    page = (CHECKOUT / "docs/training.md").read_text()
    assert {name for record in records for name in record if f"`{name}`" not in page} == {"kind"}
    capsys.readouterr()
    checkpoint = run / f"checkpoints/step-{best['best_step']:09d}/state.pt"
    assert eval_main(["top1", str(run), "--checkpoint", str(checkpoint), "--device", "cpu", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["top1"] == next(record["top1"] for record in epochs if record["step"] == best["best_step"])


def test_the_draw_follows_the_seed_and_keeps_labels(tmp_path, config_path):
    images = open_split(tmp_path / "data", "train", "L")
    drawn = {seed: hold_out(images, images, 0.25, seed)[1].numbers.tolist() for seed in (0, 1)}
    assert drawn[0] != drawn[1] and hold_out(images, images, 0.25, 1)[1].numbers.tolist() == drawn[1]
    learned, held_out = hold_out(images, images, 0.25, 0)
    assert sum(learned.shard_sizes) == len(learned) == 32 and len(learned.shard_sizes) == len(images.shard_sizes)
    sizes = np.add(learned.class_sizes(), held_out.class_sizes())
    assert sizes.tolist() == images.class_sizes() and learned.class_names == images.class_names
    for number in range(len(held_out)):
        assert held_out[number].label == images[int(held_out.numbers[number])].label == held_out.labels()[number]


def test_the_doctor_counts_what_is_held_out(config_path, tmp_path, capsys):
    assert main([str(config_path), "data.shuffle_window=6", "--doctor", f"run_dir={tmp_path / 'run'}"]) == 0
    told = capsys.readouterr().out
    assert "32 images of 3 classes to train on, 11 to choose by, 13 to validate with; the index of 9 shards" in told
    assert "9 shards for 1 reading processes." in told


class Broken:
    """Images of which none can be read."""

    def __init__(self, images):
        self.images = images

    def __getattr__(self, name):
        return getattr(self.images, name)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        raise DataError("held out and damaged")


def test_the_doctor_reads_what_is_held_out(config_path, tmp_path, capsys, monkeypatch):
    arguments = [str(config_path), "data.max_bad_images=20", "--doctor", f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr("train.experiment.hold_out", lambda *given: (hold_out(*given)[0], Broken(hold_out(*given)[1])))
    assert main(arguments) == 2
    assert "held out and damaged" in capsys.readouterr().out


def test_a_share_without_images_or_without_effect_is_refused(config_path, tmp_path, capsys):
    images = open_split(tmp_path / "data", "train", "L")
    with pytest.raises(DataError, match="sets 0 of the 43 training images apart: give another share"):
        hold_out(images, images, 0.001, 0)
    distill = "train.distill={kind: features, teacher: {name: vit_tiny_patch16_224, weights: x.pt}}"
    with pytest.raises(ConfigError, match=r"data\.holdout 0\.25 has no effect under train\.distill\.kind 'features'"):
        load_config(config_path, [distill])
