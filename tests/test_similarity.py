"""Similarity of maps: against maps written out naively, over all kinds of layer, fused or not."""

import pytest
import timm
import torch

import vitreuse  # noqa: F401, registers the models
from vitreuse.similarity import attention_maps, map_similarity

SIZES = {"img_size": 15, "patch_size": 3, "embed_dim": 22, "depth": 4, "num_heads": 2, "num_classes": 7}
H, N = 2, 26


def build(plan=None, **keywords):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224" if plan is None else "vit_reuse_tiny_patch16_224"
    model = timm.create_model(name, **SIZES, **keywords, **({} if plan is None else {"plan": plan})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # maps far from uniform
    return model


def images(number=3):
    return torch.randn(number, 3, 15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive_maps(model, batch):
    """The maps of timm's unfused model, by its own dropout layers, which see them."""
    found, hooks = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone())))
    with torch.no_grad():
        model.forward_features(batch)
    for hook in hooks:
        hook.remove()
    return found


def naive_similarity(maps):
    similarity = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            variations = [0.5 * (a[n, h, q] - b[n, h, q]).abs().sum()
                          for n in range(len(a)) for h in range(H) for q in range(N)]
            similarity[i, j] = 1 - sum(variations) / len(variations)
    return similarity


@pytest.mark.parametrize("plan", [None, "exact*4"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_that_of_the_maps(plan, qk_norm):
    model, plain, batch = build(plan, qk_norm=qk_norm), build(qk_norm=qk_norm), images(2)
    plain.load_state_dict(model.state_dict())
    expected = naive_similarity(naive_maps(plain, batch))
    assert 0.1 < expected[0, 1] < 0.98  # neither all alike nor all apart
    assert torch.allclose(map_similarity(model, batch).double(), expected, atol=1e-5)


@pytest.mark.parametrize("reuse_backend", ["map", "qk"])
def test_a_reuse_layer_has_its_anchors_map(reuse_backend):
    found = map_similarity(build("exact reuse exact reuse", reuse_backend=reuse_backend), images())
    assert found[0, 1] == found[2, 3] == 1
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert found[0, 2] < 0.9


def test_a_partial_layer_has_its_own_heads_last_and_hands_them_on_first():
    model, batch = build("exact reuse:1 reuse:1 exact"), images(1)
    first, second, third, _ = (layer.weights for layer in attention_maps(model, batch))
    assert torch.equal(second[:, 0], first[:, 0])
    assert not torch.allclose(second[:, 1], first[:, 1], atol=0.01)
    assert torch.equal(third[:, 0], second[:, 1])


@pytest.mark.parametrize(("plan", "keywords"), [
    ("exact reuse:1 exact reuse", {}),
    ("span:3 reuse:1 exact span:5", {}),
    ("exact none reuse exact", {"reuse_backend": "qk"}),
    ("lowrank:5 reuse:1*3", {"lowrank_projection": "mean"}),
])
def test_maps_give_the_outputs_of_the_layers(plan, keywords):
    """Values mixed by the maps are what the attention of each layer returns."""
    model, batch, outputs = build(plan, **keywords), images(2), {}
    for layer, block in enumerate(model.blocks):
        if block.has_attention:
            def keep(attn, inputs, output, layer=layer):
                outputs[layer] = attn, inputs[0], output[0]

            block.attn.register_forward_hook(keep)
    maps = attention_maps(model, batch)
    for layer, (attn, x, y) in outputs.items():
        v = x @ (attn.v.weight if hasattr(attn, "v") else attn.qkv.weight[44:]).T
        v = v + (attn.v.bias if hasattr(attn, "v") else attn.qkv.bias[44:])
        if maps[layer].weights.shape[-1] != N:
            v = torch.nn.functional.adaptive_avg_pool1d(v.transpose(1, 2), 5).transpose(1, 2)
        mixed = maps[layer].weights @ v.unflatten(-1, (H, -1)).transpose(1, 2)
        assert torch.allclose(attn.proj(mixed.transpose(1, 2).flatten(2)), y, atol=1e-10)


def test_only_maps_over_the_same_keys_are_compared():
    found = map_similarity(build("exact none lowrank:5 lowrank:5"), images())
    assert found.isnan().tolist() == [
        [False, True, True, True], [True] * 4, [True, True, False, True], [True, True, True, False]
    ]
    shared = map_similarity(build("lowrank:5*2 span:3 exact", lowrank_sharing="layerwise"), images())
    assert not shared[:2, :2].isnan().any() and not shared[2:, 2:].isnan().any()
    assert shared[:2, 2:].isnan().all()


def test_the_model_is_left_as_it_was():
    model = build("exact reuse lowrank:5 none").train()
    map_similarity(model, images(1))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_attention_is_named():
    with pytest.raises(ValueError, match="layer 0 has DiffAttention, whose map is not known"):
        map_similarity(timm.create_model("vit_tiny_patch16_224", **SIZES, attn_layer="diff").double(), images(1))
