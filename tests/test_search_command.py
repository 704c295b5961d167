"""``vitreuse search`` from the command line: what it finds, writes, refuses, and goes on with."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image

from vitreuse.__main__ import main
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.files.hub import save_hub_folder
from vitreuse.io.durable import exclusive_lock
from vitreuse.plan import parse_plan
from vitreuse.verbs.search.table import thinned

SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 5, "patch_size": 2, "img_size": 8}
QUICK = ("--minutes", "0.02", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's hub folder, and images."""
    root = tmp_path_factory.mktemp("search")
    draw = random.Random(1)
    (root / "images").mkdir()
    for number in range(16):
        Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(root / f"images/{number}.png")
    torch.manual_seed(0)
    save_hub_folder(timm.create_model("vit_reuse_tiny_patch16_224", plan="exact*4", **SIZES), root / "hub")
    return root


def argv(folder, *more):
    return ["search", str(folder / "hub"), "--data", str(folder / "images"), *QUICK, *more]


def searched(capsys, *command):
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_leaves_the_converted_model_and_what_it_found(folder, capsys, tmp_path):
    found = searched(capsys, *argv(folder, "--budget", "0.8", "-o", str(tmp_path)))
    assert found == json.loads((tmp_path / "search.json").read_text())
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert found["words"] == ["exact", "reuse", "lowrank:5", "span:3", "none", "linear", "skip", "-1", "/8"]
    assert found["images"] == {"fitted": 10, "tried": 4, "shown, other images of val": 2}
    chosen = parse_plan(found["chosen"]["plan"], 4)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.plan == chosen and found["chosen"]["share"] <= 0.8
    original = timm.create_model(f"local-dir:{folder / 'hub'}", pretrained=True)
    assert found["chosen"]["cost"] == PlanCosts(original).of(chosen)
    assert found["front"][-1] == {**found["front"][-1], "plan": "exact*4", "share": 1.0, "damage": 0.0}
    audited = found["audited"]
    assert next(iter(audited)) == "chosen" and {"constant merging", "constant merging, fitted"} <= audited.keys()
    assert list(audited)[-4:] == ["reuse", "lazy", "lowrank", "mixspan"]
    assert audited["lowrank"]["plan"] == "lowrank:5*4"
    latency = PlanCosts(original, "latency")
    assert latency.of(parse_plan(audited["constant merging"]["plan"], 4)) <= latency.of(chosen)
    assert audited["chosen"]["damage"] == found["chosen"]["damage"]
    for row in audited.values():
        plan = parse_plan(row["plan"], 4)
        assert row["predicted_speedup"] == latency.of(parse_plan("exact*4", 4)) / latency.of(plan)
        assert row["speedup"] > 0 and row["agreement"]["num_images"] == 2
    assert found["distance"] <= found["start"]["distance"]
    assert found["command"].startswith("vitreuse export ") and found["costs_of"] == "AMD EPYC, 2026-11-22"


def test_the_same_arguments_go_on_and_others_are_refused(folder, capsys, tmp_path):
    command = argv(folder, "--words", "exact,none,-2,/32", "-o", str(tmp_path))
    found = searched(capsys, *command, "--budget", "0.8")
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    again = searched(capsys, *command, "--budget", "0.8")
    assert (again["chosen"], again["distance"]) == (found["chosen"], found["distance"])
    cheaper = searched(capsys, *command, "--budget", "0.6", "--metric", "bytes")
    assert cheaper["chosen"]["share"] <= 0.6
    assert (tmp_path / "trials.jsonl").read_text().splitlines()[: len(lines)] == lines
    assert main([*argv(folder, "--images", "12", "-o", str(tmp_path)), "--budget", "0.8"]) == 2
    told = capsys.readouterr().err
    assert "trials.jsonl has trials of another model or version of vitreuse, or on other images, by its first" in told
    assert (tmp_path / "model.safetensors").exists()


