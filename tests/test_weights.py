"""Plain checkpoints in plans, and plans that reuse nothing as timm's own models."""

import argparse

import numpy as np
import pytest
import timm
import torch
from cases import CASES, PATCH_SIZE, Case, backends, image_size, images
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from vitreuse import PlanVisionTransformer, load_checkpoint, parse_plan
from vitreuse.compress.convert import convert
from vitreuse.config import ConfigError
from vitreuse.files.hub import pack_weights
from vitreuse.io.process import choose_device
from vitreuse.model.checkpoint import load_exactly
from vitreuse.model.preprocessing import evaluation_transform

HEADS = 5
ADDED = ("key_proj", "value_proj", ".linear.weight", ".linear.bias")


def plain(case, grid=None, **more):
    """timm's model with a case's keywords, random in float64."""
    torch.manual_seed(3)
    model_class = VisionTransformerDistilled if case.distilled else VisionTransformer
    keywords = {key: value for key, value in case.keywords.items() if not key.startswith("lowrank")}
    model = model_class(
        img_size=image_size(grid or case.grid),
        patch_size=PATCH_SIZE,
        embed_dim=15,
        depth=len(parse_plan(case.plan)),
        dtype=torch.float64,
        **{"num_heads": HEADS, "num_classes": 7, "mlp_ratio": 2, **keywords, **more},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def rows_kept(plain_state, layer, heads, parts, kind):
    """Rows of ``blocks.layer.attn.qkv`` by hand: of each part (q 0, k 1, v 2) in turn, the given heads'."""
    qkv = plain_state[f"blocks.{layer}.attn.qkv.{kind}"]
    dim = len(qkv) // 3 // HEADS
    return torch.cat([qkv[(part * HEADS + head) * dim :][:dim] for part in parts for head in heads])


@pytest.mark.parametrize("name", CASES)
def test_a_plain_checkpoint_fills_every_plan(name):
    """All of it that the plan has a use for, and token projections and linear layers are the only new keys."""
    case = CASES[name]
    checkpoint = state_of(plain(case, mlp_ratio=3))  # 45 hidden units, more than any plan has
    model = case.build(mlp_ratio=3)
    before = state_of(model)
    report = load_checkpoint(model, checkpoint)
    after = state_of(model)
    added = {key for key in after if key.endswith(ADDED)}
    assert set(report.new) == added
    assert all(torch.equal(after[key], before[key]) for key in added)
    cut = {key for layer, spec in enumerate(model.plan) if spec.hidden for key in units_of(after, layer)}
    shared = {key for key in after if key in checkpoint} - cut
    assert all(torch.equal(after[key], checkpoint[key]) for key in shared)
    remade = {key for key in after if ".attn.v." in key or ".attn.qk." in key}
    assert after.keys() == shared | cut | remade | added
    gone = {key.split(" ")[0] for key in report.dropped}
    assert gone == checkpoint.keys() - shared


def units_of(state, layer):
    """For each entry of a layer's MLP that has hidden units, the dimension of these."""
    names = {"fc1.weight": 0, "fc1.bias": 0, "norm.weight": 0, "norm.bias": 0, "fc2.weight": 1}
    return {key: dim for name, dim in names.items() if (key := f"blocks.{layer}.mlp.{name}") in state}


@pytest.mark.parametrize("name", ["hidden", "hidden extras", "hidden no bias", "merge mixture"])
def test_the_largest_hidden_units_stay_in_their_order(name):
    case = CASES[name]
    checkpoint, model = state_of(plain(case, mlp_ratio=3)), case.build(mlp_ratio=3)
    report, after = load_checkpoint(model, checkpoint), state_of(model)
    for layer in [layer for layer, spec in enumerate(model.plan) if spec.hidden]:
        fc1, fc2 = (checkpoint[f"blocks.{layer}.mlp.{part}.weight"].double().numpy() for part in ("fc1", "fc2"))
        sizes = [np.linalg.norm(fc1[unit]) * np.linalg.norm(fc2[:, unit]) for unit in range(45)]
        kept = sorted(sorted(range(45), key=lambda unit: -sizes[unit])[: model.plan[layer].hidden])
        for key, dim in units_of(after, layer).items():
            assert torch.equal(after[key], checkpoint[key].index_select(dim, torch.tensor(kept)))
            assert f"{key} (all but {len(kept)} units)" in report.dropped


def test_hidden_units_that_are_named_stay_in_the_order_that_is_said():
    case = CASES["hidden extras"]
    checkpoint, units = state_of(plain(case)), {0: [29, 0, 3, 17, 5, 2, 11], 4: (4, 3, 2, 1, 0)}
    named, chosen = case.build(), case.build()
    dropped = load_checkpoint(named, checkpoint, units=units).dropped
    assert dropped == load_checkpoint(chosen, checkpoint).dropped
    for layer in (0, 2, 4):
        for key, dim in units_of(state_of(named), layer).items():
            other = state_of(chosen)[key]
            if layer in units:
                other = checkpoint[key].index_select(dim, torch.tensor(units[layer]))
            assert torch.equal(state_of(named)[key], other)


@pytest.mark.parametrize(("plan", "units", "said"), [
    ("exact/2*2", {0: [1]}, "layer 0 is 'exact/2' and keeps 2 different units of 0 to 29, and 1 are named."),
    ("exact/2*2", {1: [1, 1]}, "layer 1 is 'exact/2' and keeps 2 different units of 0 to 29, and 1 is named twice."),
    ("exact/2*2", {0: [1, 30]}, "and 30 is none of them."),
    ("exact/2*2", {0: [-1, 3]}, "and -1 is none of them."),
    ("exact/2 exact", {1: [1]}, "units of layer 1 are named, which is 'exact' and chooses none: leave them out."),
    ("exact/2 exact/0", {1: []}, "units of layer 1 are named, which is 'exact/0' and chooses none: leave them out."),
    ("exact/2 linear", {1: [1]}, "which is 'linear' and chooses none"),
    ("exact/2*2", {2: [1, 3]}, "units of layer 2 are named, the model's layers are 0 to 1."),
    ("exact exact/31", None, "layer 1 is 'exact/31', and trained are 30 hidden units for it: give /30 or less"),
])
def test_hidden_units_that_there_are_not_are_one_sentence(plan, units, said):
    source, model = plain(Case("exact*2")), Case(plan).build()
    before = state_of(model)
    loads = (lambda: load_checkpoint(model, state_of(source), units=units), lambda: convert(source, plan, units=units))
    for load in loads:
        with pytest.raises(ValueError) as caught:
            load()
        assert said in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in state_of(model).items())


