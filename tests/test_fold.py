"""Folding keeps the logits, step by step, and does what its name says."""

import pytest
import timm
import torch
from cases import CASES, Case, backends, images, randomized, with_backends
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from vitreuse.compress.fold import STEPS, ClassAttention, fold

PLAIN = {
    "class token": {},
    "average": {"global_pool": "avg"},
    "average of all before the norm": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "maximum": {"global_pool": "max"},
    "attention pool": {"global_pool": "map"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "no positions": {"pos_embed": "none"},
    "norm before the layers": {"pre_norm": True},
    "norms inside": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.1},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "no final norm": {"final_norm": False},
    "rms norm": {"norm_layer": "rmsnorm"},
    "swiglu": {"mlp_layer": timm.layers.SwiGLU},
    "dynamic": {"dynamic_img_size": True},
}
SIZES = {"img_size": (6, 15), "patch_size": (2, 3), "embed_dim": 15, "num_heads": 5, "mlp_ratio": 2, "num_classes": 7}


def plain(keywords, model_class=VisionTransformer):
    torch.manual_seed(0)
    return randomized(model_class(**SIZES, depth=3, **keywords).double())


def assert_same_logits(model, folded, x):
    with torch.no_grad():
        wanted, actual = model.eval()(x), folded(x)
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert wanted.std() > 1e-3


STEP_SETS = [*((step,) for step in STEPS), tuple(STEPS), ("norm_affine", "centring")]


@pytest.mark.parametrize("steps", STEP_SETS, ids="+".join)
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_vit_keeps_its_logits(name, steps):
    model = plain(PLAIN[name])
    assert_same_logits(model, fold(model, steps), images())


@pytest.mark.parametrize(("name", "backend"), with_backends(CASES))
def test_every_plan_keeps_its_logits(name, backend):
    case = CASES[name]
    model = case.build(reuse_backend=backend)
    assert_same_logits(model, fold(model, tuple(STEPS)), images(case.grid))


MIXTURES = [
    *("mixture", "extras", "extras unshared", "distilled", "linear and skip", "hidden extras", "merge before reuse"),
    *("merge by values of some heads", "merge mixture", "merge mixture by values", "merge distilled", "merge extras"),
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MIXTURES)
def test_every_step_alone_keeps_the_logits_of_mixtures(name, step):
    model = CASES[name].build(reuse_backend=backends(CASES[name])[0])
    assert_same_logits(model, fold(model, [step]), images())


def test_a_distilled_deit_keeps_its_logits():
    model = plain({}, VisionTransformerDistilled)
    assert_same_logits(model, fold(model), images())


def test_pixels_are_taken_as_they_are():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    model, pixels = plain({}), torch.randint(256, (2, 3, 6, 15)).double()
    shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    folded = fold(model, normalisation=(mean, std))
    torch.testing.assert_close(folded(pixels), model.eval()((pixels / 255 - shift) / scale), rtol=1e-9, atol=1e-9)


def test_the_steps_leave_what_they_say():
    folded = fold(plain({"init_values": 0.1}), tuple(STEPS))
    assert folded.patch_embed.proj.bias is None and folded.no_embed_class
    assert all(isinstance(scale, nn.Identity) for block in folded.blocks for scale in (block.ls1, block.ls2))
    for norm in (folded.norm, *(n for block in folded.blocks for n in (block.norm1, block.norm2))):
        assert isinstance(norm, nn.RMSNorm) and norm.weight is None
    assert folded.blocks[0].attn.scale == 1
    assert not folded.blocks[0].attn.qkv.bias[15:].any() and folded.blocks[0].attn.qkv.bias[:15].all()
    assert isinstance(folded.blocks[2].attn, ClassAttention)
    assert folded.forward_features(images()).shape == (2, 1, 15)


def test_biases_that_say_which_tokens_merge_stay():
    folded = fold(Case("exact-3 exact reuse-2 exact reuse:2-1 exact").build(), ["key_bias", "value_bias"])
    by_key, exact, by_value, _, partial, _ = (block.attn for block in folded.blocks)
    assert by_key.qkv.bias[15:30].all() and not by_key.qkv.bias[30:].any()
    assert not exact.qkv.bias[15:].any()
    assert by_value.v.bias.all() and partial.v.bias.all() and not partial.qk.bias.chunk(2)[1].any()


def test_what_is_centred_has_no_linear_layer():
    for plan, is_centred in (("exact-3/7 skip none/5 exact/0 exact", True), ("exact linear exact", False)):
        folded = fold(Case(plan).build(), ["norm_affine", "centring"])
        assert isinstance(folded.norm, nn.RMSNorm) == is_centred
        assert isinstance(folded.blocks[0].norm1, nn.RMSNorm) == is_centred


def test_class_rows_weigh_sizes(monkeypatch):
    model, x = Case("exact-7 exact").build().eval(), images()
    folded = fold(model, ["class_rows"])
    assert isinstance(folded.blocks[1].attn, ClassAttention)
    assert_same_logits(model, folded, x)
    monkeypatch.setattr("vitreuse.compress.fold.log_sizes", lambda *_: None)
    with torch.no_grad():
        assert not torch.allclose(folded(x), model(x), rtol=1e-3)


def test_the_model_itself_stays():
    model = plain({}).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model)
    assert model.training and not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_low_precision_is_folded_in_high():
    model = plain({}).bfloat16()
    folded = fold(model)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    x = images(dtype=torch.bfloat16)
    error = (folded(x) - model(x)).norm() / model(x).norm()
    assert error < 0.05


@pytest.mark.parametrize(
    ("model", "steps", "sentence"),
    [
        (nn.Linear(2, 3), None, "Linear cannot be folded: fold takes timm's VisionTransformer and ours"),
        (VisionTransformer(**SIZES, depth=1), ["scale"], "fold has no step 'scale': the steps are embedding, "),
        (
            VisionTransformer(**SIZES, depth=1, block_fn=timm.models.vision_transformer.ResPostBlock),
            None,
            "layers of ResPostBlock around Attention have no plan",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused(model, steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        fold(model, steps)
