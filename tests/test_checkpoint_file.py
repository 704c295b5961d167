"""Checkpoints as people keep them, read from files and fitted to plans; what is none; and that no file runs code."""

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save as safetensors_save
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import vitreuse
from eval.__main__ import main as eval_main
from train.weights import start_from
from vitreuse.__main__ import main
from vitreuse.io.checkpoint_file import as_weights, read_weights
from vitreuse.model.checkpoint import adapt_state_dict

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 3}
NAME, PLAN = "vit_reuse_tiny_patch16_224", "exact reuse lowrank:5"
RECORDED = json.loads(Path(__file__).with_name("transformers_names.json").read_text())


def plain(seed=0, **keywords):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **keywords}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def ours(**keywords):
    torch.manual_seed(9)
    return timm.create_model(NAME, plan=PLAN, **{**SIZES, **keywords}).eval()


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def chunked(layer):
    """The layers of DINOv2 in training, two to a chunk: blocks.CHUNK.LAYER."""
    return f"blocks.{int(layer[1]) // 2}.{layer[1]}"


RIGHT, OTHER = plain().state_dict(), plain(seed=1).state_dict()
BODY = {key: value for key, value in RIGHT.items() if not key.startswith("head.")}
HEAD = {key: value for key, value in RIGHT.items() if key.startswith("head.")}
PROJECTOR = {"head.mlp.0.weight": torch.ones(5, 24), "head.last_layer.weight_g": torch.ones(2)}
SETTINGS = argparse.Namespace(model="vit", lr=0.1, betas=[0.9, 0.95], output_dir="out")
WHOLE = {  # what is RIGHT in them is all of it
    "itself": RIGHT,
    "DDP": under("module.", RIGHT),
    "compiled": under("_orig_mod.", RIGHT),
    "compiled DDP": {"state_dict": under("_orig_mod.module.", RIGHT)},
    "DDP of compiled": {"model": under("module._orig_mod.", RIGHT), "epoch": 3},
    "thrice": {"model": {"state_dict": under("module._orig_mod.module.", RIGHT)}},
    "compiled layers": {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in RIGHT.items()},
    "no average": {"model": RIGHT, "model_ema": None, "args": SETTINGS},
    "timm's average": {"state_dict": OTHER, "state_dict_ema": under("module.", RIGHT), "arch": "vit"},
    "DeiT's average": {"model": OTHER, "model_ema": RIGHT, "optimizer": {"state": {}}, "args": SETTINGS},
    "torchvision's average": {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(7), **under("module.", RIGHT)}},
    "ours": {"model": OTHER, "ema": RIGHT, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "counters": {}},
    "Lightning": {"state_dict": under("model.", RIGHT), "pytorch-lightning_version": "2.5", "hyper_parameters": {}},
    "Lightning's average": {"state_dict": {**under("model.", OTHER), **under("ema_model.", RIGHT)}},
    "DeepSpeed": {"module": under("module.", RIGHT), "dp_world_size": 8},
    "a name of its own": {"my_vit": under("net.", RIGHT), "optim": {"a": torch.ones(1)}, "epoch": 3},
    "a probe's head beside it": {"state_dict": {**under("model.backbone.", BODY), **under("model.", HEAD)}},
    "a student beside it": {"student": under("module.", OTHER), "teacher": under("module.", RIGHT)},
}
HEADLESS = {  # what is RIGHT in them is all but the head
    "DINO": {
        "teacher": {**under("backbone.", BODY), **PROJECTOR},
        "student": under("module.backbone.", BODY),
        "args": SETTINGS,
    },
    "iBOT": {"teacher": {**under("module.backbone.", BODY), **under("module.", PROJECTOR)}},
    "DINOv2 in chunks": {
        "teacher": {
            **under("backbone.", {re.sub(r"blocks\.(\d)", chunked, key): value for key, value in BODY.items()}),
            "backbone.mask_token": torch.ones(1, 24),
            "dino_head.mlp.0.weight": torch.ones(2, 2),
        }
    },
    "MoCo v3": {
        "state_dict": {
            **under("module.momentum_encoder.", {key: value for key, value in OTHER.items() if "head" not in key}),
            **under("module.base_encoder.", BODY),
            "module.base_encoder.head.0.weight": torch.ones(4, 24),
            "module.base_encoder.head.1.running_mean": torch.ones(4),
            "module.predictor.0.weight": torch.ones(4, 4),
        }
    },
    "BYOL": {"state_dict": {**under("target_encoder.net.", OTHER), **under("online_encoder.net.", BODY)}},
    "MAE": {
        "model": {**BODY, "mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 24)},
        "args": SETTINGS,
    },
    "SimMIM": {
        "model": {
            **under("encoder.", BODY),
            "encoder.mask_token": torch.ones(1, 1, 24),
            "decoder.0.weight": torch.ones(9),
        }
    },
}  # fmt: skip


BESIDE = {"Lightning's average": under("model.", OTHER)}  # what is left out although the head is there


def assert_fits(report, model, left_out=(), beside=()):
    """The checkpoint's weights are the model's; the plan's new ones are alone in being so."""
    state = model.state_dict()
    headless = {"head.weight", "head.bias"} if left_out else set()
    assert set(report.new) == {"blocks.2.attn.key_proj", *headless}
    for key, value in RIGHT.items():
        if key in state and key not in headless:
            assert torch.equal(state[key], value), key
    assert torch.equal(state["blocks.1.attn.v.weight"], RIGHT["blocks.1.attn.qkv.weight"][48:])
    assert {key for key in report.dropped if not key.startswith("blocks.1.")} == {*left_out, *beside}


@pytest.mark.parametrize("name", WHOLE)
def test_what_training_wraps_around_weights_is_taken_off(name, tmp_path):
    torch.save(WHOLE[name], tmp_path / "x.pth")
    for source in (tmp_path / "x.pth", str(tmp_path / "x.pth"), WHOLE[name]):
        model = ours()
        report = vitreuse.load_checkpoint(model, source)
        assert_fits(report, model, beside=BESIDE.get(name, ()))


@pytest.mark.parametrize("name", HEADLESS)
def test_other_heads_and_decoders_are_left_out_by_name(name, tmp_path):
    torch.save(HEADLESS[name], tmp_path / "x.pth")
    model = ours()
    report = vitreuse.load_checkpoint(model, tmp_path / "x.pth")
    left_out = {
        "DINO": PROJECTOR,
        "iBOT": PROJECTOR,
        "DINOv2 in chunks": ("mask_token", "dino_head.mlp.0.weight"),
        "MoCo v3": {
            *("head.0.weight", "head.1.running_mean", "predictor.0.weight"),
            *under("momentum_encoder.", BODY),
        },
        "BYOL": under("target_encoder.net.", OTHER),
        "MAE": ("mask_token", "decoder_embed.weight"),
        "SimMIM": ("mask_token", "decoder.0.weight"),
    }  # fmt: skip
    assert_fits(report, model, left_out[name])
    said = start_from(ours(), str(tmp_path / "x.pth"))
    assert "a new head for 3 classes" in said and "left out: " in said


def test_a_checkpoint_of_timms_train_script_is_read_with_its_arguments(tmp_path):
    model, average = plain(), plain()
    average.load_state_dict(RIGHT)
    model.load_state_dict(OTHER)
    ema = ModelEmaV3(average)
    saver = CheckpointSaver(
        nn.DataParallel(model), torch.optim.SGD(model.parameters(), 0.1), args=SETTINGS, model_ema=ema,
        checkpoint_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(3, metric=71.2)
    target = ours()
    assert_fits(vitreuse.load_checkpoint(target, tmp_path / "last.pth.tar"), target)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "anything"])
