"""Trained models converted into plans: heads matched, tokens pooled, weights moved."""

import itertools
import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from cases import randomized
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitreuse import parse_plan
from vitreuse.__main__ import main
from vitreuse.attention.lowrank import grid_pooling
from vitreuse.cli.source import sample_images
from vitreuse.compress.convert import convert
from vitreuse.compress.fidelity import agreement
from vitreuse.compress.fitting import fit_projections
from vitreuse.compress.head_matching import match_heads, order_of_heads, rows_of_heads
from vitreuse.compress.recording import attention_maps
from vitreuse.compress.redundancy import measure_head_errors, measure_redundancy
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import resolve_targets
from vitreuse.io.durable import durable_folder
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy
from vitreuse.model.preprocessing import image_settings


def test_heads_are_matched_at_the_least_sum():
    distances = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    best = min(itertools.permutations(range(5), 3), key=lambda own: sum(distances[i, own[i]] for i in range(3)))
    assert match_heads(distances) == list(best)
    assert list(best) != distances.argmin(1).tolist()  # not each for itself


def test_heads_that_read_come_first():
    assert order_of_heads([3, 0], 5) == [3, 0, 1, 2, 4]
    assert rows_of_heads([2, 0, 1], 2).tolist() == [4, 5, 0, 1, 2, 3]


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), num_prefix_tokens=st.integers(0, 3), data=st.data())
def test_grid_pooling_averages_every_patch_once(rows, columns, num_prefix_tokens, data):
    num_cells = data.draw(st.integers(1, rows * columns))
    pooled = grid_pooling((rows, columns), num_prefix_tokens, num_prefix_tokens + num_cells)
    prefix, cells = pooled.split([num_prefix_tokens, num_cells])
    assert torch.equal(prefix, torch.eye(num_prefix_tokens, num_prefix_tokens + rows * columns))
    weights = cells[:, num_prefix_tokens:]
    assert torch.allclose(weights.sum(1), torch.ones(num_cells))
    assert ((weights > 0).sum(0) == 1).all()
    inside = (weights > 0).unflatten(1, (rows, columns))
    assert all((cell.any(1)[:, None] & cell.any(0)).equal(cell) for cell in inside)  # a rectangle


def test_grid_pooling_makes_square_cells():
    inside = (grid_pooling((14, 14), 1, 50) > 0)[1:, 1:].unflatten(1, (14, 14))
    assert all((cell.any(1).sum(), cell.any(0).sum()) == (2, 2) for cell in inside)


def test_grid_pooling_of_no_more_rows_than_prefix_tokens_is_a_mean():
    assert torch.allclose(grid_pooling((3, 3), 1, 1), torch.full((1, 10), 0.1))


def trained(name="vit_tiny_patch16_224", **keywords):
    """A small model of timm whose every parameter is random, in float64; a test's own keywords stand over these."""
    torch.manual_seed(1)
    sizes = {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": 64, "num_classes": 5}
    return randomized(timm.create_model(name, **{**sizes, **keywords})).double().eval()


def pixels(model, num_images=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_images, *image_settings(model)["input_size"], generator=generator, dtype=torch.float64)


FAMILIES = {
    "ViT with qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "global_pool": "avg"}),
    "other sizes": ("vit_tiny_patch16_224", {"img_size": (48, 80), "mlp_ratio": 2.3, "qkv_bias": False, "in_chans": 1}),
    "DeiT III": ("deit3_small_patch16_224", {}),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "num_classes": 0}),
    "any size": ("vit_small_patch14_dinov2", {"img_size": 56, "dynamic_img_size": True, "num_classes": 0}),
    "all tokens": ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0}),
    "CLIP": ("vit_base_patch32_clip_quickgelu_224", {}),
    "BEiT-3": ("beit3_base_patch16_224", {}),
    "without class token": ("vit_wee_patch16_reg1_gap_256", {}),
    "RMSNorm": ("test_vit4", {}),
    "ours": ("vit_lazy_tiny_patch16_224", {"plan": "exact*3"}),
}


