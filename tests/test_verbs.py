"""What the commands do, from Python: the same from whatever images come in, results that show themselves, refusals."""

import json
import random
from html.parser import HTMLParser

import pytest
import timm
import torch
from cases import randomized
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import vitreuse
from vitreuse.__main__ import main
from vitreuse.cli.source import sample_images
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import resolve_targets

SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 3, "num_classes": 5, "patch_size": 2, "img_size": 8}
NUM_IMAGES = 17
PICKY = {"minutes": 0, "words": "exact,none,-2"}


def build(**keywords):
    """A plain ViT of timm."""
    torch.manual_seed(0)
    return randomized(timm.create_model("vit_tiny_patch16_224", **{**SIZES, **keywords})).eval()


def pixels(number=NUM_IMAGES, size=8):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


class Labelled(Dataset):
    """Images with labels, as torchvision's sets give them; iterating over it would never end."""

    def __len__(self):
        return NUM_IMAGES

    def __getitem__(self, number):
        return pixels()[number % NUM_IMAGES], number % 5


class Batches:
    """Batches and labels each time that it is gone over."""

    def __iter__(self):
        return ((images, torch.zeros(len(images))) for images in pixels().split(7))


FORMS = {
    "tensor": pixels,
    "tensors as a data set": lambda: TensorDataset(pixels()),
    "tensors and labels": lambda: TensorDataset(pixels(), torch.arange(NUM_IMAGES)),
    "a data set": Labelled,
    "a loader": lambda: DataLoader(Labelled(), batch_size=5, shuffle=False),
    "a loader of tensors": lambda: DataLoader(pixels(), batch_size=4),
    "a list of images": lambda: list(pixels()),
    "a list of batches": lambda: list(pixels().split(6)),
    "what gives batches": Batches,
}


@pytest.mark.parametrize("form", FORMS)
def test_images_are_the_same_whatever_they_come_in(form):
    images = vitreuse.Images(FORMS[form](), 4)
    assert len(images) == NUM_IMAGES and [*map(len, images)] == [4, 4, 4, 4, 1]
    assert torch.equal(torch.cat(list(images)), pixels()) and torch.equal(torch.cat(list(images)), pixels())
    parts = images.parts(9, 5, seed=3)
    assert [*map(len, parts)] == [9, 5] and len({*parts[0].numbers, *parts[1].numbers}) == 14
    for part, expected in zip(parts, vitreuse.Images(pixels()).parts(9, 5, seed=3), strict=True):
        assert torch.equal(torch.cat(list(part)), torch.cat(list(expected)))
    assert all((labels == -1).all() for _, labels in images.labelled())  # nobody says what they are of


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pixels())


