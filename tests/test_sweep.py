"""Several runs side by side: bars on a terminal, lines elsewhere, failures and signals passed on."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from storms.processes import PATIENCE_S

from train.__main__ import main as train
from train.sweep import Run, Sweep, main

CHECKOUT = Path(__file__).parent.parent
CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 2, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  {{epochs: {epochs}, global_batch_size: 4, device: cpu, num_threads: 1, optimizer: {{lr: {lr}}}, log_every_steps: 1}}
"""


@pytest.fixture
def write_config(tmp_path):
    """Writes NAME.yaml over two classes of a few images; its path."""
    for split in ("train", "val"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), shade + i).save(folder / f"{i}.png")

    def write(name, epochs=3, lr="1e-3"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(root=tmp_path / "data", epochs=epochs, lr=lr))
        return path

    return write


def start(*arguments, **where):
    command = [sys.executable, "-m", "train.sweep", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment, **where)


def on_a_terminal(*arguments):
    """What a terminal receives, and the exit code."""
    ours, theirs = pty.openpty()
    process = start(*arguments, stderr=theirs)
    os.close(theirs)
    received = b""
    while True:
        try:
            received += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            return received.decode(), process.wait(timeout=PATIENCE_S)


def status(run_dir):
    return json.loads((run_dir / "run.json").read_text())["status"]


@pytest.mark.proof
def test_a_terminal_shows_a_bar_for_each_run(write_config, tmp_path):
    configs = [write_config("one", epochs=60), write_config("two", epochs=60)]
    shown, code = on_a_terminal(*configs, f"runs={tmp_path / 'runs'}", "jobs=2")
    assert code == 0
    assert "\x1b[" in shown
    for name in ("one", "two"):
        assert f"{name} loss " in shown and " images/s" in shown
        assert f"{name}: 120/120 steps, epoch 60/60, loss " in shown
        assert status(tmp_path / "runs" / name) == "completed"
    assert re.search(r"120/120\S* steps \S*0:00:00", shown)


def test_elsewhere_the_runs_lines_are_passed_on_and_a_failure_does_not_stop_the_others(write_config, tmp_path):
    configs, cards = [write_config("wrong", lr="fast"), write_config("right")], tmp_path / "cards"
    process = start(*configs, f"runs={tmp_path / 'runs'}", f"cards={cards}", stderr=subprocess.PIPE)
    said = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert process.returncode == 2
    assert "\x1b[" not in said
    assert "wrong.yaml:7: train.optimizer.lr must be a number" in said and "wrong ended with exit code 2." in said
    assert "right: 6/6 steps, epoch 3/3" in said
    assert status(tmp_path / "runs" / "right") == "completed"
    assert [path.name for path in cards.iterdir()] == ["right.json"]