@pytest.mark.parametrize(("name", "keywords"), FAMILIES.values(), ids=FAMILIES)
def test_a_plan_that_changes_nothing_converts_exactly(name, keywords, tmp_path):
    model = trained(name, **keywords).float()
    images = pixels(model).float()
    converted = convert(model, "exact*3").model
    state = model.state_dict()
    assert state.keys() == converted.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(images))  # all rows of the last layer, as timm's forward
        assert torch.equal(converted.forward_head(converted.forward_features(images)), wanted)
        assert (converted(images) - wanted).abs().max() <= 1e-6 * wanted.abs().max()  # sums in another order
        save_hub_folder(converted, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(images), converted(images))


FOREIGN = {
    "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224 takes no plan, since it is no VisionTransformer",
    "convnext_atto": "convnext_atto takes no plan",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock in layer 0",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention in layer 0",
    "vit_base_patch16_rpn_224": "ResPostBlock in layer 0",
    "vit_tiny_r_s16_p8_224": "HybridEmbed",
    "vit_reuse_tiny_patch16_224": "'reuse' already: give the model with exact attention",
}


@pytest.mark.parametrize(("name", "said"), FOREIGN.items())
def test_what_no_plan_expresses_is_refused(name, said):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=said):
        convert(model, "exact*12")


@pytest.mark.parametrize("plan", ["exact-3*3", "exact*2 exact/5", "exact/96*3", "linear exact*2", "exact*2 skip"])
def test_what_is_converted_already_is_refused(plan):
    word = next(str(spec) for spec in parse_plan(plan) if str(spec) != "exact")
    said = f"is '{word}' already: give the model with exact attention, all tokens and all hidden units in every layer."
    model = trained("vit_reuse_tiny_patch16_224", plan=plan)
    for convert_it in (lambda: convert(model, "exact*3"), lambda: exact_copy(model)):
        with pytest.raises(ValueError, match=re.escape(said)):
            convert_it()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: setattr(model.blocks[1].norm2, "eps", 1e-3), r"norm2 = LayerNorm\(eps=0.001\)"),
        (lambda model: setattr(model.blocks[2].mlp, "act", torch.nn.ReLU()), "mlp.act = ReLU"),
        (
            lambda model: model.blocks[1].register_forward_hook(lambda _, inputs, output: 2 * output),
            "makes something else",
        ),
    ],
)
def test_what_no_weight_shows_is_refused(change, said):
    model = trained()
    change(model)
    with pytest.raises(ValueError, match=said):
        convert(model, "exact*3")


