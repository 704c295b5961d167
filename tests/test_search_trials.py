"""Plans put together from fitted pieces and tried: against whole conversions, and in a search that was killed."""

import itertools
import json
import random
import time
from itertools import islice

import pytest
import timm
import torch
from cases import randomized

from vitreuse import parse_plan
from vitreuse.compress.convert import convert
from vitreuse.compress.damage import Change
from vitreuse.compress.fidelity import mean_distance, output_distance
from vitreuse.compress.search import Space, search
from vitreuse.compress.search.audit import audit
from vitreuse.compress.search.clock import Clock
from vitreuse.compress.search.constant import constant_merging
from vitreuse.compress.search.delivery import deliveries, nearest
from vitreuse.compress.search.forecast import measure_changes, tries
from vitreuse.compress.search.found import make_pieces
from vitreuse.compress.search.healing import heal_for, mirrored_in_turns, regained
from vitreuse.compress.search.pieces import Pieces, fit_pieces
from vitreuse.compress.search.refine import Refiner, Step, best_steps, fits, neighbours
from vitreuse.compress.search.trials import Trials, begin_trials, parting
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.data.samples import Images
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy
from vitreuse.plan import EXACT, Plan, Spec

SIZES = {"depth": 4, "embed_dim": 24, "num_heads": 3, "img_size": 20, "patch_size": 4, "num_classes": 5}
WORDS = tuple(parse_plan(f"exact {word}")[1] for word in ["exact", "reuse", "lowrank:5", "none", "linear", "skip"])
SPACE = Space(WORDS, depth=4, num_patches=25, num_hidden=96, merge_step=3, hidden_step=24)
KINDS = {
    "classes": {},
    "average": {"global_pool": "avg", "class_token": False},
    "features": {"num_classes": 0, "global_pool": "", "init_values": 0.1},
    "no biases": {"proj_bias": False, "num_classes": 0},
}


def original(**keywords):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **keywords})
    return exact_copy(randomized(model).double().eval())


def batches(num_images=12, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num_images, 3, 20, 20, generator=generator, dtype=torch.float64).split(5))


def quiet(total=1):
    return WorkProgress("", "", total, enabled=False)


@pytest.fixture(scope="module", params=KINDS)
def pieces(request):
    return make_pieces(original(**KINDS[request.param]), batches(32), SPACE)


def some_plans(number, space=SPACE, seed=0):
    draw, found = random.Random(seed), []
    while len(found) < number:
        plan = space.exact
        for _ in range(5):
            plan = draw.choice([changed for *_, changed in neighbours(space, plan)])
        found.append(plan)
    return found


def test_what_is_not_fitted_is_what_convert_makes(pieces):
    images = batches()[0]
    for text in ("exact*4", "exact-3*4", "exact reuse*2 exact-6", "lowrank:5 exact*2 reuse", "exact reuse:1 exact*2"):
        plan = parse_plan(text)
        wanted = convert(pieces.original, plan, pieces.distances).model
        assert torch.equal(pieces.model(plan)(images), wanted(images)), text


def test_a_trial_is_the_distance_of_the_model_that_is_put_together(pieces):
    trials = Trials.on(pieces, batches())
    models = [pieces.original]
    for plan in some_plans(6):
        if {spec.word for spec in plan} & {"none", "skip"}:
            continue  # what these leave out is added to the tokens
        parts = []
        models[1:] = [pieces.model(plan)]
        for images in batches():
            with torch.no_grad():
                answers = [each(images) if each.num_classes else each.forward_features(images) for each in models]
            parts.append(output_distance(pieces.original, *answers))
        assert trials.distance(plan) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-6, abs=1e-12)


def test_a_model_that_pools_nothing_is_compared_by_its_class_token_and_patches():
    model, images = original(**KINDS["features"]), batches(5)[0]
    converted = convert(model, "exact-3*4").model
    with torch.no_grad():
        wanted, found = model.forward_features(images), converted.forward_features(images)
    cosine = torch.nn.functional.cosine_similarity(wanted, found, dim=-1)
    expected = 1 - (cosine[:, 0] + cosine[:, 1:].mean(1)) / 2
    torch.testing.assert_close(output_distance(model, wanted, found).double(), expected, atol=1e-6, rtol=0)
    trials = Trials.on(Pieces(model), [images])
    assert trials.distance(parse_plan("exact-3*4")) == pytest.approx(float(expected.mean()), abs=1e-6)


