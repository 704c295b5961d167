"""`python -m eval compare`: what it shows of cards that were made up, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main
from eval.card import make_card, read_card
from eval.predictions import Predictions
from vitreuse.config import load_config

NUM_IMAGES = 400
EASE = np.random.default_rng(0).random(NUM_IMAGES)
COLOURS = {"worse": (0xD5, 0x5E, 0x00), "better": (0x00, 0x72, 0xB2)}


def write_card(folder: Path, name: str, seed: int, accuracy: float, *overrides: str, num_images=NUM_IMAGES) -> str:
    """A card of a digits experiment that is right on the easy images and, by its seed, on some of the others."""
    config = load_config(f"configs/digits/{name}.yaml", [f"train.seed={seed}", *overrides])
    labels = np.arange(num_images) % 10
    luck = np.random.default_rng([seed, len(name)]).normal(0, 0.02, NUM_IMAGES)
    is_right = (EASE + luck < accuracy)[:num_images]
    classes = np.stack([(labels + shift + ~is_right) % 10 for shift in range(5)], axis=1)
    keys = tuple(map(str, range(num_images)))
    predictions = Predictions(keys, labels, classes, np.full(num_images, 0.9, np.float32))
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-seed{seed}.json"
    make_card(path.stem, config.model, "digits/val", predictions, {}, config).write(path)
    return str(path)


@pytest.fixture
def cards(tmp_path) -> Path:
    """Three seeds of three models: the second as good as the first, the third eight points worse."""
    for name, accuracy in (("exact", 0.95), ("lazy", 0.95), ("lowrank", 0.87)):
        for seed in range(3):
            write_card(tmp_path / "cards", name, seed, accuracy)
    return tmp_path / "cards"


def compared(capsys, *arguments: str) -> dict:
    assert main(["compare", *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    assert main(["compare", *arguments, "--no-speed"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    return told.err


def test_seeds_are_one_row_with_the_words_for_its_difference(cards, capsys):
    rows = compared(capsys, str(cards), "--no-speed")["rows"]
    assert [(row["name"], row["num_seeds"], row["verdict"]) for row in rows] == [
        ("exact", 3, "baseline"), ("lazy", 3, "within noise"), ("lowrank", 3, "worse"),
    ]  # fmt: skip
    top1 = [json.loads(path.read_text())["top1"] for path in sorted(cards.glob("lowrank*"))]
    assert rows[2]["top1"] == pytest.approx(np.mean(top1)) and rows[2]["top1_sd"] == pytest.approx(np.std(top1, ddof=1))
    assert rows[2]["low"] < rows[2]["difference"] < rows[2]["high"] < 0
    assert rows[2]["difference"] == pytest.approx(rows[2]["top1"] - rows[0]["top1"])
    assert rows[1]["plan"] == "(exact reuse*2)*2" and rows[0]["images_per_second"] is None


def test_seeds_are_one_row_whatever_their_folders_are_called(tmp_path, capsys):
    for seed, name in enumerate(("first", "second", "third")):
        path = Path(write_card(tmp_path, "lazy", seed, 0.95))
        (tmp_path / f"{name}.json").write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
        path.unlink()
    base = write_card(tmp_path / "base", "exact", 0, 0.95)
    rows = compared(capsys, base, str(tmp_path), "--no-speed")["rows"]
    assert [(row["name"], row["num_seeds"]) for row in rows] == [("exact", 1), ("first", 3)]


def test_a_run_again_under_another_name_is_another_row(tmp_path, capsys):
    path = Path(write_card(tmp_path, "lazy", 0, 0.95))
    again = tmp_path / "again.json"
    again.write_text(json.dumps({**json.loads(path.read_text()), "name": "again"}))
    rows = compared(capsys, str(path), str(again), "--no-speed")["rows"]
    assert [(row["name"], row["num_seeds"]) for row in rows] == [("lazy", 1), ("again", 1)]


def test_any_row_may_be_the_baseline(cards, capsys):
    rows = compared(capsys, str(cards), "--no-speed", "--baseline", "lowrank")["rows"]
    assert [row["verdict"] for row in rows] == ["better", "better", "baseline"]
    assert "--baseline lazi is none of the runs' names: exact, lazy, lowrank." in refusal(
        capsys, str(cards), "--baseline", "lazi"
    )


def test_the_table_is_written_in_every_form(cards, tmp_path, capsys):
    out = tmp_path / "out"
    result = compared(capsys, str(cards), "-o", str(out), "--batch-size", "2", "--repeats", "2")
    assert all(row["images_per_second"] > 0 and row["peak_memory_mib"] > 0 for row in result["rows"])
    table = (out / "results.md").read_text()
    assert table.splitlines()[2].startswith("| exact | exact*6 | 0.30 | 11.62 | ")
    assert table.splitlines()[4].endswith("| <0.001 | worse |")
    told = " ".join(table.split())
    assert "Difference to exact in points with its 95 % interval, from 10,000 paired resamples" in told
    assert "after Holm for 2 comparisons" in told and "batch 2" in told and "torch" in told
    lines = (out / "results.csv").read_text().splitlines()
    assert lines[0].split(",") == list(result["rows"][0]) and len(lines) == 4
    assert r"lowrank & lowrank:16*6 & 0.31" in (out / "results.tex").read_text()
    with Image.open(out / "scatter.png") as image:
        assert image.size == (1350, 900)
    with Image.open(out / "intervals.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    is_drawn = {name: (pixels == colour).all(1).any() for name, colour in COLOURS.items()}
    assert is_drawn == {"worse": True, "better": False}


def test_one_seed_claims_nothing_of_others(tmp_path, capsys):
    cards = [write_card(tmp_path, name, 0, 0.95) for name in ("exact", "lazy")]
    assert main(["compare", *cards, "--no-speed"]) == 0
    assert "One seed each: how other seeds would do is unknown" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seeds, said", [
    ({"exact": 1, "lazy": 1}, ["One seed each: how other seeds"]),
    ({"exact": 2, "lazy": 1}, ["variance between seeds. p", "One seed (lazy) tells no", "that of exact is taken"]),
    ({"exact": 1, "lazy": 2}, ["One seed (exact) tells no variance", "that of the other model is taken"]),
    ({"exact": 1, "lazy": 2, "reuse": 1}, ["One seed (exact) tells", "One seed each of exact and reuse: how"]),
])  # fmt: skip
def test_what_one_seed_leaves_unknown_is_said_of_each_model(tmp_path, capsys, seeds, said):
    cards = [write_card(tmp_path, name, seed, 0.95) for name, count in seeds.items() for seed in range(count)]
    assert main(["compare", *cards, "--no-speed"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(sentence in told for sentence in said), told
    assert ("variance between seeds. p" in told) == (max(seeds.values()) > 1)


def test_images_that_were_counted_otherwise_are_not_compared(tmp_path, capsys):
    plain, among = (Path(write_card(tmp_path, name, 0, 0.95)) for name in ("exact", "lazy"))
    replace(read_card(among), facts={"set": "ImageNet-A, among its 200 classes"}).write(among)
    told = refusal(capsys, str(plain), str(among))
    assert "two ways, exact as plain images and lazy as ImageNet-A, among its 200 classes: measure both" in told


def test_recipes_are_not_mixed_in_silence(cards, capsys):
    write_card(cards, "reuse", 0, 0.95, "train.epochs=9", "train.optimizer.lr=0.02")
    told = refusal(capsys, str(cards))
    assert "reuse (train.epochs 25 -> 9; train.optimizer.lr 0.01 -> 0.02)" in told and "--mix-recipes" in told
    assert main(["compare", str(cards), "--no-speed", "--mix-recipes"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Another recipe than that of exact: reuse (train.epochs 25 -> 9; train.optimizer.lr 0.01 -> 0.02)." in said


def test_a_model_of_another_size_is_said(tmp_path, capsys):
    narrow = write_card(tmp_path, "lazy", 0, 0.95, "model.keywords.mlp_ratio=2")
    cards = [write_card(tmp_path, "exact", 0, 0.95), narrow]
    assert main(["compare", *cards, "--no-speed"]) == 0
    assert "Another model than that of exact: lazy (mlp_ratio None -> 2)." in " ".join(capsys.readouterr().out.split())


def test_cards_that_cannot_be_compared_are_refused(cards, tmp_path, capsys):
    fewer = write_card(tmp_path / "fewer", "mixspan", 0, 0.95, num_images=300)
    assert "exact was measured on 400 images of digits/val and mixspan on 300 others" in refusal(
        capsys, str(cards), fewer
    )
    again = write_card(tmp_path / "again", "lazy", 1, 0.9)
    assert "2 runs of lazy have the seed 1: leave all but one of them out." in refusal(capsys, str(cards), again)
    changed = write_card(tmp_path / "changed", "lazy", 7, 0.9, "train.epochs=9")
    assert "not trained by the recipe of exact: lazy (2) (train.epochs 25 -> 9)" in refusal(capsys, str(cards), changed)
    assert "--batch-size and --repeats have no effect under --no-speed" in refusal(capsys, str(cards), "--repeats", "3")
    assert "is neither a run folder nor one of run cards" in refusal(capsys, str(tmp_path / "again" / ".."))
