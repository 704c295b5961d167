"""What README and docs show is what happens: their Python runs, their ratios are computed, their commands name what
exists; and the README is short."""

import re
import shlex
from pathlib import Path

import pytest
import timm

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
        assert (ROOT / f"{program.replace('.', '/')}/__main__.py").exists() or (
            ROOT / f"{program.replace('.', '/')}.py"
        ).exists()


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


def test_both_models_go_through_the_same_five_commands():
    digits, real = (five_commands(model) for model in ("runs/demo/exact", "vit_small_patch14_dinov2"))
    assert [argv[:2] for argv in digits] == [argv[:2] for argv in real]
    assert load_config(ROOT / real[3][3]).train.distill.teacher.name == real[0][2]


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
