"""Healing: models of folders, and what wins back the accuracy that a conversion cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from storms.pictures import write_pictures

from train.__main__ import main
from vitreuse.config import ConfigError
from vitreuse.hub import save_hub_folder
from vitreuse.targets import load_experiment, resolve_targets

SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = """\
model: {{name: "local-dir:{model}"}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 1
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{lr: 1e-2}}
  log_every_steps: 1
eval: {{crop_pct: 1.0}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of three classes: three steps of 8, 8 and 1 make an epoch."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, 17, 7, per_shard=10)
    return folder


@pytest.fixture
def write(tmp_path, root):
    """Writes an experiment that begins with the model of a folder; its path."""

    def write_config(model: Path, name: str = "x.yaml") -> Path:
        (tmp_path / name).write_text(CONFIG.format(model=model, root=root))
        return tmp_path / name

    return write_config


def _hub_folder(folder: Path, plan: str, **keywords: Any) -> Any:
    """A random model, saved as a hub folder."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_reuse_tiny_patch16_224", **{**SIZES, "plan": plan, **keywords})
    save_hub_folder(model, folder, crop_pct=1.0)
    return model


# ---- models of folders


def test_a_run_starts_from_the_model_of_a_folder_and_goes_on_from_that_run(tmp_path, write, capsys):
    """A hub folder, then the run folder that the first run left: name, plan, keywords and weights."""
    model = _hub_folder(tmp_path / "hub", "exact span:1", qk_norm=True)
    first, second = (tmp_path / name for name in ("first", "second"))
    for source, run_dir in ((tmp_path / "hub", first), (first, second)):
        arguments = [str(write(source)), f"run_dir={run_dir}", "train.optimizer.lr=1e-9"]
        assert main(arguments) == 0
        assert f"starts from {source / 'model.safetensors'}." in capsys.readouterr().err
        assert main(arguments) == 0  # the resolved config.yaml is that of the same experiment
        assert "is completed already" in capsys.readouterr().err
        inputs = json.loads((run_dir / "run.json").read_text())["inputs"]
        assert len(inputs[str(source / "model.safetensors")]) == 64
    settings = resolve_targets([str(second)])[0].model
    assert (settings.name, settings.plan) == ("vit_reuse_tiny_patch16_224", "exact span:1")
    assert settings.keywords["qk_norm"] and settings.weights == str(first / "model.safetensors")
    for name, tensor in load_file(second / "model.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-6)


def test_what_stands_beside_the_folder_lies_over_what_it_holds(tmp_path, write):
    _hub_folder(tmp_path / "hub", "exact*2")
    overrides = ["model.plan=exact reuse", "model.keywords={drop_path_rate: 0.1}"]
    teacher = f"train.distill={{kind: soft, teacher: {{name: 'local-dir:{tmp_path / 'hub'}'}}}}"
    config = load_experiment(write(tmp_path / "hub"), [*overrides, teacher])
    assert config.model.plan == "exact reuse" and config.model.keywords["embed_dim"] == 16
    assert config.model.keywords["drop_path_rate"] == 0.1
    assert config.train.distill is not None and config.train.distill.teacher.plan == "exact*2"
    assert config.train.distill.teacher.weights == config.model.weights == str(tmp_path / "hub" / "model.safetensors")


def test_weights_may_be_a_folder(tmp_path, write, capsys):
    _hub_folder(tmp_path / "hub", "exact*2")
    model = f"{{name: vit_reuse_tiny_patch16_224, plan: exact reuse, keywords: {json.dumps(SIZES)}"
    arguments = [str(write(tmp_path / "hub")), f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, f"model={model}, weights: {tmp_path / 'hub'}}}"]) == 0
    assert f"starts from {tmp_path / 'hub'}; left out: blocks.1.attn.qkv." in capsys.readouterr().err
    assert str(tmp_path / "hub" / "model.safetensors") in json.loads((tmp_path / "run/run.json").read_text())["inputs"]
    assert main([*arguments, f"model={model}, weights: {tmp_path}}}", f"run_dir={tmp_path / 'other'}"]) == 2
    assert f"{tmp_path}/model.safetensors cannot be read as weights: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "overrides", "sentence"),
    [
        ("nowhere", [], "nowhere is no folder: give a run folder, or one that vitreuse convert or export wrote."),
        ("data", [], "data is neither a run folder nor a hub folder"),
        ("hub", ["model.weights=x.pth"], "brings weights of its own: leave out weights and pos_embed."),
        ("hub", ["model.pos_embed=sincos2d"], "brings weights of its own: leave out weights and pos_embed."),
        ("begun", [], "begun has no model.safetensors yet: go on with its training."),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path, write, source, overrides, sentence):
    (tmp_path / "data").mkdir()
    (tmp_path / "begun").mkdir()
    _hub_folder(tmp_path / "hub", "exact*2")
    begun = write(tmp_path / "hub", "begun.yaml").read_text().replace(
        f'"local-dir:{tmp_path / "hub"}"', "vit_reuse_tiny_patch16_224"
    )  # fmt: skip
    (tmp_path / "begun" / "config.yaml").write_text(begun)
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path / source), overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