def test_a_trial_goes_on_from_where_a_plan_parts(pieces):
    whole = Trials.on(pieces, batches())
    for base in some_plans(4):
        standing = whole.run(base)
        for *_, changed in itertools.islice(neighbours(SPACE, base), 0, None, 5):
            partly = Trials.on(pieces, batches())
            assert partly.distance(changed, standing) == pytest.approx(whole.distance(changed), rel=1e-6, abs=1e-12)


def test_plans_part_at_the_anchor_of_a_map_that_is_read_behind():
    def first(one, other):
        return parting(parse_plan(one), parse_plan(other))

    assert first("exact*4", "exact*2 none exact") == 2
    assert first("exact reuse exact*2", "exact reuse*2 exact") == 0
    assert first("exact reuse exact*2", "exact reuse exact skip") == 3
    assert first("exact*2 none reuse", "exact*2 none exact") == 1
    assert first("exact*4", "exact*4") == 3


def test_pieces_bring_the_answers_nearer_than_plain_removal():
    model = original(**KINDS["features"])
    found = make_pieces(model, batches(64), SPACE)
    bare = Pieces(model, found.distances, found.units)
    images = batches(24, seed=5)
    for text in ("exact/72*4", "exact*2 exact/24 exact", "exact none exact*2", "exact skip exact*2", "exact/0 exact*3"):
        near, far = (Trials.on(of, images).distance(parse_plan(text)) for of in (found, bare))
        assert near < far, text


def test_a_layer_that_is_affine_is_found_whole():
    model = original(**KINDS["features"])
    with torch.no_grad():  # the MLP's hidden units are all alike far above zero, where GELU is the identity
        model.blocks[2].attn.proj.weight.zero_()
        model.blocks[2].mlp.fc2.weight.zero_()
    found = fit_pieces(model, batches(32), WORDS, SPACE.hidden, None, quiet())
    trials = Trials.on(found, batches(8, seed=3))
    for text in ("exact*2 linear exact", "exact*2 skip exact", "exact*2 exact/0 exact", "exact*2 exact/24 exact"):
        assert trials.distance(parse_plan(text)) < 1e-6, text


def test_what_was_tried_is_not_tried_again_after_a_kill(tmp_path, monkeypatch):
    found = make_pieces(original(), batches(16), SPACE)
    path = tmp_path / "trials.jsonl"
    path.write_text('{"about": "the search"}\n')
    forecast = measure_changes(Trials.on(found, batches(4), path), SPACE, quiet())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]) + lines[40][:10])  # as a kill leaves it
    made = []
    build = Pieces.model
    monkeypatch.setattr(Pieces, "model", lambda self, plan: made.append(str(plan)) or build(self, plan))
    again = measure_changes(Trials.on(found, batches(4), path), SPACE, quiet())
    known = {json.loads(line)["plan"] for line in lines[1:40]}
    assert not (known & set(made)) - {str(each.from_plan) for each in tries(SPACE)}  # those are run for their images
    for kind in ("attention", "merges", "hidden", "whole"):
        ours, theirs = getattr(forecast, kind), getattr(again, kind)
        assert ours.keys() == theirs.keys()
        assert all(theirs[key] == pytest.approx(curve) for key, curve in ours.items())
    count = len(path.read_text().splitlines())
    measure_changes(Trials.on(found, batches(4), path), SPACE, quiet())
    assert len(path.read_text().splitlines()) == count


def test_a_forecast_knows_every_plan_of_its_space_and_is_right_about_single_changes():
    found = make_pieces(original(), batches(16), SPACE)
    trials = Trials.on(found, batches(4))
    forecast = measure_changes(trials, SPACE, quiet())
    assert all(forecast.of(plan) >= 0 for plan in some_plans(50))
    assert forecast.of(SPACE.exact) == 0
    for text in ("exact*2 none exact", "linear exact*3", "exact reuse*2 exact", "exact*3 lowrank:5"):
        assert forecast.of(parse_plan(text)) == pytest.approx(max(trials.distance(parse_plan(text)), 1e-9), rel=1e-6)
    key = Change(2, Spec("reuse"), 0, EXACT)
    chain = [trials.distance(parse_plan(text)) for text in ("exact reuse exact*2", "exact reuse*2 exact")]
    assert forecast.attention[key][0] == pytest.approx(max(chain[1] - chain[0], 1e-9))