def test_weights_of_fewer_hidden_units_say_that_the_plan_should_have_them():
    source = Case("exact exact/5").build()
    with pytest.raises(ValueError, match=r"fc1.weight is \(5, 15\) in the checkpoint .*/hidden in the plan"):
        load_checkpoint(Case("exact*2").build(), state_of(source))


def test_units_of_a_model_without_a_plan_are_refused():
    source = plain(Case("exact"))
    with pytest.raises(ValueError, match="units are of layers of a plan, VisionTransformer has none"):
        load_checkpoint(source, state_of(source), units={0: [1]})


def test_torchs_own_method_keeps_the_same_units():
    """Of a plan with timm's keys, too."""
    checkpoint = state_of(plain(Case("exact*2")))
    ours, theirs = (Case("exact/7 exact").build(seed) for seed in (0, 1))
    load_checkpoint(ours, checkpoint)
    theirs.load_state_dict(checkpoint)
    assert all(torch.equal(value, state_of(theirs)[key]) for key, value in state_of(ours).items())


@pytest.mark.parametrize("bias", [True, False])
def test_reuse_layers_keep_the_rows_of_their_own_heads(bias):
    case = Case("exact reuse reuse:2 none reuse:0 reuse:5", keywords={"qkv_bias": bias, "qk_norm": True})
    checkpoint, model = state_of(plain(case)), case.build()
    report = load_checkpoint(model, checkpoint)
    after, all_heads = state_of(model), range(HEADS)
    for kind in ("weight", "bias") if bias else ("weight",):
        for layer in (1, 2, 4, 5):
            values = rows_kept(checkpoint, layer, all_heads, [2], kind)
            assert torch.equal(after[f"blocks.{layer}.attn.v.{kind}"], values)
        own = rows_kept(checkpoint, 2, range(2, HEADS), [0, 1], kind)
        assert torch.equal(after[f"blocks.2.attn.qk.{kind}"], own)
        assert torch.equal(after[f"blocks.4.attn.qk.{kind}"], rows_kept(checkpoint, 4, all_heads, [0, 1], kind))
    no_part = ("blocks.1.attn.q", "blocks.5.attn.q", "blocks.3.attn", "blocks.3.norm1")
    assert not any(key.startswith(no_part) for key in after)
    assert "blocks.1.attn.qkv.weight (all but attn.v.weight)" in report.dropped
    assert "blocks.3.norm1.weight" in report.dropped and "blocks.5.attn.k_norm.bias" in report.dropped


