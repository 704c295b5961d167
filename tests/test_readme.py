"""What README and docs show is what happens: their Python runs, their ratios are computed, their commands name what
exists; and the README is short."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vitreuse
from eval.__main__ import COMMANDS as INSTRUMENTS
from eval.__main__ import main as evaluate
from train.__main__ import _parse as train_arguments
from train.__main__ import main as train
from train.sweep import _parse as sweep_arguments
from vitreuse.__main__ import COMMANDS as OURS
from vitreuse.__main__ import main
from vitreuse.config import load_config
from vitreuse.cost.summary import describe
from vitreuse.plan import PRESETS, parse_plan
from vitreuse.plan.language import WORDS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
RUN_HERE = [page for page in PAGES if page != "docs/integrations.md"]  # whose snippets test_integrations.py runs
MOST_WORDS = 1100
CARDS = "docs/study/pointer/cards"


def read(page):
    return (ROOT / page).read_text()


def fenced(language, *pages):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(map(read, pages)), flags=re.DOTALL | re.MULTILINE)
    return [text for word, text in blocks if word == language]


def commands():
    lines = dict.fromkeys("\n".join(fenced("sh", *RUN_HERE)).splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def five_commands(model):
    """Those for a trained model, of which each takes what the one before has left."""
    (block,) = [block for block in fenced("sh", "README.md") if f"vitreuse similarity {model}" in block]
    return [shlex.split(line) for line in block.splitlines()]


def other_commands(is_ours):
    five = [*five_commands("runs/demo/exact"), *five_commands("vit_small_patch14_dinov2")]
    return [argv for argv in commands() if argv not in five and (argv[0] == ".venv/bin/vitreuse") is is_ours]


def understood(argv, monkeypatch):
    """Reads a command as its program does, arguments, configs and overrides, and does not run it."""
    program, arguments = (argv[argv.index("-m") + 1], argv[argv.index("-m") + 2 :]) if "-m" in argv else ("", argv[1:])
    if program == "train":
        path, overrides, *_ = train_arguments(arguments)
        load_config(ROOT / path, overrides)
    elif program == "train.sweep":
        runs, _ = sweep_arguments(arguments)
        for run in runs:
            load_config(ROOT / run.config, run.overrides)
    elif program in ("", "eval"):
        for command in (OURS if not program else INSTRUMENTS).values():
            monkeypatch.setattr(command, "run", lambda args: {})
            monkeypatch.setattr(command, "render", lambda result: "")
        assert (evaluate if program else main)(arguments) == 0
    else:
        assert importlib.util.find_spec(program) is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # fvcore's import
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_python_runs(page, capsys):
    namespace = {}
    for block in fenced("python", page):
        exec(block, namespace)
        for expected in re.findall(r"print\(.*\)  # (.*)", block):
            assert expected in capsys.readouterr().out


def test_the_ratios_are_computed():
    rows = re.findall(r"\| `([^`]*)` \| ([\d.]+) \| ([\d.]+) \|", read("docs/plans.md"))
    assert len(rows) == 1 + len(PRESETS)
    for plan, macs_ratio, params_ratio in rows:
        found = describe("deit_small_patch16_224", plan)
        assert (f"{found['macs_ratio']:.3f}", f"{found['params_ratio']:.3f}") == (macs_ratio, params_ratio)


def test_the_words_and_plans_are_those_of_the_language():
    block = next(block for block in fenced("", "docs/plans.md") if block.startswith("exact  "))
    words, examples = block.split("\n\n")
    specs = re.findall(r"^\S+", words, flags=re.MULTILINE)
    assert [str(parse_plan(f"exact {spec}")[1]) for spec in specs] == specs
    assert {parse_plan(f"exact {spec}")[1].word for spec in specs} == set(WORDS)
    for plan in re.split(r" {2,}|\n", examples.strip()):
        assert str(parse_plan(plan, 12, 6, 196)) == plan


@pytest.mark.parametrize("argv", other_commands(True), ids=shlex.join)
def test_the_vitreuse_commands_work(argv, capsys):
    assert main(argv[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("argv", other_commands(False), ids=shlex.join)
def test_the_other_commands_name_what_exists(argv, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    if argv[0] == "make":
        assert argv[1] in targets
    else:
        understood(argv, monkeypatch)


@pytest.mark.parametrize("argv", five_commands("vit_small_patch14_dinov2"), ids=lambda argv: " ".join(argv[:4]))
def test_the_five_commands_of_the_real_backbone_are_understood(argv, monkeypatch):
    understood(argv, monkeypatch)


@pytest.mark.parametrize("wrong", ["-m eval kn runs/x", "-m train configs/digits/lazy.yaml train.epoch=3", "models -x"])
def test_a_command_that_no_program_takes_is_not_understood(wrong, monkeypatch):
    with pytest.raises((SystemExit, ValueError)):
        understood([".venv/bin/python", *shlex.split(wrong)], monkeypatch)


@pytest.mark.proof
def test_the_five_commands_make_a_trained_model_faster(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert train(["configs/digits/exact.yaml", "train.epochs=3", "run_dir=runs/demo/exact"]) == 0
    five = five_commands("runs/demo/exact")
    for argv in five:
        run, arguments = (main, argv[1:]) if argv[0] == ".venv/bin/vitreuse" else (train, argv[3:])
        assert run(arguments) == 0, argv
    assert ", before healing top-1 " in capsys.readouterr().err
    exported = timm.create_model(f"local-dir:{tmp_path / 'runs/exported'}", pretrained=True)
    assert str(exported.plan) in shlex.join(five[2])
    teacher, healed = (load_config(tmp_path / "configs/digits" / f"{name}.yaml").train for name in ("exact", "heal"))
    assert healed.epochs <= teacher.epochs / 10 and healed.global_batch_size == teacher.global_batch_size


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_all_other_commands_of_the_readme_run(tmp_path):
    """As processes, in their order, beside two models of the demo; trainings are cut short."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    programs = {
        "python": [],
        "torchrun": ["-m", "torch.distributed.run", "--standalone"],
        "vitreuse": ["-m", "vitreuse"],
    }
    demo = [["-m", "train", f"configs/digits/{name}.yaml", f"run_dir=runs/demo/{name}"] for name in ("exact", "lazy")]
    five = [*five_commands("runs/demo/exact"), *five_commands("vit_small_patch14_dinov2")]
    lines = [shlex.split(line, comments=True) for block in fenced("sh", "README.md") for line in block.splitlines()]
    others = [argv for argv in lines if argv and argv[0] != "make" and argv not in five]
    written = [[*programs[Path(argv[0]).name], *argv[1:]] for argv in others]
    assert len(written) >= 10
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for arguments in (*demo, *written):
        short = [argument for argument in arguments if not argument.startswith("train.epochs=")]
        short += ["train.epochs=3"] if "train" in arguments else []
        command = [sys.executable, *short]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(short)}: {done.stderr}"