def test_each_change_takes_its_part_of_what_others_leave_where_answers_are_tokens():
    trials = Trials.on(make_pieces(original(**KINDS["features"]), batches(16), SPACE), batches(4))
    forecast = measure_changes(trials, SPACE, quiet())
    alone = [trials.distance(parse_plan(text)) for text in ("linear exact*3", "exact*2 none exact")]
    assert min(alone) > 0.01
    for text, distance in zip(("linear exact*3", "exact*2 none exact"), alone, strict=True):
        assert forecast.of(parse_plan(text)) == pytest.approx(distance)
    assert forecast.of(parse_plan("linear exact none exact")) == pytest.approx(1 - (1 - alone[0]) * (1 - alone[1]))


class AddedUp:
    """Trials whose distances add up over the layers: 1 for a change, less in later layers."""

    def __init__(self):
        self.known = {}

    def distance(self, plan, standing=None):
        lost = (
            (0 if spec == EXACT else 1 + 0.5 * spec.merged + (0 if spec.hidden is None else (96 - spec.hidden) / 24))
            * (1 + layer if spec.word != "linear" else 9)
            for layer, spec in enumerate(plan)
        )
        return sum(lost)

    def run(self, plan):
        return None


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5])
def test_steps_by_real_distances_reach_the_best_plan_where_damages_add_up(budget):
    words = (EXACT, Spec("linear"))
    space = Space(words, depth=4, num_patches=25, num_hidden=96, hidden_step=24)
    costs, trials = PlanCosts(original()), AddedUp()
    most = budget * costs.of(space.exact)
    options = [space.spec(EXACT, hidden=hidden) for hidden in space.hidden] + [Spec("linear")]
    plans = [Plan(chosen) for chosen in itertools.product(options, repeat=4)]
    best = min(trials.distance(plan) for plan in plans if costs.of(plan) <= most)

    class Flat:
        def of(self, plan):
            return 0.0

    told = []
    refiner = Refiner(trials, space, Flat(), costs.of, most, lambda: False, lambda *found: told.append(found))
    found = refiner.refine(parse_plan("linear*4"))
    assert found.is_best and found.distance == best and costs.of(found.plan) <= most
    distances = [distance for _, distance in told]
    assert distances == sorted(distances, reverse=True) and told[-1] == (found.plan, best)


def test_no_step_is_taken_once_time_is_up():
    space = Space((EXACT, Spec("linear")), depth=4, num_patches=25, num_hidden=96)
    start = parse_plan("linear*4")
    refiner = Refiner(AddedUp(), space, None, lambda plan: 1, 2, lambda: True, lambda *found: None)
    assert refiner.refine(start) == (start, 36, False)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_combination_of_steps_is_that_of_all(seed):
    draw = random.Random(seed)
    steps = [Step(draw.randrange(4), EXACT, draw.randint(-5, 5), draw.randint(-9, 9)) for _ in range(9)]
    slack, size = draw.randint(-4, 4), draw.randint(1, 4)
    least = 0
    for count in range(1, size + 1):
        for chosen in itertools.combinations(steps, count):
            is_allowed = len({step.layer for step in chosen}) == count and sum(step.cost for step in chosen) <= slack
            least = min(least, sum(step.damage for step in chosen)) if is_allowed else least
    found = best_steps(steps, slack, size, 1.0)
    assert sum(step.damage for step in found) == least
    assert sum(step.cost for step in found) <= max(slack, 0)
    assert len({step.layer for step in found}) == len(found) <= size


def test_neighbours_are_plans_of_the_space():
    for plan in some_plans(10):
        found = list(neighbours(SPACE, plan))
        assert len(found) > 20
        for layer, spec, changed in found:
            assert changed[layer] == spec != plan[layer] and fits(SPACE, changed)
            assert [*changed[:layer], *changed[layer + 1 :]] == [*plan[:layer], *plan[layer + 1 :]]
            assert spec.merged % 3 == 0 and (spec.hidden is None or spec.hidden % 24 == 0)


def test_a_search_keeps_to_the_budget_and_is_the_same_every_time():
    model = original(**KINDS["features"])
    costs = PlanCosts(model)
    found = [search(model, batches(24), batches(5, seed=7), SPACE, costs, 0.7, minutes=2) for _ in range(2)]
    exact = costs.of(SPACE.exact)
    for one in found:
        assert one.is_best and one.chosen.cost == costs.of(one.chosen.plan) <= 0.7 * exact
        assert one.distance == one.trials.distance(one.chosen.plan) <= one.trials.distance(one.start.plan)
    assert found[0].chosen == found[1].chosen and found[0].front == found[1].front
    assert search(model, batches(24), batches(5, seed=7), SPACE, costs, 0.01, minutes=0) is None