def test_a_plan_reads_its_own_checkpoint():
    pairs = [(case, backend) for case in CASES.values() for backend in backends(case)]
    for case, backend in pairs:
        model, other = case.build(reuse_backend=backend), case.build(seed=1, reuse_backend=backend)
        report = load_checkpoint(other, state_of(model))
        assert (report.new, report.dropped) == ((), ())
        assert torch.equal(other(images(case.grid)), model(images(case.grid)))


@pytest.mark.parametrize(
    "name",
    ["mixture", "extras", "average without class", "lowrank layerwise linear reused", "lowrank none conv reused"],
)
def test_another_resolution_is_resized_as_by_set_input_size(name):
    """From a square grid, which is what a checkpoint without its config is taken to be."""
    case = CASES[name]
    square = Case(case.plan, (4, 4), case.distilled, case.keywords).build()
    large = Case(case.plan, (5, 7), case.distilled, case.keywords).build(seed=1)
    report = load_checkpoint(large, state_of(square))
    assert report.new == ()
    square.set_input_size(image_size((5, 7)))
    torch.testing.assert_close(large(images((5, 7))), square(images((5, 7))), rtol=1e-9, atol=1e-10)


# Grids of another shape


OTHER_WAY = ["mixture", "average without class", "lowrank layerwise linear reused", "lowrank none linear", "extras"]


def turned(name):
    """A model of 3 x 5 patches and one of as many, 5 x 3."""
    case = CASES[name]
    return case.build(), Case(case.plan, (5, 3), case.distilled, case.keywords).build(seed=1)


def assert_resized(model, source):
    source.set_input_size(image_size((5, 3)))
    torch.testing.assert_close(model(images((5, 3))), source(images((5, 3))), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OTHER_WAY)
def test_as_many_patches_in_another_shape_are_resampled(name):
    source, model = turned(name)
    report = load_checkpoint(model, state_of(source), img_size=image_size((3, 5)))
    assert (report.source_grid, report.is_grid_guessed) == ((3, 5), False)
    assert_resized(model, source)


@pytest.mark.parametrize("held", ["our keywords", "img_size", "input_size"])
def test_a_file_says_its_image_size(held, tmp_path):
    source, model = turned("mixture")
    size = image_size((3, 5))
    if held == "our keywords":
        (tmp_path / "x").write_bytes(pack_weights(state_of(source), "vit", None, {"img_size": size}))
    else:
        said = {"img_size": size} if held == "img_size" else {"img_size": None, "input_size": [3, *size]}
        torch.save({"model": state_of(source), "args": argparse.Namespace(**said)}, tmp_path / "x")
    report = load_checkpoint(model, tmp_path / "x")
    assert (report.source_grid, report.is_grid_guessed) == ((3, 5), False)
    assert_resized(model, source)


