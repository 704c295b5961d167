"""ImageNet's test sets in fabricated folders and shards: labels, masks, several labels, numbers of images, refusals."""

import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn

from eval.__main__ import main
from eval.labelled import Share
from eval.predictions import Predictions
from eval.sets import (
    ALEXNET_ERRORS,
    CORRUPTED_SPLITS,
    SETS,
    Among,
    corrupted_splits,
    mean_corruption_error,
    named_set,
    plain_set,
)
from eval.top1 import evaluate
from vitreuse.data import EncodedSample, FolderDataset, ShardDataset, write_shards
from vitreuse.model.preprocessing import evaluation_transform

SYNSETS = ImageNetInfo().label_names()
CONFIG = """
model:
  name: deit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, embed_dim: 8, depth: 2, num_heads: 2, num_classes: {num_classes}}}
data: {{root: data}}
train: {{epochs: 1, global_batch_size: 2, optimizer: {{lr: 0.1}}}}
"""


def timms(name: str) -> list[str]:
    """A file of timm's."""
    return (files("timm.data") / "_info" / name).read_text().split()


def picture(number: int) -> bytes:
    """An image that shows a class's number."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1), (number // 256, number % 256, 0)).save(content, "PNG")
    return content.getvalue()


def shown(image: Image.Image) -> torch.Tensor:
    """The number that an image shows."""
    high, low, _ = image.getpixel((0, 0))
    return torch.tensor(256 * high + low)


def make_folders(folder: Path, images: dict[str, int]) -> FolderDataset:
    """Class folders from CLASS/NAME to the number that the image shows."""
    for name, number in images.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return FolderDataset(folder, "RGB")


class Ranked(nn.Module):
    """The class that an image shows comes first, then those given, and last all others."""

    def __init__(self, *others: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.others = others

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(numbers), 1000)
        for place, other in enumerate(self.others):
            logits[:, other] = 5.0 - place
        return self.scale * logits.scatter(1, numbers[:, None], 10.0)


def answered(name: str, dataset, model: nn.Module) -> Predictions:
    """What a model says of a part of a named set."""
    test_set = named_set(SETS[name], dataset, whole=False)
    return evaluate(Among(model, test_set.classes), Share(test_set.images, transform=shown))


def test_the_folders_of_v2_are_in_numeric_order(tmp_path):
    dataset = make_folders(tmp_path, {f"{number}/a": number for number in range(1000)})
    found = answered("v2", dataset, Ranked())
    assert sorted(found.labels) == [*range(1000)]
    assert found.top1 == 100
    with pytest.raises(ValueError, match="are numbers in the order of text, 0, 1, 10, 100: --set v2"):
        plain_set(dataset, 1000, is_own=False)
    assert plain_set(dataset, 1000, is_own=True).images[2].label == 2  # as it was trained, although it shows 10


@pytest.mark.parametrize("name", ["a", "r"])
def test_a_model_chooses_among_the_classes_of_the_set(name, tmp_path):
    """Each image shows a class that the set lacks, which must not count; the right one comes next."""
    test_classes = [SYNSETS.index(synset) for synset in timms(f"imagenet_{name}_synsets.txt")]
    foreign = min({*range(1000)} - {*test_classes})
    assert SETS[name].classes == tuple(test_classes)
    dataset = make_folders(tmp_path, {f"{SYNSETS[number]}/a": foreign for number in test_classes[-3:]})
    assert named_set(SETS[name], dataset, whole=False).title.endswith(", among its 200 classes (part)")
    model = Ranked(test_classes[-2], test_classes[-1])
    found = answered(name, dataset, model)
    assert (found.n, found.top1, found.top5) == (3, 100 / 3, pytest.approx(200 / 3))
    assert found.labels.tolist() == test_classes[-3:]
    assert (found.classes[:, 0] == test_classes[-2]).all()
    expected = torch.tensor([5.0, 4.0] + [0.0] * 198).softmax(0)[0]
    assert found.probabilities == pytest.approx(float(expected))  # of the set's classes alone
    assert evaluate(model, Share(named_set(SETS[name], dataset, False).images, transform=shown)).top1 == 0


def test_labels_of_real_are_any_of_several_or_none(tmp_path):
    """timm's labels of the first four validation images: none, 970 and 795, 230 and 231, 809."""
    names = [f"{SYNSETS[5]}/ILSVRC2012_val_{number:08d}" for number in (1, 2, 3, 4)]
    dataset = make_folders(tmp_path, dict(zip(names, (970, 795, 0, 1), strict=True)))
    found = answered("real", dataset, Ranked(231))
    assert (found.n, found.top1, found.top5) == (3, 100 / 3, pytest.approx(200 / 3))
    assert found.by_class() == [(230, 1, 0), (231, 1, 0), (795, 1, 1), (809, 1, 0), (970, 1, 1)]
    assert [line.split(",")[:2] for line in found.to_csv().splitlines()[1:]] == [
        [f"{names[1]}.png", "970 795"],
        [f"{names[2]}.png", "230 231"],
        [f"{names[3]}.png", "809"],
    ]