def test_a_folder_takes_one_search_at_a_time(folder, capsys, tmp_path):
    with exclusive_lock(tmp_path / ".lock"):
        held = subprocess.run(
            [sys.executable, "-m", "vitreuse", *argv(folder, "--words", "exact,none", "-o", str(tmp_path))],
            capture_output=True, text=True,
        )  # fmt: skip
    assert held.returncode == 2 and f"{tmp_path} is being written by another search: wait for it" in held.stderr
    assert searched(capsys, *argv(folder, "--words", "exact,none", "--budget", "0.9", "-o", str(tmp_path)))


def test_a_trained_model_is_not_written_over(folder, capsys, tmp_path):
    hub = tmp_path / "run"
    shutil.copytree(folder / "hub", hub)
    kept = {path.name: path.read_bytes() for path in hub.iterdir()}
    assert main([*argv(folder, "--words", "exact,none", "-o", str(hub)), "--budget", "0.9"]) == 2
    assert "give a folder that is new or empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == kept


def test_what_is_handed_over_is_the_nearest_on_the_images_that_plans_were_tried_on(folder, capsys, tmp_path):
    words = ("--words", "exact,linear,-2,/32", "--budget", "0.8")
    found = searched(capsys, *argv(folder, *words, "-o", str(tmp_path)))
    name, rows = found["delivered"]["name"], found["audited"]
    assert name in ("searched", "searched, fitted", "constant merging", "constant merging, fitted")
    assert rows["chosen"]["plan"] == found["chosen"]["plan"]
    assert {"constant merging", "constant merging, fitted"} <= rows.keys() | {name}
    fits = found["delivered"]["layer_fits"]
    assert (fits is not None) == name.endswith("fitted")
    assert all(fit["after"] <= fit["before"] for fit in fits or [])


@pytest.mark.proof
def test_a_killed_search_goes_on(folder, capsys, tmp_path):
    command = argv(folder, "--budget", "0.8", "--words", "exact,linear,-2,/32", "-o", str(tmp_path), "--minutes", "1")
    process = subprocess.Popen([sys.executable, "-m", "vitreuse", *command], stderr=subprocess.DEVNULL)
    trials = tmp_path / "trials.jsonl"
    while not trials.exists() or trials.read_text().count("\n") < 9:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "model.safetensors").exists()
    found = searched(capsys, *command)
    fresh = searched(capsys, *argv(folder, "--budget", "0.8", "--words", "exact,linear,-2,/32", "--minutes", "1"))
    assert found["is_best"] and (found["chosen"], found["front"]) == (fresh["chosen"], fresh["front"])


