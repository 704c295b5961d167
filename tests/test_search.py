"""The search for plans: against all plans of a toy, its ties and its protected layers; what plans cost; the command."""

import itertools
import json
import random
import shutil
from collections import Counter
from functools import partial

import pytest
import timm
import torch
from PIL import Image

from vitreuse import count_macs
from vitreuse.__main__ import main
from vitreuse.attention import costs as attention_costs
from vitreuse.cli.search import thinned
from vitreuse.compress import search
from vitreuse.compress.damage import EXACT, Change, possible_changes
from vitreuse.cost import plan_costs
from vitreuse.cost.measure import saved_memory_mib
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.export.hub import save_hub_folder
from vitreuse.plan import Plan, Spec, parse_plan

DEPTH = 4
REUSE, LOWRANK, SPAN, NONE = Spec("reuse"), Spec("lowrank", 3), Spec("span", 3), Spec("none")
SPECS = (EXACT, REUSE, LOWRANK, NONE)
WORDS = (*SPECS, SPAN, Spec("reuse", 1))


def toy(seed, specs=SPECS, depth=DEPTH, damages=64):
    """Random damage and costs, in steps that add up without rounding; few damages make ties."""
    draw = random.Random(seed)
    anchors = [spec for spec in specs if spec.word not in ("reuse", "none")]
    damage = {change: draw.randint(1, damages) / 64 for change in possible_changes(depth, specs)}
    layers = {
        (layer, spec, anchor): draw.randint(1, 9)
        for layer in range(depth)
        for spec in specs
        for anchor in (anchors if spec == REUSE else [None])
    }
    return damage, PlanCosts(layers, {spec: draw.randint(0, 3) for spec in anchors}, draw.randint(0, 9))


def all_plans(specs=SPECS, depth=DEPTH):
    for chosen in itertools.product(specs, repeat=depth):
        try:
            yield Plan(chosen)
        except ValueError:  # a reuse layer without a map before it
            continue


def front_by_force(damage, costs, plans):
    scored = sorted(search.score(plan, damage, costs) for plan in plans)
    return [one for one in scored if not any(other < one and other.damage <= one.damage for other in scored)]


@pytest.mark.parametrize("damages", [1, 3, 64])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_that_of_all_plans(seed, damages):
    damage, costs = toy(seed, damages=damages)
    plans = list(all_plans())
    assert len(plans) > 150
    assert search.pareto_front(damage, costs, SPECS, DEPTH) == front_by_force(damage, costs, plans)
    kept = [plan for plan in plans if plan[0] == plan[-1] == EXACT]
    assert search.pareto_front(damage, costs, SPECS, DEPTH, True) == front_by_force(damage, costs, kept)


def test_the_order_of_the_words_changes_nothing():
    damage, costs = toy(5, damages=2)
    fronts = [search.pareto_front(damage, costs, specs, DEPTH) for specs in (SPECS, SPECS[::-1])]
    assert fronts[0] == fronts[1]


def test_a_map_is_read_across_a_layer_without_attention_and_paid_for_once():
    damage, costs = toy(0)
    plan = parse_plan("lowrank:3 none reuse*2")
    found = search.score(plan, damage, costs)
    changes = [Change(0, LOWRANK), Change(1, NONE), Change(2, REUSE, 0, LOWRANK), Change(3, REUSE, 0, LOWRANK)]
    assert found.damage == sum(damage[change] for change in changes)
    layers = [costs.layers[layer, spec, LOWRANK if spec == REUSE else None] for layer, spec in enumerate(plan)]
    assert found.cost == costs.rest + sum(layers) + costs.handing_on[LOWRANK]
    assert (found.num_changed, found.plan) == (4, plan)


def uniform(depth=DEPTH, **damages):
    """Costs of 2 for an exact layer and 1 for none, and a damage for each layer by name."""
    layers = {(layer, spec, None): cost for layer in range(depth) for spec, cost in ((EXACT, 2), (NONE, 1))}
    damage = {Change(layer, NONE): damages.get(f"layer{layer}", 1.0) for layer in range(depth)}
    return damage, PlanCosts(layers, {}, 0)


def test_ties_go_to_fewer_changes_and_then_to_the_alphabet():
    damage, costs = uniform()
    chosen = search.search(damage, costs, (NONE, EXACT), DEPTH, 7 / 8).chosen
    assert str(chosen.plan) == "exact*2 none exact"  # and not 'exact none exact*2'
    costs.layers[1, NONE, None] = 0
    damage[Change(1, NONE)] = 2.0
    chosen = search.search(damage, costs, (NONE, EXACT), DEPTH, 6 / 8).chosen
    assert str(chosen.plan) == "exact none exact*2"  # two layers without attention would cost and harm as much