def test_classes_of_shards_go_by_name(tmp_path):
    synsets = (SYNSETS[700], SYNSETS[3])
    samples = [EncodedSample(f"{label}", picture(number), "png", label) for label, number in ((0, 700), (1, 3))]
    write_shards(samples, tmp_path / "shards", synsets, 10)
    dataset = ShardDataset(tmp_path / "shards", "RGB")
    found = answered("sketch", dataset, Ranked())
    assert (found.labels.tolist(), found.top1) == ([700, 3], 100)
    with pytest.raises(ValueError, match=r"has 2 of ImageNet's classes and the model 1000 classes.* --set goes by"):
        plain_set(dataset, 1000, is_own=False)


def test_shards_without_a_name_keep_their_labels_and_may_lack_a_class(tmp_path):
    write_shards([EncodedSample("a", picture(3), "png", 1)], tmp_path / "shards", ("cat", "dog"), 10)
    test_set = plain_set(ShardDataset(tmp_path / "shards"), 3, is_own=False)
    assert (test_set.images[0][1], test_set.class_names, test_set.title) == (1, ("cat", "dog"), None)


@pytest.mark.parametrize(
    ("name", "images", "sentence"),
    [
        ("a", {f"{SYNSETS[6]}/a": 0}, "has 1 images that count, ImageNet-A has 7,500: give the"),
        ("a", {f"{SYNSETS[0]}/a": 0}, "class 'n01440764' of .* is none of the 200 classes of ImageNet-A"),
        ("imagenet", {"tench/a": 0}, "class 'tench' of .* is none of the 1,000 classes of ImageNet: name it by"),
        ("v2", {"0/a": 0, "1/a": 1}, "class '0' of .* is none of the 1,000 classes of ImageNet-V2"),  # two of what?
        ("real", {f"{SYNSETS[0]}/ILSVRC2012_val_00000002": 0}, "has 1 images that count, ImageNet ReaL"),
        ("real", {f"{SYNSETS[0]}/000002": 0}, "'.*/000002.png' of .* is no validation image of ImageNet"),
        ("real", {f"{SYNSETS[0]}/ILSVRC2012_val_00050001": 0}, "val_00050001.png' of .* is no validation image"),
    ],
)
def test_another_set_is_refused(name, images, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        named_set(SETS[name], make_folders(tmp_path, images))


def test_corruption_error_is_relative_to_alexnet():
    """As good as AlexNet on all but fog, where the mean over severities is half its error."""
    top1 = {split: 100 - 100 * ALEXNET_ERRORS[split.split("/")[0]] for split in CORRUPTED_SPLITS}
    assert len(top1) == 75
    assert mean_corruption_error(top1) == pytest.approx(100)
    alexnet = 100 * ALEXNET_ERRORS["fog"]
    fog = {f"fog/{severity}": 100 - alexnet * severity / 6 for severity in range(1, 6)}
    assert mean_corruption_error(top1 | fog) == pytest.approx(100 - 50 / 15)
    assert mean_corruption_error(fog) is None


def test_a_missing_corruption_is_named(tmp_path):
    for split in (*CORRUPTED_SPLITS[:-1], "speckle_noise/1"):
        (tmp_path / split).mkdir(parents=True)
    with pytest.raises(ValueError, match="has no jpeg_compression/5/: ImageNet-C is"):
        corrupted_splits(tmp_path)
    assert {*corrupted_splits(tmp_path, whole=False)} == {*CORRUPTED_SPLITS[:-1], "speckle_noise/1"}
    (tmp_path / CORRUPTED_SPLITS[-1]).mkdir()
    assert corrupted_splits(tmp_path) == [*CORRUPTED_SPLITS]


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224.augreg_in1k",
        "deit_small_patch16_224.fb_in1k",
        "deit3_small_patch16_224.fb_in1k",
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",  # crop_mode squash
        "resnet50.a1_in1k",  # tested at 288 px
    ],
)
def test_images_are_what_timm_validates_on(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    timms_own = create_transform(**resolve_data_config({}, model=model, use_test_size=True), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (97, 411, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(evaluation_transform(model, use_test_size=True)(image), timms_own(image))


def run_top1(capsys, *arguments: str) -> list[dict]:
    """The rows of the command."""
    assert main(["top1", *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.fixture
def experiment(tmp_path) -> tuple[str, str]:
    """A config of a tiny model with ImageNet's classes, and weights of it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(num_classes=1000))
    keywords = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("deit_reuse_tiny_patch16_224", plan="exact reuse", **keywords)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return str(path), str(tmp_path / "weights.pt")


def test_corrupted_images_are_a_row_each_and_their_mean(tmp_path, experiment, capsys):
    config, weights = experiment
    for split in ("fog/1", "fog/2", "snow/1"):
        images = {f"{SYNSETS[number]}/{number}": number for number in range(3)}
        make_folders(tmp_path / "corrupted" / split, images if split != "fog/1" else {f"{SYNSETS[0]}/0": 0})
    options = ("--data", str(tmp_path), "--split", "corrupted", "--set", "corruptions", "--subset")
    output = tmp_path / "out"
    rows = run_top1(capsys, config, "--checkpoint", weights, *options, "-o", str(output))
    assert [Path(row["data"]).relative_to(tmp_path / "corrupted").as_posix() for row in rows] == [
        "fog/1",
        "fog/2",
        "snow/1",
        ".",
    ]
    assert rows[-1]["top1"] == pytest.approx(sum(row["top1"] for row in rows[:3]) / 3)
    assert (rows[-1]["set"], rows[-1]["n"], rows[-1]["mce"]) == ("mean of 3 (part)", 7, None)
    assert len(list(output.iterdir())) == 9
    assert len((output / "tiny.fog-2.predictions.csv").read_text().splitlines()) == 4
    assert (output / "tiny.snow-1.classes.csv").read_text().splitlines()[1].startswith('0,"tench, Tinca tinca",1,')
    assert main(["top1", config, "--checkpoint", weights, *options]) == 0
    assert "mCE (%)" in capsys.readouterr().out


def test_a_card_says_what_is_known_of_the_weights(tmp_path, experiment, capsys):
    config, weights = experiment
    make_folders(tmp_path / "val", {f"{SYNSETS[number]}/{number}": number for number in range(4)})
    options = ("--data", str(tmp_path), "--set", "imagenet", "--subset", "-o", str(tmp_path / "out"))
    (row,) = run_top1(capsys, config, "--checkpoint", weights, *options)
    card = json.loads((tmp_path / "out" / "tiny.imagenet.card.json").read_text())
    assert (card["name"], card["seed"], card["recipe"], card["n"]) == ("tiny", None, None, 4)
    assert (card["facts"]["weights"], card["facts"]["set"]) == (weights, "ImageNet (part)")
    assert (card["top1"], row["set"]) == (row["top1"], "ImageNet (part)")


def test_pretrained_weights_are_those_of_the_name(tmp_path, monkeypatch, capsys):
    """A name with its tag, and with the weights that timm has under it."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    make_folders(tmp_path / "val", {f"{SYNSETS[0]}/0": 200})
    options = ("--data", str(tmp_path), "--set", "sketch", "--subset", "-o", str(tmp_path))
    (from_file,) = run_top1(capsys, name, "--checkpoint", str(tmp_path / "weights.pt"), *options)
    predictions = (tmp_path / f"{name}.sketch.predictions.csv").read_text()
    monkeypatch.setattr("vitreuse.files.networks.pretrained_weights", {name: state}.__getitem__)
    (pretrained,) = run_top1(capsys, name, "--pretrained", *options)
    assert pretrained == from_file
    assert (tmp_path / f"{name}.sketch.predictions.csv").read_text() == predictions


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/tiny.yaml", "--pretrained"], "tiny is no model name, and --pretrained means timm's weights: leave"),
        (["vit_reuse_tiny_patch16_224", "--pretrained"], "are neither a file nor pretrained weights of timm"),
        (["vit_tiny_patch16_224", "--pretrained"], "cannot be fetched (no network): give them as a file."),
        (["vit_tiny_patch16_224", "--pretrained", "--checkpoint", "a"], "not allowed with argument --pretrained"),
        (["{tmp}/tiny.yaml", "--checkpoint", "{tmp}/weights.pt", "--subset"], "--subset has no effect without --set"),
        (["{tmp}/tiny.yaml", "--checkpoint", "{tmp}/weights.pt", "--set", "b"], "invalid choice: 'b'"),
        (["{tmp}/ten.yaml", "--checkpoint", "{tmp}/ten.pt", "--set", "v2"], "--set v2 needs a model of ImageNet's"),
        (["{tmp}/tiny.yaml", "--checkpoint", "{tmp}/weights.pt", "--set", "corruptions"], "no gaussian_noise/1/: "),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(arguments, sentence, tmp_path, experiment, monkeypatch, capsys):
    (tmp_path / "ten.yaml").write_text(CONFIG.format(num_classes=10))
    state = torch.load(experiment[1])
    torch.save(state | {key: state[key][:10] for key in ("head.weight", "head.bias")}, tmp_path / "ten.pt")
    make_folders(tmp_path / "val", {f"{SYNSETS[0]}/0": 0})
    monkeypatch.setattr(timm, "create_model", offline(timm.create_model))
    try:
        code = main(["top1", *(argument.format(tmp=tmp_path) for argument in arguments), "--data", str(tmp_path)])
    except SystemExit as exit_:
        code = exit_.code
    told = capsys.readouterr().err
    assert (code, told.count("\n")) == (2, 1)
    assert sentence in told


def offline(create_model):
    """timm's function on a machine without a network."""

    def create(name: str, pretrained: bool = False, **keywords) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return create_model(name, **keywords)

    return create
