"""Damage against models that were really changed, whose layers get the tokens of the unchanged one."""

from itertools import product

import pytest
import timm
import torch

import vitreuse
from vitreuse.attention.base import EMPTY_CARRY
from vitreuse.attention.lowrank import grid_pooling
from vitreuse.compress.damage import Change, measure_damage, possible_changes
from vitreuse.compress.head_matching import match_heads, order_of_heads, rows_of_heads
from vitreuse.compress.redundancy import measure_redundancy
from vitreuse.cost.measure import peak_memory_mib
from vitreuse.io.progress import WorkProgress
from vitreuse.plan import Spec
from vitreuse.verbs.words import parse_words

SIZES = {"img_size": 15, "patch_size": 3, "embed_dim": 21, "depth": 3, "num_heads": 3, "num_classes": 7}
L, H, D = 3, 3, 7
SPECS = parse_words("exact,reuse,reuse:2,lowrank:5,span:3,none")


def build(plan=None, **keywords):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224" if plan is None else "vit_reuse_tiny_patch16_224"
    model = timm.create_model(name, **SIZES, **keywords, **({} if plan is None else {"plan": plan})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def images(number=3):
    return torch.randn(number, 3, 15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silent():
    return WorkProgress("", "images", 1, enabled=False)


def measured(model, batch, specs=SPECS, batch_size=2, **rows):
    batches = [(images,) for images in batch.split(batch_size)]
    redundancy = measure_redundancy(model, batches, silent())
    return measure_damage(model, batches, specs, redundancy, silent(), **rows), redundancy


def observed(model, batch, signs):
    """What each attention gets, what its half of the layer returns, and the gradient of the signed logits by that."""
    tokens, outputs, hooks = [], [], []
    for block in model.blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].detach())))
        hooks.append(block.ls1.register_forward_hook(lambda *args: outputs.append(args[2])))
    logits = model(batch)
    gradients = torch.autograd.grad((logits * signs).sum(), outputs)
    for hook in hooks:
        hook.remove()
    return tokens, [output.detach() for output in outputs], gradients, logits.detach()


def changed_output(state, change, redundancy, tokens, keywords):
    """Of the attention half of a layer in a model with that plan, loaded from the plain one with its heads in order."""
    specs = ["exact"] * L
    specs[change.layer] = str(change.spec)
    if change.anchor is not None:
        specs[change.anchor] = str(change.anchor_spec)
        specs[change.anchor + 1 : change.layer] = ["none"] * (change.layer - change.anchor - 1)
        matched = match_heads(redundancy.variation[change.anchor, change.layer][: change.spec.number])
        state = in_order(state, change.layer, rows_of_heads(order_of_heads(matched, H), D))
    model = build(" ".join(specs), **keywords)
    vitreuse.load_checkpoint(model, state)
    for name, parameter in model.named_parameters():
        if name.endswith("key_proj"):
            parameter.data = grid_pooling((5, 5), model.num_prefix_tokens, 5).double()
    carry = EMPTY_CARRY
    if change.anchor is not None:
        _, carry = model.blocks[change.anchor].attn(tokens[change.anchor], carry)
    block = model.blocks[change.layer]
    return block.ls1(block.attn(tokens[change.layer], carry)[0])


def in_order(state, layer, rows):
    attn = f"blocks.{layer}.attn."
    fused = torch.cat([rows, rows + H * D, rows + 2 * H * D])
    ordered = {f"{attn}qkv.{name}": state[f"{attn}qkv.{name}"][fused] for name in ("weight", "bias")}
    return {**state, **ordered, f"{attn}proj.weight": state[f"{attn}proj.weight"][:, rows]}


@pytest.mark.parametrize("keywords", [
    {"init_values": 0.5, "qk_norm": True},
    {"class_token": False, "global_pool": "avg"},
], ids=["token", "avg"])
def test_it_is_what_a_changed_layer_returns(keywords):
    model, batch = build(**keywords), images()
    found, redundancy = measured(model, batch)
    assert [*found] == possible_changes(L, SPECS)
    signs = 2 * torch.randint(2, (3, 7), generator=torch.Generator().manual_seed(0)) - 1
    tokens, outputs, gradients, logits = observed(model, batch, signs)
    for change, damage in found.items():
        if change.spec.word == "none":
            error = outputs[change.layer]
        else:
            with torch.no_grad():
                error = changed_output(model.state_dict(), change, redundancy, tokens, keywords) - outputs[change.layer]
        expected = (gradients[change.layer] * error).square().sum() / logits.square().sum()
        assert damage == pytest.approx(expected.item(), rel=1e-6, abs=1e-12), change


def test_the_changes_are_all_that_the_specs_allow():
    exact, span, reuse = Spec("exact"), Spec("span", 3), Spec("reuse")
    assert possible_changes(3, [reuse, span, reuse]) == [
        Change(0, span),
        Change(1, reuse, 0, exact), Change(1, reuse, 0, span), Change(1, span),
        *(Change(2, reuse, anchor, maker) for anchor, maker in product((0, 1), (exact, span))), Change(2, span),
    ]


def test_a_model_of_ours_has_the_damage_of_timms():
    plain, ours = build(), build("exact*3")
    ours.load_state_dict(plain.state_dict())
    expected, found = measured(plain, images())[0], measured(ours, images())[0]
    assert found == pytest.approx(expected, rel=1e-6)
    last = {change: damage for change, damage in found.items() if change.layer == 2}
    assert last[Change(2, Spec("span", 3))] == 0  # the class token, which alone is read, sees all
    assert last[Change(2, Spec("none"))] > 0
    assert all(found[Change(layer, Spec("exact"))] == 0 for layer in range(3))


