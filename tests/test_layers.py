"""Every kind of layer, alone and mixed, against a naive reference written from the papers."""

import copy
import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CASES, SMALL_CASES, Case, backends, images, with_backends
from timm.layers import set_fused_attn, set_reentrant_ckpt, use_fused_attn, use_reentrant_ckpt
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse import load_checkpoint, parse_plan
from vitreuse.attention import Carry, maps, tiles
from vitreuse.attention.maps import Carried

NO_GRADIENT = ("k_norm.bias",)  # it adds the same number to all logits of a query

UNFUSED = {f"cpu float32 {mode}": [(1, 9.0, 1.0, 1.0, 1.0)] for mode in ("inference", "train")}  # no layer fuses

every_case = pytest.mark.parametrize(("name", "backend"), with_backends(CASES))
every_small_case = pytest.mark.parametrize(("name", "backend"), with_backends(SMALL_CASES))


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request):
    """timm's switch of fused attention, read when a model is built."""
    before = use_fused_attn()
    set_fused_attn(request.param)
    yield
    set_fused_attn(before)


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def reentrant(request):
    """timm's switch of re-entrant checkpointing, which a plan's layers do not follow."""
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield
    set_reentrant_ckpt(before)


def build(name: str, backend: str, **more) -> Any:
    """The model of a case."""
    return CASES[name].build(reuse_backend=backend, **more)


def loss(logits: Tensor) -> Tensor:
    """A number that every logit moves."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """The loss's gradient of every parameter."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(logits), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