PLANS = ["exact reuse reuse:1", "exact reuse:2 reuse:1 none reuse:2 reuse", "exact none reuse:0 reuse:3 exact reuse:1"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("keywords", [
    {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.1},
    {"reg_tokens": 2},
])
def test_converted_heads_read_what_they_are_matched_to(plan, keywords):
    model = trained(depth=len(parse_plan(plan)), **keywords)
    depth = len(model.blocks)
    distances = torch.rand(depth, depth, 3, 3, generator=torch.Generator().manual_seed(4))
    conversion = convert(model, plan, distances)
    assert any(matched != sorted(matched) for matched in conversion.matches.values())
    images = pixels(model)
    assert torch.allclose(conversion.model(images), by_hand(model, plan, conversion.matches, images))
    assert not torch.allclose(convert(model, plan).model(images), conversion.model(images))


def by_hand(model, plan, matches, images):
    """The plan on the original's weights, no head moved: maps are handed on as a list, new ones first."""
    x, handed = model._pos_embed(model.patch_embed(images)), []
    for layer, (block, spec) in enumerate(zip(model.blocks, parse_plan(plan), strict=True)):
        if spec.word != "none":
            attn, y = block.attn, block.norm1(x)
            q, k, v = attn.qkv(y).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            maps = [*(attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).softmax(-1).unbind(1)]
            matched = matches.get(layer, [])
            own = [maps[head] for head in range(3) if head not in matched]
            for head, read in zip(matched, handed, strict=False):
                maps[head] = read
            handed = own + handed[: len(matched)]
            mixed = (torch.stack(maps, 1) @ v).transpose(1, 2).flatten(2)
            x = x + block.ls1(attn.proj(attn.norm(mixed)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


MIXTURE = "exact reuse:1-3/10 linear exact/0 skip none/5 exact-2"


def test_what_is_new_touched_and_dropped_is_named():
    conversion = convert(trained(depth=7), MIXTURE)
    mlp = [f"mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")]
    norm1, norm2, qkv, proj = (
        [f"{part}.{kind}" for kind in ("weight", "bias")] for part in ("norm1", "norm2", "attn.qkv", "attn.proj")
    )
    assert conversion.new == ("blocks.2.linear.weight", "blocks.2.linear.bias")
    own = [f"attn.{part}.{kind}" for part in ("qk", "v", "proj") for kind in ("weight", "bias")]
    assert conversion.touched == (*(f"blocks.1.{name}" for name in (*own, *mlp)), *(f"blocks.5.{name}" for name in mlp))
    whole = {2: [*norm1, *norm2, *qkv, *proj, *mlp], 3: [*norm2, *mlp], 5: [*norm1, *qkv, *proj]}
    wanted = {f"blocks.{layer}.{name}" for layer, names in {**whole, 4: whole[2]}.items() for name in names}
    for layer, count in ((1, 10), (5, 5)):
        wanted |= {f"blocks.{layer}.{name} (all but {count} units)" for name in mlp if name != "mlp.fc2.bias"}
    wanted |= {f"blocks.1.attn.qkv.{kind} (all but attn.qk.{kind}, attn.v.{kind})" for kind in ("weight", "bias")}
    assert len(conversion.dropped) == len(wanted) and set(conversion.dropped) == wanted


@pytest.mark.parametrize("plan", ["exact-3*3", "exact/96*3", "exact*2 exact-5/96"])
def test_fewer_tokens_and_as_many_units_touch_nothing(plan):
    model = trained()
    conversion = convert(model, plan)
    assert (conversion.new, conversion.touched, conversion.dropped) == ((), (), ())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in conversion.model.state_dict().items())


@pytest.mark.parametrize(("plan", "around"), [
    ("exact/10 linear none/5 skip exact/0 exact", "exact*6"),
    ("exact-3/10 linear none/5 skip exact-2/0 exact", "exact-3 exact*3 exact-2 exact"),
    ("exact linear reuse:2-5/10 skip exact/20 reuse/0", "exact none reuse:2-5 none exact reuse"),
])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("keywords", [{"init_values": 0.3, "qk_norm": True}, {"global_pool": "avg", "reg_tokens": 2}])
@pytest.mark.filterwarnings("ignore:plan .* merges more than half")
def test_layers_and_units_that_go_are_as_if_their_outputs_were_zero(plan, around, named, keywords):
    """Of the original, in which they are made zero by hand, under a plan that has all layers and units."""
    model = trained(depth=6, **keywords)
    units = {layer: [*range(spec.hidden)] for layer, spec in enumerate(parse_plan(plan)) if spec.hidden}
    converted = convert(model, plan, units=units if named else None).model
    with torch.no_grad():
        for layer, (block, spec) in enumerate(zip(model.blocks, parse_plan(plan), strict=True)):
            fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
            sizes = fc1.norm(dim=1) * fc2.norm(dim=0)
            kept = units.get(layer, []) if named else sizes.topk(spec.hidden or 0).indices.tolist()
            if spec.hidden:
                fc2[:, [unit for unit in range(96) if unit not in kept]] = 0
            for part in [block.attn.proj] * (not spec.has_attention) + [block.mlp.fc2] * (
                spec.hidden == 0 or spec.word in ("linear", "skip")
            ):
                part.weight.zero_()
                part.bias.zero_()
    images = pixels(model)
    wanted = convert(model, around).model
    assert torch.allclose(converted(images), wanted(images))
    assert torch.allclose(converted.forward_features(images), wanted.forward_features(images))


def test_more_merged_tokens_than_half_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("vitreuse.compress.convert.exact_copy", lambda model: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="layer 0 is 'exact-9', but 16 patch tokens are left there"):
        convert(trained(), "exact-9 exact*2")


def test_heads_in_another_order_are_found():
    """A second layer that computes the first one's maps in another order loses nothing by reading them."""
    model = trained(depth=2)
    first, second = model.blocks
    with torch.no_grad():
        for part in (first.attn.proj, first.mlp.fc2):  # so that both layers get the same tokens
            part.weight.zero_()
            part.bias.zero_()
        second.norm1.load_state_dict(first.norm1.state_dict())
        rows = rows_of_heads([2, 0, 1], 8)
        for mine, its in zip(second.attn.qkv.parameters(), first.attn.qkv.parameters(), strict=True):
            mine[:48] = its.unflatten(0, (3, 24))[:2, rows].flatten(0, 1)
    images = pixels(model)
    progress = WorkProgress("", "", 3, enabled=False)
    for distances in (
        measure_head_errors(exact_copy(model), [(images,)], progress),
        measure_redundancy(model, [(images,)], progress).variation,
    ):
        conversion = convert(model, "exact reuse", distances)
        assert conversion.matches == {1: [1, 2, 0]}
        assert torch.allclose(conversion.model(images), model(images))
    assert not torch.allclose(convert(model, "exact reuse").model(images), model(images))


@pytest.mark.parametrize("keywords", [{"init_values": 0.3}, {"global_pool": "avg"}])
def test_head_errors_are_those_of_the_layers_output(keywords):
    model = exact_copy(trained(**keywords))
    images = pixels(model)
    errors = measure_head_errors(model, [(images[:2],), (images[2:],)], WorkProgress("", "", 3, enabled=False))
    given = []
    hook = model.blocks[2].attn.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    maps = [made.weights for made in attention_maps(model, images)]
    hook.remove()
    attn, ls1 = model.blocks[2].attn, model.blocks[2].ls1
    values = attn.qkv(given[0])[..., 48:].unflatten(2, (3, 8)).transpose(1, 2)

    def output(weights):
        mixed = ls1(attn.proj((weights @ values).transpose(1, 2).flatten(2)))
        return mixed if "global_pool" in keywords else mixed[:, :1]

    for read, own in itertools.product(range(3), range(3)):
        changed = maps[2].clone()
        changed[:, own] = maps[1][:, read]
        wanted = (output(changed) - output(maps[2])).square().sum() / 3
        assert torch.isclose(errors[1, 2, read, own].double(), wanted, rtol=1e-5)
    assert not errors[2, 1].any()


@pytest.mark.proof
@pytest.mark.parametrize("keywords", [{"reg_tokens": 2}, {"global_pool": "avg"}])
def test_head_errors_of_a_sample_of_rows_are_right_in_the_mean_over_draws(keywords):
    """Of an image that comes 401 times, each time with rows of its own; all of them where patches are no more."""
    model = exact_copy(trained(**keywords))
    progress = WorkProgress("", "", 401, enabled=False)
    image = pixels(model)[:1]
    wanted = measure_head_errors(model, [(image,)], progress)
    found = measure_head_errors(model, [(image.expand(401, -1, -1, -1),)], progress, num_rows=7)
    assert torch.allclose(found, wanted, rtol=0.1)
    reads_few = "global_pool" not in keywords
    assert torch.allclose(found[:, 2], wanted[:, 2], rtol=1e-4) == reads_few
    assert not torch.allclose(found[0, 1], wanted[0, 1], rtol=1e-4)
    assert torch.equal(measure_head_errors(model, [(image,)], progress, num_rows=16), wanted)


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_token_projections_start_as_pooling(sharing):
    model = trained()
    conversion = convert(model, "lowrank:9 exact lowrank:9", lowrank_sharing=sharing)
    for key in conversion.new:
        projection = conversion.model.get_parameter(key)
        assert torch.equal(projection.float(), grid_pooling((4, 4), 1, 9).expand(projection.shape))
    count = {"none": 4, "headwise": 4, "key_value": 2, "layerwise": 1}[sharing]
    assert len(conversion.new) == count
    names = [f"{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")]
    assert conversion.touched == tuple(f"blocks.{layer}.attn.{name}" for layer in (0, 2) for name in names)


