"""The search for plans: its front against all plans of a toy, what plans cost, and the command."""

import itertools
import json
import random
from functools import cache, partial

import numpy as np
import pytest
import timm
import torch

from vitreuse import count_macs
from vitreuse.attention import costs as attention_costs
from vitreuse.compress.damage import Change
from vitreuse.compress.search import Space, best_within, least_cost, pareto_front
from vitreuse.compress.search.forecast import Forecast
from vitreuse.compress.search.refine import fits
from vitreuse.cost.measure import saved_memory_mib
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import EXACT, Plan, Spec, parse_plan
from vitreuse.plan.language import WHOLE

REUSE, LOWRANK, NONE = Spec("reuse"), Spec("lowrank", 3), Spec("none")
WORDS = (EXACT, REUSE, LOWRANK, NONE, Spec("skip"))
SPACE = Space(WORDS, depth=3, num_patches=8, num_hidden=8, merge_step=2, hidden_step=4)


class ToyCosts:
    """Random costs in whole numbers, with the methods of PlanCosts; exact parts cost most."""

    rest = 3

    def __init__(self, seed, space):
        self.seed, self.space = seed, space

    def _drawn(self, low, high, *about):
        return random.Random(repr((self.seed, about))).randint(low, high)

    def attention(self, layer, spec, anchor, patches):
        return 9 if spec == EXACT else self._drawn(1, 9, layer, str(spec), str(anchor), patches)

    def merging(self, layer, patches):
        return self._drawn(0, 1, "merge", layer, patches)

    def mlp(self, layer, hidden, patches):
        return 9 if hidden == self.space.num_hidden else self._drawn(0, 8, "mlp", layer, hidden, patches)

    def whole(self, layer, spec, patches):
        return self._drawn(0, 9, layer, str(spec), patches)

    def handing_on(self, layer, spec, patches):
        return self._drawn(0, 3, "map", layer, str(spec), patches)

    of = PlanCosts.of
    num_patches = property(lambda self: self.space.num_patches)
    num_hidden = property(lambda self: self.space.num_hidden)


def toy_forecast(seed, space, damages=64):
    """Random damages, in steps that add up without rounding; few of them make ties."""
    draw = random.Random(seed)

    def curve():
        return np.array([draw.randint(1, damages) / 64 for _ in space.levels])

    forecast = Forecast(space)
    for layer in range(space.depth):
        for spec in space.attention_words[1:]:
            for anchor in range(layer) if spec.word == "reuse" else [None]:
                forecast.attention[Change(layer, spec, anchor, None if anchor is None else EXACT)] = curve()
        for merged in space.merges(space.num_patches):
            forecast.merges[layer, merged] = curve()
        for hidden in space.hidden:
            forecast.hidden[layer, hidden] = curve()
        for spec in space.whole_words:
            forecast.whole[layer, spec] = curve()
    return forecast


@cache
def all_plans(space):
    """Every plan of a space, by the rules of the language alone."""
    return list(_all_plans(space))


def _all_plans(space):
    specs = [spec for spec in space.words if spec.word in WHOLE]
    for word, merged, hidden in itertools.product(space.attention_words, (0, 2, 4), space.hidden):
        try:
            specs.append(parse_plan(f"exact {space.spec(word, merged, hidden)}")[1])
        except ValueError:  # such as none-2 and none/0
            continue
    for chosen in itertools.product(specs, repeat=space.depth):
        try:
            plan = Plan(chosen)
        except ValueError:  # such as a reuse layer without a map before it
            continue
        if fits(space, plan):
            yield plan


def front_by_force(space, forecast, costs):
    most, kept = costs.of(space.exact), []
    for cost, damage in sorted((costs.of(plan), forecast.of(plan)) for plan in all_plans(space)):
        if cost <= most and (not kept or damage < kept[-1][1]):
            kept.append((cost, damage))
    return kept


@pytest.mark.parametrize(("seed", "damages"), [(0, 1), (1, 3), (2, 64), (3, 64)])
def test_the_front_is_that_of_all_plans(seed, damages):
    forecast, costs = toy_forecast(seed, SPACE, damages), ToyCosts(seed, SPACE)
    assert len(all_plans(SPACE)) > 3000
    front = pareto_front(SPACE, forecast, costs)
    assert [(one.cost, one.damage) for one in front] == front_by_force(SPACE, forecast, costs)
    assert all((one.cost, one.damage) == (costs.of(one.plan), forecast.of(one.plan)) for one in front)
    assert least_cost(SPACE, costs) == min(costs.of(plan) for plan in all_plans(SPACE))


def test_a_front_ends_in_the_exact_plan_and_gives_the_best_within_a_budget():
    front = pareto_front(SPACE, toy_forecast(1, SPACE), ToyCosts(1, SPACE))
    assert (front[-1].damage, front[-1].plan) == (0.0, SPACE.exact)
    assert best_within(front, front[2].cost) == best_within(front, front[3].cost - 1) == front[2]
    assert best_within(front, front[0].cost - 1) is None


def test_a_deep_model_at_many_levels_takes_seconds():
    space = Space((EXACT, REUSE, NONE), depth=24, num_patches=256, num_hidden=64, merge_step=32, hidden_step=16)
    front = pareto_front(space, toy_forecast(0, space, 2**20), ToyCosts(0, space))
    assert len(front) > 40
    damages = [one.damage for one in front]
    assert damages == sorted(damages, reverse=True)