def test_what_an_earlier_start_has_tried_has_used_up_its_time(tmp_path):
    found = make_pieces(original(**KINDS["features"]), batches(16), SPACE)
    path, plans = tmp_path / "trials.jsonl", some_plans(5)
    first = Trials.on(found, batches(4), path)
    wanted = [first.distance(plan) for plan in plans]
    assert first.seconds_saved == 0 and len(first.asked) == len(set(plans))
    again = Trials.on(found, batches(4), path)
    assert [again.distance(plan) for plan in plans * 2] == wanted * 2
    assert again.seconds_saved == pytest.approx(sum(trial.seconds for trial in first.known.values())) and wanted
    assert Clock(time.monotonic() + 60, quiet()).is_over(61) and not Clock(time.monotonic() + 60, quiet()).is_over(9)


def test_a_file_of_trials_is_of_one_model_and_its_images(tmp_path):
    path, one = tmp_path / "trials.jsonl", original()
    begin_trials(path, one, batches(8), batches(4, seed=7), None)
    begin_trials(path, one, batches(8), batches(4, seed=7), None)
    assert path.read_text().count("\n") == 1
    other = original()
    other.blocks[0].mlp.fc2.weight.data[0, 0] += 1e-6
    for others in ((other, batches(8), batches(4, seed=7)), (one, batches(9), batches(4, seed=7))):
        with pytest.raises(ValueError, match="trials of another model or version of vitreuse, or on other images"):
            begin_trials(path, *others, None)
    with pytest.raises(ValueError, match="trials of another model"):
        begin_trials(path, one, batches(8), batches(4), None)
    with pytest.raises(ValueError, match="trials of another model"):
        begin_trials(path, one, batches(8), batches(4, seed=7), (256, 0))


def test_too_few_images_are_refused_before_anything_is_done():
    model = original(**KINDS["features"])
    costs = PlanCosts(model)
    with pytest.raises(ValueError, match="3 images are too few: one of 4 decides, so give 4 or more"):
        search(model, batches(3), batches(4, seed=7), SPACE, costs, 0.7)
    with pytest.raises(ValueError, match="there are 0 images to try plans on"):
        search(model, batches(8), [], SPACE, costs, 0.7)


def test_means_that_no_bias_could_take_are_in_no_piece():
    model = original(**KINDS["features"], reg_tokens=2, no_embed_class=True)
    found = make_pieces(model, batches(8), SPACE)
    assert {layer for layer, _ in found.means} == {1, 2, 3}
    assert {layer for layer, _ in make_pieces(original(**KINDS["features"]), batches(8), SPACE).means} == {0, 1, 2, 3}


def test_what_is_handed_over_keeps_to_the_budget_and_is_the_nearest():
    model = original(**KINDS["features"])
    costs = PlanCosts(model)
    plans = {"searched": parse_plan("exact linear exact*2"), "constant merging": parse_plan("exact-3*4")}
    pieces = make_pieces(model, batches(24), SPACE)
    made = deliveries(pieces, plans, batches(24), batches(6, seed=7))
    assert list(made) == [name + fitted for name in plans for fitted in (", fitted", "")]
    for delivery in made.values():
        assert delivery.distance == mean_distance(model, delivery.conversion.model, batches(6, seed=7))
    assert made["searched, fitted"].distance < made["searched"].distance
    least = min(made, key=lambda name: made[name].distance)
    assert nearest(made, costs, costs.of(SPACE.exact)) == least
    cheapest = min(plans.values(), key=costs.of)
    assert made[nearest(made, costs, costs.of(cheapest))].plan == cheapest


def test_an_audit_is_in_turns_with_the_best_plain_model_and_asks_the_original_once():
    model = original(**KINDS["features"]).float()
    plain = [timm.create_model("vit_tiny_patch16_224", **{**SIZES, **KINDS["features"]}) for _ in range(2)]
    models = {"same": exact_copy(model), "skipped": convert(model, "skip*4").model}
    shown = Images(torch.cat([images.float() for images in batches(6)]), batch_size=4)
    asked = []
    model.patch_embed.register_forward_hook(lambda _, images, tokens: asked.append(len(tokens)))
    found = audit(model, models, lambda fused: plain[fused], shown)
    assert asked == [4, 2]
    assert found["same"].distance == pytest.approx(0, abs=1e-6) and found["same"].agreement.cosine == pytest.approx(1)
    assert found["skipped"].distance > 0.1 and found["skipped"].agreement.num_images == 6
    assert found["skipped"].speedup > found["same"].speedup > 0


