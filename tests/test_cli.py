"""The ``vitreuse`` command: what it prints, as JSON and as text, and how it refuses."""

import fcntl
import json
import os
import platform
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from timm.models import VisionTransformer

import vitreuse
from eval.__main__ import COMMANDS as eval_commands
from eval.__main__ import main as eval_main
from train.__main__ import main as train_main
from vitreuse.__main__ import COMMANDS as vitreuse_commands
from vitreuse.__main__ import main
from vitreuse.compress.fold import STEPS
from vitreuse.cost.measure import Timing
from vitreuse.io.tables import fitted
from vitreuse.plan import WORDS

PYTHON = platform.python_version()


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
        "vit_merge_tiny_patch16_224": "exact-8*12",
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
            "vitreuse plan: resnet50 takes no plan, since it is no VisionTransformer of timm: give a plain ViT",
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


# What a terminal shows


WIDTHS = (200, 100, 80, 60, 45, 30)
CELLS = [
    ("vit_lazy_small_patch16_224", "(exact reuse*2)*4", "19.70", "+0.11 [-0.56, +0.78]", ""),
    ("deit_reuse_tiny_distilled_patch16_224", "exact reuse*6 exact*5", "5.47", "-", "within noise"),
]


def table_of_cells():
    table = Table(box=SIMPLE_HEAD, caption="what [it] is of")
    table.add_column("name", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    for heading in ("params (M)", "difference", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in CELLS:
        table.add_row(*row)
    return table


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_keeps_to_the_width_and_loses_nothing(width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(fitted(Group(Text("a title of several words"), table_of_cells(), Text("a remark")), console))
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= width and "\u2026" not in shown
    words = [word for row in CELLS for cell in row for word in cell.split()]
    for word in [*words, "name", "plan", "params", "(M)", "difference", "verdict", "what", "of", "title", "remark"]:
        assert word in shown if len(word) < width else word in "".join(shown.split())
    ruled = any({*line.strip()} == {"\u2500"} for line in shown.splitlines())
    assert ruled == (width >= 80)  # the longest words of the columns and a space between each take 73


def read_terminal(columns, *argv):
    """What a command shows on a terminal so wide, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "vitreuse", *argv]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, env=environment, stdout=theirs, stderr=subprocess.DEVNULL):
        os.close(theirs)
        content = b""
        with suppress(OSError):  # a terminal's end
            while part := os.read(ours, 1 << 16):
                content += part
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", content.decode())


def test_a_terminal_is_kept_to_and_a_pipe_gets_all(capsys):
    assert main(["models", "*_tiny_*"]) == 0
    piped = capsys.readouterr().out
    rows = [line.split() for line in piped.splitlines() if "_patch16_" in line]
    assert len(rows) > 10 and max(map(len, piped.splitlines())) > 80
    shown = read_terminal(60, "models", "*_tiny_*")
    assert max(map(len, shown.splitlines())) <= 60
    for row in rows:
        assert all(word in shown.split() or f"{word}," in shown.split() for word in row)


# Help, versions, completion


@pytest.mark.parametrize("program, names", [(main, vitreuse_commands), (eval_main, eval_commands)])
def test_help_keeps_to_80_columns(program, names, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for argv in ([], *([name] for name in names)):
        with pytest.raises(SystemExit, match="0"):
            program([*argv, "--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80, argv
        assert not argv or shown.count("usage: ") == 1
    assert train_main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_help_of_plan_has_every_word_and_three_examples_that_run(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    words, _, examples = shown.partition("words, one per layer")[2].partition("examples:\n")
    explained = re.findall(r"^  (\w+)", words, re.MULTILINE)
    assert {*explained} == {*WORDS}
    commands = [shlex.split(line) for line in examples.strip().splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert command[:2] == ["vitreuse", "plan"] and main(command[1:]) == 0


@pytest.mark.parametrize("program", [main, eval_main, train_main])
def test_versions_are_told(program, capsys):
    with suppress(SystemExit):
        assert program(["--version"]) == 0
    told = capsys.readouterr().out
    packages = f"vitreuse {vitreuse.__version__}, torch {torch.__version__}, timm {timm.__version__}"
    assert told == f"{packages}, Python {PYTHON}\n"


def complete(script, *words):
    """What bash would complete the last word to."""
    line = " ".join(f"'{word}'" for word in words)
    program = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_vitreuse; "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_a_shell_completes_commands_options_and_files(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    assert complete(script, "vitreuse", "si") == ["similarity"]
    assert complete(script, "vitreuse", "convert", "--lowrank-s") == ["--lowrank-start", "--lowrank-sharing"]
    assert complete(script, "vitreuse", "search", "--metric", "l") == ["latency"]
    (tmp_path / "weights.pth").touch()
    assert complete(script, "vitreuse", "export", "--checkpoint", f"{tmp_path}/wei") == [f"{tmp_path}/weights.pth"]
    assert complete(script, "vitreuse", "export", f"{tmp_path}/wei") == [f"{tmp_path}/weights.pth"]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_are_written_for(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    assert "similarity" in capsys.readouterr().out


def test_completion_without_its_package_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--print-completion", "bash"])
    told = capsys.readouterr().err
    assert "needs shtab, which pip install 'vitreuse[completion]' installs" in told and told.count("\n") == 1


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