@pytest.mark.parametrize("page", ["README.md", "docs/compress.md"])
def test_the_search_in_the_text_finds_what_the_text_says(page):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    namespace = {"vitreuse": vitreuse, "model": timm.create_model("vit_tiny_patch16_224", **sizes).eval()}
    namespace["images"] = torch.randn(12, 3, 8, 8)
    (call,) = re.findall(r"`(found\s+=\s+vitreuse\.search\([^`]*\))`", read(page))
    exec(" ".join(call.split()), namespace)
    attributes = re.findall(r"`(found\.\w+)`", read(page))
    assert len(attributes) >= 2 and all(eval(attribute, namespace) is not None for attribute in attributes)


def test_both_models_go_through_the_same_five_commands():
    digits, real = (five_commands(model) for model in ("runs/demo/exact", "vit_small_patch14_dinov2"))
    assert [argv[:2] for argv in digits] == [argv[:2] for argv in real]
    assert load_config(ROOT / real[3][3]).train.distill.teacher.name == real[0][2]


def as_written(cosine):
    return f"{cosine:.4f}".rstrip("0").rstrip(".")


def measured(size_px, plan, is_searched):
    """What the study has of a plan: speed-up, and cosines of the class token and of patch tokens of photographs."""
    lines = {
        name: [json.loads(line) for line in read(f"docs/study/dinov2/{name}.jsonl").splitlines()]
        for name in ("quality", "speed", "searched")
    }
    if is_searched:
        found = [row for line in lines["searched"] if line["image_size_px"] == size_px for row in line["rows"][:1]]
        (row,) = [row for row in found if row["plan"] == plan]
        return row["speedup"], *(1 - float(distance) / 100 for distance in row["photographs"].split(" / "))
    (quality, speed) = (
        next(line for line in lines[name] if (line["image_size_px"], line["plan"]) == (size_px, plan))
        for name in ("quality", "speed")
    )
    photographs = quality["photographs"]
    return speed["speedup"], photographs["class_cosine"], photographs["patch_cosine"]


def test_the_first_table_is_what_was_measured():
    row = r"^\| (\d+) px \| `([^`]*)`(, searched and fitted)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(row, read("README.md"), flags=re.MULTILINE)
    assert len(rows) == 6
    for size_px, plan, is_searched, *written in rows:
        speedup, *cosines = measured(int(size_px), plan, is_searched)
        assert written == [f"{speedup:.2f}", *map(as_written, cosines)]


def test_what_must_be_beaten_is_what_the_study_found(capsys):
    said = " ".join(read("README.md").split())
    assert "`(none*2 exact)*2`" in said and "within noise of exact attention at 60 % of its MACs" in said
    paths = [path for name in ("exact", "none_as_mixspan") for path in sorted((ROOT / CARDS).glob(f"pointer_{name}-*"))]
    cards = [str(path) for path in paths]
    assert evaluate(["compare", *cards, "--baseline", "pointer_exact", "--no-speed", "--json"]) == 0
    exact, cut = json.loads(capsys.readouterr().out)["rows"]
    assert cut["plan"] == "(none*2 exact)*2" and cut["verdict"] == "within noise" and cut["num_seeds"] == 5
    assert cut["macs"] / exact["macs"] == pytest.approx(0.6, abs=0.005)


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= MOST_WORDS


# The home page is the site's: make docs looks at its links.
@pytest.mark.parametrize("page", [*sorted({*PAGES} - {"docs/index.md"}), "experiments.md"])
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", read(page)):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_the_tree_names_what_exists():
    tree = next(block for block in fenced("", "docs/contributing.md") if block.startswith("vitreuse/ "))
    files = re.findall(r"[\w/]+\.py\b|^\w+/|(?<=^  )\w+/", tree, flags=re.MULTILINE)
    assert len(files) > 15
    for name in files:
        found = [*ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}"), *ROOT.glob(name)]
        assert found, f"the tree names {name}, which does not exist"