def test_batches_change_nothing_and_the_model_is_left_as_it_was():
    model = build().train().requires_grad_(False)
    alone, together = measured(model, images(5), batch_size=1)[0], measured(model, images(5), batch_size=5)[0]
    assert alone == pytest.approx(together, rel=1e-6)
    assert model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("keywords", [
    {"init_values": 0.5, "reg_tokens": 3},
    {"class_token": False, "global_pool": "avg"},
], ids=["token", "avg"])
def test_a_sample_of_rows_is_right_in_the_mean_over_draws(keywords):
    """Of an image that comes 151 times, each time with rows of its own."""
    model, many = build(**keywords), images(1).expand(151, -1, -1, -1)
    redundancy, specs = measure_redundancy(model, [(images(1),)], silent()), parse_words("reuse,lowrank:5,none")
    found, expected = (
        measure_damage(model, [(many,)], specs, redundancy, silent(), num_rows) for num_rows in (7, None)
    )
    assert found == pytest.approx(expected, rel=0.2, abs=1e-12)
    errors = [found[change] / damage - 1 for change, damage in expected.items() if damage]
    assert abs(sum(errors)) / len(errors) < 0.04


@pytest.mark.parametrize("plan", [None, "exact*3"])
def test_a_sample_holds_all_rows_that_token_pooling_reads(plan):
    """Which are those of prefix tokens: in the last layer there is no error of sampling."""
    model = build(plan, reg_tokens=2)
    found, expected = measured(model, images(), num_rows=3)[0], measured(model, images())[0]
    for change, damage in expected.items():
        if change.layer == L - 1:
            assert found[change] == pytest.approx(damage, rel=1e-6)
        elif damage:
            assert found[change] != pytest.approx(damage, rel=1e-6)


@pytest.mark.proof
def test_a_sample_of_rows_ranks_changes_as_all_rows_do():
    from scipy.stats import spearmanr

    model = build(init_values=0.5)
    expected = [*measured(model, images(3), batch_size=3)[0].values()]
    for seed in range(3):
        found = [*measured(model, images(3), batch_size=3, num_rows=13, seed=seed)[0].values()]
        assert found != expected and spearmanr(found, expected).statistic > 0.95


def test_all_rows_are_looked_at_where_there_are_no_more():
    model = build()
    default, *others = (measured(model, images(), **rows)[0] for rows in ({}, {"num_rows": None}, {"num_rows": 25}))
    assert all(found == default for found in others)


def test_a_seed_decides_the_rows_and_the_batch_does_not():
    model = build()
    alone, together, another = (
        measured(model, images(5), batch_size=size, num_rows=7, seed=seed)[0] for size, seed in ((1, 0), (5, 0), (5, 1))
    )
    assert alone == pytest.approx(together, rel=1e-6)
    assert another != pytest.approx(together, rel=1e-3)


def test_a_model_without_a_head_is_measured_by_its_features():
    model = build()
    model.reset_classifier(0)
    damage, _ = measured(model, images(), parse_words("none"))
    assert all(amount > 0 for amount in damage.values())


def test_memory_does_not_grow_with_the_images(monkeypatch):
    monkeypatch.setattr("vitreuse.compress.redundancy.MAP_NUMBERS", 1)  # image by image
    model = build()
    redundancy = measure_redundancy(model, [(images(),)], silent())

    def peak(count):
        batches = [(images(2),) for _ in range(count)]
        return peak_memory_mib(
            lambda: measure_damage(model, batches, parse_words("reuse,none"), redundancy, silent()),
            [*model.parameters(), *(batch for batch, in batches)],
            torch.device("cpu"),
        ) - sum(batch.nbytes for batch, in batches) / 2**20

    assert 0 < peak(16) < 1.01 * peak(2)


@pytest.mark.parametrize(("plan", "text", "said"), [
    ("exact reuse exact", "none", "exact reuse exact has layers that are not exact, and damage is measured on exact"),
    ("exact*3", "lowrank:26", "lowrank:26 does not fit a model of 26 tokens: give lowrank:25 or less"),
    ("exact*3", "reuse:4", "reuse:4 does not fit a model of 3 heads: give reuse:3 or less"),
])
def test_what_cannot_be_measured_is_one_sentence(plan, text, said):
    with pytest.raises(ValueError, match=said):
        measured(build(plan), images(1), parse_words(text))


def test_another_model_is_named():
    _, redundancy = measured(build(), images(1), parse_words("none"))
    with pytest.raises(ValueError, match="ResNet has no maps that are known: give a ViT of timm"):
        measure_damage(timm.create_model("resnet18"), [(images(1),)], parse_words("none"), redundancy, silent())


def test_redundancy_of_another_model_is_refused():
    _, redundancy = measured(build(), images(1), parse_words("none"))
    other = timm.create_model("vit_tiny_patch16_224", **{**SIZES, "depth": 2})
    with pytest.raises(ValueError, match="redundancy is of 3 layers, the model has 2"):
        measure_damage(other, [images(1)], parse_words("none"), redundancy, silent())


def test_half_precision_keeps_what_its_squares_would_lose():
    model, batch = build(), images()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight *= 0.05
            block.attn.proj.bias *= 0.05
    words = parse_words("exact,none")
    wide, _ = measured(model, batch, words)
    narrow, _ = measured(model.half(), batch.half(), words)
    assert all(narrow[change] == pytest.approx(damage, rel=0.1) for change, damage in wide.items())
