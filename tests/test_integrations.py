"""What docs/integrations.md shows is what happens: other people's tools train, adapt, quantise, export our models."""

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, get_state_dict
from timm.utils.onnx import onnx_export
from torch import nn

import vitreuse

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/integrations.md").read_text()
WRAPPER = "with_vitreuse.py"
CHECKOUT = "TIMM_CHECKOUT"  # timm ships its scripts in no package
NAME = "vit_reuse_tiny_patch16_224"
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3}


def blocks(language):
    """The blocks of a language by the title that they stand under."""
    sections = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    found = [re.search(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for text in sections[1::2]]
    return {title: match[1] for title, match in zip(sections[::2], found, strict=True) if match}


PYTHON = blocks("python")
SNIPPETS = {title: block for title, block in PYTHON.items() if title != "timm's scripts"}


def run(command, folder):
    """What a process prints that has our checkout, and nothing else, beside its packages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout, done.stderr


def test_every_tool_has_its_few_lines():
    tools = {"PEFT: LoRA", "torchao: int8", "Hugging Face: Trainer", "Lightning", "accelerate"}
    assert {*SNIPPETS} == tools
    assert all("  # True\n" in block and block.count("\n") <= 32 for block in SNIPPETS.values())
    assert PYTHON["timm's scripts"].count("\n") == 2


@pytest.mark.proof
@pytest.mark.parametrize("title", SNIPPETS)
def test_the_python_does_what_it_says(title, tmp_path):
    (tmp_path / "snippet.py").write_text(f"import torch\ntorch.manual_seed(0)\n{SNIPPETS[title]}")
    printed, _ = run([sys.executable, "snippet.py"], tmp_path)
    expected = re.findall(r"^print\(.*\)  # (.*)$", SNIPPETS[title], flags=re.MULTILINE)
    lines = [line for line in printed.splitlines() if line in (*expected, "False")]  # some of the tools print, too
    assert lines == expected


def scripts():
    """The commands of the page that run timm's scripts."""
    lines = blocks("sh")["timm's scripts"].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_commands_are_of_timm_s_four_scripts():
    assert [argv[:2] for argv in scripts()] == [["python", WRAPPER]] * 6
    names = [argv[2].removeprefix("pytorch-image-models/") for argv in scripts()]
    assert names == [*["train.py"] * 3, "validate.py", "benchmark.py", "onnx_export.py"]


def write_weights(file, **keywords):
    """A plain ViT's, whose head is not so near to zero that nothing is seen of the rest."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **keywords)
    nn.init.normal_(model.head.weight, std=0.05)
    torch.save(model.state_dict(), file)


def write_images(folder):
    """Dark and light ones, a folder each."""
    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 100, (40, 40, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}/{name}/{index}.png")


@pytest.mark.proof
@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout of timm's repository")
def test_timm_s_own_scripts_run_on_our_names(tmp_path):
    (tmp_path / WRAPPER).write_text(PYTHON["timm's scripts"])
    (tmp_path / "pytorch-image-models").symlink_to((ROOT / os.environ[CHECKOUT]).resolve())
    write_images(tmp_path / "images")
    write_weights(tmp_path / "plain_32px.pth", img_size=32, num_classes=2)
    write_weights(tmp_path / "plain_224px.pth")
    commands = [[sys.executable, *argv[1:]] for argv in scripts()]
    first, second, resampled, validated, benchmarked, _ = [run(command, tmp_path) for command in commands]
    assert "left out, since the model has no use for it: blocks.1.attn.qkv.weight (all but attn.v.weight)" in first[1]
    assert "Resized position embedding: (14, 14) to (2, 2)" in resampled[1]
    assert "Restoring optimizer state from checkpoint" in second[1] and '"epoch": 2' in second[0]
    assert '"top1": 100.0' in validated[0]
    assert '"train_samples_per_sec"' in benchmarked[0] and '"infer_gmacs"' in benchmarked[0]
    onnx.checker.check_model(str(tmp_path / "runs/model.onnx"))


@pytest.fixture
def plain(tmp_path):
    """Files of a small plain ViT's weights for 32 px and 2 classes, and for 64 px and 5."""
    files = [tmp_path / f"{size_px}px.pth" for size_px in (32, 64)]
    for file, size_px, num_classes in zip(files, (32, 64), (2, 5), strict=True):
        write_weights(file, img_size=size_px, num_classes=num_classes, **SMALL)
    return [str(file) for file in files]


def small(name=NAME, **keywords):
    """A small model of a name of ours or of timm's."""
    keywords |= {"plan": "exact reuse*2", **keywords} if name == NAME else {}
    return timm.create_model(name, **{"img_size": 32, "num_classes": 2, **SMALL, **keywords})


class Training:
    """What timm's train.py makes of a model: a task with a moving average, and an optimizer with decay by layers."""

    def __init__(self, **keywords):
        self.model = small(drop_path_rate=0.1, **keywords)
        self.task = ClassificationTask(self.model, criterion=SoftTargetCrossEntropy())
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-3, layer_decay=0.75)
        self.task.setup_ema(decay=0.5)

    def step(self, seed):
        torch.manual_seed(seed)
        images, targets = torch.randn(8, 3, 32, 32), torch.eye(2)[torch.arange(8) % 2]
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.task(images, targets)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.task.update_ema()

    def save(self, folder):
        saver = CheckpointSaver(None, self.optimizer, checkpoint_dir=str(folder), task=self.task)
        saver.save_checkpoint(epoch=0, metric=1.0)
        return str(folder / "last.pth.tar")

    def weights(self):
        parts = self.model, self.task.get_trainable_module(ema=True)
        return [copy.deepcopy(get_state_dict(part)) for part in parts]