def test_a_space_says_how_far_tokens_and_hidden_units_go():
    space = Space((EXACT,), depth=2, num_patches=10, num_hidden=7, merge_step=4, hidden_step=3)
    assert (space.levels, space.hidden) == ((10, 6, 2), (7, 6, 3, 0))
    assert ([*space.merges(10)], [*space.merges(6)], [*space.merges(2)]) == ([0, 4], [0], [0])
    bare = Space((EXACT, NONE), depth=2, num_patches=10, num_hidden=7)
    assert (bare.levels, bare.hidden, [*bare.merges(10)]) == ((10,), (7,), [0])
    with pytest.raises(ValueError, match=r"^words are without exact"):
        Space((NONE,), depth=2, num_patches=10, num_hidden=7)


# With a class token, whose row is all that the last layer computes, and without; a grid on which a span runs as tiles.
SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 5, "patch_size": 2}
MODELS = {
    "class token": {**SIZES, "img_size": 8},
    "average": {**SIZES, "img_size": 8, "global_pool": "avg", "class_token": False, "depth": 5},
    "tiles": {**SIZES, "img_size": 28},
    "two layers": {**SIZES, "img_size": 8, "depth": 2},
    "no classes": {**SIZES, "img_size": 8, "num_classes": 0, "global_pool": ""},
}


def build(name, plan=None):
    plan = plan or f"exact*{MODELS[name]['depth']}"
    return timm.create_model("vit_reuse_tiny_patch16_224", plan=str(plan), **MODELS[name])


def some_plans(depth, number=12):
    """Random plans of every word."""
    draw, found = random.Random(depth), []
    words = ["exact", "exact-2", "exact-3/24", "exact/8", "reuse", "reuse:1", "lowrank:3", "none", "linear", "skip"]
    while len(found) < number:
        try:
            found.append(Plan(tuple(parse_plan(f"exact {draw.choice(words)}")[1] for _ in range(depth))))
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("name", MODELS)
def test_macs_and_bytes_of_parts_add_up_to_those_of_the_model(name):
    model = build(name)
    macs, size = PlanCosts(model), PlanCosts(model, "bytes")
    for plan in some_plans(MODELS[name]["depth"]):
        with torch.device("meta"):
            made = build(name, plan)
        assert macs.of(plan) == sum(count_macs(made, theoretical=True).values()), plan
        assert size.of(plan) == sum(each.numel() * each.element_size() for each in made.parameters()), plan


def test_spans_cost_by_their_window():
    costs, plan = PlanCosts(build("tiles")), parse_plan("span:3 reuse exact-4 exact/0")
    with torch.device("meta"):
        assert costs.of(plan) == sum(count_macs(build("tiles", plan), theoretical=True).values())


@pytest.mark.parametrize("name", ["class token", "average"])
def test_memory_of_parts_adds_up_to_what_a_training_step_keeps(name):
    costs = PlanCosts(build(name), "memory")
    assert costs.handing_on(1, EXACT, 16) > 0  # the map, which is not kept where none reads it
    for plan in some_plans(MODELS[name]["depth"], 8):
        model = build(name, plan).train()
        few, more = (saved_memory_mib(partial(model, torch.randn(size, 3, 8, 8))) for size in (2, 3))
        assert costs.of(plan) == pytest.approx((more - few) * 2**20, rel=0.04), plan


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
    costs = PlanCosts(build("class token"), "latency")
    tokens, dim, pairs = 17, 16, 2 * 17 * 17 * 8 / 64  # of 2 heads of 8 channels
    mlp, projection = 8 * tokens * dim**2 * 4, tokens * dim**2 * 2
    assert costs.mlp(1, 64, 16) == mlp and costs.mlp(1, 32, 16) == mlp / 2
    assert costs.attention(1, NONE, None, 16) == 0
    assert costs.attention(1, EXACT, None, 16) == round(4 * projection + 700 * pairs)
    assert costs.attention(1, REUSE, EXACT, 16) == round(2 * projection + 100 * pairs)
    assert costs.handing_on(1, EXACT, 16) == round(200 * pairs)  # the map made and applied
    low_rank = 2 * projection + (2 * 3 * dim**2 + 3 * tokens * dim) * 2 + 700 * pairs * 3 / 17
    assert costs.attention(1, LOWRANK, None, 16) == round(low_rank)
    assert costs.mlp(3, 64, 16) == mlp / tokens  # of the class row alone
    assert costs.rest == 16 * 12 * dim * 2 + dim * 5 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latency_goes_by_the_costs_that_ship(dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = PlanCosts(build("class token"), "latency", dtype=dtype)
    assert all(costs.of(plan) > 0 for plan in some_plans(4))


@pytest.mark.parametrize("parts", [{}, {"costs": [[5, 7, 9, 8, 1]]}], ids=["another dtype", "an old file"])
def test_latency_that_was_not_measured_is_refused(parts, tuned):
    if parts:
        tuned(**parts)
    dtype = torch.float32 if parts else torch.float16
    with pytest.raises(ValueError, match=r"run vitreuse tune --device cpu --dtype float(16|32)\.$"):
        PlanCosts(build("class token"), "latency", dtype=dtype)


