"""The controls of `python -m eval controls`: what they are, how close they come, what their files say."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import eval.controls
from eval.__main__ import main
from eval.control_models import controls, deepened, without_attention
from eval.controls import Control, closest
from train.augmentation import train_transform
from vitreuse import parse_plan
from vitreuse.config import ModelConfig, load_config
from vitreuse.cost.counters import torch_flops
from vitreuse.model.preprocessing import evaluation_transform, image_settings
from vitreuse.plan import PRESETS, preset_plan

LAZY = Path(__file__).parent.parent / "configs" / "digits" / "lazy.yaml"
EXACT = LAZY.with_name("exact.yaml")
SMALL = """
model:
  name: {name}
  plan: {plan}
  {weights}
  keywords: {{img_size: 12, patch_size: 4, embed_dim: 12, depth: 2, num_heads: 2, {keywords}}}
data: {{root: data}}
train: {{epochs: 1, global_batch_size: 2, optimizer: {{lr: 0.1}}}}
"""
LINE = re.compile(r"# (MACs|Params|Latency): ([\d,.]+)(?: ms)? in (.+), ([\d,.]+)(?: ms)? here, ([+-][\d.]+) %\.")


def count_macs(model: ModelConfig) -> int:
    size_px = model.keywords["img_size"]
    return torch_flops(model.create().eval(), torch.zeros(1, 1, size_px, size_px))[""] // 2


def count_params(model: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in model.create().parameters())


def clock(model: ModelConfig) -> float:
    """Milliseconds by width, depth, plan and hidden units."""
    costs = {"exact": 1.0, "reuse": 0.5, "none": 0.0}
    layers = [costs[spec.word] + model.keywords.get("mlp_ratio", 4.0) / 4 for spec in parse_plan(str(model.plan))]
    return round(model.keywords["embed_dim"] / 64 * sum(layers), 4)


MEASURES = {"macs": count_macs, "params": count_params, "latency_ms": clock}  # independent of the command's


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of the controls of lazy.yaml, timed by that clock, and the JSON object that was printed."""
    folder = tmp_path_factory.mktemp("controls")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr(eval.controls, "_latency_ms", lambda models, **_: [clock(model) for model in models])
        assert main(["controls", str(LAZY), "-o", str(folder), "--json", "--device", "cpu"]) == 0
    return folder, json.loads(output.getvalue())


def headers(path: Path) -> dict[str, tuple[str, str, str, str]]:
    """What the header of a control says of each quantity: target, whose it is, reached, difference."""
    words = {"MACs": "macs", "Params": "params", "Latency": "latency_ms"}
    return {words[word]: tuple(numbers) for word, *numbers in LINE.findall(path.read_text())}


def test_every_control_is_there_in_every_quantity(written):
    folder, result = written
    names = ("removed", "removed_mlp", "shallower", "narrower", "wider", "deeper")
    expected = [(name, quantity) for name in names for quantity in ("macs", "params", "latency_ms")]
    assert [(row["control"], row["quantity"]) for row in result["rows"]] == expected
    assert {path.name for path in folder.iterdir()} == {row["file"] for row in result["rows"]}
    plans = {row["control"]: row["plan"] for row in result["rows"] if row["quantity"] == "macs"}
    assert plans == {
        "removed": "(exact none*2)*2",
        "removed_mlp": "(exact none*2)*2",
        "shallower": "exact*5",
        "narrower": "exact*6",
        "wider": "(exact reuse*2)*2",
        "deeper": "(exact reuse*2)*2 exact",
    }


def test_the_files_say_what_the_models_are(written):
    folder, result = written
    own, exact = ({key: count(load_config(path).model) for key, count in MEASURES.items()} for path in (LAZY, EXACT))
    for row in result["rows"]:
        path = folder / row["file"]
        config = load_config(path)
        quantity = row["quantity"]
        found = MEASURES[quantity](config.model)
        target = exact[quantity] if row["control"] in ("wider", "deeper") else own[quantity]
        difference = 100 * (found - target) / target
        assert (row["target"], row["reached"]) == (target, found)
        assert row["difference_percent"] == pytest.approx(difference)
        told = headers(path)[quantity]
        assert [float(told[i].replace(",", "")) for i in (0, 2)] == [target, found]
        assert told[3] == f"{difference:+.2f}"
        assert told[1] == ("the exact model" if row["control"] in ("wider", "deeper") else "lazy")
        assert f"# Command: python -m train {path}\n" in path.read_text()
        assert (config.train, config.data) == (load_config(LAZY).train, load_config(LAZY).data)
        tree = yaml.safe_load(path.read_text())
        assert tree.keys() == {"base", "model"} and tree["model"].keys() <= {"plan", "keywords"}
        assert (folder / tree["base"]).resolve() == LAZY


