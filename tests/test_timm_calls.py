"""What users of timm do to a model, which one with a plan takes as timm's takes it, or refuses in a sentence."""

import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
from cases import randomized
from timm.data import resolve_model_data_config
from torch import nn

import vitreuse
from vitreuse import count_macs
from vitreuse.attention.costs import COST_NAMES, SIZED_NAMES
from vitreuse.attention.policy import READS_MAP, Conditions
from vitreuse.compress.fold import fold
from vitreuse.cost.backends import fused_attention, layer_backends
from vitreuse.files.hub import save_hub_folder
from vitreuse.model.copies import untrained_copy

SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 5, "patch_size": 2, "img_size": 8}


def build(plan, name="vit_reuse_tiny_patch16_224", **keywords):
    torch.manual_seed(0)
    return randomized(timm.create_model(name, plan=plan, **{**SIZES, **keywords})).eval()


def pixels(size=8):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_features_alone_of_trained_weights(tmp_path):
    plain = randomized(timm.create_model("vit_tiny_patch16_224", **SIZES)).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "num_classes": 5, "input_size": (3, 8, 8)}
    keywords = {**SIZES, "pretrained_cfg_overlay": overlay, "out_indices": (0, 2)}
    made = vitreuse.create_model("vit_tiny_patch16_224", "exact*4", True, features_only=True, **keywords).eval()
    expected = plain.forward_intermediates(pixels(), (0, 2), intermediates_only=True)
    with torch.no_grad():
        for found, wanted in zip(made(pixels()), expected, strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "kind"),
    [
        ({"act_layer": "relu"}, nn.ReLU),
        ({"act_layer": "silu"}, nn.SiLU),
        ({"act_layer": partial(nn.GELU, approximate="tanh")}, timm.layers.GELUTanh),
        ({}, nn.GELU),
    ],
)
def test_an_activation_is_the_one_that_is_asked_for(keywords, kind):
    made = vitreuse.create_model("vit_tiny_patch16_224", "exact*4", **SIZES, **keywords)
    assert type(made.blocks[0].mlp.act) is kind
    plain = timm.create_model("vit_tiny_patch16_224", **SIZES, **keywords)
    made.load_state_dict(plain.state_dict())
    assert torch.allclose(made.eval()(pixels()), plain.eval()(pixels()), atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"act_layer": "hard_swish"}, "takes no plan, since it has Hardswish in its MLPs: give a plain ViT"),
        ({"norm_layer": "simplenorm"}, "takes no plan, since it has SimpleNorm for its norms: give a plain ViT"),
    ],
)
def test_parts_that_no_keyword_of_a_hub_folder_can_name_are_refused(keywords, said):
    with pytest.raises(ValueError, match=said):
        vitreuse.create_model("vit_tiny_patch16_224", "exact*4", **SIZES, **keywords)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_reuse_tiny_patch16_224"])
def test_an_empty_plan_is_no_plan(name):
    with pytest.raises(ValueError, match="plan is empty"):
        vitreuse.create_model(name, "", **SIZES)


@pytest.mark.parametrize("save", [timm.models.save_for_hf, save_hub_folder])
@pytest.mark.parametrize(("size", "plan"), [(16, "exact-2*4"), (4, "exact-2 exact-1 exact*2")])
@pytest.mark.filterwarnings("ignore:layer 1 of plan:UserWarning")
def test_a_model_of_another_size_comes_back_from_its_folder(save, size, plan, tmp_path):
    model = build("exact-2*4")
    model.set_input_size((size, size))
    expected = model(pixels(size))
    save(model, tmp_path)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert str(found.plan) == plan and torch.allclose(found(pixels(size)), expected, atol=1e-6)


def test_a_preset_of_another_size_stays_what_it_was(tmp_path):
    model = timm.create_model("vit_merge_tiny_patch16_224", **{**SIZES, "img_size": 16}).eval()
    before = str(model.plan)
    model.set_input_size((32, 32))
    timm.models.save_for_hf(model, tmp_path)
    assert str(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).plan) == before