def test_constant_merging_is_the_least_that_keeps_the_cost():
    costs = PlanCosts(original())
    exact = costs.of(SPACE.exact)
    plan = constant_merging(SPACE, costs, 0.7 * exact)
    merged = plan[0].merged
    assert costs.of(plan) <= 0.7 * exact < costs.of(Plan((Spec("exact", merged=merged - 1),) * 4))
    halved = parse_plan("exact-12 exact-6 exact-3 exact-2")
    assert constant_merging(SPACE, costs, costs.of(halved)) == halved
    assert constant_merging(SPACE, costs, costs.of(halved) - 1) is None


def test_a_short_healing_learns_and_leaves_the_model_as_it_is():
    model = original(**KINDS["features"]).float()
    converted = convert(model, "skip exact*3").model.eval()
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    fitted, tried, shown = ([few.float() for few in batches(*part)] for part in ((24,), (6, 7), (6, 3)))
    pupil = heal_for(model, converted.requires_grad_(False), fitted, tried, 0.03, 8)
    found = regained(model, converted, pupil, shown)
    assert (found.before, found.after) == tuple(mean_distance(model, of, shown) for of in (converted, pupil.model))
    assert found.rate == 1e-4 and found.after < found.before and found.num_steps > 9
    assert all(torch.equal(before[key], value) for key, value in converted.state_dict().items())


def test_healing_that_leads_away_is_not_kept(monkeypatch):
    """Rates by which nothing can be learned, on images of another kind than those that are looked at."""
    monkeypatch.setattr("vitreuse.compress.search.healing.RATES", (10.0,))
    model = original(**KINDS["features"]).float()
    converted = convert(model, "exact*3 none").model.eval()
    fitted, tried = ([few.float() for few in batches(*part)] for part in ((12,), (6, 7)))
    pupil = heal_for(model, converted, fitted, tried, 0.005, 8)
    assert pupil.num_steps > 1 and mean_distance(model, pupil.model, tried) == mean_distance(model, converted, tried)


def test_images_to_heal_on_are_mirrored_every_second_time():
    one, other = torch.arange(6.0).reshape(1, 1, 2, 3), torch.ones(2, 1, 2, 3)
    found = [*islice(mirrored_in_turns([one, other], 2), 5)]
    expected = [one, other, one.flip(-1), other.flip(-1), one]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert [len(part) for part in islice(mirrored_in_turns([torch.ones(5, 1, 2, 3)], 2), 4)] == [2, 2, 1, 2]


def test_no_mean_is_added_that_no_bias_of_the_plan_could_carry():
    model = original(**KINDS["no biases"])
    trials = Trials.on(make_pieces(model, batches(32), SPACE), batches(4))
    plan = parse_plan("exact none*2 exact")
    assert trials.distance(plan) == pytest.approx(mean_distance(model, convert(model, plan).model.eval(), batches(4)))


def test_trials_are_of_one_architecture_too(tmp_path):
    """The same weights, by name and number, which are pooled in another way."""
    begin_trials(tmp_path / "trials.jsonl", original(num_classes=0), batches(8), batches(4), None)
    other = original(num_classes=0, global_pool="")
    assert len(other.state_dict()) == len(original(num_classes=0).state_dict())
    with pytest.raises(ValueError, match="trials of another model"):
        begin_trials(tmp_path / "trials.jsonl", other, batches(8), batches(4), None)


def test_answers_that_are_no_numbers_are_the_farthest_of_all(monkeypatch):
    model, costs = original(**KINDS["features"]), PlanCosts(original(**KINDS["features"]))
    run = Trials._run_from

    def broken(self, plan, first, states):
        distances, passed = run(self, plan, first, states)
        return distances * (float("nan") if any(spec.word == "linear" for spec in plan) else 1), passed

    monkeypatch.setattr(Trials, "_run_from", broken)
    found = search(model, batches(24), batches(5, seed=7), SPACE, costs, 0.7, minutes=0.05)
    assert found is not None and not any(spec.word == "linear" for spec in found.chosen.plan)