@pytest.mark.parametrize(
    ("first", "budget", "plan", "protected"),
    [
        (1.0, 7 / 8, "exact*2 none exact", "exact*2 none exact"),
        (0.92, 7 / 8, "exact*2 none exact", "exact*2 none exact"),
        (0.9, 7 / 8, "none exact*3", "exact*2 none exact"),
        (1.0, 5 / 8, "exact none*3", None),
        (0.1, 1.0, "exact*4", "exact*4"),
    ],
)
def test_first_and_last_layer_stay_exact_unless_it_pays(first, budget, plan, protected):
    damage, costs = uniform(layer0=first)
    found = search.search(damage, costs, (EXACT, NONE), DEPTH, budget)
    assert str(found.chosen.plan) == plan
    assert (found.protected and str(found.protected.plan)) == protected
    ends = {(candidate.words[0], candidate.words[-1]) for candidate in found.front}
    assert (ends == {("exact", "exact")}) == (plan == protected)


def test_a_budget_that_no_plan_meets():
    damage, costs = uniform()
    assert search.search(damage, costs, (EXACT, NONE), DEPTH, 0.49) is None
    assert search.least_cost(costs, (EXACT, NONE), DEPTH) == 4


def test_24_layers_take_a_moment():
    damage, costs = toy(0, (*SPECS, SPAN), 24, 2**20)
    front = search.pareto_front(damage, costs, (*SPECS, SPAN), 24)
    assert len(front) > 40 and front == sorted(front)
    assert all(search.score(one.plan, damage, costs) == one for one in front[::20])


# With a class token, whose row is all that the last layer computes, and without; a grid on which a span runs as tiles.
SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 5, "patch_size": 2}
MODELS = {
    "class token": {**SIZES, "img_size": 8},
    "average": {**SIZES, "img_size": 8, "global_pool": "avg", "class_token": False, "depth": 5},
    "tiles": {**SIZES, "img_size": 28},
    "two layers": {**SIZES, "img_size": 8, "depth": 2},
}


def build(name, plan=None):
    plan = plan or f"exact*{MODELS[name]['depth']}"
    return timm.create_model("vit_reuse_tiny_patch16_224", plan=str(plan), **MODELS[name])


def some_plans(specs, depth, number):
    return random.Random(0).sample(list(all_plans(specs, depth)), number)


@pytest.mark.filterwarnings("ignore:span.3 covers")
@pytest.mark.parametrize("name", ["average", "tiles", "two layers"])
def test_macs_of_layers_add_up_to_those_of_the_model(name):
    depth = MODELS[name]["depth"]
    costs = plan_costs.plan_costs(build(name), WORDS, "macs")
    for plan in some_plans(WORDS, depth, 5):
        with torch.device("meta"):
            assert costs.of(plan) == sum(count_macs(build(name, plan), theoretical=True).values()), plan


@pytest.mark.parametrize("name", ["class token", "average"])
def test_memory_of_layers_adds_up_to_what_a_training_step_keeps(name):
    costs = plan_costs.plan_costs(build(name), (*SPECS, SPAN), "memory")
    assert costs.handing_on[EXACT] > 0  # the map, which is not kept where none reads it
    for plan in some_plans((*SPECS, SPAN), MODELS[name]["depth"], 5):
        model = build(name, plan).train()
        few, more = (saved_memory_mib(partial(model, torch.randn(size, 3, 8, 8))) for size in (2, 3))
        assert costs.of(plan) == (more - few) * 2**20, plan


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes costs at 64 channels a head, and rates."""

    def write(**parts):
        path = attention_costs.tuned_costs_path()
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({name: {"cpu float32 inference": points} for name, points in parts.items()}))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return write


@pytest.mark.parametrize("of_sizes", [[], [740, 790]], ids=["without sizes", "with sizes"])
def test_latency_is_products_at_their_rates_and_pairs_at_their_costs(tuned, of_sizes):
    tuned(costs=[[5, 700, 900, 800, 100, *of_sizes]], rates=[[8, 3, 1], [24, 5, 3]])  # 16 channels: 4 and 2
    costs = plan_costs.plan_costs(build("class token"), SPECS, "latency")
    tokens, dim, pairs = 17, 16, 2 * 17 * 17 * 8 / 64  # of 2 heads of 8 channels
    mlp, projection = 8 * tokens * dim**2 * 4, tokens * dim**2 * 2
    assert costs.layers[1, NONE, None] == mlp
    assert costs.layers[1, EXACT, None] == round(mlp + 4 * projection + 700 * pairs)
    assert costs.layers[1, REUSE, EXACT] == round(mlp + 2 * projection + 100 * pairs)
    assert costs.handing_on[EXACT] == round(200 * pairs)  # the map made and applied
    low_rank = 2 * projection + (2 * 3 * dim**2 + 3 * tokens * dim) * 2 + 700 * pairs * 3 / 17
    assert costs.layers[1, LOWRANK, None] == round(mlp + low_rank)
    assert costs.layers[3, NONE, None] == mlp / tokens  # of the class row alone
    assert costs.rest == 16 * 12 * dim * 2 + dim * 5 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latency_goes_by_the_costs_that_ship(dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = plan_costs.plan_costs(build("class token"), SPECS, "latency", dtype=dtype)
    assert all(cost > 0 for cost in costs.layers.values())


@pytest.mark.parametrize("parts", [{}, {"costs": [[5, 7, 9, 8, 1]]}], ids=["another dtype", "an old file"])
def test_latency_that_was_not_measured_is_refused(parts, tuned):
    if parts:
        tuned(**parts)
    dtype = torch.float32 if parts else torch.float16
    with pytest.raises(ValueError, match=r"run vitreuse tune --device cpu --dtype float(16|32)\.$"):
        plan_costs.plan_costs(build("class token"), SPECS, "latency", dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model's hub folder, and images."""
    root = tmp_path_factory.mktemp("search")
    draw = random.Random(1)
    (root / "images").mkdir()
    for number in range(6):
        Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(root / f"images/{number}.png")
    torch.manual_seed(0)
    save_hub_folder(build("class token"), root / "hub")
    return root