@pytest.mark.parametrize("word", ["exact", "linear"])
def test_every_layer_takes_masks_by_name_and_refuses_them_by_place(word):
    layer = build(f"exact {word} exact*2").blocks[1]
    tokens, mask = torch.randn(2, 17, 16), torch.ones(17, 17, dtype=torch.bool)
    assert layer(tokens, attn_mask=mask, is_causal=False).shape == tokens.shape
    with pytest.raises(ValueError, match=r"carry is a Tensor and must be a Carry or None: give attn_mask by name."):
        layer(tokens, mask)


def test_a_distilled_model_has_no_registers():
    with pytest.raises(ValueError, match=r"reg_tokens=4 has no effect on a distilled model: leave it out."):
        build("exact*4", "deit_reuse_tiny_distilled_patch16_224", reg_tokens=4)


@pytest.mark.parametrize("plan", ["exact-2*4", "exact*3 exact-2"])
def test_a_folded_model_whose_last_layer_merges_gives_intermediates(plan):
    model = build(plan)
    folded, expected = fold(model), model(pixels())
    assert torch.allclose(folded(pixels()), expected, atol=1e-4)
    found, wanted = (of.forward_intermediates(pixels(), [0, 1, 2], intermediates_only=True) for of in (folded, model))
    assert [each.shape for each in found] == [each.shape for each in wanted]
    assert len(folded.get_intermediate_layers(pixels(), 2)) == 2


