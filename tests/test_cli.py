"""The ``vitreuse`` command: what it prints, as JSON and as text, and how it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer

from vitreuse.__main__ import main
from vitreuse.fold import STEPS
from vitreuse.measure import Timing


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_reports_layers_and_ratios(capsys):
    result = run_json(capsys, "plan", "exact reuse*6 exact*5", "--model", "deit_small_patch16_224")
    assert result["plan"] == "exact reuse*6 exact*5"
    assert [row["anchor"] for row in result["layers"]] == [None] + [0] * 6 + [None] * 5
    tokens, dim = 197, 384
    expected = {"qkv": tokens * dim**2, "logits": 0, "values": tokens**2 * dim, "proj": tokens * dim**2}
    expected |= {"fc1": 4 * tokens * dim**2, "fc2": 4 * tokens * dim**2}
    assert result["layers"][3]["theoretical_macs"] == expected
    assert result["params_ratio"] == pytest.approx(0.920, abs=5e-4)


def test_plan_takes_the_image_size_and_either_name(capsys):
    small = run_json(capsys, "plan", "lowrank:64*12", "--model", "vit_small_patch16_224", "--image-size", "384")
    ours = run_json(capsys, "plan", "lowrank:64*12", "--model", "vit_reuse_small_patch16_224", "--image-size", "384")
    assert small["layers"][0]["theoretical_macs"]["token_projection"] == 64 * 577 * 384
    assert small["layers"] == ours["layers"]


def test_plan_counts_what_runs_beside_what_the_method_needs(capsys):
    result = run_json(capsys, "plan", "span:7*12")  # 14 x 14 patches: windows run as one dense masked map
    exact = run_json(capsys, "plan", "exact*12")
    assert result["theoretical_macs"] < result["macs"] == exact["macs"] == exact["theoretical_macs"]
    assert result["macs_ratio"] == result["theoretical_macs"] / exact["theoretical_macs"]


def test_plan_prints_equal_layers_once(capsys):
    assert main(["plan", "exact reuse*6 exact*5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.strip()[:1].isdigit()][:4] == [
        ["0", "exact"],
        ["1-6", "reuse"],
        ["7-10", "exact"],
        ["11", "exact"],
    ]


def test_models_lists_what_matches(capsys):
    result = run_json(capsys, "models", "vit_*_tiny_patch16_224")
    assert {model["name"]: model["plan"] for model in result["models"]} == {
        "vit_lazy_tiny_patch16_224": "(exact reuse*2)*4",
        "vit_lowrank_tiny_patch16_224": "lowrank:64*12",
        "vit_mixspan_tiny_patch16_224": "(span:7*2 exact)*4",
        "vit_reuse_tiny_patch16_224": "exact reuse*6 exact*5",
    }


FOLD = ["--device", "cpu", "--image-size", "32", "--repeats", "1", "--batch-size", "2"]


@pytest.mark.parametrize("plan", [[], ["--plan", "lowrank:3 reuse exact*10"]], ids=["plain", "plan"])
def test_fold_measures_each_step_alone_and_all_together(capsys, monkeypatch, plan):
    times_ms = iter(range(1, 99))

    def time_interleaved(calls, device, num_repeats):
        for call in calls.values():
            call()
        return {label: Timing(0.5, float(next(times_ms)), 1.0, num_repeats) for label in calls}

    monkeypatch.setattr("vitreuse.cli.fold.time_interleaved", time_interleaved)
    result = run_json(capsys, "fold", "vit_tiny_patch16_224", *plan, *FOLD)
    assert (result["plan"], result["image_size_px"], result["batch_size"]) == (plan[1] if plan else None, [32, 32], 2)
    labels = ["norm_affine + centring" if step == "centring" else step for step in STEPS]
    assert [row["step"] for row in result["steps"]] == ["unfolded", "no step", *labels, "all steps", "default steps"]
    assert [row["speedup"] for row in result["steps"]] == [1 / row["minimum_ms"] for row in result["steps"]]
    differences = {row["step"]: row["relative_difference"] for row in result["steps"]}
    assert differences["unfolded"] is None and differences["no step"] == 0
    assert 0 < differences["norm_affine + centring"] < 1e-4 and 0 < differences["all steps"] < 1e-4


def test_fold_shows_a_step_that_changes_the_logits(capsys, monkeypatch):
    def broken(model):
        model.head.bias += 1

    same = Timing(1.0, 1.0, 1.0, 1)
    monkeypatch.setitem(STEPS, "key_bias", broken)
    monkeypatch.setattr("vitreuse.cli.fold.time_interleaved", lambda calls, *_: dict.fromkeys(calls, same))
    result = run_json(capsys, "fold", "vit_tiny_patch16_224", *FOLD)
    wrong = {row["step"] for row in result["steps"] if (row["relative_difference"] or 0) > 1e-4}
    assert wrong == {"key_bias", "all steps"}


def test_fold_times_in_the_dtype_that_is_asked_for(capsys, monkeypatch):
    dtypes = []
    forward = VisionTransformer.forward

    def record(model, x):
        dtypes.append(x.dtype)
        return forward(model, x)

    monkeypatch.setattr(VisionTransformer, "forward", record)
    assert main(["fold", "vit_tiny_patch16_224", *FOLD, "--dtype", "bfloat16"]) == 0
    assert "vit_tiny_patch16_224 at 32 x 32 px in bfloat16, batch 2" in capsys.readouterr().out
    num_models = 1 + len(STEPS) + 3
    assert dtypes == [torch.float32] * num_models + [torch.bfloat16] * 3 * num_models


def test_shards_are_written_described_and_verified(capsys, tmp_path):
    root = str(tmp_path / "digits")
    written = run_json(capsys, "shards", "digits", root)
    assert [split["num_samples"] for split in written["folders"]] == [1437, 360]
    assert run_json(capsys, "shards", "verify", f"{root}/train")["folders"] == written["folders"][:1]
    shard = next((tmp_path / "digits" / "val").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["shards", "verify", f"{root}/val"]) == 2
    assert shard.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            ["plan", "exact reuse*6 exact*4"],
            "vitreuse plan: plan has 11 layers, the model has 12: 'exact reuse*6 exact*4' could end in 'exact*5'.\n",
        ),
        (
            ["plan", "exact*12", "--model", "resnet50"],
            "vitreuse plan: no model 'resnet50' that takes a plan: the nearest is ",
        ),
        (
            ["plan", "exact*12", "--image-size", "5"],
            "vitreuse plan: images of (5, 5) px are smaller than a patch of (16, 16) px",
        ),
        (["models", "zzz"], "vitreuse models: no model matches 'zzz': try '*reuse*'"),
        (["shards", "info", "no/such/folder"], "vitreuse shards: no/such/folder "),
        (["fold", "resnet18"], "vitreuse fold: ResNet cannot be folded: fold takes timm's VisionTransformer and ours."),
        (["fold", "vit_tny_patch16_224"], "vitreuse fold: model.name 'vit_tny_patch16_224' is not a model of timm"),
        (["fold", "vit_tiny_patch16_224", "--plan", "exact"], "vitreuse fold: model 'vit_"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(capsys, argv, sentence):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence) and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_output_that_cannot_be_written_is_one_sentence(more):
    with open("/dev/full", "w") as full:
        result = run_process(["plan", "exact*12", *more], stdout=full)
    assert (result.returncode, result.stderr) == (
        2,
        "vitreuse plan: standard output cannot be written (No space left on device): send it somewhere else.\n",
    )


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_has_seen_enough_ends_it_quietly(more):
    reader, writer = os.pipe()
    os.close(reader)
    result = run_process(["plan", "exact*12", *more], stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def run_process(arguments: list[str], **where) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, whose standard output goes somewhere."""
    command = [sys.executable, "-m", "vitreuse", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True, **where)


def test_wrong_arguments_are_one_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plans"])
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_one_sentence(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitreuse.cli.models.run", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "vitreuse models: interrupted.\n"
