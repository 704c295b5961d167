"""Classes by their names: whatever starts from a run, or evaluates it, finds its classes again or says what differs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from data.tiny_split import encode
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

from eval.__main__ import main as evaluate
from eval.labelled import Share
from eval.sets import SETS, Among, imagenet_order, named_set
from eval.top1 import evaluate as predictions_of
from train.__main__ import main as train
from train.distill import create_teacher
from train.weights import known_rows
from vitreuse.__main__ import main as vitreuse
from vitreuse.compress.convert import convert
from vitreuse.compress.fidelity import agreement
from vitreuse.config import ConfigError, DistillConfig, ModelConfig
from vitreuse.data import EncodedSample, FolderDataset, write_shards
from vitreuse.data.labels import are_numbers, places
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import resolve_targets
from vitreuse.model.class_names import has_classes, name_classes, names_of, read_names
from vitreuse.model.copies import exact_copy
from vitreuse.model.preprocessing import image_settings

TOWER = {"embed_dim": 24, "depth": 2, "num_heads": 3}  # the shape of a small CLIP tower
GREYS = {"cat": 20, "dog": 120, "emu": 220}  # what an image of each class looks like
OTHER_ORDER = ("emu", "cat", "dog")
CONFIG = """
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}
data: {root: data, num_workers: 0, cache_images: true}
train: {epochs: 20, global_batch_size: 12, device: cpu, optimizer: {lr: 1e-2}}
eval: {crop_pct: 1.0, every_epochs: 20}
"""
FROZEN = ("train.epochs=1", "train.optimizer.lr=1e-12", "train.optimizer.weight_decay=0")


def picture(name: str, number: int) -> bytes:
    return encode(Image.new("L", (8, 8), GREYS[name] + number))


def write_folders(folder: Path, classes: dict[str, str], num_images: int = 4) -> None:
    """Class folders by name, each with images of a class of GREYS."""
    for name, looks in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(num_images):
            (folder / name / f"{number}.png").write_bytes(picture(looks, number))


def write_split(folder: Path, names: tuple[str, ...], labels: dict[int, str], num_images: int = 4) -> None:
    """Shards under names, with images that look like a class for each of some labels."""
    samples = (
        EncodedSample(f"{looks}-{number}", picture(looks, number), "png", label)
        for label, looks in labels.items()
        for number in range(num_images)
    )
    write_shards(samples, folder, names, 100)


def write_shuffled(folder: Path) -> None:
    """The data of the run as shards that number the classes in another order."""
    for split in ("train", "val"):
        write_split(folder / split, OTHER_ORDER, dict(enumerate(OTHER_ORDER)))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set of class folders, and the config of a run on it."""
    folder = tmp_path_factory.mktemp("classes")
    for split in ("train", "val"):
        write_folders(folder / "data" / split, {name: name for name in GREYS})
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def run(root) -> Path:
    """A run that tells the three classes apart without a fault."""
    assert train(command(root, root / "data", root / "run")) == 0
    assert json.loads((root / "run/card.json").read_text())["top1"] == 100
    return root / "run"