def jax_archive(model, heads):
    """A plain ViT's weights as the first ViTs were published, by the names of JAX."""
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    found = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for layer in range(len(model.blocks)):
        ours, theirs = f"blocks.{layer}.", f"Transformer/encoderblock_{layer}/"
        for name, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            found[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        attention, width = f"{theirs}MultiHeadDotProductAttention_1/", len(state["cls_token"][0, 0])
        weights, biases = state[f"{ours}attn.qkv.weight"], state[f"{ours}attn.qkv.bias"]
        for number, name in enumerate(("query", "key", "value")):
            rows = slice(number * width, (number + 1) * width)
            found[f"{attention}{name}/kernel"] = weights[rows].T.reshape(width, heads, -1)
            found[f"{attention}{name}/bias"] = biases[rows].reshape(heads, -1)
        found[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            found[f"{dense}kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].T
            found[f"{dense}bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    return found


@pytest.mark.parametrize("plan", ["exact*4", "exact reuse none/32 linear", "lowrank:5 exact-2 skip exact"])
def test_archives_of_the_first_vits_are_loaded_under_any_plan(plan, tmp_path):
    plain = randomized(timm.create_model("vit_tiny_patch16_224", **SIZES)).eval()
    path = str(tmp_path / "weights.npz")
    np.savez(path, **jax_archive(plain, SIZES["num_heads"]))
    theirs = timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **SIZES)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in plain.state_dict().items())
    torch.manual_seed(1)
    found = timm.create_model("vit_reuse_tiny_patch16_224", plan=plan, checkpoint_path=path, **SIZES)
    torch.manual_seed(1)
    expected = timm.create_model("vit_reuse_tiny_patch16_224", plan=plan, **SIZES)
    expected.load_state_dict(plain.state_dict())
    for name, value in expected.state_dict().items():
        assert "key_proj" in name or torch.equal(value, found.state_dict()[name]), name
    assert pickle.loads(pickle.dumps(found)).plan == found.plan


def test_macs_know_that_sizes_decide_what_is_carried(monkeypatch):
    costs = dict(zip((*COST_NAMES, *SIZED_NAMES), (1.0, 9.0, 1.1, 0.5, 2.0, 2.0), strict=True))
    point = (1, *costs.values())
    monkeypatch.setattr("vitreuse.model.vit.load_costs", lambda: {"cpu float32 inference": [point]})
    model = build("exact-2 exact reuse exact")
    assert layer_backends(model, Conditions(torch.device("cpu"), torch.float32, False))[2] is READS_MAP
    assert "blocks.2.attn.logits" not in {part for part, macs in count_macs(model).items() if macs}


def test_a_plan_without_merges_is_not_made_at_each_call(monkeypatch):
    model = build("exact*4")
    monkeypatch.setattr(type(model), "plan", property(lambda self: pytest.fail("it is made")))
    model(pixels())


def test_an_archive_leaves_what_it_lacks_and_goes_into_a_model_that_was_changed(tmp_path):
    plain = randomized(timm.create_model("vit_tiny_patch16_224", **SIZES)).eval()
    np.savez(tmp_path / "weights.npz", **jax_archive(plain, SIZES["num_heads"]))
    model = timm.create_model("vit_reuse_tiny_patch16_224", plan="exact*4", reg_tokens=0, **SIZES)
    theirs = timm.create_model("vit_tiny_patch16_224", **SIZES)
    for each in (model, theirs):
        each.reset_classifier(7)
        torch.nn.init.ones_(each.head.weight)
        torch.nn.init.zeros_(each.head.bias)
        each.set_input_size((16, 16))
        each.load_pretrained(str(tmp_path / "weights.npz"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert model.head.weight.eq(1).all() and model.pos_embed.shape == theirs.pos_embed.shape


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch32_clip_384", "vit_tiny_patch16_224"])
def test_the_data_settings_are_those_of_the_name(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), vitreuse.create_model(name, plan=None)
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    copied = resolve_model_data_config(untrained_copy(theirs.to_empty(device="cpu"), "skip*12"))
    assert copied == resolve_model_data_config(theirs)
    with torch.device("meta"):
        resized = vitreuse.create_model(name, plan="exact-1*12", img_size=96, patch_size=16)
    assert resolve_model_data_config(resized)["input_size"] == (3, *resized.patch_embed.img_size) == (3, 96, 96)


def test_names_without_weights_are_refused_with_those_that_have_them():
    with pytest.raises(ValueError, match=r"has no weights 'badtag'.* 'vit_small_patch14_dinov2.lvd142m'"):
        vitreuse.create_model("vit_small_patch14_dinov2.badtag")
    with pytest.raises(ValueError, match=r"no published weights: those of vit_tiny_patch16_224 go into a plan, as by"):
        vitreuse.create_model("vit_reuse_tiny_patch16_224", pretrained=True)


def test_images_of_no_patch_are_refused_before_anything_changes():
    sizes = {**SIZES, "img_size": 8, "patch_size": 16, "class_token": False, "global_pool": "avg"}
    with pytest.raises(ValueError, match=r"images of \(8, 8\) px are smaller than a patch of \(16, 16\) px"):
        timm.create_model("vit_lowrank_tiny_patch16_224", plan="lowrank:4*4", **sizes)
    model = build("exact*4")
    before = model.patch_embed.grid_size
    with pytest.raises(ValueError, match="are smaller than a patch"):
        model.set_input_size((1, 1))
    assert model.patch_embed.grid_size == before and model(pixels()).isfinite().all()


def test_a_mask_of_the_keys_alone_is_taken_as_timm_takes_it():
    with fused_attention(False):  # the fused kernel takes none
        plain, model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval(), build("exact*4").eval()
    model.load_state_dict(plain.state_dict())
    images = pixels()
    mask = torch.arange(plain.pos_embed.shape[1]) != 3
    found = [each.forward_features(images, attn_mask=mask) for each in (plain, model)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(model(images, attn_mask=mask), plain.forward_head(found[0]))


def test_what_is_carried_of_a_projection_outlives_the_parameter():
    """FSDP2 frees a layer's parameters behind it."""
    model = build("lowrank:5 reuse exact*2").eval()
    images = pixels()
    expected = model(images)
    first = model.blocks[0].attn

    def freed(*_):
        first.key_proj.data.fill_(torch.nan)

    first.register_forward_hook(freed)
    assert torch.equal(model(images), expected)


def test_names_that_come_later_are_listed():
    assert {"search", "convert", "heal", "export", "tune", "similarity", "describe", "Images"} <= {*dir(vitreuse)}
