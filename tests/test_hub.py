"""Models written as hub folders and read back, by timm and by our commands."""

import json
from pathlib import Path

import pytest
import timm
import torch
from cases import moved

from eval.__main__ import main as eval_main
from vitreuse.files.hub import read_hub_folder, save_hub_folder
from vitreuse.files.networks import load_experiment, resolve_targets
from vitreuse.model.preprocessing import image_settings

SMALL = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
MODELS = {
    "every word": ("vit_lazy_tiny_patch16_224", {"plan": "exact reuse:2 lowrank:8 span:3", **SMALL}),
    "none, registers, qk-norm": (
        "vit_reuse_tiny_patch16_224",
        {**SMALL, "plan": "exact none reuse*2", "reg_tokens": 3, "qk_norm": True, "in_chans": 1},
    ),
    "layerwise, average pooling": (
        "deit3_lowrank_small_patch16_224",
        {**SMALL, "plan": "lowrank:8*4", "lowrank_sharing": "layerwise", "global_pool": "avg"},
    ),
    "distilled": ("deit_reuse_tiny_distilled_patch16_224", {**SMALL, "plan": "exact reuse*3"}),
    "timm's": ("deit3_small_patch16_224", SMALL),
}


@pytest.mark.parametrize(("name", "keywords"), MODELS.values(), ids=MODELS)
def test_timm_gives_the_same_model_back(name, keywords, tmp_path):
    torch.manual_seed(0)
    model = moved(timm.create_model(name, pretrained_cfg_overlay={"crop_pct": 0.8}, **keywords), std=0.05).eval()
    save_hub_folder(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, *image_settings(model)["input_size"])
    assert torch.equal(loaded(images), model(images))
    assert str(getattr(loaded, "plan", None)) == str(getattr(model, "plan", None))
    read = json.loads(json.dumps(image_settings(loaded)))
    assert read == json.loads(json.dumps(image_settings(model))) and read["crop_pct"] == 0.8


def test_a_folder_keeps_the_plan_that_its_name_would_give(tmp_path):
    save_hub_folder(timm.create_model("vit_lazy_tiny_patch16_224", **SMALL), tmp_path)
    assert read_hub_folder(tmp_path).plan == "exact reuse*2 exact"


def test_a_folder_is_a_target_with_weights_and_preprocessing(tmp_path):
    overlay = {"crop_pct": 0.7}
    model = timm.create_model(
        "vit_reuse_tiny_patch16_224", plan="exact reuse*3", pretrained_cfg_overlay=overlay, **SMALL
    )
    save_hub_folder(model, tmp_path / "mine")
    for text in (str(tmp_path / "mine"), f"local-dir:{tmp_path / 'mine'}"):
        (target,) = resolve_targets([text])
        loaded = target.load()
        assert target.label == "mine"
        assert image_settings(loaded)["crop_pct"] == 0.7
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    assert eval_main(["flops", str(tmp_path / "mine"), "--json"]) == 0


@pytest.mark.parametrize("damage", ["{", "[]", json.dumps({"architecture": "vit_tiny"}), "{}"])
def test_a_damaged_configuration_is_one_sentence(damage, tmp_path, capsys):
    save_hub_folder(timm.create_model("vit_reuse_tiny_patch16_224", plan="exact reuse*3", **SMALL), tmp_path)
    Path(tmp_path, "config.json").write_text(damage)
    assert eval_main(["flops", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "Traceback" not in told


@pytest.mark.parametrize(("given", "found"), [([], "growing"), (["model.drop_path=uniform"], "uniform")])
def test_drop_path_beside_a_folder_is_the_one_that_is_asked_for(given, found, tmp_path):
    digits = load_experiment(Path("configs/digits/exact.yaml"), []).model
    save_hub_folder(digits.create(), tmp_path)
    folder = [f"model.name=local-dir:{tmp_path}", "model.plan=null", "model.keywords={drop_path_rate: 0.2}"]
    model = load_experiment(Path("configs/digits/exact.yaml"), [*folder, *given]).model
    assert model.drop_path == found
    rates = [block.drop_path2.drop_prob for block in list(model.create().blocks)[1:]]
    assert rates == pytest.approx([0.2] * 5 if given else [0.04, 0.08, 0.12, 0.16, 0.2])
