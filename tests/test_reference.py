"""Reference curves: a warning where the loss is off, once, through stops and resumes; what is refused."""

import json
import os
import re
import signal

import pytest
from storms.pictures import write_pictures

from train.__main__ import main
from train.reference import Reference
from train.run import RunFolder
from vitreuse.config import ConfigError, ReferenceConfig


def watch(tmp_path, losses, **settings):
    """Follows a curve that is 2.0 from epoch 0 and 1.0 from epoch 4; the warnings by number of the record."""
    (tmp_path / "curve.csv").write_text("epoch,loss\n4,1.0\n0,2.0\n")
    reference = Reference(ReferenceConfig(curve=str(tmp_path / "curve.csv"), **settings))
    said = [reference.follow(i / 2, loss) for i, loss in enumerate(losses)]
    return {i: text for i, text in enumerate(said) if text is not None}


@pytest.mark.parametrize(("factor", "expected"), [(1.09, []), (1.11, [2]), (0.3, [])])
def test_a_loss_above_the_curve_is_told_once(tmp_path, factor, expected):
    losses = [factor * (2 - i / 8) for i in range(9)]
    assert [*watch(tmp_path, losses, num_records=3)] == expected


def test_the_warning_says_how_far_and_where(tmp_path):
    (text,) = watch(tmp_path, [3.0, 2.8125], num_records=2, tolerance_percent=40.0).values()
    curve = re.escape(str(tmp_path / "curve.csv"))
    assert re.fullmatch(f"warning: at epoch 0.50 the loss, 2.906 over the last 2 records, is 50 % above the 1.938 of "
                        f"{curve}: look at data and recipe before going on.", text)


def test_one_bad_step_is_no_warning(tmp_path):
    assert watch(tmp_path, [2, 4, 1.75, None, 1.5, 1.375], num_records=5, tolerance_percent=30.0) == {}
    assert watch(tmp_path, [2, 4, 1.75, None, 1.5, 1.375], num_records=5, tolerance_percent=20.0).keys() == {5}


def test_nothing_is_compared_after_the_end_of_the_curve(tmp_path):
    assert watch(tmp_path, [2.0] * 2 + [1.0] * 7 + [9.0] * 3, num_records=1, tolerance_percent=20.0) == {}


@pytest.mark.parametrize(("name", "text"), [
    ("curve.csv", None), ("curve.csv", ""), ("curve.csv", "epoch,loss\n1,none\n"), ("curve.csv", "step,loss\n1,1\n"),
    ("curve.csv", "epoch,loss\n1,0\n"), ("metrics.jsonl", "[]\n"), ("metrics.jsonl", '{"kind": "epoch"}\n'),
])
def test_another_file_is_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"train.reference.curve .*{name} (cannot be read|needs losses above 0)"):
        Reference(ReferenceConfig(curve=str(tmp_path / name)))


def test_a_url_is_no_curve():
    with pytest.raises(ConfigError, match="URL"):
        ReferenceConfig(curve="https://example.org/curve.csv")


# ---- in training

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 8, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0, cache_images: true}}
train:
  {{epochs: 10, global_batch_size: 9, device: cpu, num_threads: 1, optimizer: {{lr: 1e-3}}, log_every_steps: 1}}
eval: {{crop_pct: 1.0, every_epochs: 10}}
"""


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """The metrics of a run of twenty steps, beside its config."""
    folder = tmp_path_factory.mktemp("reference")
    write_pictures(folder / "data", 17, 7, 9)
    (folder / "small.yaml").write_text(CONFIG.format(root=folder / "data"))
    assert main([str(folder / "small.yaml"), f"run_dir={folder / 'run'}"]) == 0
    return folder / "run" / "metrics.jsonl"


def retrain(curve, run_dir, factor):
    """Trains the same run again beside its own curve with losses divided by a factor; the exit code."""
    records = [json.loads(line) for line in curve.read_text().splitlines()]
    scaled = [{**record, "loss": record["loss"] / factor} for record in records if record["kind"] == "step"]
    path = run_dir.parent / "scaled.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in scaled))
    setting = f"train.reference={{curve: {path}, tolerance_percent: 20, num_records: 5}}"
    return main([str(curve.parent.parent / "small.yaml"), setting, f"run_dir={run_dir}"])


@pytest.mark.parametrize(("factor", "number"), [(1.0, 0), (1.3, 1)])
def test_training_warns_and_goes_on(curve, tmp_path, capfd, factor, number):
    assert retrain(curve, tmp_path / "run", factor) == 0
    warnings = re.findall("warning: at epoch (.*) the loss", capfd.readouterr().err)
    assert warnings == ["2.00"] * number
    losses = [[json.loads(line).get("loss") for line in path.read_text().splitlines()]
              for path in (curve, tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("stop_after", "warns_in"), [(3, 2), (7, 1)])
def test_a_resumed_run_knows_its_past(curve, tmp_path, capfd, monkeypatch, stop_after, warns_in):
    """It warns at the same step as an unbroken one, and not again."""
    log = RunFolder.log

    def stopping(self, kind, step, **values):
        log(self, kind, step, **values)
        if (kind, step) == ("step", stop_after):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log", stopping)
    said = []
    for expected in (75, 0):
        assert retrain(curve, tmp_path / "run", 1.3) == expected
        said.append(re.findall("warning: at epoch (.*) the loss", capfd.readouterr().err))
        monkeypatch.setattr(RunFolder, "log", log)
    assert said == [["2.00"] * (warns_in == start) for start in (1, 2)]