def test_a_plain_vit_is_trained_on_by_what_timm_s_script_is_made_of(plain, tmp_path):
    training = Training(checkpoint_path=plain[0])
    start, average = training.weights()
    assert torch.equal(start["blocks.1.attn.v.weight"], torch.load(plain[0])["blocks.1.attn.qkv.weight"][-24:])
    scale = {id(p): group["lr_scale"] for group in training.optimizer.param_groups for p in group["params"]}
    of_layers = [{round(scale[id(p)], 9) for p in layer.parameters()} for layer in training.model.blocks]
    assert of_layers == [{round(0.75 ** (3 - index), 9)} for index in range(3)]
    training.step(1)
    assert all(not torch.equal(start[key], value) for key, value in training.model.state_dict().items())
    file = training.save(tmp_path)
    training.step(2)
    again = Training()
    assert resume_task_checkpoint(again.task, file, optimizer=again.optimizer) == 1
    load_task_ema_checkpoint(again.task, file)
    again.step(2)
    torch.testing.assert_close(again.weights(), training.weights(), rtol=0, atol=0)
    assert not torch.equal(again.weights()[1]["head.weight"], average["head.weight"])


def test_timm_s_validation_reads_the_average_and_the_file_is_one_of_ours(plain, tmp_path):
    training = Training(checkpoint_path=plain[0])
    training.step(1)
    file, (_, average) = training.save(tmp_path), training.weights()
    model = small()
    load_checkpoint(model, file, use_ema=True)
    torch.testing.assert_close(dict(model.state_dict()), dict(average), rtol=0, atol=0)
    report = vitreuse.load_checkpoint(small(), file)
    assert (report.new, report.dropped) == ((), ())


@pytest.mark.parametrize("name", [NAME, "vit_tiny_patch16_224"])
def test_an_initial_checkpoint_is_resampled_for_neither_but_pretrained_weights_are(plain, name):
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        small(name, checkpoint_path=plain[1])
    overlay = {"file": plain[1], "num_classes": 5}
    model = small(name, pretrained=True, pretrained_cfg_overlay=overlay)
    wanted = small("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.pos_embed, wanted.pos_embed)
    assert model.head.weight.shape == (2, 24)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporter
def test_timm_s_onnx_export_checks_what_onnxruntime_says(plain, tmp_path):
    file = str(tmp_path / "model.onnx")
    model = small(checkpoint_path=plain[0], exportable=True)
    onnx_export(model, file, input_size=(3, 32, 32), batch_size=3, use_dynamo=True, check_forward=True)
    onnx.checker.check_model(file)