def test_a_plain_model_of_timm_is_resampled_too():
    case = Case("exact*2")
    source, model = plain(case), plain(case, grid=(5, 3))
    report = load_checkpoint(model, state_of(source), img_size=image_size((3, 5)))
    assert report.source_grid == (3, 5)
    source.set_input_size(image_size((5, 3)))
    torch.testing.assert_close(model.pos_embed, source.pos_embed)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.pos_embed, plain(case).pos_embed)


@pytest.mark.parametrize("name", ["mixture", "lowrank none linear"])
def test_a_guess_is_said(name):
    source, model = turned(name)
    report = load_checkpoint(model, state_of(source))
    assert (report.source_grid, report.is_grid_guessed) == ((5, 3), True)
    assert report.said(model)[-1] == "taken to be of 5 x 3 patches, a guess by their number"
    square = Case(CASES[name].plan, (4, 4), keywords=CASES[name].keywords).build()
    report = load_checkpoint(model, state_of(square))
    assert (report.source_grid, report.is_grid_guessed) == ((4, 4), True)
    assert report.said(model)[-1] == "resampled to 5 x 3 from 4 x 4 patches, a guess by their number"


def test_the_pretrained_config_is_a_guess_where_the_model_has_as_many_patches():
    """224 px are 14 x 14 patches, as many as 7 x 28: timm takes the config's grid, and here that is said."""
    sizes = {"embed_dim": 15, "depth": 1, "num_heads": 3, "plan": "exact"}
    source = timm.create_model("vit_reuse_tiny_patch16_224", img_size=(112, 448), **sizes)
    model = timm.create_model("vit_reuse_tiny_patch16_224", img_size=(112, 448), **sizes)
    report = load_checkpoint(model, state_of(source))
    assert (report.source_grid, report.is_grid_guessed) == ((14, 14), True)
    report = load_checkpoint(model, state_of(source), img_size=(112, 448))
    assert (report.source_grid, report.is_grid_guessed) == ((7, 28), False)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_a_conversion_knows_its_grid():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(112, 448), embed_dim=15, depth=2, num_heads=3)
    assert torch.equal(convert(model, "exact reuse").model.pos_embed, model.pos_embed)


def test_a_grid_that_cannot_be_known_is_refused():
    source, model = Case("lowrank:3", (3, 5)).build(), Case("lowrank:3", (5, 7)).build()
    with pytest.raises(ValueError, match=r"is of 15 patches, which make no square, and the model of 5 x 7: give img_"):
        load_checkpoint(model, state_of(source))
    with pytest.raises(ValueError, match=r"img_size=\(6, 6\) makes 3 x 2 patches and the checkpoint is of 15: give"):
        load_checkpoint(model, state_of(source), img_size=6)
    report = load_checkpoint(model, state_of(source), img_size=image_size((3, 5)))
    assert report.said(model) == ["resampled to 5 x 7 from 3 x 5 patches"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"^the checkpoint has a blocks\.2\..* that the model lacks \(0 keys missing, 12 unknown\)"),
        ({"depth": 1}, r"^the checkpoint has no blocks\.1\..* keys missing, 0 unknown\): it is of another"),
        ({"num_classes": 9}, r"^head\.weight is \(9, 15\) in the checkpoint and \(7, 15\) in the model: create"),
        ({"embed_dim": 20}, r"^\w+ is .* in the checkpoint and .* in the model: create the model with"),
        ({"qk_norm": True}, r"^the checkpoint has a blocks\.0\.attn\.q_norm\.weight that the model lacks"),
    ],
    ids=["deeper", "shallower", "classes", "wider", "with qk-norm"],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(change, message):
    case = Case("exact reuse:2")
    torch.manual_seed(0)
    sizes = {"img_size": image_size((3, 5)), "patch_size": PATCH_SIZE, "embed_dim": 15, "depth": 2, "num_heads": HEADS}
    checkpoint = VisionTransformer(**{**sizes, "mlp_ratio": 2, "num_classes": 7, "dtype": torch.float64, **change})
    model = case.build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, checkpoint.state_dict())
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