@functools.cache
def expected(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, final tokens and gradients of a case by the reference; they depend on no backend."""
    case = CASES[name]
    reference = case.reference(case.build())
    tokens = torch.stack([reference.tokens(image) for image in images(case.grid)])
    logits = torch.stack([reference.head(image_tokens) for image_tokens in tokens])
    grads = torch.autograd.grad(loss(logits), list(reference.state.values()))
    return logits.detach(), tokens.detach(), dict(zip(reference.state, grads, strict=True))


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def assert_gradients(actual: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
    """Every parameter has a gradient, the right one, and not zero unless its gradient is zero by nature."""
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert gradient is not None, f"no gradient for {name}"
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 1e-7 or name.endswith(NO_GRADIENT), f"gradient of {name} is zero"


@every_case
def test_outputs_and_gradients_are_those_of_the_reference(name, backend, fused):
    logits, tokens, grads = expected(name)
    model, x = build(name, backend), images(CASES[name].grid)
    actual = model(x)
    assert_close(actual, logits)
    assert_gradients(gradients(model, actual), grads)
    assert_close(model.forward_features(x), tokens)


@every_case
def test_the_last_layer_computes_the_rows_that_the_head_reads(name, backend):
    logits, _, grads = expected(name)
    model, x = build(name, backend), images(CASES[name].grid)
    rows = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: rows.append(output[0].shape[1]))
    model(x)
    actual = model.forward_head(model.forward_features(x))
    num_read, num_left = 2 if CASES[name].distilled else 1, tokens_of(model) - CASES[name].num_merged
    assert rows == [num_read if model.global_pool == "token" else num_left, num_left]
    assert_close(actual, logits)
    assert_gradients(gradients(model, actual), grads)


def tokens_of(model: Any) -> int:
    return model.num_prefix_tokens + model.patch_embed.num_patches


FIRST_ROWS = [  # where tokens merge, those that never do
    pytest.param(*case.values, num_queries, marks=case.marks)
    for case in with_backends(CASES)
    for num_queries in (1, 4)
    if num_queries <= CASES[case.values[0]].num_prefix_tokens or not CASES[case.values[0]].num_merged
]


@pytest.mark.parametrize(("name", "backend", "num_queries"), FIRST_ROWS)
def test_any_number_of_first_rows_can_be_asked_for(name, backend, num_queries):
    """More than there are prefix tokens, too: then a span cuts rows out of whole tiles."""
    model = build(name, backend)
    tokens, _ = model.embed(images(CASES[name].grid))
    rows = model.blocks(tokens, num_queries=num_queries, layerwise_proj=model.key_proj)
    assert_close(rows, model.blocks(tokens, layerwise_proj=model.key_proj)[:, :num_queries])


@every_case
def test_checkpointing_changes_neither_outputs_nor_gradients(name, backend, reentrant):
    logits, _, grads = expected(name)
    model = build(name, backend)
    model.set_grad_checkpointing()
    calls = count_calls(next(block for block in model.blocks if block.spec.word != "skip"))  # which saves nothing
    actual = model.train()(images(CASES[name].grid))
    assert_close(actual, logits)
    assert_gradients(gradients_by_backward(model, actual), grads)
    assert len(calls) == 2


def count_calls(module: nn.Module) -> list[None]:
    """A list that grows by one with every forward of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def gradients_by_backward(model: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """The same as ``gradients``, as a training step makes them; re-entrant checkpoints know no other way."""
    loss(logits).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_small_case
def test_a_model_can_be_copied_after_a_forward(name, backend):
    model = build(name, backend)
    model(images())
    assert_close(copy.deepcopy(model)(images()), expected(name)[0])


@every_small_case
def test_two_threads_can_run_one_model_in_lockstep(name, backend):
    model, x, barrier = build(name, backend), images(), threading.Barrier(2, timeout=300)

    def wait_for_the_other(*_):
        barrier.wait()

    for block in model.blocks:
        block.register_forward_pre_hook(wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        logits = list(pool.map(model, x.split(1)))
    assert_close(torch.cat(logits), expected(name)[0])


@every_case
def test_an_image_does_not_see_its_batch(name, backend):
    model, x = build(name, backend), images(CASES[name].grid)
    assert_close(model(torch.stack([x[1], torch.full_like(x[0], 100.0)]))[0], expected(name)[0][1])


def merges(model: Any, x: Tensor) -> Tensor:
    """Which tokens of each image are one after each layer, (B, layers, N, N)."""
    with torch.no_grad():
        taken = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    patches = [layer[-1] if isinstance(layer, tuple) else layer for layer in taken]
    return torch.stack([(y[:, :, None] == y[:, None]).all(-1) for y in patches], dim=1)


def assert_near(actual: Tensor, wanted: Tensor, found: Tensor, chosen: Tensor) -> None:
    """Near for images whose tokens merged as they should, and not far for others: rounding flips near-equal ties."""
    alike = (found == chosen).flatten(1).all(1)
    apart = (actual.double() - wanted).flatten(1)
    assert apart[alike].norm() <= 0.05 * wanted[alike].norm()
    assert (apart.norm(dim=1) <= 0.5 * wanted.flatten(1).norm(dim=1)).all()


@functools.cache
def expected_merges(name: str) -> Tensor:
    """Which tokens of each image of a case are one after each layer."""
    return merges(CASES[name].build(), images(CASES[name].grid))


@every_case
def test_bfloat16_and_autocast_are_close(name, backend):
    logits = expected(name)[0]
    model, x = build(name, backend).float(), images(CASES[name].grid, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, found = model(x), merges(model, x)
    assert_near(mixed, logits, found, expected_merges(name))
    assert all(g is not None and g.isfinite().all() for g in gradients(model, mixed).values())
    narrow = model.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert_near(narrow, logits, merges(model, x.bfloat16()), expected_merges(name))


def numbers_seen(monkeypatch) -> list[tuple[torch.dtype, ...]]:
    """The types of the queries, keys and values of every map that is made or applied, and of all other attention."""
    seen, make, apply = [], maps.make_map, maps.apply_map
    fused, blocked = torch.nn.functional.scaled_dot_product_attention, maps.blocked_attention

    def made(q, k, *rest):
        seen.append((q.dtype, k.dtype))
        return make(q, k, *rest)

    def applied(weights, prefix_weights, v, *rest):
        seen.append((weights.dtype, v.dtype))
        return apply(weights, prefix_weights, v, *rest)

    def whole(attention):
        def attended(q, k, v, *rest, **more):
            seen.extend([(q.dtype, k.dtype), (q.dtype, v.dtype)])
            return attention(q, k, v, *rest, **more)

        return attended

    monkeypatch.setattr(maps, "make_map", made)
    monkeypatch.setattr(maps, "apply_map", applied)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", whole(fused))
    monkeypatch.setattr(maps, "blocked_attention", whole(blocked))
    return seen


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_autocast_narrows_all_of_attention(name, backend, dtype, inference, monkeypatch):
    logits, chosen, seen = expected(name)[0], expected_merges(name), numbers_seen(monkeypatch)
    model, x = build(name, backend).float(), images(CASES[name].grid, dtype=torch.float32)
    for costs in ({}, {key.replace("float32", str(dtype)[6:]): value for key, value in UNFUSED.items()}):
        for block in model.blocks:
            block.attn.costs = costs
        with torch.inference_mode(inference), torch.autocast("cpu", dtype):
            mixed = model.train(not inference)(x)
            found = merges(model, x)
        mixed = sum(mixed) / len(mixed) if isinstance(mixed, tuple) else mixed
        assert_near(mixed, logits, found, chosen)
        attends = any(spec.has_attention for spec in parse_plan(CASES[name].plan))
        assert set(seen) == ({(dtype, dtype)} if attends else set())
        seen.clear()


class Widening(nn.LayerNorm):
    """A norm under autocast on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize("backend", ["map", "qk"])
@pytest.mark.parametrize("inference", [False, True])
def test_norms_of_queries_and_keys_may_widen_them(backend, inference, monkeypatch):
    seen = numbers_seen(monkeypatch)
    model = Case("exact reuse:2 span:3 reuse:1 lowrank:3").build(reuse_backend=backend, qk_norm=True).float()
    for block in model.blocks:
        block.attn.costs = {key.replace("float32", "bfloat16"): value for key, value in UNFUSED.items()}
        block.attn.q_norm, block.attn.k_norm = Widening(3), Widening(3)
    carries = []
    model.blocks[0].register_forward_hook(lambda module, args, output: carries.append(output[1].made))
    with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        assert model.train(not inference)(images(dtype=torch.float32)).isfinite().all()
    assert {x.dtype for x in carries[0] if x is not None} == {torch.bfloat16}
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@every_small_case
def test_a_carry_is_made_only_for_a_layer_that_reads_it(name, backend):
    model = build(name, backend)
    specs = parse_plan(CASES[name].plan)
    handed = {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, layer=layer: handed.update({layer: output[1]}))
    model(images())
    for layer, carry in handed.items():
        following = [spec.word for spec in specs[layer + 1 :] if spec.has_attention]
        is_read = following[:1] == ["reuse"]
        made = (*carry.made, carry.key_proj, carry.value_proj)
        assert any(field is not None for field in made) == is_read, layer


overruled_by_dropout = pytest.mark.filterwarnings("ignore:reuse_backend='qk' has no effect while training:UserWarning")


@overruled_by_dropout
@pytest.mark.parametrize(
    ("backend", "attn_drop_rate", "training", "carried"),
    [
        ("map", 0.0, True, "map"),
        ("qk", 0.0, True, "q and k"),
        ("auto", 0.0, True, "map"),  # on the CPU
        ("qk", 0.1, True, "map"),  # dropout cannot be drawn on a map that a fused kernel makes
        ("qk", 0.1, False, "q and k"),
    ],
)
def test_a_backend_carries_either_the_map_or_queries_and_keys(backend, attn_drop_rate, training, carried):
    model = CASES["reuse"].build(reuse_backend=backend, attn_drop_rate=attn_drop_rate).train(training)
    carries = []
    model.blocks[0].register_forward_hook(lambda module, args, output: carries.append(output[1]))
    model(images())
    weights, _, q, k = carries[0].made
    assert [weights is not None, q is not None, k is not None] == [carried == "map", *[carried == "q and k"] * 2]


@every_case
@pytest.mark.parametrize("block_bytes", [1, 5000])
def test_inference_by_blocks_of_the_map_is_the_same_function(name, backend, block_bytes, monkeypatch):
    monkeypatch.setattr("vitreuse.attention.maps.BLOCK_BYTES", block_bytes)
    model, x = build(name, backend).eval(), images(CASES[name].grid, num_images=3)
    for block in model.blocks:
        block.attn.costs = UNFUSED
    wanted = model(x)
    with torch.inference_mode():
        assert_close(model(x), wanted.detach())


@pytest.mark.parametrize(("backend", "rate", "warned"), [("qk", 0.1, 1), ("qk", 0.0, 0), ("map", 0.1, 0)])
def test_a_backend_that_dropout_overrules_is_warned_of(backend, rate, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CASES["reuse"].build(reuse_backend=backend, attn_drop_rate=rate)
    assert [str(w.message)[:53] for w in caught] == ["reuse_backend='qk' has no effect while training with "] * warned


def test_a_reuse_layer_without_a_map_says_so():
    model = CASES["reuse"].build()
    with pytest.raises(ValueError, match="a reuse layer was run without a map: call the whole model"):
        model.blocks[1](torch.zeros(1, 16, 15, dtype=torch.float64))


MASKED_PLANS = ("exact*2", "exact reuse:0 reuse", "exact reuse:2 reuse:1 reuse", "exact none reuse:3 exact reuse")
MASKS = {
    "boolean": {"attn_mask": torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < 0.6},
    "additive": {"attn_mask": torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)},
    "per image": {"attn_mask": torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)) < 0.6},
    "one row": {"attn_mask": torch.rand(2, 1, 1, 16, generator=torch.Generator().manual_seed(4)) < 0.6},
    "causal": {"is_causal": True},
}
for _mask in MASKS.values():
    if "attn_mask" in _mask and _mask["attn_mask"].dtype == torch.bool:
        _mask["attn_mask"][..., 0] = True  # no query is left without a key


@pytest.mark.parametrize(("plan", "backend"), [(plan, b) for plan in MASKED_PLANS for b in backends(Case(plan))])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_those_of_the_reference(plan, mask, backend, fused):
    case, x = Case(plan), images()
    model = case.build(reuse_backend=backend)
    reference = case.reference(model)
    arguments = [
        {
            key: value if key == "is_causal" else value[image, 0].expand(16, 16) if value.ndim == 4 else value
            for key, value in MASKS[mask].items()
        }
        for image in range(2)
    ]
    tokens = torch.stack([reference.tokens(image, **given) for image, given in zip(x, arguments, strict=True)])
    assert_close(model.forward_features(x, **MASKS[mask]), tokens)
    assert_close(model(x, **MASKS[mask]), torch.stack([reference.head(image_tokens) for image_tokens in tokens]))
    model.set_grad_checkpointing()
    assert_close(model(x, **MASKS[mask]), torch.stack([reference.head(image_tokens) for image_tokens in tokens]))


def blind(dtype: torch.dtype = torch.bool, *shape: int) -> Tensor:
    """A mask under which the queries 3 and 7 see no key."""
    seen = torch.rand(*shape, 16, 16, generator=torch.Generator().manual_seed(5)) < 0.6
    seen[..., 0], seen[..., [3, 7], :] = True, False
    return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))


BLIND = {"boolean": blind(), "of each image": blind(torch.bool, 2, 1), "of -inf": blind(torch.float64)}


@pytest.mark.parametrize("plan", [*MASKED_PLANS, "exact reuse*2"])
@pytest.mark.parametrize("mask", BLIND.values(), ids=BLIND)
def test_queries_that_see_no_key_mix_no_value_whatever_the_way(plan, mask, fused):
    """As in torch's scaled_dot_product_attention, which an exact plan and carried queries and keys run through."""
    x, found = images(), {}
    for backend in ("qk", "map") if "reuse" in plan else ("auto",):
        for costs in ({}, UNFUSED):  # nothing measured: the fused kernel
            model = Case(plan).build(reuse_backend=backend)
            for block in model.blocks:
                block.attn.costs = costs
            tokens = model.forward_features(x, attn_mask=mask)
            grads = torch.autograd.grad(tokens.sin().sum(), [*model.blocks.parameters()])
            with torch.inference_mode():
                assert_close(model.forward_features(x, attn_mask=mask), tokens)
            found[backend, bool(costs)] = torch.cat([tokens.flatten(), *(grad.flatten() for grad in grads)]).detach()
    wanted, *others = found.values()
    assert wanted.isfinite().all()
    for other in others:
        torch.testing.assert_close(other, wanted, rtol=1e-8, atol=1e-9)


def test_a_query_that_sees_no_key_gets_the_bias_of_the_output_projection():
    attn, x = Case("exact").build().blocks[0].attn, torch.randn(1, 16, 15, dtype=torch.float64)
    for attn.fused_attn in (True, False):
        y = attn(x, attn_mask=blind())
        assert_close(y[:, [3, 7]], attn.proj.bias.expand(1, 2, -1))


@pytest.mark.parametrize("plan", ["exact*2", "exact reuse", "exact reuse:2", "lowrank:3 reuse"])
@pytest.mark.parametrize("backend", ["map", "qk"])
@pytest.mark.filterwarnings("ignore:reuse_backend=.* has no effect on plan:UserWarning")
def test_a_mask_beside_causal_attention_is_refused_as_torch_refuses_it(plan, backend, fused):
    model = Case(plan).build(reuse_backend=backend)
    with pytest.raises(ValueError, match=r"attn_mask and is_causal=True exclude each other|lowrank layers take no"):
        model(images(), attn_mask=MASKS["boolean"]["attn_mask"], is_causal=True)
    for block in model.blocks[1:]:  # a reuse layer alone, too
        carry = Carry(Carried(weights=torch.rand(2, 5, 16, 16, dtype=torch.float64)))
        with pytest.raises(ValueError, match=r"exclude each other|lowrank layers take no"):
            block(model.embed(images())[0], carry, attn_mask=blind(), is_causal=True)


def test_a_mask_of_numbers_may_be_wider_than_the_queries(fused):
    model, x = Case("exact reuse:2 reuse").build(reuse_backend="map").bfloat16(), images(dtype=torch.bfloat16)
    mask = MASKS["additive"]["attn_mask"]
    assert torch.equal(model(x, attn_mask=mask.float()), model(x, attn_mask=mask.bfloat16()))


def test_spans_of_one_width_compute_their_bias_once(monkeypatch):
    widths = []
    bias = tiles.neighbourhood_bias
    monkeypatch.setattr(tiles, "neighbourhood_bias", lambda *args: widths.append(args[1]) or bias(*args))
    Case("span:3 exact span:3 reuse:1 span:5 none lowrank:3 span:5 reuse:2 span:3 exact").build()(images())
    assert widths == [3, 5, 3]


@pytest.mark.parametrize("plan", ["lowrank:3", "span:3", "exact none lowrank:3 reuse", "exact span:3 reuse:1"])
@pytest.mark.parametrize("mask", [MASKS["boolean"], MASKS["causal"]], ids=["boolean", "causal"])
def test_layers_whose_keys_are_not_all_tokens_refuse_a_mask(plan, mask):
    with pytest.raises(ValueError, match=r"^(lowrank|span) layers take no attn_mask and no is_causal, since"):
        Case(plan).build()(images(), **mask)


@pytest.mark.parametrize("plan", ["exact reuse", "exact reuse:2 none reuse:1"])
@pytest.mark.parametrize("backend", ["map", "qk"])
def test_patch_dropout_runs_where_no_layer_needs_the_grid(plan, backend):
    model = Case(plan).build(patch_drop_rate=0.5, reuse_backend=backend)
    assert model.train().forward_features(images()).shape == (2, 1 + 7, 15)
    assert model.eval().forward_features(images()).shape == (2, 1 + 15, 15)


@pytest.mark.parametrize("plan", ["lowrank:3", "span:3", "exact lowrank:3 reuse", "exact span:3 reuse:1"])
def test_patch_dropout_is_refused_at_the_first_training_forward(plan):
    model = Case(plan).build(patch_drop_rate=0.5)
    model.eval()(images())
    with pytest.raises(ValueError, match=r"layers need all 1 \+ 3 x 5 tokens and got 8: set patch_drop_rate to 0"):
        model.train()(images())


@overruled_by_dropout
@every_small_case
def test_dropout_on_the_map_is_drawn_afresh_from_a_map_before_dropout(name, backend, monkeypatch):
    """In training the map itself is carried, whatever the backend; in evaluation nothing changes."""
    model = build(name, backend, attn_drop_rate=0.4)
    assert_close(model.eval()(images()), expected(name)[0])
    maps, dropout = [], F.dropout

    def spy(weights, p=0.5, training=True, inplace=False):
        dropped = dropout(weights, p, training, inplace)
        if weights.ndim == 4:
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            maps.append((weights, dropped))
        return dropped

    monkeypatch.setattr(F, "dropout", spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", unfused_with_dropout(dropout, maps))
    model.train().forward_features(images())
    specs = [spec for spec in parse_plan(CASES[name].plan) if spec.has_attention]
    assert len(maps) == len(specs)
    for (previous, previous_dropped), (weights, dropped), spec in zip(maps, maps[1:], specs[1:], strict=False):
        if str(spec) == "reuse":
            assert not torch.equal(previous_dropped, dropped)
            assert sorted(previous.flatten().tolist()) == sorted(weights.flatten().tolist())


def unfused_with_dropout(dropout, maps):
    """Stands in for fused attention so that its dropout counts as one map's."""

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        assert dropout_p == 0.4
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
        dropped = dropout(weights, dropout_p)
        maps.append((weights, dropped))
        return dropped @ v

    return attention


def identity_projections(model: Any) -> None:
    """Makes every token projection of a model with k = N the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("key_proj", "value_proj")):
                square = parameter.shape[-1] == 16
                parameter.copy_(torch.eye(16).expand_as(parameter) if square else torch.ones_like(parameter))


LOWRANK_OPTIONS = [case.keywords for name, case in CASES.items() if case.plan == "lowrank:3*2"]
LIMITS = [
    (plan, options, backend)
    for plan, given in {
        "exact reuse:0*2": [{}],
        "span:9*3": [{}],
        "span:999999999 reuse:0*2": [{}],
        "span:11 reuse:0 lowrank:16": [{}],
        "lowrank:16*3": LOWRANK_OPTIONS,
        "lowrank:16 reuse:0*2": LOWRANK_OPTIONS,
    }.items()
    for options in given
    for backend in backends(Case(plan))
]


@pytest.mark.parametrize(("plan", "options", "backend"), LIMITS)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.filterwarnings("ignore:.*(saves nothing|is exact attention) here:UserWarning")
def test_every_approximation_has_a_setting_at_which_it_is_exact(plan, options, qk_norm, backend):
    exact = Case("exact*3").build(qk_norm=qk_norm)
    model = Case(plan, keywords=options).build(seed=1, qk_norm=qk_norm, reuse_backend=backend)
    load_checkpoint(model, exact.state_dict())
    identity_projections(model)
    assert_close(model(images()), exact(images()))
    assert_close(model.forward_features(images()), exact.forward_features(images()))


@pytest.mark.parametrize("plan", ["exact-0*3", "exact/30*3", "exact-0/30*3"])
def test_no_merge_and_the_usual_width_are_the_usual_layer(plan):
    exact, model = Case("exact*3").build(), Case(plan).build(seed=1)
    model.load_state_dict(exact.state_dict())
    for run in (type(model).forward, type(model).forward_features):
        torch.testing.assert_close(run(model, images()), run(exact, images()), rtol=1e-12, atol=1e-12)


def test_a_merge_of_nothing_is_read_and_not_written():
    assert parse_plan("exact-0 reuse:2-0/7") == parse_plan("exact reuse:2/7")
    assert str(parse_plan("exact-0 reuse:2-0/7")) == "exact reuse:2/7"


def test_a_linear_layer_begins_as_one_that_is_skipped():
    skipping, model = Case("exact skip reuse:2 skip").build(), Case("exact linear reuse:2 linear").fresh()
    load_checkpoint(model, skipping.state_dict())
    for run in (type(model).forward, type(model).forward_features):
        torch.testing.assert_close(run(model, images()), run(skipping, images()), rtol=1e-12, atol=1e-12)


def test_reusing_every_head_by_number_is_full_reuse():
    full, by_number = Case("exact reuse*2").build(), Case("exact reuse:5*2").build()
    assert full.state_dict().keys() == by_number.state_dict().keys()
    assert_close(by_number(images()), full(images()))