def test_the_format_is_known_by_the_content(prefix, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    save_file(under(prefix, RIGHT), path)
    assert read_weights(path).state.keys() == RIGHT.keys()


def test_a_model_that_is_no_vit_loses_its_prefix_alone(tmp_path):
    model = timm.create_model("test_resnet")
    torch.save({"state_dict": under("module.", model.state_dict()), "epoch": 1}, tmp_path / "x.pth")
    assert vitreuse.load_checkpoint(timm.create_model("test_resnet"), tmp_path / "x.pth").dropped == ()


def test_what_timm_converts_stays_for_timm():
    """OpenCLIP's wrapper and OpenAI's CLIP, whose heads timm knows how to make of them."""
    trunk = {**under("module.visual.trunk.", BODY), "module.visual.head.proj.weight": torch.ones(3, 24)}
    model = ours()
    report = vitreuse.load_checkpoint(model, trunk)
    assert torch.equal(model.head.weight, torch.ones(3, 24)) and report.new == ("blocks.2.attn.key_proj",)
    names = {"patch_embed.proj.weight": "conv1.weight", "cls_token": "class_embedding"}
    names["pos_embed"] = "positional_embedding"
    clip = {}
    for key, value in plain(pre_norm=True).state_dict().items():
        name = names.get(key, key.replace("blocks", "transformer.resblocks").replace("attn.qkv.", "attn.in_proj_"))
        name = name.replace("attn.proj", "attn.out_proj").replace("norm_pre", "ln_pre").replace("norm", "ln_")
        name = name.replace("fc1", "c_fc").replace("fc2", "c_proj").replace("ln_.", "ln_post.")
        clip[f"visual.{name}"] = value.flatten() if key == "cls_token" else value[0] if key == "pos_embed" else value
    del clip["visual.head.weight"], clip["visual.head.bias"]
    model = ours(pre_norm=True)
    report = vitreuse.load_checkpoint(model, clip)
    assert set(report.new) == {"blocks.2.attn.key_proj", "head.weight", "head.bias"}
    assert torch.equal(model.pos_embed[0], clip["visual.positional_embedding"])


# transformers


def of_transformers(version, kind):
    """A random state dict of a real model's names and shapes."""
    generator = torch.Generator().manual_seed(5)
    recorded = RECORDED[version][kind]
    return {key: torch.randn(shape, generator=generator) for key, shape in recorded.items()}


TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}
KINDS = {  # how ours is made, what it leaves out
    "ViTForImageClassification": (NAME, {}, set()),
    "ViTModel": (NAME, {"num_classes": 0}, {"pooler.dense.weight", "pooler.dense.bias"}),
    "ViTForMaskedImageModeling": (NAME, {"num_classes": 0}, {"mask_token", "decoder.0.weight", "decoder.0.bias"}),
    "DeiTForImageClassificationWithTeacher": ("deit_reuse_tiny_distilled_patch16_224", {}, set()),
    "Dinov2ForImageClassification": (
        NAME,
        {"num_classes": 0, "init_values": 1.0},
        {"mask_token", "classifier.weight", "classifier.bias"},
    ),
    "Dinov2WithRegistersModel": (
        NAME,
        {"num_classes": 0, "init_values": 1.0, "reg_tokens": 2, "no_embed_class": True},
        {"mask_token"},
    ),
}


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_transformers_are_known(version, kind):
    """Of real models, recorded: by an old and a new version's names. What is joined is in timm's order."""
    state = of_transformers(version, kind)
    name, keywords, left_out = KINDS[kind]
    if kind == "Dinov2WithRegistersModel":
        out = ("weights_out.weight", "down_proj.weight")
        (hidden,) = [value.shape[1] for key, value in state.items() if key.endswith(out)]
        keywords = {**keywords, "mlp_ratio": 2 * hidden / 12, "mlp_layer": timm.layers.SwiGLUPacked}
    model = timm.create_model(name, plan="exact", **{**TINY, **keywords})
    report = vitreuse.load_checkpoint(model, state)
    assert report.new == () and set(report.dropped) == left_out
    found = model.state_dict()
    values = {part: find(state, part, "weight") for part in ("query", "key", "value")}
    assert torch.equal(found["blocks.0.attn.qkv.weight"], torch.cat([*values.values()]))
    assert torch.equal(found["patch_embed.proj.weight"], find(state, "projection", "weight"))
    if "Registers" in kind:
        assert torch.equal(found["reg_token"], state["embeddings.register_tokens"])
        positions = state["embeddings.position_embeddings"]
        assert torch.equal(found["pos_embed"], positions[:, 1:])
        assert torch.equal(found["cls_token"], state["embeddings.cls_token"] + positions[:, :1])
        parts = ("weights_in.weight", "gate_proj.weight", "up_proj.weight")
        joined = [value for key, value in state.items() if key.endswith(parts)]
        assert torch.equal(found["blocks.0.mlp.fc1.weight"], torch.cat(joined))
    if "Teacher" in kind:
        assert torch.equal(found["head.weight"], state["cls_classifier.weight"])
        assert torch.equal(found["head_dist.weight"], state["distillation_classifier.weight"])
        assert torch.equal(found["dist_token"], state["deit.embeddings.distillation_token"])