# Percent: a layer is a sixth of the model, two channels more or less 3 %, a hidden unit for 16 channels little.
STEPS = {"removed_mlp": ("mlp_ratio", 1 / 16), "narrower": ("embed_dim", 4), "wider": ("embed_dim", 4)}
LARGEST_PERCENT = {"removed_mlp": 0.8, "shallower": 9, "narrower": 7, "wider": 7, "deeper": 9}


def test_no_model_beside_it_is_closer(written):
    folder, result = written
    for row in (row for row in result["rows"] if row["control"] != "removed"):
        assert abs(row["difference_percent"]) <= LARGEST_PERCENT[row["control"]]
        base = load_config(folder / row["file"]).model
        depth, quantity = base.keywords["depth"], row["quantity"]
        if row["control"] in STEPS:
            keyword, step = STEPS[row["control"]]
            own = base.keywords.get(keyword, 4.0)
            beside = [[f"model.keywords.{keyword}={own + change}"] for change in (-step, step)]
        else:
            specs = [*(["exact", "reuse", "reuse"] * 3 if row["control"] == "deeper" else ["exact"] * 9)]
            beside = [
                [f"model.keywords.depth={depth + change}", f"model.plan={' '.join(specs[: depth + change])}"]
                for change in (-1, 1)
            ]
        for overrides in beside:
            other = MEASURES[quantity](load_config(folder / row["file"], overrides).model)
            assert abs(other - row["target"]) >= abs(row["reached"] - row["target"])


def test_a_search_that_was_misled_starts_again():
    """The clock shows five times as much for the first models it sees."""
    models = [ModelConfig(name=str(size), keywords={}) for size in range(100)]
    control = Control("x", "y", range(1, 100), models.__getitem__, models[40], "z")
    busy = iter([5.0] * 3)

    def measure(measured):
        factor = next(busy, 1.0)
        return [float(measured[0].name), *(factor * float(model.name) for model in measured[1:])]

    match = closest(control, "latency_ms", measure)
    assert (match.model.name, match.target, match.reached, match.difference_percent) == ("40", 40.0, 40.0, 0.0)


MIXED = "exact*2 exact-3/96 linear exact/32 exact"