@pytest.mark.parametrize("options", [{}, {"lowrank_sharing": "none"}, {"lowrank_projection": "conv"}])
def test_fitted_projections_come_nearer_and_are_the_same_again(options, monkeypatch):
    monkeypatch.setattr("vitreuse.compress.fitting.FIT_STEPS", 30)
    model = trained()
    images = pixels(model, 128)
    pooled, fitted, again = (convert(model, "lowrank:7 lowrank:5 exact", **options) for _ in range(3))
    errors = fit_projections(fitted, [images[:64], images[64:]])
    fit_projections(again, [images[:64], images[64:]])
    assert list(errors) == [0, 1]
    assert all(after < before for before, after in errors.values())
    for key, value in fitted.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
        assert torch.equal(value, pooled.model.state_dict()[key]) == (key not in fitted.new)

    def distance(conversion):
        return (conversion.model.forward_features(images) - model.forward_features(images)).norm()

    assert distance(fitted) < distance(pooled)


def test_tokens_units_and_layers_that_go_leave_the_fit_as_it_is(monkeypatch):
    """Each layer is fitted on the tokens of the original."""
    monkeypatch.setattr("vitreuse.compress.fitting.FIT_STEPS", 3)
    model = trained(depth=5)
    plans = ("exact lowrank:5 lowrank:9 exact*2", "linear lowrank:5/0 lowrank:9/7 exact-3 skip")
    whole, less = (convert(model, plan) for plan in plans)
    assert fit_projections(whole, [pixels(model, 4)]) == fit_projections(less, [pixels(model, 4)])
    for key in whole.new:
        assert torch.equal(whole.model.state_dict()[key], less.model.state_dict()[key])


