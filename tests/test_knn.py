"""Accuracy of features by nearest neighbours: against a loop, scikit-learn, and what ties and ranks must not change."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from eval import knn
from eval.__main__ import main
from eval.knn import Features, head_input, knn_votes, predict
from vitreuse.config import load_config, to_yaml
from vitreuse.files.hub import WEIGHTS
from vitreuse.files.networks import resolve_targets
from vitreuse.model.preprocessing import evaluation_transform

CONFIG = """
model:
  name: deit_reuse_tiny_patch16_224
  plan: exact reuse*2
  keywords:
    {{img_size: 12, patch_size: 4, in_chans: 1, num_classes: {num_classes}, embed_dim: 8, depth: 3, num_heads: 2}}
data: {{root: {root}}}
train: {{epochs: 1, global_batch_size: 2, optimizer: {{lr: 0.1}}}}
eval: {{crop_pct: 1.0}}
"""
SWAPPED = ("--train-split", "val", "--split", "train", "--neighbours", "9")
CLASSES = ("ant", "bee", "cat", "dog", "elk")
NUM_MEMORY = 7  # images of each class
M, Q, C = 31, 7, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_votes(memory, labels, queries, num_classes, num_neighbours, temperature):
    """The definition, a number at a time."""
    votes = np.zeros((len(queries), num_classes))
    for row, query in enumerate(queries.double().tolist()):
        found = []
        for number, known in enumerate(memory.double().tolist()):
            product = math.fsum(a * b for a, b in zip(query, known, strict=True))
            found.append((-product / math.hypot(*query) / math.hypot(*known), number))
        for negative, number in sorted(found)[:num_neighbours]:
            votes[row, labels[number]] += math.exp(-negative / temperature)
    return votes


def shares(votes) -> np.ndarray:
    votes = np.asarray(votes)
    return votes / votes.sum(1, keepdims=True)


@pytest.mark.parametrize(("num_neighbours", "temperature"), [(1, 0.07), (11, 0.07), (31, 0.5)])
def test_votes_are_those_of_a_loop_and_of_scikit_learn(num_neighbours, temperature):
    memory, queries, labels = 3 * drawn(M, C), drawn(Q, C, seed=1), drawn(M, seed=2).gt(0) * 2  # none of class 1
    found = knn_votes(memory, labels, queries, 3, num_neighbours, temperature)
    naive = naive_votes(memory, labels, queries, 3, num_neighbours, temperature)
    np.testing.assert_allclose(shares(found), shares(naive), rtol=1e-4)

    def weights(distances):
        return np.exp((1 - distances) / temperature)

    peer: Any = KNeighborsClassifier(num_neighbours, weights=weights, metric="cosine", algorithm="brute")
    peer.fit(memory.double(), labels)
    np.testing.assert_allclose(shares(found)[:, ::2], peer.predict_proba(queries.double()), rtol=1e-4)
    assert (found[:, 1] == 0).all() and (found.sum(1) >= 1).all()


def test_a_part_of_the_queries_at_a_time_is_all_of_them(monkeypatch):
    arguments = drawn(M, C), torch.arange(M) % 3, drawn(Q, C, seed=1), 3, 11
    whole = knn_votes(*arguments)
    monkeypatch.setattr(knn, "MAX_SIMILARITIES", 2 * M)
    torch.testing.assert_close(knn_votes(*arguments), whole, rtol=1e-5, atol=0)


def test_as_cold_as_can_be_the_nearest_neighbour_decides():
    votes = knn_votes(drawn(M, C), torch.arange(M) % 3, drawn(Q, C, seed=1), 3, 11, temperature=1e-5)
    nearest = torch.cosine_similarity(drawn(Q, C, seed=1)[:, None], drawn(M, C), dim=2).argmax(1)
    assert votes.isfinite().all() and torch.equal(votes.argmax(1), nearest % 3)


@pytest.mark.parametrize(("num_queries", "num_channels"), [(1, 67), (2, 67), (13, 7)])
def test_of_equally_similar_neighbours_the_first_vote(num_queries, num_channels):
    """Copies of three features, of other lengths, all over the memory; a product in float32 would tell them apart."""
    kinds = drawn(3, num_channels)
    of_kind = drawn(251, seed=3).mul(100).long() % 3
    memory, queries = kinds[of_kind] * 2 ** (torch.arange(251) % 3)[:, None], drawn(num_queries, num_channels, seed=1)
    votes = knn_votes(memory, torch.arange(251), queries, 251, 101)
    order = torch.cosine_similarity(queries[:, None], kinds, dim=2).argsort(descending=True)
    for found, preferred in zip(votes, order, strict=True):
        expected = torch.cat([(of_kind == kind).nonzero()[:, 0] for kind in preferred])[:101]
        assert found.nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_of_classes_with_equal_votes_the_lower_is_the_answer():
    """Each class has the same features in an order of its own."""
    memory = torch.cat([drawn(M, C)[drawn(M, seed=seed).argsort()] for seed in (1, 2, 3)])
    labels = torch.tensor([4, 2, 3]).repeat_interleave(M)
    votes = knn_votes(memory, labels, drawn(101, C, seed=4), 6, 3 * M)
    assert torch.equal(votes[:, 2], votes[:, 4]) and torch.equal(votes[:, 2], votes[:, 3])
    queries = Features(drawn(101, C, seed=4), torch.full((101,), 3), [str(number) for number in range(101)])
    found = predict(Features(memory, labels, [""] * len(labels)), queries, 6, 3 * M)
    assert (found.classes == [[2, 3, 4, -1, -1]]).all()  # no neighbour has one of the others
    assert (found.top1, found.top5) == (0, 100)
    assert found.probabilities == pytest.approx(np.full(101, 1 / 3))


def write_images(folder: Path, split: str, num_images: int, classes=CLASSES) -> None:
    """Images of a bright bar, at a place of its own in each class, and a little noise."""
    generator = np.random.default_rng(len(split))
    for name in classes:
        (folder / split / name).mkdir(parents=True)
        for number in range(num_images):
            pixels = generator.integers(0, 20, (12, 12), dtype=np.uint8)
            bar = slice(2 * CLASSES.index(name), 2 * CLASSES.index(name) + 3)
            pixels[bar] += 200
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


@pytest.fixture
def run(tmp_path):
    """A run folder of a tiny model without a head, and its data; two classes of the memory are not in val."""
    write_images(tmp_path / "data", "train", NUM_MEMORY)
    write_images(tmp_path / "data", "val", 3, CLASSES[1:4])
    return make_run(tmp_path, "run")


def make_run(folder: Path, name: str, num_classes: int = 0) -> Path:
    config_path, path = folder / f"{name}.yaml", folder / name
    config_path.write_text(CONFIG.format(root=folder / "data", num_classes=num_classes))
    config = load_config(config_path)
    path.mkdir()
    torch.manual_seed(0)
    save_file(config.model.create().state_dict(), path / WEIGHTS)
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "run.json").write_text(json.dumps({"status": "completed"}))
    return path


def rows_of(capsys, *arguments: object) -> list[dict]:
    """The rows that the command prints."""
    assert main(["knn", *map(str, arguments), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def by_hand(model, folder: Path, transform) -> torch.Tensor:
    """The features of all images of a split."""
    paths = sorted(folder.glob("*/*.png"))
    images = torch.stack([transform(Image.open(path).convert("L")) for path in paths])
    with torch.inference_mode():
        return model.eval()(images)


def test_a_run_without_a_head_is_told_by_its_output(run, tmp_path, capsys):
    (row,) = rows_of(capsys, run, "--neighbours", 23, "--temperature", 0.11, "--batch-size", 4, "-o", tmp_path / "out")
    model = resolve_targets([str(run)])[0].load()
    transform = evaluation_transform(model, 1.0)
    memory, queries = (by_hand(model, tmp_path / "data" / split, transform) for split in ("train", "val"))
    votes = naive_votes(memory, np.arange(len(memory)) // NUM_MEMORY, queries, 5, 23, 0.11)
    labels = 1 + np.arange(9) // 3  # as train has the classes
    with (tmp_path / "out" / "run.knn.predictions.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert [int(line["label"]) for line in lines] == labels.tolist()
    assert [int(line["top5"].split()[0]) for line in lines] == votes.argmax(1).tolist()
    assert [float(line["probability"]) for line in lines] == pytest.approx(shares(votes).max(1).tolist(), abs=1e-5)
    counts = {key: row[key] for key in ("name", "num_memory", "n", "num_neighbours", "temperature")}
    assert counts == {"name": "run", "num_memory": 35, "n": 9, "num_neighbours": 23, "temperature": 0.11}
    assert row["top1"] == pytest.approx(100 * (votes.argmax(1) == labels).mean()) and row["top1"] > 60
    assert row["image_size_px"] == [12, 12] and row["plan"] == "exact reuse*2"
    assert "bee,3," in (tmp_path / "out" / "run.knn.classes.csv").read_text()
    assert main(["knn", str(run), "--neighbours", "5", "--device", "cpu"]) == 0
    assert "which the k nearest vote by exp(cosine / 0.07)." in " ".join(capsys.readouterr().out.split())


def test_a_head_is_not_asked_and_few_classes_have_no_top5(run, tmp_path, capsys):
    other = make_run(tmp_path, "other", num_classes=5)
    save_file({**load_file(other / WEIGHTS), **load_file(run / WEIGHTS)}, other / WEIGHTS)
    headless, with_head = rows_of(capsys, run, other, "--neighbours", 5)
    assert {**with_head, "name": "run"} == headless and headless["top5"] is not None
    write_images(tmp_path / "few", "train", 5, CLASSES[:3])
    write_images(tmp_path / "few", "val", 2, CLASSES[:3])
    assert rows_of(capsys, other, "--data", tmp_path / "few", "--neighbours", 5)[0]["top5"] is None


def test_splits_and_settings_are_those_that_are_given(run, tmp_path, capsys):
    given = ("--train-split", "val", "--split", "mine", "--neighbours", 1, "--temperature", "0.5")
    write_images(tmp_path / "data", "mine", 1, CLASSES[1:3])
    (row,) = rows_of(capsys, run, *given)
    assert [row[key] for key in ("num_memory", "n", "num_neighbours", "temperature")] == [9, 2, 1, 0.5]


def test_plans_and_sizes_of_published_weights(run, tmp_path, monkeypatch, capsys):
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    monkeypatch.setattr("vitreuse.files.networks.pretrained_weights", {name: timm.create_model(name).state_dict()}.get)
    options = ("--data", tmp_path / "data", "--image-size", 32, 48, "--neighbours", 5)
    assert main(["knn", name, "--pretrained", *map(str, options), "--json", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    plain = json.loads(printed.out)["rows"]
    assert f"{name}: resampled to 2 x 2 from 14 x 14 patches" in printed.err
    plans = ("exact*12", "exact-1 exact*11")
    exact, *merged = (rows_of(capsys, name, "--pretrained", "--plan", plan, *options) for plan in plans)
    assert [row["image_size_px"] for row in plain] == [[32, 32], [48, 48]]
    for found, expected in zip(exact, plain, strict=True):
        assert found["plan"] == "exact*12" and found["name"] == f"{name}, exact*12"
        assert {**found, "name": name, "plan": None} == expected
    assert [row["n"] for row in merged[0]] == [9, 9]


def test_a_run_keeps_its_weights_and_data_under_another_plan(run, capsys):
    own, planned = rows_of(capsys, run), rows_of(capsys, run, "--plan", "exact reuse*2", "exact reuse reuse-1")
    assert {**planned[0], "name": "run"} == own[0]
    assert (planned[1]["plan"], planned[1]["data"]) == ("exact reuse reuse-1", own[0]["data"])


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k", "deit_tiny_distilled_patch16_224"])
def test_features_are_what_the_head_takes(name):
    model: Any = timm.create_model(name).eval()
    images = drawn(2, 3, 160, 160) if name.startswith("test") else drawn(2, 3, 224, 224)
    with torch.inference_mode():
        found = head_input(model, images)
        expected = model(images)
        heads = [model.head, model.head_dist] if hasattr(model, "head_dist") else [model.get_classifier()]
        if len(heads) == 1:
            torch.testing.assert_close(heads[0](found), expected)
        model.reset_classifier(0)
        torch.testing.assert_close(found, model(images))


def test_a_resnet_has_neighbours_too(run, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pt")
    options = ("--checkpoint", tmp_path / "weights.pt", "--data", tmp_path / "data")
    (row,) = rows_of(capsys, "test_resnet", *options)
    assert (row["plan"], row["image_size_px"], row["n"]) == (None, [160, 160], 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}", "--neighbours", "36"], "36 is more than the 35 images of {data}/train: give at most 35, or more"),
        (["{run}", "--split", "train"], "{data}/train is both memory and what is classified"),
        (["{run}", *SWAPPED], "'ant', 'elk', not a class of {data}/val ('bee'"),
        (["{run}", "--temperature", "0"], "argument --temperature: 0 is not a number above 0"),
        (["{run}", "--temperature", "warm"], "argument --temperature: warm is not a number above 0"),
        (["{run}", "--split", "test"], "no folder {data}/test"),
        (["{run}", "--plan", "exact reuse none"], "the plan has no use for its blocks.2.attn.proj.bias"),
        (["{run}", "--plan", "exact*3"], "does not fit deit_reuse_tiny_patch16_224: the checkpoint has no blocks.1"),
        (["vit_tiny_patch16_224", "--data", "{data}"], "vit_tiny_patch16_224 has no weights: give the run folder"),
        (["vit_tiny_patch16_224", "--pretrained"], "which knows no data: give --data DIR."),
        (["{tmp}/broken"], "broken gives 35 of 35 images features that are not finite"),
        (["{tmp}/unpooled"], "gives its head 10 x 8 numbers of an image, not one row: change its keywords, such as"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, run, tmp_path, capsys):
    weights = make_run(tmp_path, "broken") / WEIGHTS
    save_file({**load_file(weights), "norm.bias": torch.full((8,), math.nan)}, weights)
    config = make_run(tmp_path, "unpooled") / "config.yaml"
    config.write_text(config.read_text().replace("num_classes: 0", "num_classes: 0\n    global_pool: ''"))
    places = {"tmp": tmp_path, "run": run, "data": tmp_path / "data"}
    try:
        code = main(["knn", *(argument.format(**places) for argument in arguments), "--device", "cpu"])
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    told = [line for line in output.err.splitlines() if line.startswith("python -m eval")]
    assert (code, output.out, len(told)) == (2, "", 1)
    assert sentence.format(**places) in told[0]