def find(state, part, last):
    """The one entry whose name has a part, old or new."""
    new = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.get(part, part)
    (value,) = [value for key, value in state.items() if key.endswith((f".{part}.{last}", f".{new}.{last}"))]
    return value


def test_logits_of_transformers_names_are_those_of_timms(tmp_path):
    """A ViT written by transformers' formula: separate queries, keys and values, classified by its class token."""
    state = of_transformers("4.49.0", "ViTForImageClassification")
    save_file(under("model.", state), tmp_path / "model.safetensors")
    model = timm.create_model(NAME, plan="exact", **TINY).eval()
    vitreuse.load_checkpoint(model, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), transformers_logits(state, images), rtol=1e-5, atol=1e-5)


def transformers_logits(state, images):
    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return nn.functional.layer_norm(x, (12,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    embeddings, layer = "vit.embeddings.", "vit.encoder.layer.0."
    patches = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    patches = patches @ state[f"{embeddings}patch_embeddings.projection.weight"].flatten(1).T
    patches = patches + state[f"{embeddings}patch_embeddings.projection.bias"]
    x = torch.cat([state[f"{embeddings}cls_token"].expand(2, 1, 12), patches], 1)
    x = x + state[f"{embeddings}position_embeddings"]
    y = norm(x, f"{layer}layernorm_before")
    q, k, v = (
        linear(y, f"{layer}attention.attention.{part}").unflatten(-1, (2, 6)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    attended = ((q @ k.transpose(-2, -1)) / 6**0.5).softmax(-1) @ v
    x = x + linear(attended.transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
    hidden = nn.functional.gelu(linear(norm(x, f"{layer}layernorm_after"), f"{layer}intermediate.dense"))
    x = x + linear(hidden, f"{layer}output.dense")
    return linear(norm(x, "vit.layernorm")[:, 0], "classifier")


# What is no checkpoint


class Trap:
    """An object whose unpickling would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def packed(content, **how):
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def scripted():
    buffer = io.BytesIO()
    with pytest.warns():
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def array(save, *values):
    buffer = io.BytesIO()
    save(buffer, *values)
    return buffer.getvalue()


def half(content):
    return content[: len(content) // 2]


def no_checkpoints(trap):
    """Content by file name, and what is said of it."""
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], []))
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    settings = argparse.Namespace(output_dir=Path("out"))
    return {
        "text.pth": (b"just some words\n" * 9, "it is text"),
        "page.pth": (b"\n<!DOCTYPE html><html>", "it is a web page"),
        "empty.safetensors": (b"", "it is empty"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of git-lfs"),
        "archive.pth": (zipped("weights/a.txt", "a"), "it is a zip archive"),
        "script.pt": (scripted(), "a TorchScript archive"),
        "adam.pth": (packed(adam), "no model's weights (state, param_groups)"),
        "state.pth": (packed({"optimizer": adam, "epoch": 3}), "no model's weights (optimizer, epoch)"),
        "model.pth": (packed(nn.Linear(2, 2)), "a pickled torch.nn.modules.linear.Linear, and nothing that could run"),
        "inner.pth": (packed({"model": nn.Linear(2, 2)}), "a pickled torch.nn.modules.linear.Linear, and nothing"),
        "path.pth": (packed({"model": RIGHT, "args": settings}), "a pickled pathlib.PosixPath, and nothing"),
        "old.pth": (
            packed({"model": RIGHT, "args": settings}, _use_new_zipfile_serialization=False),
            "a pickled pathlib.PosixPath, and nothing",
        ),
        "trap.pth": (packed({"model": RIGHT, "args": argparse.Namespace(a=Trap(trap))}), "a pickled posix.system"),
        "trap.pkl": (pickle.dumps(Trap(trap)), "damaged, incomplete, or no file of torch.save"),
        "array.npy": (array(np.save, np.ones(3)), "it is a NumPy array"),
        "jax.npz": (array(np.savez, np.ones(3)), "it is a NumPy archive"),
        "half.safetensors": (half(safetensors_save(RIGHT)), "a damaged or incomplete file of safetensors"),
        "start.safetensors": (b"\x10\0\0", "a damaged file of safetensors"),
        "half.pth": (half(packed(RIGHT)), "it is damaged or incomplete"),
        "model.onnx": (graph.SerializeToString(), "it is an ONNX model"),
        "renamed.pth": (graph.SerializeToString(), "it is an ONNX model"),
        "packed.pth": (b"\x1f\x8b\x08\0\0", "compressed by gzip"),
        "noise.bin": (b"\x01\x02\x03\xff" * 99, "of no format of weights"),
        "tensor.pth": (packed(torch.ones(3)), "holds a Tensor and no weights by name"),
        "two.pth": (packed({"a": RIGHT, "b": RIGHT}), "holds several (a, b)"),
    }


@pytest.fixture
def others(tmp_path):
    """A folder of files that are no checkpoints, and what is said of each."""
    folder = tmp_path / "others"
    (folder / "folder.pth").mkdir(parents=True)
    said = {"folder.pth": "it is a folder", "missing.pth": "No such file"}
    for name, (content, reason) in no_checkpoints(tmp_path / "trapped").items():
        (folder / name).write_bytes(content)
        said[name] = reason
    yield folder, said
    assert not (tmp_path / "trapped").exists()


def test_what_is_no_checkpoint_is_one_sentence(others):
    folder, said = others
    for name, reason in said.items():
        with pytest.raises(ValueError) as error:
            vitreuse.load_checkpoint(ours(), folder / name)
        told = str(error.value)
        assert told.startswith(f"{folder / name} cannot be read as weights: ") and reason in told, told
        assert told.endswith(".") and not {"\n", "\x1b"} & {*told} and "weights_only" not in told


@pytest.mark.parametrize("command", ["top1", "similarity", "search", "convert", "export"])
def test_every_command_refuses_what_is_no_checkpoint(command, others, tmp_path, capsys):
    folder, said = others
    (tmp_path / "data/val/a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "data/val/a/0.png")
    more = {
        "top1": ["--data", str(tmp_path / "data")],
        "similarity": ["--data", str(tmp_path / "data"), "-o", str(tmp_path / "out")],
        "search": ["--data", str(tmp_path / "data"), "--budget", "0.8"],
        "convert": ["--plan", "exact*12", "-o", str(tmp_path / "out")],
        "export": ["-o", str(tmp_path / "out")],
    }[command]
    for name in ("page.pth", "path.pth", "adam.pth", "half.safetensors", "model.onnx", "folder.pth", "missing.pth"):
        run = eval_main if command == "top1" else main
        assert run([command, "vit_tiny_patch16_224", "--checkpoint", str(folder / name), *more]) == 2
        captured = capsys.readouterr()
        assert said[name] in captured.err and captured.err.count("\n") == 1 and captured.out == ""
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_urls_are_refused():
    with pytest.raises(ValueError, match="is a https: URL"):
        vitreuse.load_checkpoint(ours(), "https://example.com/x.pth")


# The doors of timm


@pytest.mark.parametrize("plan", ["exact reuse lowrank:5", "lowrank:5*3", "exact none reuse:1", "span:3 exact*2"])
@pytest.mark.parametrize("door", ["file", "checkpoint_path"])
def test_timm_loads_a_plain_checkpoint_into_any_plan(plan, door, tmp_path, caplog):
    torch.save({"state_dict": under("module.", RIGHT), "args": SETTINGS}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    keywords = {"checkpoint_path": path}
    if door == "file":
        keywords = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "num_classes": 3}}
    torch.manual_seed(9)
    model = timm.create_model(NAME, plan=plan, **SIZES, **keywords)
    torch.manual_seed(9)
    expected = timm.create_model(NAME, plan=plan, **SIZES)
    report = vitreuse.load_checkpoint(expected, RIGHT)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    told = [record.message for record in caplog.records if record.name == "vitreuse.model.checkpoint"]
    expected_lines = [names[0] for names in (report.dropped, report.new) if names]
    assert len(told) == len(expected_lines)
    assert all(any(name in line for line in told) for name in expected_lines)


def test_timm_makes_a_new_head_for_other_classes(tmp_path):
    torch.save(RIGHT, tmp_path / "x.pth")
    overlay = {"file": str(tmp_path / "x.pth"), "num_classes": 3}
    model = timm.create_model(
        NAME, plan="lowrank:5*3", pretrained=True, pretrained_cfg_overlay=overlay, **{**SIZES, "num_classes": 11}
    )
    assert model.head.weight.shape == (11, 24) and torch.equal(model.norm.weight, RIGHT["norm.weight"])


def test_a_state_dict_of_another_model_is_refused_by_torch():
    others = (
        ("Unexpected key", plain(depth=4)),
        ("Unexpected key", plain(qk_norm=True)),
        ("size mismatch for head", plain(num_classes=4)),
    )
    for said, wrong in others:
        with pytest.raises(RuntimeError, match=said):
            ours().load_state_dict(wrong.state_dict())
    lacking = {key: value for key, value in ours().state_dict().items() if key != "blocks.1.attn.v.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.attn\.v\.weight"):
        ours().load_state_dict(lacking)


def filter_of(model):
    """As timm's tests look for it."""
    return __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"]).checkpoint_filter_fn


@pytest.mark.parametrize("name", [NAME, "deit_reuse_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("img_size", [(32, 32), (16, 40)])
def test_timms_filter_gives_back_a_headless_model(name, img_size):
    """As timm's test_headless_checkpoint_reload, and test_relpos_non_square_checkpoint_reload."""
    keywords = {**SIZES, "num_classes": 0, "img_size": img_size}
    model, reloaded = (timm.create_model(name, plan=PLAN, **keywords).eval() for _ in range(2))
    reloaded.load_state_dict(filter_of(model)(dict(sorted(model.state_dict().items())), reloaded))
    images = torch.randn(2, 3, *img_size)
    assert torch.equal(reloaded(images), model(images))


def test_timms_filter_resizes_as_set_input_size():
    """As timm's test_relpos_family_set_input_size."""
    model, expected = (timm.create_model(NAME, plan=PLAN, **{**SIZES, "img_size": side}).eval() for side in (32, 56))
    expected.load_state_dict(filter_of(model)(model.state_dict(), expected))
    model.set_input_size(img_size=(56, 56))
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(images), expected(images))


def test_a_given_checkpoint_is_left_as_it_was():
    state = {**under("model.", BODY), "model.mask_token": torch.ones(1, 1, 24)}
    before = dict(state)
    vitreuse.load_checkpoint(ours(num_classes=0), state)
    adapt_state_dict(as_weights({**BODY, "mask_token": torch.ones(1)}), ours())
    assert state.keys() == before.keys()