@pytest.mark.parametrize("is_alike", [True, False])
def test_projections_stay_as_they_were_where_images_kept_aside_do_not_gain(is_alike, monkeypatch):
    monkeypatch.setattr("vitreuse.compress.fitting.FIT_STEPS", 30)
    model = trained()
    images = pixels(model, 1).repeat(8, 1, 1, 1)
    if not is_alike:
        images[3::4] = images[3::4].flip(-1, -2) * 9
    pooled, fitted = (convert(model, "exact*2 lowrank:9") for _ in range(2))
    before, after = fit_projections(fitted, [images])[2]
    state, start = fitted.model.state_dict(), pooled.model.state_dict()
    assert (after < before) == is_alike
    assert all(torch.equal(state[key], start[key]) for key in fitted.new) != is_alike


def test_images_in_other_batches_are_fitted_to_the_same(monkeypatch):
    """Which images are kept aside, and what their error is, does not go by batches; three images are too few."""
    monkeypatch.setattr("vitreuse.compress.fitting.FIT_STEPS", 0)
    model = trained()
    images = pixels(model, 8)
    (once, _), (again, _) = (
        fit_projections(convert(model, "exact*2 lowrank:9"), images.split(size))[2] for size in (8, 3)
    )
    assert once == pytest.approx(again, rel=1e-5) and once > 0
    with pytest.raises(ValueError, match="3 images are too few"):
        fit_projections(convert(model, "exact*2 lowrank:9"), [images[:3]])


def test_one_projection_for_all_layers_is_not_fitted():
    conversion = convert(trained(), "lowrank:9*3", lowrank_sharing="layerwise")
    with pytest.raises(ValueError, match="choose the pooled start"):
        fit_projections(conversion, [pixels(conversion.model)])