def test_a_signal_stops_the_running_ones_and_starts_no_more(write_config, tmp_path):
    configs = [write_config("long", epochs=100_000), write_config("waiting")]
    process = start(*configs, f"runs={tmp_path / 'runs'}", stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "runs/long/metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 75
    assert status(tmp_path / "runs/long") == "stopped"
    assert not (tmp_path / "runs/waiting").exists()


@pytest.fixture
def started(monkeypatch):
    """The commands of processes that end at once, instead of starting any; each after `-m train`."""
    commands = []

    class Ended:
        def __init__(self, command, **_):
            commands.append(command[3:])

        def poll(self):
            return 0

    monkeypatch.setattr("train.sweep.subprocess", SimpleNamespace(Popen=Ended))
    monkeypatch.setattr("train.sweep.SECONDS_BETWEEN_LOOKS", 0)
    return commands


def test_seeds_are_the_outer_loop(started):
    assert main(["a/x.yaml", "train.epochs=2", "y.yaml", "seeds=2", "runs=r"]) == 0
    runs = [("a/x.yaml", "x", 0), ("y.yaml", "y", 0), ("a/x.yaml", "x", 1), ("y.yaml", "y", 1)]
    assert started == [
        [config, "train.epochs=2", f"train.seed={seed}", f"run_dir=r/{stem}-seed{seed}"] for config, stem, seed in runs
    ]


def test_a_tilde_is_a_home_folder(started, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["~/x.yaml", "runs=~/r"]) == 0
    assert started == [[f"{tmp_path}/x.yaml", f"run_dir={tmp_path}/r/x"]]


@pytest.mark.parametrize("given", [["--allow=https", "--allow=pipe"], ["--allow", "https", "--allow", "pipe"]])
def test_kinds_of_url_are_handed_on_to_each_run(started, given):
    assert main([*given, "a/x.yaml", "train.epochs=2", "seeds=2", "runs=r"]) == 0
    allowed = ["--allow=https", "--allow=pipe"]
    assert started == [
        ["a/x.yaml", "train.epochs=2", f"train.seed={seed}", f"run_dir=r/x-seed{seed}", *allowed] for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("visible", "devices", "said"),
    [
        ("3,5", ["3", "5", "3"], "3 runs at a time share 2 CUDA devices."),
        ("GPU-a, GPU-b,GPU-c", ["GPU-a", "GPU-b", "GPU-c"], ""),
        ("", [""] * 3, ""),  # somebody wants none
    ],
)
def test_runs_side_by_side_take_turns_on_the_devices(monkeypatch, capsys, visible, devices, said):
    given = []

    class Running:
        def __init__(self, command, env, **_):
            given.append(env["CUDA_VISIBLE_DEVICES"])
            self.looks = 0

        def poll(self):
            self.looks += 1
            return 0 if self.looks > 5 else None

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("train.sweep.subprocess", SimpleNamespace(Popen=Running))
    monkeypatch.setattr("train.sweep.SECONDS_BETWEEN_LOOKS", 0)
    assert main(["a/x.yaml", "seeds=3", "jobs=3", "runs=r"]) == 0
    assert given == devices and said in capsys.readouterr().err


def test_without_seeds_the_configs_own_holds(started):
    assert main(["a/x.yaml", "train.seed=3"]) == 0
    assert started == [["a/x.yaml", "train.seed=3", "run_dir=runs/x"]]


def test_a_completed_run_is_started_again_only_if_its_config_has_changed(write_config, tmp_path, started, capsys):
    config, runs = str(write_config("one", epochs=1)), tmp_path / "runs"
    assert train([config, "train.seed=1", f"run_dir={runs}/one-seed1"]) == 0
    again = ["train.log_every_steps=2"]  # which gives the same run
    for overrides, seeds, said in ((again, [0, 2], True), (["train.epochs=2"], [0, 1, 2], False)):
        capsys.readouterr()
        started.clear()
        assert main([config, *overrides, "seeds=3", f"runs={runs}"]) == 0
        assert started == [[config, *overrides, f"train.seed={k}", f"run_dir={runs}/one-seed{k}"] for k in seeds]
        assert ("1 of 3 runs are completed already." in capsys.readouterr().err) is said


def test_a_run_that_was_stopped_is_started_again(write_config, tmp_path, started):
    config, folder = str(write_config("one", epochs=1)), tmp_path / "one"
    assert train([config, f"run_dir={folder}"]) == 0
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    assert main([config, f"runs={tmp_path}"]) == 0
    assert started == [[config, f"run_dir={folder}"]]


def test_cards_are_kept_and_stand_for_their_runs(write_config, tmp_path, started, capsys):
    config, runs, cards = str(write_config("one", epochs=1)), tmp_path / "runs", tmp_path / "cards"
    assert train([config, "train.seed=0", f"run_dir={runs}/one-seed0"]) == 0
    arguments = [config, "seeds=1", f"runs={runs}", f"cards={cards}"]
    assert main(arguments) == 0
    kept = (cards / "one-seed0.json").read_bytes()
    assert kept == (runs / "one-seed0" / "card.json").read_bytes()
    shutil.rmtree(runs)
    assert main(arguments) == 0
    assert started == []
    assert main([*arguments, "train.epochs=2"]) == 2
    assert "is the card of another model, recipe or seed" in capsys.readouterr().err
    assert (cards / "one-seed0.json").read_bytes() == kept
    (cards / "one-seed0.json").write_text("{}")
    assert main(arguments) == 2
    assert "is no run card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give one or more configs"),
        (["a/x.yaml", "b/x.yaml"], "each of another name"),
        (["x.yaml", "jobs=none"], "jobs=none is not a whole number from 1 to 99999"),
        (["x.yaml", "seeds=0"], "seeds=0 is not a whole number from 1 to 99999"),
        (["x.yaml", "seeds=100000000000"], "seeds=100000000000 is not a whole number from 1 to 99999"),
        (["x.yaml", "run_dir=runs/y"], "run_dir=runs/y is for python -m train, of one run"),
        (["x.yaml", "--doctor"], "--doctor is for python -m train"),
        (["x.yaml", "seeds=2", "train.seed=1"], "train.seed and seeds: give at most one of the two"),
    ],
)
def test_wrong_arguments_are_refused(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_cards_are_not_asked_of_a_run_that_leaves_none(write_config, tmp_path, started, capsys):
    (tmp_path / "weights.pt").write_bytes(b"")
    teacher = f"{{name: vit_tiny_patch16_224, weights: {tmp_path / 'weights.pt'}}}"
    arguments = [str(write_config("one")), f"train.distill={{kind: features, teacher: {teacher}}}"]
    assert main([*arguments, f"runs={tmp_path}", f"cards={tmp_path / 'cards'}"]) == 2
    assert "reads no labels, and its run leaves no card: leave it or cards=DIR out." in capsys.readouterr().err
    assert started == []


def test_what_still_runs_is_stopped_where_a_card_cannot_be_kept(tmp_path):
    (tmp_path / "cards").write_text("")  # no folder
    runs = [Run(Path("a.yaml"), [], tmp_path / name, tmp_path / "cards" / f"{name}.json") for name in ("long", "short")]
    for run, command in zip(runs, (["sleep", "1000"], ["true"]), strict=True):
        run.process = subprocess.Popen(command)
    with pytest.raises(OSError, match="cards"):
        Sweep(runs, 2).run(SimpleNamespace(received=False))
    assert runs[0].process.returncode == -signal.SIGTERM
