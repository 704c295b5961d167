"""Data sets as people share them, with their names of splits and what systems left in them, through the programs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main as evaluate
from eval.labelled import ALONE
from eval.report.measured import similarity
from train.__main__ import main as train
from train.experiment import set_up
from vitreuse.cli.source import learning_split, sample_images
from vitreuse.config import load_config
from vitreuse.data import DataError
from vitreuse.files.networks import Target, resolve_targets

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 1
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{name: sgd, lr: 1e-2}}
  affine: {{degrees: 10}}
eval: {{crop_pct: 1.0}}
"""


def draw(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "emu"), count: int = 5) -> None:
    """Class folders, with thumbnails in a hidden folder of each."""
    for label, name in enumerate(classes):
        for below in ("", ".thumbnails"):
            (folder / name / below).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.full((8, 8), 80 * label + number, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / below / f"{number}.png")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A config beside the folder export/, which has the splits train, valid and test."""
    for split in ("train", "valid", "test"):
        draw(tmp_path / "export" / split)
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "export"))
    return path


def test_a_run_reads_valid_as_val_and_says_what_it_leaves_out(export: Path, tmp_path: Path, capsys) -> None:
    root, run = tmp_path / "export", tmp_path / "run"
    assert train([str(export), f"run_dir={run}"]) == 0
    told = capsys.readouterr().err
    for split in ("train", "valid"):
        assert f"{root}/{split}: 3 files or folders that are no images are left out: 3 .thumbnails.\n" in told
    assert f"{root}/valid is read as val.\n" in told
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["n"] == 15
    assert len((run / "predictions.csv").read_text().splitlines()) == 16
    for split, folder in (("val", "valid"), ("validation", "valid"), ("test", "test")):
        assert evaluate(["top1", str(run), "--data", str(root), "--split", split, "--json", "--device", "cpu"]) == 0
        told = capsys.readouterr()
        (row,) = json.loads(told.out)["rows"]
        assert (row["n"], row["data"]) == (15, f"{root}/{folder}")
        assert "3 .thumbnails" in told.err and ("is read as" in told.err) == (split != folder)
    assert evaluate(["top1", str(run), "--data", str(tmp_path), "--split", "export", "--device", "cpu"]) == 2
    assert "export has splits (train, valid, test), not classes" in capsys.readouterr().err


def test_a_folder_of_splits_is_never_measured_as_classes(export: Path, tmp_path: Path) -> None:
    (target,) = resolve_targets([str(export)])
    model, root = target.model.create(), tmp_path / "export"
    assert learning_split(target, root) == learning_split(target, tmp_path) == "train"
    for split, folder in (("val", "valid"), ("train", "train"), ("test", "test")):
        for given in (root, tmp_path, None):
            sample = sample_images(target, model, given, 99, split)
            assert sample.class_names == ("cat", "dog", "emu") and len(sample) == 15
            assert sample.dataset.folder == root / folder
    with pytest.raises(DataError, match="has the splits train, valid, test and no other: choose one of them"):
        sample_images(target, model, root, 99, "other")


def test_a_report_finds_the_images_of_val_under_another_name(export: Path, tmp_path: Path, monkeypatch) -> None:
    (target,) = resolve_targets([str(export)])
    model = target.model.create()
    monkeypatch.setattr(Target, "load", lambda target: model)
    series: Any = SimpleNamespace(runs=[SimpleNamespace(folder=target, card=SimpleNamespace(seed=3))])
    found = similarity(series, ALONE.device)
    assert found.keys() == {"seed", "rows"}


def test_names_that_look_the_same_are_told_apart(tmp_path: Path) -> None:
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        draw(tmp_path / split, ("bar", name, "pub"))
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    with pytest.raises(DataError) as error:
        set_up(load_config(path), ALONE)
    assert r"val has 'cafe\u0301', which " in str(error.value)
    assert r"train has as 'caf\xe9', which differs only in Unicode normalisation" in str(error.value)
