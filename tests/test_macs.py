"""The closed form of every registered model against two counters that know nothing of it or of each other."""

from collections import defaultdict

import pytest
import timm
import torch

import vitreuse
from vitreuse.cost.counters import fvcore_macs, torch_flops, training_flops
from vitreuse.model.registry import plain_name

NAMES = timm.list_models(module="registry")
RESOLUTIONS = (224, pytest.param(384, marks=pytest.mark.proof))  # px
# Of each method and family, without the time that large models take where products are really computed.
SMALL_NAMES = [name for name in NAMES if "_tiny_" in name or ("deit3" in name and "_small_" in name)]
SIZES = ((112, 512), (160, 160))  # px; a span of 7 cuts the first, 7 x 32 patches, into tiles and not the second


def build(name, **keywords):
    """The model without memory, where initialising it would only take time."""
    return timm.create_model(name, device="meta", weight_init="skip", **keywords).eval()


def by_module(parts):
    """The closed form summed for the submodules that make the products, and for the whole model as ""."""
    sums = defaultdict(int)
    for part, macs in parts.items():
        fields = part.split(".")
        sums[".".join(fields[:3]) if fields[0] == "blocks" else fields[0]] += macs
        sums[""] += macs
    return {module: macs for module, macs in sums.items() if macs}


def of_modules(counts, modules):
    return {module: counts.get(module, 0) for module in modules}


@pytest.mark.parametrize("size", RESOLUTIONS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.proof] if "_base_" in name or "_large_" in name else []) for name in NAMES],
)
def test_closed_form_equals_both_counters(name, size):
    """Only the patches are really embedded: the meta device can trace all but a convolution."""
    model = build(name, img_size=size)
    image = torch.zeros(1, 3, size, size)
    expected = by_module(vitreuse.count_macs(model))
    assert of_modules(torch_flops(model, image), expected) == {part: 2 * macs for part, macs in expected.items()}
    embed = model.patch_embed.to_empty(device="cpu")
    embed.register_forward_hook(lambda module, images, tokens: tokens.to("meta"))
    assert of_modules(fvcore_macs(model, image), expected) == expected


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SMALL_NAMES)
def test_closed_form_equals_both_counters_where_products_run(name, size):
    model = build(name, img_size=size)
    image = torch.zeros(1, 3, *size)
    expected = by_module(vitreuse.count_macs(model))
    assert of_modules(torch_flops(model, image), expected) == {part: 2 * macs for part, macs in expected.items()}
    real = model.to_empty(device="cpu")
    for tensor in (*real.parameters(), *real.buffers()):
        tensor.data.zero_()
    assert of_modules(fvcore_macs(real, image), expected) == expected


@pytest.mark.parametrize("plan", ["exact*3", "exact reuse*2", "lowrank:7 reuse:1 none", "span:3 reuse exact"])
@pytest.mark.parametrize("backend", ["map", "qk"])
def test_training_is_three_forward_passes_less_the_gradient_of_images(plan, backend):
    keywords = {"reuse_backend": backend} if "reuse" in plan else {}
    model = build("vit_reuse_tiny_patch16_224", plan=plan, depth=3, img_size=(112, 512), **keywords).train()
    macs = vitreuse.count_macs(model)
    flops = 2 * (3 * sum(macs.values()) - macs["patch_embed"])
    assert training_flops(model, torch.zeros(2, 3, 112, 512)) == flops


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_plain_model_but_what_the_plan_leaves_out_and_adds(name):
    model, plain = build(name), build(plain_name(name))
    dim, num_tokens = model.embed_dim, model.num_prefix_tokens + model.patch_embed.num_patches
    more = {"reuse": -2 * dim * (dim + 1), "lowrank": 64 * num_tokens}
    expected = vitreuse.count_params(plain) + sum(more.get(spec.word, 0) for spec in model.plan)
    assert vitreuse.count_params(model) == expected


def test_plain_deit_as_published():
    """timm's tables, less the products of LayerNorm that they count."""
    for size, gmacs in (("tiny", 1.254), ("small", 4.599), ("base", 17.564)):
        exact = build(f"deit_reuse_{size}_patch16_224", plan="exact*12", global_pool="avg")
        assert sum(vitreuse.count_macs(exact).values()) / 1e9 == pytest.approx(gmacs, abs=5e-4)


@pytest.mark.parametrize(
    "plan, macs_ratio, params_ratio", [("exact reuse*6 exact*5", 0.905, 0.920), ("lowrank:64*12", 0.858, None)]
)
def test_ratios_before_the_last_layer_saving(plan, macs_ratio, params_ratio):
    """Average pooling reads every row of the last layer, so that nothing is saved there."""
    exact = build("deit_reuse_small_patch16_224", plan="exact*12", global_pool="avg")
    model = build("deit_reuse_small_patch16_224", plan=plan, global_pool="avg")
    macs = [sum(vitreuse.count_macs(m).values()) for m in (model, exact)]
    assert macs[0] / macs[1] == pytest.approx(macs_ratio, abs=5e-4)
    if params_ratio is not None:
        assert vitreuse.count_params(model) / vitreuse.count_params(exact) == pytest.approx(params_ratio, abs=6e-4)


def test_theoretical_count_of_a_span_is_its_neighbourhoods():
    """Five by seven patches, width 3: a corner sees 4 patches, an edge 6, the inside 9, and all see the class token."""
    model = build("vit_mixspan_tiny_patch16_224", plan="span:3*2", depth=2, img_size=(80, 112), global_pool="avg")
    inside, edges, corners = 3 * 5, 2 * (3 + 5), 4
    pairs = 9 * inside + 6 * edges + 4 * corners + 35 + 36
    assert vitreuse.count_macs(model, theoretical=True)["blocks.0.attn.logits"] == pairs * 192


def test_carried_queries_and_keys_are_multiplied_again():
    maps, pairs = (
        build("vit_lazy_tiny_patch16_224", reuse_backend=backend, global_pool="avg") for backend in ("map", "qk")
    )
    again = sum(vitreuse.count_macs(pairs).values()) - sum(vitreuse.count_macs(maps).values())
    assert again == 8 * 197**2 * 192
    assert vitreuse.count_macs(pairs, theoretical=True) == vitreuse.count_macs(maps, theoretical=True)