@pytest.mark.proof
def test_a_terminated_command_leaves_no_temporary_folder(folder, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = ["convert", str(folder / "hub"), "--data", str(folder / "images"), "--plan", "linear*4"]
    code = (
        "import sys, signal, os\nfrom vitreuse.io import spool\nfrom vitreuse.__main__ import main\n"
        "append = spool.Spool.append\n"
        "spool.Spool.append = lambda self, value: (append(self, value), os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, *command, "-o", str(tmp_path / "new")]
    done = subprocess.run(argv, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True)
    assert (done.returncode, [*temporary.iterdir()]) == (130, []) and "interrupted" in done.stderr


def test_a_plan_is_chosen_on_images_to_learn_from_and_shown_on_others(folder, capsys, tmp_path):
    for split, number in (("train", 10), ("val", 3)):
        shutil.copytree(folder / "images", tmp_path / split)
        for path in sorted((tmp_path / split).iterdir())[number:]:
            path.unlink()
    command = ["search", str(folder / "hub"), "--data", str(tmp_path), "--words", "exact,none", *QUICK]
    found = searched(capsys, *command)
    assert (found["split"], found["images"]) == ("train", {"fitted": 8, "tried": 2, "shown, val": 2})


def test_the_table_says_what_was_measured_and_how_to_go_on(folder, capsys):
    assert main(argv(folder, "--budget", "0.8", "--words", "exact,none,reuse,-2", "--rows", "5")) == 0
    shown = capsys.readouterr().out
    assert "times as fast as the best plain model" in shown and "on which nothing was chosen" in shown
    assert "constant merging" in shown and "lowrank" not in shown and "exact reuse*2 exact" in shown
    assert shown.splitlines()[-1].startswith(f"vitreuse search {folder / 'hub'} --data")
    few = thinned([{"cost": number} for number in range(1000)])
    assert len(few) == 12 and {0, 999} <= {row["cost"] for row in few}


def test_a_gated_mlp_keeps_its_hidden_units(folder, capsys, tmp_path):
    torch.manual_seed(0)
    gated = {**SIZES, "mlp_layer": "swiglu"}
    save_hub_folder(timm.create_model("vit_reuse_tiny_patch16_224", plan="exact*4", **gated), tmp_path / "hub")
    command = ["search", str(tmp_path / "hub"), "--data", str(folder / "images"), *QUICK, "--budget", "0.9"]
    assert searched(capsys, *command)["words"][-2:] == ["skip", "-1"]
    assert main([*command, "--words", "exact,/8"]) == 2
    assert "/8 takes hidden units of an MLP, and a SwiGLU is gated: leave it out." in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["latency", "memory", "bytes"])
def test_a_budget_may_be_of_time_memory_or_bytes(metric, folder, capsys):
    found = searched(capsys, *argv(folder, "--budget", "0.9", "--metric", metric, "--words", "exact,linear,-2,/32"))
    assert 0.5 < found["chosen"]["share"] <= 0.9
    for row in found["audited"].values():  # a file and a training step are as large as they were said to be
        assert metric == "latency" or row["measured_share"] == pytest.approx(row["share"], rel=0.02)
        assert metric != "latency" or row["measured_share"] == 1 / row["speedup"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "1.5"], "argument --budget: 1.5 is no share of an exact model's cost: give a number above 0"),
        (["--minutes", "-1"], "argument --minutes: -1 is no time in minutes: give a number, 0 or more"),
        (["--words", "exact,reus"], "argument --words: in reus, layer 1 is 'reus', but the words are"),
        (["--words", "exact,-8,-4"], "argument --words: in exact,-8,-4, -4 is no step: give - and a number once"),
        (["--words", "exact,/x"], "argument --words: in exact,/x, /x is no step: give / and a number once"),
        (["--words", "exact,exact-8"], "argument --words: in exact,exact-8, exact-8 is more than a word: give it, and"),
        (["--words", "reuse,none"], "argument --words: reuse,none is without exact, which layers are that stay as"),
        (["--words", "exact,none", "--rows", "5"], "--rows has no effect on words without reuse: leave it out."),
        (["--words", "exact,-9"], "-9 merges more than half of 16 patches: give -8 or less."),
        (["--words", "exact,/65"], "an MLP has 64 hidden units and /65 are more: give /64 or less."),
        (["--words", "exact,lowrank:17"], "lowrank:17 does not fit a model of 17 tokens: give lowrank:16 or less"),
        (["--images", "5"], "5 images are given, and 6 are needed, to fit, to try and to show: give more."),
        (
            ["--words", "exact,reuse", "--budget", "0.3"],
            "no plan of the words given has 0.3 of the MACs of the exact model: the least is 0.842: raise the",
        ),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(more, sentence, folder, capsys):
    try:
        code = main(argv(folder, *more))
    except SystemExit as exit:
        code = exit.code
    told = capsys.readouterr().err
    assert code == 2 and told.startswith("vitreuse search: ") and sentence in told and told.count("\n") == 1


def test_what_healing_regains_is_measured_when_asked_for(folder, capsys, tmp_path):
    command = argv(folder, "--budget", "0.8", "--words", "exact,none,skip", "-o", str(tmp_path))
    found = searched(capsys, *command, "--heal-minutes", "0.01")
    healing = found["healing"]
    assert healing["rate"] in (1e-6, 1e-5, 1e-4) and healing["num_steps"] >= 1
    assert healing["before"] == pytest.approx(found["audited"]["chosen"]["distance"], rel=1e-5, abs=1e-7)
    assert main([*command, "--heal-minutes", "0.01"]) == 0
    assert "the best of three, regained" in capsys.readouterr().out
    assert "healing" not in searched(capsys, *argv(folder, "--words", "exact,none"))