def command(root: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return [str(root / "tiny.yaml"), f"data.root={data}", f"run_dir={run_dir}", *more]


def without_names(run: Path, folder: Path) -> Path:
    """A run as it was left before names were kept."""
    shutil.copytree(run, folder)
    with safe_open(run / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    del metadata["label_names"]
    save_file(load_file(run / "model.safetensors"), folder / "model.safetensors", metadata)
    for name in ("run.json", "card.json"):
        record = json.loads((run / name).read_text())
        del record["class_names"]
        (folder / name).write_text(json.dumps(record))
    return folder


def top1(capsys, *arguments: object) -> dict:
    assert evaluate(["top1", *map(str, arguments), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    return row


def refused(capsys, main, arguments: list[str]) -> str:
    """The one sentence of a refusal."""
    capsys.readouterr()
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


# ---- where names are kept


def test_names_are_kept_with_the_weights(run):
    names = tuple(GREYS)
    states = sorted((run / "checkpoints").glob("step-*/state.pt"))
    assert states and all(read_names(path) == names for path in (run / "model.safetensors", *states))
    record, card = (json.loads((run / name).read_text()) for name in ("run.json", "card.json"))
    assert record["class_names"] == card["class_names"] == [*names]
    (target,) = resolve_targets([str(run)])
    assert names_of(target.load()) == names


def test_a_file_without_names_has_none(run, tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pth")
    (tmp_path / "y.safetensors").write_bytes(b"no weights")
    for path in ("x.pth", "y.safetensors", "none.pth"):
        assert read_names(tmp_path / path) is None
    save_file({"x": torch.zeros(1)}, tmp_path / "z.safetensors", {"label_names": json.dumps([1, 2])})
    assert read_names(tmp_path / "z.safetensors") is None


def test_converted_and_exported_models_carry_the_names(run, tmp_path):
    assert vitreuse(["convert", str(run), "--plan", "exact reuse:1", "-o", str(tmp_path / "x")]) == 2  # not exact
    plan = ["train.epochs=1", "model.plan=exact*2"]
    assert train(command(run.parent, run.parent / "data", tmp_path / "exact", *plan)) == 0
    assert vitreuse(["convert", str(tmp_path / "exact"), "--plan", "exact reuse", "-o", str(tmp_path / "made")]) == 0
    assert vitreuse(["export", str(tmp_path / "made"), "-o", str(tmp_path / "hub")]) == 0
    for folder in ("made", "hub"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["label_names"] == [*GREYS] and not config["pretrained_cfg"].get("label_names")
        assert read_names(tmp_path / folder / "model.safetensors") == tuple(GREYS)
        model = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        assert names_of(model) == tuple(GREYS)


def test_names_of_a_folder_that_timm_wrote_are_read(run, tmp_path):
    (target,) = resolve_targets([str(run)])
    save_for_hf(target.load(), tmp_path, {"label_names": [*GREYS]}, safe_serialization=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not file.metadata() or "label_names" not in file.metadata()
    assert read_names(tmp_path / "model.safetensors") == tuple(GREYS)


# ---- evaluating a run on other data


def test_classes_in_another_order_are_matched(run, tmp_path, capsys):
    write_shuffled(tmp_path / "data")
    row = top1(capsys, run, "--data", tmp_path / "data", "-o", tmp_path / "out")
    assert (row["top1"], row["n"]) == (100, 12)
    assert row["remark"] == "labels by the names of 3 of the model's 3 classes"
    lines = (tmp_path / "out/run.classes.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["0", "cat"], ["1", "dog"], ["2", "emu"]]
    assert evaluate(["top1", str(run), "--data", str(tmp_path / "data")]) == 0
    assert "run: labels by the names of 3 of the model's 3 classes" in capsys.readouterr().out


def test_classes_in_another_order_are_matched_for_a_run_that_is_not_finished(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    write_shuffled(tmp_path / "data")
    assert top1(capsys, tmp_path / "run", "--data", tmp_path / "data")["top1"] == 100


@pytest.mark.parametrize("name", GREYS)
def test_some_of_the_classes_are_enough(run, tmp_path, capsys, name):
    write_folders(tmp_path / "val", {name: name})
    assert top1(capsys, run, "--data", tmp_path)["top1"] == 100


def test_a_renamed_class_is_refused_and_may_go_by_number(run, tmp_path, capsys):
    write_folders(tmp_path / "val", {"cat": "cat", "dug": "dog", "emu": "emu"})
    told = refused(capsys, evaluate, ["top1", str(run), "--data", str(tmp_path)])
    assert "val has 'dug', not a class of run ('cat', 'dog', 'emu'), did you mean 'dog': rename them, or " in told
    row = top1(capsys, run, "--data", tmp_path, "--by-number")
    assert (row["top1"], row["remark"]) == (100, "labels by number")


def test_the_own_data_of_a_run_are_compared_too(run, tmp_path, capsys):
    shutil.copytree(run.parent / "data", tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(config.replace(str(run.parent / "data"), str(tmp_path / "data")))
    assert top1(capsys, tmp_path / "run") == {**top1(capsys, run), "data": str(tmp_path / "data/val")}
    os.rename(tmp_path / "data/val/cat", tmp_path / "data/val/zebra")
    assert "has 'zebra', not a class of run" in refused(capsys, evaluate, ["top1", str(tmp_path / "run")])


def test_shards_without_names_are_refused_until_they_have_some(run, tmp_path, capsys):
    write_split(tmp_path / "val", ("0", "1", "2"), dict(enumerate(OTHER_ORDER)))
    told = refused(capsys, evaluate, ["top1", str(run), "--data", str(tmp_path)])
    assert "val has '0', '1', '2', not a class of run" in told
    (tmp_path / "names.txt").write_text("emu\ncat\ndog\n")
    naming = ["shards", "index", str(tmp_path / "val"), "--workers", "1", "--class-names", str(tmp_path / "names.txt")]
    assert vitreuse(naming) == 0
    capsys.readouterr()
    assert top1(capsys, run, "--data", tmp_path)["top1"] == 100
    told = refused(capsys, vitreuse, [*naming[:-1], str(tmp_path / "none.txt")])
    assert "none.txt cannot be read (No such file" in told


def test_a_run_without_names_goes_by_number(run, tmp_path, capsys):
    old = without_names(run, tmp_path / "old")
    row = top1(capsys, old)
    assert (row["top1"], row["remark"]) == (100, None)
    write_folders(tmp_path / "data/val", {"a": "cat", "b": "dog", "c": "emu"})
    row = top1(capsys, old, "--data", tmp_path / "data")
    assert (row["top1"], row["remark"]) == (100, "labels by number")


def test_images_of_other_classes_have_no_top1_in_a_conversion(run, tmp_path, capsys):
    assert train(command(run.parent, run.parent / "data", tmp_path / "exact", "model.plan=exact*2")) == 0
    write_shuffled(tmp_path / "data")
    write_folders(tmp_path / "renamed", {"cat": "cat", "dug": "dog", "emu": "emu"})
    capsys.readouterr()

    def convert(images: Path) -> dict:
        options = ["--plan", "exact*2", "--data", str(images), "-o", str(tmp_path / f"made-{images.name}"), "--json"]
        assert vitreuse(["convert", str(tmp_path / "exact"), *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert convert(tmp_path / "data")["agreement"]["original_top1"] == 100
    result = convert(tmp_path / "renamed")
    assert result["agreement"]["original_top1"] is None and result["agreement"]["equal_top1"] == 100
    assert "renamed has 'dug', not a class of exact" in result["labels"]


def test_runs_on_images_of_other_classes_are_not_compared(run, tmp_path, capsys):
    """Equal keys and labels, which mean other things."""
    other = shutil.copytree(run, tmp_path / "other")
    card = json.loads((run / "card.json").read_text())
    (other / "card.json").write_text(json.dumps({**card, "name": "other", "class_names": ["ant", "bee", "cow"]}))
    told = refused(capsys, evaluate, ["compare", str(run), str(other), "--no-speed"])
    assert "the images of other are of classes 'ant', 'bee', 'cow', not a class of run" in told
    old = without_names(run, tmp_path / "old")
    (old / "card.json").write_text((old / "card.json").read_text().replace('"run"', '"old"'))
    assert evaluate(["compare", str(run), str(old), "--no-speed"]) == 0


def test_a_published_set_finds_its_classes_in_a_run(tmp_path):
    synsets = ImageNetInfo().label_names()
    names = [*reversed(synsets)]
    order = imagenet_order(names, "run")
    assert [names[number] for number in order] == synsets
    assert imagenet_order([*ImageNetInfo().label_descriptions()], "run") == [*range(1000)]
    assert imagenet_order([str(number) for number in range(1000)], "run") == [*range(1000)]
    with pytest.raises(ValueError, match="--set is for ImageNet's classes and run has 'a0', 'a1', 'a2' and 997 more"):
        imagenet_order([f"a{number}" for number in range(1000)], "run")

    class Reader(torch.nn.Module):
        """Says of a picture the class whose number it shows, by the run's numbers."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, numbers):
            return self.scale * torch.nn.functional.one_hot(999 - numbers, 1000)

    for number in (3, 200):
        (tmp_path / synsets[number]).mkdir()
        Image.new("L", (1, 1), number).save(tmp_path / synsets[number] / "0.png")
    test_set = named_set(SETS["sketch"], FolderDataset(tmp_path, "L"), whole=False)
    share = Share(test_set.images, transform=lambda image: torch.tensor(image.getpixel((0, 0))))
    found = predictions_of(Among(Reader(), test_set.classes, order), share)
    assert (found.labels.tolist(), found.top1) == ([3, 200], 100)


# ---- training: splits, starting from weights, teachers, going on


def test_validation_goes_by_the_names_of_the_training_classes(root, tmp_path, capsys):
    """torchvision would make emu label 1 of a val that lacks dog."""
    write_folders(tmp_path / "train", {name: name for name in GREYS})
    write_folders(tmp_path / "val", {"cat": "cat", "emu": "emu"})
    assert train(command(root, tmp_path, tmp_path / "run")) == 0
    assert "no image to validate with: top-1 says nothing of 1 class ('dog')." in capsys.readouterr().err
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert (card["top1"], card["n"]) == (100, 8)
    lines = (tmp_path / "run/predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in lines] == ["0"] * 4 + ["2"] * 4
    assert train(command(root, tmp_path, tmp_path / "run", "--doctor")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "classes warning no image to validate with: top-1 says nothing of 1 class ('dog')." in told


def test_a_class_that_training_does_not_know_is_refused(root, tmp_path, capsys):
    write_folders(tmp_path / "train", {name: name for name in GREYS})
    write_folders(tmp_path / "val", {"cat": "cat", "puppy": "dog", "emu": "emu"})
    told = refused(capsys, train, command(root, tmp_path, tmp_path / "run"))
    assert f"val has 'puppy', not a class of {tmp_path / 'train'} ('cat', 'dog', 'emu'): give both" in told
    assert not (tmp_path / "run").exists()


def test_a_class_that_is_only_validated_is_said(root, tmp_path, capsys):
    write_split(tmp_path / "train", tuple(GREYS), {0: "cat", 1: "dog"})
    write_split(tmp_path / "val", tuple(GREYS), {0: "cat", 2: "emu"})
    assert train(command(root, tmp_path, tmp_path / "run", *FROZEN)) == 0
    told = capsys.readouterr().err
    assert "no image to train on, only some to validate with: no model can learn 1 class ('emu')." in told
    assert "no image to validate with: top-1 says nothing of 1 class ('dog')." in told


@pytest.mark.parametrize("option", [[], ["--doctor"]])
def test_splits_that_count_from_0_and_from_1_are_refused(root, tmp_path, capsys, option):
    write_split(tmp_path / "train", ("0", "1", "2", "3"), dict(enumerate(GREYS, start=1)))
    write_split(tmp_path / "val", ("0", "1", "2"), dict(enumerate(GREYS)))
    told = refused(capsys, train, command(root, tmp_path, tmp_path / "run", "model.keywords.num_classes=4", *option))
    assert f"val has images of the label '0' and {tmp_path / 'train'} has none, and without names" in told
    assert not (tmp_path / "run").exists()


def test_splits_that_both_count_from_1_are_trained_and_it_is_said(root, tmp_path, capsys):
    for split in ("train", "val"):
        write_split(tmp_path / split, ("0", "1", "2", "3"), dict(enumerate(GREYS, start=1)))
    assert train(command(root, tmp_path, tmp_path / "run", "model.keywords.num_classes=4")) == 0
    assert "no image in either split: 1 class ('0')." in capsys.readouterr().err
    assert json.loads((tmp_path / "run/card.json").read_text())["top1"] == 100


@pytest.mark.parametrize("source", ["{run}", "{run}/model.safetensors", "{state}"])
def test_a_head_is_taken_by_the_names_of_its_classes(root, run, tmp_path, capsys, source):
    write_shuffled(tmp_path / "data")
    state = max((run / "checkpoints").glob("step-*/state.pt"))
    weights = f"model.weights={source.format(run=run, state=state)}"
    assert train(command(root, tmp_path / "data", tmp_path / "run", weights, *FROZEN)) == 0
    assert "; the head's rows of 3 classes by their names." in capsys.readouterr().err
    assert json.loads((tmp_path / "run/card.json").read_text())["top1"] == 100


def test_a_class_more_keeps_the_rows_of_the_others(root, run, tmp_path, capsys):
    for split in ("train", "val"):
        write_folders(tmp_path / "data" / split, {"ant": "emu", "cat": "cat", "emu": "emu"})
    assert train(command(root, tmp_path / "data", tmp_path / "run", f"model.weights={run}", *FROZEN)) == 0
    assert "; the head's rows of 2 classes by their names, new ones for 1 ('ant')." in capsys.readouterr().err
    before, after = (load_file(folder / "model.safetensors")["head.weight"] for folder in (run, tmp_path / "run"))
    torch.testing.assert_close(after[1:], before[[0, 2]], rtol=0, atol=1e-6)
    assert not torch.allclose(after[0], before[0], atol=1e-2) and not torch.allclose(after[0], before[1], atol=1e-2)


def test_a_head_of_other_classes_is_not_taken(root, run, tmp_path, capsys):
    """As many, which is how the head of another set was kept."""
    for split in ("train", "val"):
        write_folders(tmp_path / "data" / split, {"ant": "emu", "bee": "dog", "cow": "cat"})
    assert train(command(root, tmp_path / "data", tmp_path / "run", f"model.weights={run}", *FROZEN)) == 0
    told = capsys.readouterr().err
    assert "; a new head for 3 classes, 'ant', 'bee', 'cow' and not 'cat', 'dog', 'emu'." in told
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert not torch.allclose(after["head.weight"], before["head.weight"], atol=1e-2)
    torch.testing.assert_close(after["norm.weight"], before["norm.weight"], rtol=0, atol=1e-6)


def test_weights_without_names_go_by_number_and_it_is_said(root, run, tmp_path, capsys):
    old = without_names(run, tmp_path / "old")
    assert train(command(root, root / "data", tmp_path / "run", f"model.weights={old}", *FROZEN)) == 0
    assert "; its 3 classes, whose names are not known, go by number." in capsys.readouterr().err
    assert json.loads((tmp_path / "run/card.json").read_text())["top1"] == 100


@pytest.mark.parametrize(
    ("names", "class_names", "rows", "remark"),
    [
        (("a", "b"), ("a", "b"), [0, 1], ""),
        (("a", "b"), ("b", "a"), [1, 0], "the head's rows of 2 classes by their names"),
        (("a", "b", "c"), ("c", "a"), [2, 0], "the head's rows of 2 classes by their names"),
        (("0", "1"), ("0", "1"), [0, 1], "its classes are numbers, taken for those of the same number here"),
        (("0", "1", "2"), ("0", "1"), [None, None], "a new head for 2 classes, '0', '1' and not '0', '1', '2'"),
        (("0", "1"), ("1", "0"), [1, 0], "the head's rows of 2 classes by their names"),
        (("a", "b"), ("0", "1"), [None, None], "a new head for 2 classes, '0', '1' and not 'a', 'b'"),
        (("a", "a"), ("a", "b"), [None, None], "a new head for 2 classes, 'a', 'b' and not 'a', 'a'"),
        (("a", "a"), ("a", "a"), [0, 1], ""),
        (None, ("a", "b"), [0, 1], "its 2 classes, whose names are not known, go by number"),
        (None, ("a", "b", "c"), [None] * 3, "a new head for 3 classes"),
        (("a", "b"), None, [0, 1], ""),
    ],
)
def test_rows_of_a_head(names, class_names, rows, remark):
    num_rows = 2 if names is None else len(names)
    assert known_rows(names, class_names, num_rows, len(class_names or rows)) == (rows, remark)


def test_a_teacher_answers_in_the_order_of_the_student(run, capsys):
    student = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="exact reuse", keywords=keywords()).create()
    teacher = ModelConfig(name="vit_reuse_tiny_patch16_224", plan="exact reuse", keywords=keywords(), weights=str(run))
    settings = DistillConfig(teacher=teacher, kind="soft")
    images = torch.randn(5, 1, 8, 8)
    settings_of_images = image_settings(student)
    logits, shuffled = (
        create_teacher(settings, student, settings_of_images, names)(images) for names in (tuple(GREYS), OTHER_ORDER)
    )
    torch.testing.assert_close(shuffled, logits[:, [2, 0, 1]])
    assert "the head's rows of 3 classes by their names" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"the data have 'dug', not a class of .*: a teacher must tell the same"):
        create_teacher(settings, student, settings_of_images, ("cat", "dug", "emu"))


def keywords() -> dict:
    return {
        "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2
    }  # fmt: skip


def test_a_run_does_not_go_on_with_renamed_classes(root, tmp_path, capsys):
    for split in ("train", "val"):
        write_split(tmp_path / "data" / split, tuple(GREYS), dict(enumerate(GREYS)))
    settings = command(root, tmp_path / "data", tmp_path / "run", *FROZEN)
    assert train(settings) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "status": "stopped"}))
    for split in ("train", "val"):
        path = tmp_path / "data" / split / "index.json"
        path.write_text(path.read_text().replace('"dog"', '"dug"'))
    told = refused(capsys, train, settings)
    assert "was begun with other classes, the data have now 'dug', not a class of the run ('cat', 'dog', 'emu')" in told


def test_names_and_numbers():
    assert are_numbers(("0", "1")) and not are_numbers(("1", "0")) and not are_numbers(("0", "2"))
    assert places(("b", "x", "a"), ("a", "b")) == [1, None, 0]
    assert places(("a", "b"), ("a", "b", "a")) == [None, 1]


def test_a_model_of_another_number_of_classes_has_no_names(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **{**keywords(), "num_classes": 4})
    model.pretrained_cfg["label_names"] = [*GREYS]
    assert names_of(model) is None
    save_hub_folder(model, tmp_path)
    assert "label_names" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "keywords", "wanted"),
    [
        ("vit_base_patch16_clip_224.openai", {}, False),
        ("vit_large_patch14_clip_224.metaclip_2pt5b", {}, False),
        ("vit_base_patch16_clip_224.openai", {"num_classes": 10}, True),
        ("vit_base_patch16_clip_224.openai_ft_in1k", {}, True),
        ("vit_tiny_patch16_224", {"num_classes": 512}, True),
        ("vit_small_patch14_dinov2", {}, False),
    ],
)
def test_the_embedding_of_a_tower_is_no_logits_of_classes(name, keywords, wanted, tmp_path):
    model = timm.create_model(name, **TOWER, **keywords)
    converted = convert(model, "exact none").model
    save_hub_folder(converted, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert [has_classes(each) for each in (model, exact_copy(model), converted, loaded)] == [wanted] * 4
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    found = agreement(exact_copy(model), converted.eval(), [(images, torch.zeros(2))], has_labels=False)
    assert (found.kl_divergence_nats is None, found.cosine is None) == (not wanted, wanted)


def test_a_tower_whose_classes_have_names_has_classes():
    model = timm.create_model("vit_base_patch16_clip_224.openai", **TOWER)
    name_classes(model, [f"class {number}" for number in range(512)])
    assert has_classes(model)