REFUSED = {
    "a generator gives its images once": lambda: (images for images in pixels().split(4)),
    "a loader that shuffles gives other images each time": lambda: DataLoader(Labelled(), shuffle=True),
    "images are Images: give tensors": lambda: [(Image.new("RGB", (8, 8)), 0)],
    "images are dicts: give tensors": lambda: [{"pixel_values": pixels(1)[0]}],
    "images are of torch.uint8: give floats, normalised": lambda: pixels().byte(),
    "images are 3 x 8 x 8: give batches": lambda: pixels()[0],
    "images are 3 x 8 x 8: give batches (B, channels": Stream,
    "images are a int": lambda: 7,
    "there are no images: give at least one": lambda: pixels(0),
    "there are no images: give at least one.": lambda: [],
    "images are 3 x 9 x 9 and the model takes 3 x 8 x 8: resize": lambda: pixels(size=9),
    "images are of several sizes, 3 x 8 x 8 and 3 x 9 x 9": lambda: [*pixels(2), *pixels(2, size=9)],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_holds_no_images_that_can_be_gone_over_is_one_sentence(said):
    with pytest.raises(ValueError) as error:
        vitreuse.similarity(build(), REFUSED[said]())
    assert said in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_images_of_any_size_go_to_a_model_of_any_size():
    model = build(dynamic_img_size=True)
    assert vitreuse.similarity(model, pixels(2, size=12), "none").facts["num_images"] == 2


class Reading(HTMLParser):
    """What is in a page: tags that are closed in their order, texts, and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.tags, self.attributes = [], [], set(), {}
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(attrs)
        self.open += [] if tag == "img" else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(shown):
    assert repr(shown) == str(shown) and len(repr(shown).splitlines()) < 50
    page = Reading(shown._repr_html_())
    assert page.tags <= {"div", "b", "small", "table", "thead", "tbody", "tr", "th", "td", "img"}
    assert "color" not in page.attributes.get("style", "") and "table" in page.tags
    return page


@pytest.mark.parametrize("form", FORMS)
def test_similarity_is_the_same_of_each(form):
    model = build()
    found = vitreuse.similarity(model, FORMS[form](), "reuse,none")
    expected = vitreuse.similarity(model, pixels(), "reuse,none")
    assert found.facts == expected.facts and found.damage == expected.damage
    assert torch.equal(found.redundancy.variation, expected.redundancy.variation)


def test_similarity_shows_itself(monkeypatch):
    found = vitreuse.similarity(build(), pixels())
    assert found.facts["layers"][2]["damage"].keys() == {"reuse", "lowrank:5", "span:3", "none"}
    assert str(found).splitlines()[0] == "vit_tiny_patch16_224, 17 images"
    assert "\x1b" not in str(found) and len(str(found).splitlines()) < 12
    page = read(found)
    assert page.texts[0] == "vit_tiny_patch16_224, 17 images" and "same head" in page.texts
    assert page.attributes["src"].startswith("data:image/png;base64,iVBOR")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "img" not in read(found).tags
    found.facts["name"] = "<script>alert('x')</script>"
    assert read(found).texts[0].startswith("<script>")


def without_times(facts):
    rows = facts["audited"].items()
    timed = ("timing", "speedup")
    audited = {name: {key: value for key, value in row.items() if key not in timed} for name, row in rows}
    return {**facts, "audited": audited}


@pytest.fixture(scope="module")
def searched():
    """What a search finds of a tensor."""
    return vitreuse.search(build(), pixels(), 0.8, **PICKY)


@pytest.mark.parametrize("form", ["tensor", "tensors and labels", "a data set", "a loader"])
def test_a_search_finds_the_same_of_each(searched, form):
    found = vitreuse.search(build(), FORMS[form](), 0.8, **PICKY)
    assert without_times(found.facts) == without_times(searched.facts)
    state = searched.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
    assert found.plan == found.model.plan and found.facts["chosen"]["share"] <= 0.8
    assert found.facts["images"] == {"fitted": 11, "tried": 4, "shown": 2}


def test_a_search_shows_itself_and_says_what_healing_regains():
    found = vitreuse.search(build(num_classes=0), pixels(), 0.8, **PICKY)
    assert "times as fast as the best plain model" in str(found) and "cosine of features" in str(found)
    assert {"forecast damage", "predicted", "constant merging"} & {*read(found).texts} and "img" in read(found).tags
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    assert found.expected_of_healing(0.001).num_steps >= 1
    assert all(torch.equal(value, before[key]) for key, value in found.model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_healing_hands_over_a_model_that_is_nearer_to_the_original(form):
    original = build(num_classes=0)
    converted = vitreuse.convert(original, "none exact*2").model.requires_grad_(False)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    found = vitreuse.heal(original, converted, FORMS[form](), minutes=0.01)
    assert found.facts["after"] < found.facts["before"] and found.facts["num_steps"] > 1
    assert found.model.plan == converted.plan and not found.model.training
    tokens, wanted, healed = (model.forward_features(pixels()) for model in (converted, original, found.model))
    assert (healed - wanted).norm() < (tokens - wanted).norm()
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
    assert found.facts["images"] == {"fitted": 11, "tried": 4, "shown": 2}
    assert "regained" in str(found) and {"before", "after", "distance"} <= {*read(found).texts}


@pytest.mark.parametrize(
    ("converted", "settings", "said"),
    [
        (lambda: build(), {}, "a VisionTransformer has no plan: convert the original first."),
        (lambda: none_of(build(num_classes=3)), {}, "has 3 num_classes and the original 5: give the original that it"),
        (lambda: none_of(build()).half(), {}, "a model is in torch.float16: heal in float32, as model.float()."),
        (lambda: none_of(build()).to("meta"), {}, "the converted model is on meta and the original on cpu: move one"),
        (lambda: none_of(build()), {"minutes": 0}, "0 is no time in minutes: give a number above 0."),
        (lambda: none_of(build()), {"images": pixels(5)}, "5 images are given, and 6 are needed, to fit, to try"),
    ],
)
def test_what_cannot_be_healed_is_one_sentence(converted, settings, said):
    with pytest.raises(ValueError) as error:
        vitreuse.heal(build(), converted(), **{"images": pixels(), **settings})
    assert said in str(error.value) and str(error.value).endswith(".")


def none_of(model):
    return vitreuse.convert(model, "none exact*2").model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 1.5}, "1.5 is no share of an exact model's cost: give a number above 0, up to 1."),
        ({"minutes": -1}, "-1 is no time in minutes: give a number, 0 or more."),
        ({"metric": "watts"}, "'watts' is no metric: give one of macs, latency, memory, bytes."),
        ({"words": "exact,reus"}, "in reus, layer 1 is 'reus', but the words are"),
        ({"words": "exact,-9"}, "-9 merges more than half of 16 patches: give -8 or less."),
        ({"images": pixels(5)}, "5 images are given, and 6 are needed, to fit, to try and to show: give more."),
        ({"budget": 0.01, "words": "exact,none"}, "no plan of the words given has 0.01 of the MACs of the exact model"),
        ({"model": timm.create_model("resnet18")}, "ResNet has no maps that are known"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(settings, said):
    with pytest.raises(ValueError) as error:
        vitreuse.search(**{"model": build(), "images": pixels(), "minutes": 0, **settings})
    assert said in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("form", ["tensors and labels", "a data set", "a loader"])
def test_a_conversion_is_the_same_of_each(form):
    model, plan = build(), "exact reuse exact/32"
    found, expected = (vitreuse.convert(model, plan, of) for of in (FORMS[form](), pixels()))
    assert found.facts == expected.facts and found.layers and found.plan == found.model.plan
    state = expected.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
    assert found.facts["images"] == {"learned": 15, "shown": 2} and found.facts["agreement"]["num_images"] == 2


def test_a_conversion_without_images_is_as_it_comes():
    state = torch.random.get_rng_state()
    found = vitreuse.convert(build(), "exact linear lowrank:5")
    assert (found.facts["layers"], found.facts["lowrank_start"], found.layers) == ("as they come", "pooled", [])
    assert found.new == ("blocks.1.linear.weight", "blocks.1.linear.bias", "blocks.2.attn.key_proj")
    assert found.original(pixels(2)).shape == found.model(pixels(2)).shape
    assert "linear layers: zero" in str(found) and "GMACs" in read(found).texts
    units = {0: [*range(1, 33)], 1: [*range(32)], 2: [*range(32)]}
    named = vitreuse.convert(build(), "exact/32*3", units=units)
    assert torch.equal(named.model.blocks[0].mlp.fc1.weight, named.original.blocks[0].mlp.fc1.weight[1:33])
    assert "those that are named stay" in str(named)
    torch.random.set_rng_state(state)
    random = [vitreuse.convert(build(), "exact*2 lowrank:5", lowrank_start="random", seed=s) for s in (0, 0, 1)]
    first, again, other = (of.model.blocks[2].attn.key_proj for of in random)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("plan", "settings", "said"),
    [
        ("exact*3", {"heads": "error", "images": pixels()}, "heads has no effect on plan 'exact*3': leave it out."),
        ("exact reuse*2", {"heads": "error"}, "heads='error' needs images: give some, or leave it out."),
        ("exact reuse*2", {"heads": "size"}, "heads is 'size': give one of error, variation, in order."),
        ("lowrank:5*3", {"lowrank_start": "fitted"}, "lowrank_start='fitted' needs images"),
        ("exact*3", {"fits_layers": False}, "fits_layers has no effect on plan 'exact*3': leave it out."),
        ("exact*3", {"lowrank_sharing": "headwise"}, "lowrank_sharing has no effect on plan 'exact*3': leave it out."),
        ("exact/32*3", {"units": {}, "images": pixels()}, "units are chosen by the images: give units or images."),
        ("exact*3", {"shown": pixels()}, "shown has no effect without images to learn from: give some"),
        ("exact none exact", {"images": pixels(1)}, "one image is given, and none is both learned from and shown"),
        ("exact*4", {}, "plan has 4 layers, the model has 3"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(plan, settings, said):
    with pytest.raises(ValueError) as error:
        vitreuse.convert(build(), plan, **settings)
    assert said in str(error.value)


def test_an_export_is_checked_on_anybodys_images(tmp_path):
    model = vitreuse.convert(build(), "exact none exact").model
    found = vitreuse.export(model, tmp_path / "a", ("hub", "torch"), DataLoader(pixels(), batch_size=5))
    again = vitreuse.export(model, str(tmp_path / "b"), "torch", pixels())
    assert found.facts["differences"] == again.facts["differences"] and found.facts["images"] == "17 images"
    assert {path.name for path in found.files} == {path.name for path in (tmp_path / "a").iterdir()}
    assert "model.pt2" in str(found) and any("model.pt2" in text for text in read(found).texts)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    assert torch.equal(loaded(pixels(2)), model(pixels(2)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"formats": "tflite"}, "'tflite' is no format: give any of hub, safetensors, torch, onnx."),
        ({"images": pixels()}, "images has no effect without the format torch or onnx: leave it out."),
        ({"formats": "torch", "opset": 20}, "opset has no effect without the format onnx: leave it out."),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(settings, said, tmp_path):
    with pytest.raises(ValueError) as error:
        vitreuse.export(build(), tmp_path / "new", **settings)
    assert str(error.value) == said and not (tmp_path / "new").exists()


def test_a_plan_is_described_in_a_model_by_name_or_as_it_is():
    by_name = vitreuse.describe("vit_tiny_patch16_224", "exact none exact", **SIZES)
    model = build()
    assert vitreuse.describe(model, "exact none exact").facts == by_name.facts
    converted = vitreuse.convert(model, "exact none exact").model
    assert vitreuse.describe(converted).facts["macs"] == by_name.facts["macs"]
    assert by_name.facts["macs"] == sum(vitreuse.count_macs(converted).values())
    assert vitreuse.describe(converted, "exact*3").facts["macs_ratio"] == 1
    assert "exact none exact  in vit_tiny_patch16_224 at 8 x 8 px" in str(by_name) and "of exact" in read(by_name).texts
    assert "vit_lazy_tiny_patch16_224" in read(vitreuse.models("vit_lazy_tiny*224")).texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's hub folder, and images."""
    root, draw = tmp_path_factory.mktemp("verbs"), random.Random(1)
    (root / "images").mkdir()
    for number in range(NUM_IMAGES):
        Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(root / f"images/{number}.png")
    save_hub_folder(build(), root / "hub")
    return root


def from_folder(folder):
    """The model and the images of a folder, as somebody with a loader of their own has them."""
    (target,) = resolve_targets([str(folder / "hub")])
    model = target.load().eval()
    sample = sample_images(target, model, folder / "images", NUM_IMAGES)
    return model, DataLoader(TensorDataset(torch.cat([images for images, _ in sample.batches(5)])), batch_size=3)


def command(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_command_and_its_function_say_the_same(folder, tmp_path, capsys):
    argv, (model, images) = (folder / "hub", "--data", folder / "images"), from_folder(folder)
    told = command(capsys, "similarity", *argv, "--words", "reuse,none", "--seed", 3)
    found = vitreuse.similarity(model, images, "reuse,none", seed=3)
    assert {**told, "name": None} == {**json.loads(json.dumps(found.facts)), "name": None, "training": None}
    told = command(capsys, "search", *argv, "--words", PICKY["words"], "--minutes", 0, "--budget", 0.8, "--seed", 3)
    found = vitreuse.search(model, images, 0.8, seed=3, **PICKY)
    own = ("name", "training", "images", "split", "output", "command")
    for facts in (told, (expected := json.loads(json.dumps(found.facts)))):
        for key in own:
            facts.pop(key, None)
    assert without_times(told) == without_times(expected)


def test_labels_are_looked_at_where_their_names_are_said():
    labelled = [(image, number) for number, image in enumerate(pixels(5))]
    assert next(vitreuse.Images(labelled).labelled())[1].tolist() == [-1] * 5
    for named in (Named(labelled), Named(DataLoader(labelled, batch_size=2))):
        images = vitreuse.Images(named)
        assert images.class_names == ("a", "b") and torch.equal(torch.cat(list(images)), pixels(5))
        assert [labels.tolist() for _, labels in images.labelled()] == [[0, 1, 2, 3, 4]]


class Named:
    """Batches with labels, and their names."""

    class_names = ("a", "b")

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(DataLoader(list(self.source), batch_size=2) if isinstance(self.source, list) else self.source)


def test_progress_can_be_silenced(capsys):
    vitreuse.similarity(build(), pixels(3), "none")
    assert "similarity: 3/3 images" in capsys.readouterr().err
    with vitreuse.quiet():
        vitreuse.similarity(build(), pixels(3), "none")
    assert capsys.readouterr().err == ""
