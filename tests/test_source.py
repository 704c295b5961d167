"""MODEL with its weights and images, as the commands that measure a model take them."""

import argparse

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitreuse.cli.source import add_source_arguments, load_source
from vitreuse.files.hub import save_hub_folder

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes under val/, weights of a model, and its hub folder."""
    root = tmp_path_factory.mktemp("source")
    for name in ("cat", "dog"):
        (root / "data/val" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 30), (number, 9, 9)).save(root / "data/val" / name / f"{number}.png")
    (root / "empty").mkdir()
    torch.manual_seed(3)
    model = timm.create_model(NAME, depth=1)
    save_hub_folder(model, root / "hub")
    save_file(timm.create_model(NAME).state_dict(), root / "weights.safetensors")
    return root


def load(*argv):
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    return load_source(parser.parse_args(list(map(str, argv))))


def test_a_name_takes_a_checkpoint(folder):
    source = load(NAME, "--checkpoint", folder / "weights.safetensors", "--data", folder / "data", "--images", 4)
    assert not source.model.training
    assert torch.equal(source.model.norm.weight, torch.ones(192)) and len(source.model.blocks) == 12
    assert len(source.sample) == 4 and source.sample.class_names == ("cat", "dog")


def test_a_hub_folder_has_its_own_weights(folder):
    weight = load(folder / "hub", "--data", folder / "data").model.head.weight
    torch.manual_seed(3)
    assert torch.equal(weight, timm.create_model(NAME, depth=1).head.weight)


def test_a_name_alone_has_timms_weights(folder, monkeypatch):
    state = timm.create_model(NAME).state_dict()
    monkeypatch.setattr("vitreuse.files.networks.pretrained_weights", {NAME: state}.__getitem__)
    assert torch.equal(load(NAME, "--data", folder / "data").model.head.weight, state["head.weight"])


@pytest.mark.parametrize(("argv", "said"), [
    (["swin_tiny_patch4_window7_224"], "takes no plan, since it is no VisionTransformer of timm: give a plain ViT"),
    (["resnet18"], "resnet18 takes no plan, since it is no VisionTransformer of timm"),
    (["vit_reuse_tiny_patch16_224"], "neither a file nor pretrained weights of timm"),
    ([NAME, "--checkpoint", "{tmp}/hub/model.safetensors"], "does not fit vit_tiny_patch16_224: .* has no blocks"),
    (["vit_small_patch16_224", "--checkpoint", "{tmp}/weights.safetensors"], "the checkpoint's sizes"),
    ([NAME, "--checkpoint", "{tmp}/weights.safetensors"], "give --data DIR with images"),
    ([NAME, "--checkpoint", "{tmp}/weights.safetensors", "--data", "{tmp}/empty"], "nor images: give a folder"),
])
def test_wrong_input_is_one_sentence(folder, argv, said):
    with pytest.raises(ValueError, match=said):
        load(*(text.format(tmp=folder) for text in argv))