def argv(folder, *more):
    return ["search", str(folder / "hub"), "--data", str(folder / "images"), "--device", "cpu", *more]


def test_the_command_finds_the_same_plan_every_time(folder, capsys, tmp_path):
    results = []
    for _ in range(2):
        assert main(argv(folder, "--budget", "0.8", "-o", str(tmp_path), "--json")) == 0
        results.append(json.loads(capsys.readouterr().out))
    found = results[0]
    assert results[1] == found == json.loads((tmp_path / "search.json").read_text())
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert found["words"] == ["exact", "reuse", "lowrank:5", "span:3", "none"]
    assert found["rows"][0] == found["rows"][1]
    chosen = parse_plan(found["chosen"]["plan"], DEPTH)
    assert found["chosen"] in found["front"] and found["chosen"]["share"] <= 0.8
    assert found["chosen"]["cost"] == sum(count_macs(build("class token", chosen), theoretical=True).values())
    assert found["front"][-1] == {**found["front"][-1], "plan": "exact*4", "share": 1.0, "damage": 0.0}
    images = folder / "images"
    assert found["command"] == f"vitreuse convert {folder / 'hub'} --data {images} --plan '{chosen}' -o hub-macs-0.8"
    assert Counter(row["plan"] for row in found["presets"].values()) == Counter(
        ["exact reuse*2 exact", "exact reuse*2 exact", "lowrank:5*4", "span:3*2 exact span:3"]
    )
    for row in found["presets"].values():  # none is better than what was searched for
        assert all(better["damage"] <= row["damage"] for better in found["front"] if better["share"] == 1.0)


def test_a_plan_is_chosen_on_images_to_learn_from(folder, capsys, tmp_path):
    for split, number in (("train", 2), ("val", 3)):
        shutil.copytree(folder / "images", tmp_path / split)
        for path in sorted((tmp_path / split).iterdir())[number:]:
            path.unlink()
    found = []
    for more in ([], ["--split", "val"]):
        command = ["search", str(folder / "hub"), "--data", str(tmp_path), "--budget", "0.8", "--json", *more]
        assert main(command) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [(one["split"], one["num_images"]) for one in found] == [("train", 2), ("val", 3)]


def test_the_table_shows_a_dozen_rows_and_the_command_to_go_on_with(folder, capsys):
    assert main(argv(folder, "--budget", "0.8", "--words", "exact,none,reuse", "--rows", "5")) == 0
    shown = capsys.readouterr().out
    assert "of each image's maps 6 of " in shown
    assert shown.count("chosen") == 1 and "lowrank" not in shown
    assert "first and last layer" in shown and "exact reuse*2 exact" in shown
    assert shown.splitlines()[-1].startswith(f"vitreuse convert {folder / 'hub'} --data")
    rows = [{"cost": number} for number in range(1000)]
    few = thinned(rows, rows[17])
    assert len(few) == 12 and {0, 17, 999} <= {row["cost"] for row in few}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "1.5"], "argument --budget: 1.5 is no share of an exact model's cost: give a number above 0"),
        (["--words", "exact,reus"], "argument --words: in exact,reus, layer 1 is 'reus', but the words are"),
        (["--words", "reuse,none"], "argument --words: reuse,none is without exact, which layers are that stay as"),
        (["--dtype", "bfloat16"], "--dtype has no effect on macs: leave it out, or give --metric latency."),
        (
            ["--words", "exact,reuse", "--budget", "0.3"],
            "no plan of exact,reuse has 0.3 of the MACs of hub: the least is 0.842, and 0.55 with none too: raise",
        ),
        (["--budget", "0.3"], "no plan of exact,reuse,lowrank:5,span:3,none has 0.3 of the MACs of hub: the least is"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(more, sentence, folder, capsys):
    try:
        code = main(argv(folder, *more))
    except SystemExit as exit:
        code = exit.code
    told = capsys.readouterr().err
    assert code == 2 and told.startswith(f"vitreuse search: {sentence}") and told.count("\n") == 1
