"""Layers fitted in closed form: the algebra against naive sums, and models whose best weights are known."""

import resource
from dataclasses import replace

import pytest
import timm
import torch
from cases import randomized
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from train.heal import Healing
from vitreuse import convert, parse_plan
from vitreuse.attention import Carry
from vitreuse.compress import closed_form
from vitreuse.compress.closed_form import fit_layers, merged_alike, row_weights
from vitreuse.compress.fidelity import mean_distance
from vitreuse.compress.hidden_units import contributing_units
from vitreuse.compress.recording import inputs_of
from vitreuse.compress.ridge import NormalEquations, best_fit
from vitreuse.io.progress import WorkProgress
from vitreuse.io.spool import Spool
from vitreuse.model.copies import exact_copy

SIZES = {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": 20, "patch_size": 4, "num_classes": 5}


def trained(**keywords):
    """A small model of timm whose every parameter is random, in float64."""
    torch.manual_seed(1)
    return randomized(timm.create_model("vit_tiny_patch16_224", **{**SIZES, **keywords})).double().eval()


def pixels(num_images, seed=2):
    return torch.randn(num_images, 3, 20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(model, plan, num_images=48, batch_size=7, **keywords):
    conversion = convert(model, plan, **keywords)
    with WorkProgress("fitting", "layers", len(model.blocks), enabled=False) as progress:
        return conversion, fit_layers(conversion, pixels(num_images).split(batch_size), progress)


@torch.no_grad()
def distance(model, other):
    """Squared error of all tokens on images that were in no fit, over their square."""
    images = pixels(16, seed=3)
    wanted = model.forward_features(images)
    return float((other.forward_features(images) - wanted).square().sum() / wanted.square().sum())


def rows(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features, errors = (torch.randn(num_rows, width, generator=generator, dtype=torch.float64) for width in (5, 3))
    return features, errors, torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("has_bias", [True, False])
@given(strength=st.sampled_from([0.0, 1e-3, 1.0, 50.0]), cut=st.integers(1, 30))
def test_normal_equations_are_those_of_all_rows(has_bias, strength, cut):
    features, errors, weights = rows(31)
    parts = [
        NormalEquations.of(*(values[own] for values in (features, errors, weights)), has_bias)
        for own in (slice(cut), slice(cut, None))
    ]
    equations = parts[0] + parts[1]
    design = F.pad(features, (0, 1), value=1.0) if has_bias else features
    penalty = strength * (weights[:, None] * features.square()).sum(0).mean()
    root, held = weights.sqrt()[:, None], penalty.sqrt() * torch.eye(5, design.shape[1], dtype=torch.float64)
    wanted = torch.cat([root * errors, errors.new_zeros(5, 3)])
    naive = torch.linalg.lstsq(torch.cat([root * design, held]), wanted).solution
    found = equations.solve(strength)
    torch.testing.assert_close(found, naive)
    left = (weights[:, None] * (errors - design @ found).square()).sum()
    assert equations.error(found) == pytest.approx(float(left))


def test_a_feature_that_is_another_one_leaves_a_solution():
    features, errors, weights = rows(31)
    features[:, 4] = features[:, 0]
    equations = NormalEquations.of(features, errors, weights, has_bias=True)
    less = NormalEquations.of(features[:, :4], errors, weights, has_bias=True)
    assert equations.error(equations.solve(0.0)) == pytest.approx(less.error(less.solve(0.0)))


def test_rows_aside_choose_the_strength_and_whether_anything_is_done():
    features, noise, weights = rows(12)
    many = rows(4000, seed=1)
    fitted = NormalEquations.of(features, noise, weights, has_bias=True)
    assert best_fit(fitted, NormalEquations.of(*many, has_bias=True)) is None  # noise teaches nothing
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noisy = NormalEquations.of(features, features @ matrix + noise, weights, has_bias=True)
    aside = NormalEquations.of(many[0], many[0] @ matrix, many[2], has_bias=True)
    found = best_fit(noisy, aside)
    errors = {strength: aside.error(noisy.solve(strength)) for strength in (1e-5, 1e-1, 1e2)}
    assert found is not None and found.after <= min(errors.values()) < found.before == aside.energy
    assert found.strength not in (1e-5, 1e2)


def test_tokens_are_averaged_as_they_merged():
    places = torch.tensor([[0, 1, 1, 2, 1, 2], [0, 1, 2, 2, 2, 2]])
    sizes = torch.stack([torch.bincount(own, minlength=3) for own in places])
    x = torch.randn(2, 6, 4)
    found = merged_alike(x, Carry(sizes=sizes, places=places))
    for image, place in ((0, 1), (0, 2), (1, 2)):
        torch.testing.assert_close(found[image, place], x[image, places[image] == place].mean(0))
    assert merged_alike(x, Carry()) is x


def test_a_spool_gives_back_what_was_put_in_and_leaves_nothing():
    with Spool() as spool:
        for number in range(3):
            spool.append((torch.full((2,), number), Carry()))
        spool.replace(lambda value: (value[0] + 5, value[1]))
        assert [int(tensor[0]) for tensor, _ in spool] == [5, 6, 7] and len(spool) == 3
        folder = spool._path(0).parent
        assert folder.exists()
    assert not folder.exists()


def test_a_full_disk_is_one_sentence():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Spool() as spool, pytest.raises(OSError, match="set TMPDIR to a folder on a larger disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            spool.append(torch.zeros(9999))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_exact_plan_is_left_alone():
    conversion, found = fitted(trained(), "exact*3")
    assert found == [] and distance(conversion.original, conversion.model) == 0


def test_a_fit_stays_if_the_whole_model_comes_nearer(monkeypatch):
    plan = "linear exact/48 none"
    conversion, found = fitted(trained(), plan)
    aside = pixels(48)[3::4]
    assert found[-1].distance == pytest.approx(mean_distance(conversion.original, conversion.model, [aside]))
    left = [fit.distance for fit in found]
    assert left == sorted(left, reverse=True) and left[-1] < left[0]
    best = closed_form.best_fit

    def opposite(equations, others):
        fit = best(equations, others)
        return fit and replace(fit, update=-fit.update)

    monkeypatch.setattr(closed_form, "best_fit", opposite)
    conversion, found = fitted(trained(), plan)
    as_it_comes = convert(trained(), plan).model
    assert found and all(fit.strength is None and fit.after == fit.before for fit in found)
    assert all(torch.equal(*pair) for pair in zip(conversion.model.parameters(), as_it_comes.parameters(), strict=True))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("init_values", [None, 0.3])
def test_attention_that_says_the_same_of_all_tokens_is_a_bias(layer, init_values):
    """Values that are a bias alone: what a none layer leaves out is constant, and nothing is lost."""
    model = trained(init_values=init_values)
    with torch.no_grad():
        model.blocks[layer].attn.qkv.weight[48:] = 0
    plan = " ".join("none" if number == layer else "exact" for number in range(3))
    assert distance(model, convert(model, plan).model) > 1e-3
    conversion, found = fitted(model, plan)
    assert distance(model, conversion.model) < 1e-20
    mended = [(after, "mlp") for after in range(layer, 3)]
    assert [(fit.layer, fit.part) for fit in found] == [(layer, "mean"), *mended]
    assert found[0].after < 1e-20 < found[0].before


def test_the_mean_passes_a_skipped_layer_by():
    model = trained()
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.attn.qkv.weight[48:] = 0
            block.mlp.fc2.weight[:] = 0
    conversion, found = fitted(model, "exact skip*2")
    assert distance(model, conversion.model) < 1e-20
    assert [fit.part for fit in found] == ["mean", "mean"]


def test_a_layer_that_adds_nothing_is_skipped_for_nothing():
    model = trained()
    with torch.no_grad():
        for parameter in (*model.blocks[1].attn.proj.parameters(), *model.blocks[1].mlp.fc2.parameters()):
            parameter[:] = 0
    conversion, found = fitted(model, "exact skip exact")
    assert distance(model, conversion.model) < 1e-20 and found[0].before == 0


@pytest.mark.parametrize("class_token", [True, False])
def test_no_mean_is_written_where_a_norm_follows_or_tokens_are_left_out(class_token):
    kinds = {"pre_norm": True} if class_token else {"no_embed_class": True}
    _, found = fitted(trained(**kinds), "none exact*2")
    assert [fit.part for fit in found] == ["mlp"] * 3


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_units_that_say_what_others_say_can_go(init_values):
    """Of pairs of equal units one each is kept: the refit writes twice as much through it."""
    model = trained(init_values=init_values)
    with torch.no_grad():
        for mlp in (block.mlp for block in model.blocks):
            for parameter in (mlp.fc1.weight, mlp.fc1.bias):
                parameter[48:] = parameter[:48]
    units = {1: [*range(48)]}
    assert distance(model, convert(model, "exact exact/48 exact", units=units).model) > 1e-3
    conversion, found = fitted(model, "exact exact/48 exact", units=units)
    assert distance(model, conversion.model) < 1e-7  # the least ridge is no zero
    assert [(fit.layer, fit.part) for fit in found] == [(1, "mlp"), (2, "mlp")]


def test_a_layer_that_is_affine_becomes_linear():
    """Attention to the token itself cannot be had, so none: an MLP without its nonlinearity, behind no norm."""
    model = trained()
    block = model.blocks[1]
    with torch.no_grad():
        block.attn.proj.weight[:] = block.attn.proj.bias[:] = 0
        block.mlp.fc2.weight[:] = 0
    conversion, found = fitted(model, "exact linear exact")
    assert distance(model, conversion.model) < 1e-12 and found[0].part == "linear"
    torch.testing.assert_close(conversion.model.blocks[1].linear.bias, block.mlp.fc2.bias)


def test_prefix_tokens_count_together_as_much_as_all_patches():
    sizes = torch.tensor([[1.0, 1, 3, 2, 1], [1, 1, 1, 4, 1]])
    weights = row_weights(torch.zeros(2, 5, 4), sizes, 2)
    assert weights.tolist() == [[3, 3, 3, 2, 1], [3, 3, 1, 4, 1]]
    assert torch.equal(row_weights(torch.zeros(2, 5, 4), None, 0), torch.ones(2, 5))


@pytest.mark.parametrize(
    "plan",
    [
        "exact linear exact",
        "exact exact/24 exact",
        "linear exact/24 exact",
        "exact reuse exact",
        "span:3*2 exact",
        "lowrank:7*3",
        "exact-4 exact-3 exact-2",
        "exact reuse-4 exact-3",
        "exact-4 linear exact/30",
        "exact/0 exact-5/0 exact",
    ],
)
def test_what_was_fitted_is_nearer_on_other_images(plan):
    model = trained()
    before = distance(model, convert(model, plan).model)
    conversion, found = fitted(model, plan, num_images=96)
    assert distance(model, conversion.model) < before
    assert found and all(fit.after <= fit.before for fit in found)


def test_neither_batches_nor_the_original_matter():
    model = trained()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    (first, found), (second, again) = (fitted(model, "exact-4 linear exact/30", 48, size) for size in (7, 48))
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(value, second.model.state_dict()[name], rtol=1e-6, atol=1e-9)
    assert [fit.strength for fit in found] == [fit.strength for fit in again]
    assert all(parameter.requires_grad for parameter in first.model.parameters())


def test_few_images_are_refused():
    with pytest.raises(ValueError, match=r"^3 images are too few: one of 4 decides, so give 4 or more\.$"):
        fitted(trained(), "exact linear exact", num_images=3)


def hidden_of(model, layer, images):
    """What the second matrix of an MLP reads, (rows, units)."""
    with inputs_of(model.blocks[layer].mlp.fc2) as seen, torch.no_grad():
        model(images)
    return seen[0].flatten(0, 1)


def test_units_that_say_most_stay():
    """Against a regression of each unit on those chosen before; one that is always the same says nothing of its own."""
    model = exact_copy(trained())
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[[3, 50]] = 0
        model.blocks[1].mlp.fc1.bias[[3, 50]] = 9
    hidden, columns = hidden_of(model, 1, pixels(6)), model.blocks[1].mlp.fc2.weight.detach().T
    num_patches = len(hidden) // 6 - 1
    counts = torch.tensor([num_patches, *[1] * num_patches]).repeat(6)  # a class token as much as all patches
    covariance = torch.cov(hidden.T, correction=0, fweights=counts)
    covariance = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(96)
    chosen: list[int] = []
    while len(chosen) < 30:
        said = torch.linalg.solve(covariance[chosen][:, chosen], covariance[chosen])
        left = covariance.diagonal() - (covariance[chosen] * said).sum(0)
        worth = left * columns.square().sum(1)
        chosen.append(max({*range(96)} - {*chosen}, key=lambda unit: float(worth[unit])))
    found = contributing_units(model, parse_plan("exact exact/30 exact/96"), pixels(6).split(4))
    assert found == {1: sorted(chosen)} and not {3, 50} & {*chosen}
    assert contributing_units(model, parse_plan("exact*3"), []) == {}


def test_of_units_that_say_the_same_one_goes_without_a_loss():
    model = trained(num_classes=0, global_pool="")
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(model.blocks[1].mlp.fc1, name)
            rows[40:] = rows[:40].repeat(2, *[1] * (rows.ndim - 1))[:56]
    plan = "exact exact/40 exact"
    units = contributing_units(exact_copy(model), parse_plan(plan), pixels(24).split(8))
    conversion, _ = fitted(model, plan, units=units)
    assert sorted(unit % 40 for unit in units[1]) == list(range(40))
    assert distance(model, conversion.model) < 1e-6


def test_a_fitted_conversion_is_annealed_from_its_original():
    """The fit moves the output projection of a reuse layer and leaves its values, by which healing knows the heads."""
    conversion, found = fitted(trained(), "exact reuse exact")
    assert any(fit.part == "attention" and fit.strength is not None for fit in found)
    assert Healing(conversion.model, conversion.original).held[1].order == [0, 1, 2]


def test_large_tokens_of_half_precision_overflow_nothing():
    model = trained(init_values=40.0).half()
    conversion = convert(model, "exact linear exact-4")
    with WorkProgress("fitting", "layers", 3, enabled=False) as progress:
        found = fit_layers(conversion, pixels(16).half().split(8), progress)
    assert all(0 < fit.after <= fit.before < 10 for fit in found)


def test_a_mean_counts_in_the_channels_that_it_can_be_written_in():
    """A LayerScale of pruned channels lets nothing through to the tokens."""
    model = trained(init_values=0.5, num_classes=0, global_pool="")
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma[:12], block.ls2.gamma[:12] = 0.0, 0.0
    conversion, found = fitted(model, "exact none exact")
    mean = next(fit for fit in found if fit.part == "mean")
    assert mean.strength is not None  # it was worth writing
    aside = [pixels(48)[3::4]]
    assert found[-1].distance == pytest.approx(mean_distance(model, conversion.model.eval(), aside))
