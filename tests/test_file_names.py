"""Names of files that are no UTF-8, or hold what ends a line or a field: the same bytes at the end of every chain."""

import csv
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.tiny_split import encode
from PIL import Image

from eval import controls
from eval.__main__ import main as evaluate
from eval.card import read_card
from eval.table import csv_text
from train.__main__ import main as train
from train.trackers import Start, Wandb
from vitreuse.__main__ import main as vitreuse
from vitreuse.config import load_config
from vitreuse.data import DataError, DecodeError, EncodedSample, build_index, load_index, write_shards
from vitreuse.io.file_names import for_picture, is_name, printable, stem_of, to_bytes
from vitreuse.verbs.plots import front_plot

CLASSES = [b"[red]", b'a\xff, b"\n', b"caf\xc3\xa9 "]
IMAGES = [b"x\xfe.png", b'y,"\n.png', b"z\r.png", b"\tw.png", b" q .png", b"\xed\xa0\x80.png"]
DATA, NAME, SHOWN = b"d\xff", b"ru\xffn[red]$^$", r"ru\udcffn[red]$^$"
KEYS = {name + b"/" + image for name in CLASSES for image in IMAGES}
CONFIG = """
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}
data: {root: data, num_workers: 0}
train: {epochs: 1, global_batch_size: 18, device: cpu, optimizer: {lr: 1e-2}, ledger: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set of class folders under a name that is no UTF-8, and the config of a run on it."""
    made = tmp_path_factory.mktemp("names")
    for split in (b"train", b"val"):
        for label, name in enumerate(CLASSES):
            place = os.fsencode(made) + b"/" + DATA + b"/" + split + b"/" + name
            os.makedirs(place)
            for number, image in enumerate(IMAGES):
                noise = np.random.default_rng(number).integers(60 * label, 255, (8, 8), dtype=np.uint8)
                with open(place + b"/" + image, "wb") as file:
                    file.write(encode(Image.fromarray(noise)))
    (made / "tiny.yaml").write_text(CONFIG)
    return made


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A completed run on the class folders, in a folder whose name is no UTF-8 and would be rich's markup."""
    path = folder / os.fsdecode(NAME)
    assert train([*settings(folder), f"run_dir={path}"]) == 0
    return path


def settings(folder: Path) -> list[str]:
    """The run's command line, but for its folder."""
    return [str(folder / "tiny.yaml"), f"data.root={folder / os.fsdecode(DATA)}"]


def column(path: Path, number: int) -> list[bytes]:
    """A column of a CSV file, as the bytes of names, without its heading."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        heading, *rows = csv.reader(file)
    assert {len(row) for row in rows} == {len(heading)}
    return [os.fsencode(row[number]) for row in rows]


def test_a_run_on_class_folders_keeps_every_name(folder, run):
    assert set(column(run / "predictions.csv", 0)) == KEYS
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert {os.fsencode(key) for record in ledger for key in record["keys"]} == KEYS
    assert os.fsencode(read_card(run / "card.json").data) == DATA + b"/val"
    assert os.fsencode(load_config(run / "config.yaml").data.folder) == os.fsencode(folder) + b"/" + DATA


def test_an_evaluation_keeps_every_name(run, tmp_path, capsys):
    assert evaluate(["top1", str(run), "-o", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert os.fsencode(row["name"]) == NAME
    stem = tmp_path / run.name
    assert Path(f"{stem}.predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert column(Path(f"{stem}.classes.csv"), 1) == CLASSES
    assert read_card(Path(f"{stem}.card.json")).set_digest == read_card(run / "card.json").set_digest


def test_shards_keep_every_name(folder, tmp_path, capsys):
    source = folder / os.fsdecode(DATA)
    assert vitreuse(["shards", "build", str(source), str(tmp_path / "shards"), "--workers", "1", "--json"]) == 0
    assert [split["num_samples"] for split in json.loads(capsys.readouterr().out)["folders"]] == [len(KEYS)] * 2
    index = load_index(tmp_path / "shards/val")
    assert [os.fsencode(name) for name in index.class_names] == CLASSES
    keys = {key.removesuffix(b".png") for key in KEYS}
    assert set(index.records["key"].tolist()) == keys
    with tarfile.open(next((tmp_path / "shards/val").glob("*.tar"))) as tar:
        assert {os.fsencode(name).rpartition(b".")[0] for name in tar.getnames()} == keys
    assert train([str(folder / "tiny.yaml"), f"data.root={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"]) == 0
    assert set(column(tmp_path / "run/predictions.csv", 0)) == keys


def test_a_tar_keeps_every_name(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / os.fsdecode(DATA) / "val", "images")
    assert vitreuse(["shards", "build", str(tmp_path / "images.tar"), str(tmp_path / "val"), "--workers", "1"]) == 0
    index = load_index(tmp_path / "val")
    assert [os.fsencode(name) for name in index.class_names] == CLASSES
    assert set(index.records["key"].tolist()) == {key.removesuffix(b".png") for key in KEYS}


def test_a_run_of_any_name_is_compared_reported_and_exported(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "other")
    runs, name = [str(tmp_path / "other"), str(run)], os.fsencode(run.name)
    card = json.loads((run / "card.json").read_text())
    (tmp_path / "other/card.json").write_text(json.dumps({**card, "name": "other"}))
    assert evaluate(["compare", *runs, "--no-speed", "-o", str(tmp_path / "table")]) == 0
    assert column(tmp_path / "table/results.csv", 0) == [b"other", name]
    assert SHOWN in (tmp_path / "table/results.md").read_text(encoding="utf-8")
    assert r"\textbackslash{}udcff" in (tmp_path / "table/results.tex").read_text(encoding="utf-8")
    assert (tmp_path / "table/intervals.png").stat().st_size
    assert evaluate(["report", *runs, "--no-speed", "-o", str(tmp_path / "page.html")]) == 0
    assert SHOWN in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert vitreuse(["export", str(run), "-o", str(tmp_path / "exported")]) == 0
    assert r"d\udcff/val" in (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    assert vitreuse(["similarity", str(run), "-o", str(tmp_path / "similarity"), "--images", "2"]) == 0
    assert SHOWN in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_shows_an_escape_for_what_it_lacks(run, encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    assert evaluate(["top1", str(run)]) == 0
    assert SHOWN.encode() in written.getvalue()


def test_the_doctor_shows_a_name_that_is_no_text(folder, run, capsys):
    assert train([*settings(folder), f"run_dir={run}", "--doctor"]) == 0
    assert f"{SHOWN} holds this run completed" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--doctor"]])
def test_a_class_name_that_no_file_can_hold_is_refused_before_the_first_step(folder, tmp_path, capsys, option):
    samples = [EncodedSample(str(label), encode(Image.new("L", (8, 8))), "png", label) for label in range(3)]
    for split in ("train", "val"):
        write_shards(samples, tmp_path / split, ("a", "b", "c"), 3)
    header = json.loads((tmp_path / "val/index.json").read_text())
    (tmp_path / "val/index.json").write_text(json.dumps({**header, "class_names": ["a", "\ud800", "c"]}))
    assert train([str(folder / "tiny.yaml"), f"data.root={tmp_path}", f"run_dir={tmp_path / 'run'}", *option]) == 2
    told = capsys.readouterr().err
    assert r"val/index.json names class 1 '\ud800', which is no text: correct it there" in told
    assert told.count("\n") == 1 and not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"names class 0 '\\udfff'"):
        build_index(tmp_path / "train", ["\udfff", "b", "c"])


def test_a_sentence_keeps_the_end_of_a_line_in_a_name(tmp_path):
    """In this process, and after it has come from a DataLoader's worker as the end of a traceback."""
    error = DecodeError("image a\nb.png is no whole image.")
    assert str(error) == r"image a\nb.png is no whole image."
    told = f"Caught DecodeError in DataLoader worker process 0.\nOriginal Traceback:\n  File\n{DecodeError.__module__}."
    assert str(DecodeError(f"{told}DecodeError: {error}\n")) == str(error)