ZERO_REUSE = {
    "vit_small_patch16_224": "vit_lazy_small_patch16_224",
    "deit_small_patch16_224": "deit_reuse_small_patch16_224",
    "deit_small_distilled_patch16_224": "deit_lowrank_small_distilled_patch16_224",
    "deit3_small_patch16_224": "deit3_mixspan_small_patch16_224",
}


def assert_same_model(ours, timms, image):
    """Same keys, same initialisation and same logits."""
    assert list(ours.state_dict()) == list(timms.state_dict())
    assert all(torch.equal(tensor, timms.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        for model in (ours, timms):
            for name, parameter in model.named_parameters():  # logits are not to hide behind a tiny initialisation
                parameter.mul_(1 if parameter.ndim == 1 else 2).add_(0.01 * len(name) / 40)
        torch.testing.assert_close(ours.eval()(image), timms.eval()(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("plain_name", "name"), ZERO_REUSE.items(), ids=ZERO_REUSE.values())
def test_without_reuse_a_model_is_timms(plain_name, name):
    torch.manual_seed(0)
    timms = timm.create_model(plain_name)
    torch.manual_seed(0)
    ours = timm.create_model(name, plan="exact*12")
    assert_same_model(ours, timms, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "reg_tokens": 3, "init_values": 0.1, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"class_token": False, "global_pool": "avg", "qkv_bias": False, "proj_bias": False, "fc_norm": False},
        {"global_pool": "map", "no_embed_class": True, "pre_norm": True, "weight_init": "jax"},
        {"global_pool": "avgmax", "reg_tokens": 1, "pos_embed": "none", "fix_init": True, "weight_init": "moco"},
    ],
    ids=["norms", "no class", "attention pool", "pooled"],
)
def test_without_reuse_options_are_timms(options):
    sizes = {"img_size": (10, 21), "patch_size": (2, 3), "embed_dim": 15, "depth": 3, "num_heads": 5, "num_classes": 7}
    torch.manual_seed(0)
    timms = VisionTransformer(**sizes, **options)
    torch.manual_seed(0)
    ours = PlanVisionTransformer(**sizes, **options, plan="exact*3")
    assert_same_model(ours, timms, torch.randn(2, 3, 10, 21))


def test_of_weights_that_do_not_fit_the_first_key_is_named():
    state = timm.create_model("vit_tiny_patch16_224", depth=3).state_dict()
    with pytest.raises(ValueError, match=r'^Missing key\(s\) in state_dict: "[^"]+"; give the model') as error:
        load_exactly(timm.create_model("resnet18"), state)
    assert len(str(error.value)) < 200


def test_a_size_of_three_numbers_is_refused():
    model = PlanVisionTransformer(plan="exact*2", img_size=32, depth=2, embed_dim=12, num_heads=2)
    with pytest.raises(ValueError, match=r"img_size \(3, 32, 32\) is no size of an image: give the side, or"):
        load_checkpoint(model, model.state_dict(), img_size=(3, 32, 32))


def test_a_crop_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="crop_pct 0 keeps nothing of an image: give a share above 0"):
        evaluation_transform(timm.create_model("vit_tiny_patch16_224"), crop_pct=0)


@pytest.mark.parametrize("name, said", [("gpu", "'gpu' is no device: use cpu, "), ("cuda:9", "no device cuda:9")])
def test_a_device_that_is_none_is_refused(name, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match=said):
        choose_device(name)