def test_agreement_is_that_of_probabilities_and_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    others = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    labels = torch.tensor([1, 1, 1])
    original, converted = (Said(said) for said in (logits, others))
    batches = [(torch.arange(2), labels[:2]), (torch.arange(2, 3), labels[2:])]
    found = agreement(original, converted, batches, has_labels=True)
    p = 1 / (1 + math.exp(-1))
    divergence = (p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 3
    expected = (200 / 3, divergence, 100 / 3, 200 / 3)
    measured = (found.equal_top1, found.kl_divergence_nats, found.original_top1, found.converted_top1)
    assert measured == pytest.approx(expected, rel=1e-5)
    assert (found.num_images, found.cosine) == (3, None)
    assert agreement(original, converted, batches, has_labels=False).original_top1 is None
    features = agreement(Said(logits, 0), Said(others, 0), batches, has_labels=False)
    assert features.cosine == pytest.approx((4 / 5 + 1 + 1) / 3) and features.equal_top1 is None


class Said(torch.nn.Module):
    """A model whose images are numbers of its answers."""

    def __init__(self, answers, num_classes=2):
        super().__init__()
        self.answers, self.num_classes = torch.nn.Parameter(answers), num_classes

    def forward(self, numbers):
        return self.answers[numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hub folder of a small model of five classes, images of as many, and weights of a model."""
    root = tmp_path_factory.mktemp("convert")
    random = np.random.RandomState(0)
    for split, label in itertools.product(("train", "val"), range(5)):
        (root / "data" / split / str(label)).mkdir(parents=True)
        pixels = random.randint(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "data" / split / str(label) / "0.png")
    (root / "empty").mkdir()
    save_hub_folder(trained(patch_size=8, img_size=32).float(), root / "model")
    return root


def command(folder, *argv):
    return main(["convert", str(folder / "model"), *map(str, argv)])


def test_the_command_writes_a_folder_that_timm_loads(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitreuse.compress.fitting.FIT_STEPS", 20)
    argv = ("--plan", "exact reuse:2 lowrank:6", "-o", tmp_path / "new", "--data", folder / "data", "--json")
    assert command(folder, *argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "new" / "conversion.json").read_text()) == {
        key: value for key, value in result.items() if key != "output"
    }
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
    ]
    assert (result["heads"], result["lowrank_start"], result["images"]) == ("error", "fitted", {"train": 5, "val": 5})
    assert result["new"] == ["blocks.2.attn.key_proj"] and result["macs"][0] > result["macs"][1]
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    converted = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).eval()
    assert result["params"] == [sum(p.numel() for p in of.parameters()) for of in (model, converted)]
    (images, labels) = next(iter(read_images(folder, model)))
    measured = asdict(agreement(model, converted, [(images, labels)], has_labels=True))
    for name in ("cosine", "worst_cosine", "patch_cosine", "worst_patch_cosine"):
        assert result["agreement"].pop(name) is measured.pop(name) is None
    assert result["agreement"] == pytest.approx(measured, rel=1e-4)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "new"), "--plan", "exact*3", "-o", str(tmp_path / "again")]) == 2
    assert "give the model with exact attention" in capsys.readouterr().err


@pytest.mark.parametrize("is_fitted", [True, False])
def test_the_command_says_what_became_of_tokens_units_and_layers(folder, is_fitted, tmp_path, capsys):
    argv = ("--plan", "exact-3/10 linear skip", "-o", tmp_path / "new", "--data", folder / "data")
    assert command(folder, *argv, *([] if is_fitted else ["--no-fit"])) == 0
    told = " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert result["new"] == ["blocks.1.linear.weight", "blocks.1.linear.bias"]
    assert len(result["touched"]) == 4 and "blocks.2.mlp.fc1.weight" in result["dropped"]
    assert (result["heads"], result["lowrank_start"], result["units"]) == (None, None, "that say most")
    parts = [[0, "mlp"], [1, "linear"], [2, "mean"]] if is_fitted else []
    assert [[fit["layer"], fit["part"]] for fit in result["layer_fits"]] == parts
    assert (result["layers"], result["linear_start"]) == (("fitted",) * 2 if is_fitted else ("as they come", "zero"))
    assert result["agreement"]["num_images"] == 5 and result["macs"][0] > 2 * result["macs"][1]
    assert "2 new and 4 touched parameters, untrained, 27 dropped, by name in conversion.json" in told
    assert ("linear layers: zero" in told) != is_fitted == ("of images that were not fitted" in told)
    assert "hidden units: those that say most stay" in told
    converted = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).eval()
    assert str(converted.plan) == "exact-3/10 linear skip"
    assert main(["convert", str(tmp_path / "new"), "--plan", "exact*3", "-o", str(tmp_path / "again")]) == 2
    assert "layer 0 is 'exact-3/10' already: give the model with exact attention" in capsys.readouterr().err


def read_images(folder, model):
    (target,) = resolve_targets([str(folder / "model")])
    return sample_images(target, model, folder / "data", 5).batches(5)


@pytest.mark.parametrize(("argv", "heads", "start"), [
    (("--data", "{tmp}/data", "--no-match-heads", "--lowrank-start", "random"), "in order", "random"),
    (("--data", "{tmp}/data", "--match-by", "variation", "--lowrank-sharing", "layerwise"), "variation", "pooled"),
    (("--lowrank-projection", "mean"), "in order", None),
    ((), "in order", "pooled"),
])
def test_what_is_done_is_what_is_asked_and_said(folder, argv, heads, start, tmp_path, capsys):
    argv = [text.format(tmp=folder) for text in argv]
    assert command(folder, "--plan", "exact reuse lowrank:6", "-o", tmp_path / "new", *argv, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["heads"], result["lowrank_start"]) == (heads, start)
    assert (result["agreement"] is None) == ("--data" not in argv)
    assert result["rows"] == ([17, 17] if heads == "variation" else None)


@pytest.mark.parametrize("by", ["error", "variation"])
def test_heads_are_matched_by_the_rows_that_are_asked_for(folder, by, tmp_path, capsys):
    argv = ["--plan", "exact reuse*2", "-o", tmp_path / "new", "--data", folder / "data", "--match-by", by, "--rows", 3]
    assert command(folder, *argv) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"heads of reuse layers: matched by {by} of each image's maps 4 of 17 rows" in told
    assert json.loads((tmp_path / "new" / "conversion.json").read_text())["rows"] == [4, 17]


@pytest.mark.parametrize(("argv", "said"), [
    (("--plan", "exact*4"), "plan has 4 layers, the model has 3"),
    (("--plan", "exact*3", "-o", "{tmp}/model"), "/model holds .* already: give a folder that is new or empty"),
    (("--plan", "exact*3", "--data", "{tmp}/empty"), "neither shards, nor class folders, nor images"),
    (("--plan", "exact-9 exact*2"), "16 patch tokens are left there, of which at most 8 can merge"),
    (("--plan", "exact/97 exact*2"), "layer 0 is 'exact/97', and trained are 96 hidden units for it: give /96 or less"),
    (("--plan", "exact-3 reuse exact"), "the map of layer 0 is of the tokens before the merge in layer 0"),
    (("--plan", "exact-3 linear skip", "--match-by", "error"), "--match-by has no effect on plan"),
    (("--plan", "exact*3", "--no-match-heads"), "--no-match-heads has no effect on plan 'exact[*]3'"),
    (("--plan", "exact reuse*2", "--lowrank-start", "pooled"), "--lowrank-start has no effect"),
    (("--plan", "exact reuse*2", "--match-by", "error"), "--match-by needs images"),
    (("--plan", "exact reuse*2", "--rows", "7"), "--rows needs images"),
    (("--plan", "exact*3", "--rows", "7"), "--rows has no effect on plan"),
    (("--plan", "exact reuse*2", "--rows", "7", "--no-match-heads"), "--rows has no effect on plan"),
    (("--plan", "lowrank:4*3", "--lowrank-start", "fitted"), "--lowrank-start fitted needs images.*give --data DIR"),
    (("--plan", "exact*3", "--no-fit"), "--no-fit has no effect on plan"),
    (("--plan", "exact linear exact", "--no-fit"), "--no-fit has no effect on 0 images, fitting takes 4"),
    (("--plan", "linear*3", "--no-fit", "--data", "{tmp}/data", "--images", "3"), "has no effect on 3 images"),
    (("--plan", "exact*3", "--checkpoint", "{tmp}/empty"), "cannot be read as weights"),
])
def test_wrong_input_is_one_sentence(folder, argv, said, tmp_path, capsys):
    assert command(folder, "-o", tmp_path / "new", *(text.format(tmp=folder) for text in argv)) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and re.search(said, told), told
    assert not any(tmp_path.iterdir())


def test_a_name_without_weights_and_weights_of_another_size_are_one_sentence(folder, tmp_path, capsys):
    for argv, said in (
        (["swin_tiny_patch4_window7_224"], "takes no plan, since it is no VisionTransformer"),
        (["vit_tiny_patch16_224", "--checkpoint", folder / "model" / "model.safetensors"], "does not fit"),
        (["vit_reuse_tiny_patch16_224"], "neither a file nor pretrained weights"),
    ):
        assert main(["convert", *map(str, argv), "--plan", "exact*12", "-o", str(tmp_path / "new")]) == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1 and said in told


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), durable_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("half")
        assert not (tmp_path / "new").exists()
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())
    with durable_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "whole"]
    with pytest.raises(ValueError, match="new holds whole already"), durable_folder(tmp_path / "new"):
        pass