def test_what_ends_a_line_of_csv_stands_in_quotes():
    lines = [["a\rb", "c\nd"], ['"', ","], ["", "e"]]
    assert csv_text(lines) == '"a\rb","c\nd"\n"""",","\n,e\n'
    assert list(csv.reader(io.StringIO(csv_text(lines), newline=""))) == lines


def test_a_label_of_any_length_names_a_file():
    assert stem_of("runs/a", None, "nest/val", "32px") == "runs_a.nest-val.32px"
    long = "vit, " + "exact-1/320 " * 24
    stems = {stem_of(long, "knn"), stem_of(long + "x", "knn"), stem_of("\u00e4\udcff" * 99)}
    assert len(stems) == 3 and all(len(to_bytes(stem)) < 140 for stem in stems)


def test_text_for_files_and_pictures():
    assert to_bytes("a\udcffé") == b"a\xff\xc3\xa9"
    assert is_name("\udcff") and not is_name("\ud800")
    assert printable("a\udcffé") == r"a\udcffé" and printable("é±", "ascii") == r"\xe9\xb1"
    assert for_picture("$x$") == r"\$x\$"


def test_what_a_search_found_is_drawn_under_any_name():
    row = {"plan": "exact none", "share": 0.5, "damage": 1.0, "distance": 2.0}
    found = {"name": "ru\udcffn$^$", "front": [row], "audited": {"lazy": row}, "chosen": row, "budget": 0.5}
    assert front_plot({**found, "metric": "macs"}).startswith(b"\x89PNG")


def test_a_table_of_speeds_keeps_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.throughput.measure", lambda *_: [{"name": "ru\udcffn", "speedup": 1.0}])
    assert evaluate(["throughput", "vit_tiny_patch16_224", "--csv", str(tmp_path / "x.csv"), "--json"]) == 0
    assert (tmp_path / "x.csv").read_bytes().splitlines() == [b"name,speedup", b"ru\xffn,1.0"]


def test_a_tracker_is_told_a_name_that_is_text(run, monkeypatch):
    seen = {}
    monkeypatch.setattr("wandb.init", lambda **given: seen.update(given))
    Wandb(Start(run, 0, load_config(run / "config.yaml")))
    assert seen["name"] == SHOWN


def test_configs_of_controls_are_text(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "_yaml", lambda path, base, result: f"base: {base}\n")
    controls._write(tmp_path, Path("ru\udcffn.yaml"), {"rows": [{"file": "x.yaml"}, {"file": None}]})
    assert (tmp_path / "x.yaml").read_text() == "base: ru\\udcffn.yaml\n"