def work(model: ModelConfig) -> float:
    """Milliseconds that grow with both other quantities."""
    return round(count_macs(model) / 1e6 + count_params(model) / 1e5, 4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder of a config of such a plan and of its controls, timed by that, and the rows that were printed."""
    folder = tmp_path_factory.mktemp("mixed")
    config = folder / "mixed.yaml"
    config.write_text(f"base: {LAZY}\nmodel: {{plan: {MIXED}}}\n")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr(eval.controls, "_latency_ms", lambda models, **_: [work(model) for model in models])
        assert main(["controls", str(config), "-o", str(folder / "out"), "--json", "--device", "cpu"]) == 0
    return folder, json.loads(output.getvalue())["rows"]


@pytest.mark.proof
def test_a_plan_of_tokens_hidden_units_and_layers_has_controls_of_these(mixed):
    _, rows = mixed
    every, plans = ("macs", "params", "latency_ms"), {row["control"]: row["plan"] for row in rows}
    names = ("skipped", "narrower_mlp", "smaller_image", "shallower", "narrower", "wider", "deeper")
    expected = [(name, quantity) for name in names for quantity in every if (name, quantity) != (names[2], "params")]
    assert [(row["control"], row["quantity"]) for row in rows] == expected
    assert plans["skipped"] == "exact*2 exact-3/96 skip exact/32 exact"
    assert plans["narrower_mlp"] == plans["smaller_image"] == plans["narrower"] == "exact*6"
    keywords = {row["control"]: {*row["keywords"]} for row in rows if row["quantity"] == "macs"}
    assert (keywords["skipped"], keywords["narrower_mlp"]) == (set(), {"mlp_ratio"})
    assert (keywords["smaller_image"], keywords["wider"]) == ({"img_size"}, {"embed_dim"})


@pytest.mark.proof
def test_they_cost_what_their_files_say(mixed):
    folder, rows = mixed
    measures = {"macs": count_macs, "params": count_params, "latency_ms": work}
    own, exact = load_config(folder / "mixed.yaml").model, load_config(EXACT).model
    for row in rows:
        measure, larger = measures[row["quantity"]], row["control"] in ("wider", "deeper")
        found = load_config(folder / "out" / row["file"]).model
        assert (row["target"], row["reached"]) == (measure(exact if larger else own), measure(found))
        assert headers(folder / "out" / row["file"])[row["quantity"]][2] == f"{row['reached']:,.10g}"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("name", "keyword", "step"), [("narrower_mlp", "mlp_ratio", 1 / 16), ("smaller_image", "img_size", 2)]
)
def test_no_narrower_mlp_and_no_smaller_image_beside_it_is_closer(name, keyword, step, mixed):
    folder, rows = mixed
    for row in (row for row in rows if row["control"] == name):
        measure = {"macs": count_macs, "params": count_params, "latency_ms": work}[row["quantity"]]
        for change in (-step, step):
            override = f"model.keywords.{keyword}={row['keywords'][keyword] + change}"
            beside = measure(load_config(folder / "out" / row["file"], [override]).model)
            assert abs(beside - row["target"]) > abs(row["reached"] - row["target"])
            assert (beside - row["reached"]) * change > 0


@pytest.mark.proof
def test_the_data_have_the_size_of_the_smaller_image(mixed):
    folder, rows = mixed
    (row,) = (row for row in rows if (row["control"], row["quantity"]) == ("smaller_image", "macs"))
    config = load_config(folder / "out" / row["file"])
    model, size_px, digit = config.model.create().eval(), row["keywords"]["img_size"], Image.new("L", (8, 8))
    assert size_px < 12 and size_px % 2 == 0 and config.data == load_config(LAZY).data
    for image in (train_transform(config, image_settings(model))(digit).image, evaluation_transform(model)(digit)):
        assert image.shape == (1, size_px, size_px)
    assert model(evaluation_transform(model)(digit)[None]).shape == (1, 10)


def of_plan(plan: str, **keywords: object) -> dict[str, Control]:
    own = load_config(LAZY).model
    model = ModelConfig(name=own.name, plan=plan, keywords={**own.keywords, **keywords})
    return {control.name: control for control in controls(model, "own")}


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ("exact*5 exact-3", ["smaller_image"]),
        ("exact*5 linear", ["skipped"]),
        ("exact*5 skip", []),
        ("exact*5 exact/255", ["narrower_mlp"]),
        ("exact*5 exact/256", []),  # as many as all layers have
        ("exact*5 exact/300", []),
        ("exact*5 none", ["removed", "removed_mlp"]),
        ("(exact reuse-3)*3", ["removed", "removed_mlp", "smaller_image"]),
    ],
)
def test_controls_without_a_meaning_for_the_plan_are_left_out(plan, names):
    assert [*of_plan(plan)] == [*names, "shallower", "narrower", "wider", "deeper"]


def test_images_shrink_by_patches_and_keep_their_shape():
    control = of_plan("exact*5 exact-3", img_size=[12, 16])["smaller_image"]
    sizes = [control.at(size).keywords["img_size"] for size in control.sizes]
    assert sizes == [2, 4, [6, 8], [8, 10], [10, 12], [12, 16]]


def test_images_stay_larger_than_those_that_training_begins_with(tmp_path, monkeypatch):
    path, given = tmp_path / "growing.yaml", []
    train = "train: {resolution: {from_px: 8, epochs: 2}}"
    path.write_text(f"base: {LAZY}\nmodel: {{plan: exact*5 exact-3, keywords: {{dynamic_img_size: true}}}}\n{train}\n")
    monkeypatch.setattr(eval.controls, "controls", lambda *arguments: given.append(arguments) or [])
    assert main(["controls", str(path), "--json", "--device", "cpu"]) == 0
    control = {control.name: control for control in controls(*given[0])}["smaller_image"]
    assert [control.at(size).keywords["img_size"] for size in control.sizes] == [10, 12]


def test_hidden_units_grow_with_the_mlps_and_with_the_width():
    found = of_plan("exact reuse/64 reuse exact/0 exact/32 reuse/0")
    wider_mlp, wider = found["removed_mlp"].at(80), found["wider"].at(96)  # 5 units to a channel, 4 is usual
    assert (wider_mlp.plan, wider_mlp.keywords["mlp_ratio"]) == ("exact none/80 none exact/0 exact/40 skip", 5.0)
    assert (wider.plan, wider.keywords["embed_dim"]) == ("exact reuse/96 reuse exact/0 exact/48 reuse/0", 96)


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ("(exact reuse*2)*2", "(exact none*2)*2"),
        ("exact-8 exact-8/96 linear skip", "exact-8 exact-8/96 linear skip"),
        ("(exact reuse-8/96)*2", "(exact-8 none/96)*2"),
        ("span:3-8 exact-4 exact reuse", "none exact-4 exact none"),
        ("exact span:3 reuse-8/0 none", "exact-8 none skip none"),
    ],
)
def test_without_attention_the_exact_layer_before_merges_as_many(plan, left):
    assert str(without_attention(parse_plan(plan))) == left


@pytest.mark.parametrize(
    ("plan", "deeper"),
    [
        ("(lowrank:4 reuse)*2", "(lowrank:4 reuse)*3 lowrank:4"),
        ("span:3 exact none", "(span:3 exact none)*2 span:3"),
        ("exact none*2 reuse", "exact none*2 reuse exact none*2"),
        ("exact linear", "(exact linear)*3 exact"),
        ("(exact reuse-8/96)*2", "(exact reuse-8/96)*3 exact"),
        ("exact-8*4", "exact-8*3 exact-6 exact-3 exact-1*2"),
        ("span:3/9 exact-8", "span:3/9 exact-8 exact/9 exact-8 exact/9 exact-8 exact/9"),
        ("lowrank:4 exact exact-8", "lowrank:4 exact exact-8 exact*2 exact-8 exact"),
    ],
)
def test_a_deeper_plan_goes_on_as_it_began(plan, deeper):
    found = deepened(parse_plan(plan), 7, 36)
    assert found == parse_plan(deeper) == parse_plan(str(found), 7, num_patches=36)


@pytest.mark.parametrize("method", PRESETS)
def test_a_deeper_preset_is_the_preset_of_that_depth(method):
    sizes = (36,) if method == "merge" else ()
    for depth in (7, 12):
        assert deepened(preset_plan(method, 6, *sizes), depth, 36) == preset_plan(method, depth, *sizes)


def small(folder: Path, name="vit_lowrank_tiny_patch16_224", plan="lowrank:3*2", weights="", keywords="") -> Path:
    path = folder / "small.yaml"
    path.write_text(SMALL.format(name=name, plan=plan, weights=weights, keywords=keywords))
    return path


def test_the_command_line_on_this_machines_clock(tmp_path, capsys, monkeypatch):
    """Without a plan of its own; an option that only low rank takes goes back to its default in the exact controls."""
    path, folder = small(tmp_path, plan="lowrank:3 reuse", keywords="lowrank_sharing: headwise"), tmp_path / "sub/out"
    monkeypatch.setattr(eval.controls, "MOST_SEARCHES", 1)
    options = ["-o", str(folder), "--repeats", "2", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["controls", str(path), *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["command"], result["dtype"], result["num_repeats"]) == ("controls", "bfloat16", 2)
    for row in result["rows"]:
        assert row["reached"] > 0 and row["target"] > 0
        if row["file"]:
            model = load_config(folder / row["file"]).model
            assert str(model.create().plan) == row["plan"]
            is_exact = row["control"] not in ("wider", "deeper")
            assert model.keywords["lowrank_sharing"] == ("key_value" if is_exact else "headwise")
            assert (
                "latency is that of one image in bfloat16, the minimum of 2 turns."
                in (folder / row["file"]).read_text()
            ) == ("latency_ms" in headers(folder / row["file"]))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(eval.controls, "closest", lambda *arguments: pytest.fail("it was measured first"))
    assert main(["controls", str(path), *options]) == 2
    told = capsys.readouterr()
    assert told.out == "" and ".yaml is there already: move it, or give another folder to -o." in told.err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_control_that_is_the_config_itself_has_no_file(tmp_path, capsys, monkeypatch):
    """Token projections cost parameters: at those of the exact model the plan cannot grow."""
    monkeypatch.setattr(eval.controls, "_latency_ms", lambda models, **_: [1.0] * len(models))
    assert main(["controls", str(small(tmp_path)), "-o", str(tmp_path / "out"), "--json", "--device", "cpu"]) == 0
    rows = {(row["control"], row["quantity"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["wider", "params"]["file"] is rows["deeper", "params"]["file"] is None
    assert rows["wider", "params"]["reached"] > rows["wider", "params"]["target"]
    assert rows["shallower", "params"]["file"] == rows["narrower", "params"]["file"]  # the exact model, once


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "vit_tiny_patch16_224", "plan": "null"}, "vit_tiny_patch16_224 has no plan to control"),
        ({"plan": "exact*2"}, "plan 'exact*2' is exact everywhere, a control itself: give one that is not."),
        ({"weights": "weights: runs/x/model.safetensors"}, "starts from runs/x/model.safetensors, which fits no model"),
    ],
)
def test_what_has_no_controls_is_refused_in_one_sentence(settings, sentence, tmp_path, capsys):
    assert main(["controls", str(small(tmp_path, **settings)), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.count("\n") == 1 and told.out == ""
