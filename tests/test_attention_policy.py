"""The cost model of attention, what models choose by it, and that they run what cost/backends.py says."""

import itertools
import json

import pytest
import timm
import torch
from cases import CASES, images
from torch.nn import functional as F

from vitreuse import count_macs, parse_plan
from vitreuse.attention import EMPTY_CARRY, maps, policy
from vitreuse.attention import costs as attention_costs
from vitreuse.attention.costs import (
    COST_NAMES,
    SIZED_NAMES,
    cost_at,
    cost_key,
    load_costs,
    load_rates,
)
from vitreuse.attention.policy import Conditions, is_fused_faster, is_map_faster
from vitreuse.cost.backends import layer_backends, sentence, summary
from vitreuse.cost.counters import torch_flops

CPU = torch.device("cpu")
POINTS = [(10, 1.0, 2.0, 3.0, 4.0), (20, 5.0, 4.0, 3.0, 2.0), (40, 5.0, 8.0, 1.0, 2.0)]
KEY = "cpu float32 inference"


def costs_of(fused, unfused, make, apply, key="cpu float32 inference"):
    return {key: [(7, fused, unfused, make, apply)]}


@pytest.mark.parametrize(
    ("num_keys", "costs"),
    [
        (1, (1, 2, 3, 4)),
        (10, (1, 2, 3, 4)),
        (15, (3, 3, 3, 3)),
        (20, (5, 4, 3, 2)),
        (35, (5, 7, 1.5, 2)),
        (40, (5, 8, 1, 2)),
        (999, (5, 8, 1, 2)),
    ],
)
def test_costs_are_linear_between_what_was_measured_and_constant_beyond(num_keys, costs):
    assert cost_at(POINTS, num_keys) == pytest.approx(costs)


@pytest.mark.parametrize("num_keys", [1, 20, 999])
def test_one_point_holds_everywhere(num_keys):
    assert cost_at(POINTS[1:2], num_keys) == POINTS[1][1:]


@pytest.mark.parametrize(("num_keys", "expected"), [(12, True), (19, False), (30, True)])
def test_the_fused_kernel_is_taken_where_it_is_faster(num_keys, expected):
    assert is_fused_faster({KEY: POINTS}, KEY, num_keys)[0] == expected


def test_the_fused_kernel_is_taken_where_nothing_was_measured():
    slow = costs_of(9, 1, 1, 1)
    assert is_fused_faster(slow, KEY, 7) == (False, "1.00 against 9.00 ns a pair")
    for other in ("cuda float32 inference", "cpu bfloat16 inference", "cpu float32 train"):
        assert is_fused_faster(slow, other, 7) == (True, f"nothing measured for {other}")


@pytest.mark.parametrize(("num_readers", "expected"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_map_is_carried_once_its_readers_repay_it(num_readers, expected):
    costs = costs_of(4.0, 3.5, 5.9, 2.0)  # 5.9 + (1 + n) 2 against (1 + n) 3.5
    assert is_map_faster(costs, KEY, 7, num_readers)[0] == expected


@pytest.mark.parametrize(("num_keys", "expected"), [(128, True), (129, False)])
def test_only_a_short_row_is_carried_where_nothing_was_measured(num_keys, expected):
    assert is_map_faster(costs_of(9, 9, 1, 1), "cuda float32 inference", num_keys, 5)[0] == expected


@pytest.mark.parametrize(
    ("device", "dtype", "key"),
    [
        ("meta", torch.float64, "cpu float32 train"),
        ("cuda", torch.float16, "cuda float16 train"),
        ("cpu", torch.bfloat16, "cpu bfloat16 train"),
    ],
)
def test_costs_are_kept_by_device_dtype_and_mode(device, dtype, key):
    assert cost_key(device, dtype, True) == key


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Where a tuned file is looked for; its folder exists."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = attention_costs.tuned_costs_path()
    path.parent.mkdir()
    assert tmp_path in path.parents
    return path


def test_a_tuned_file_lies_over_the_shipped_one(tuned):
    shipped = load_costs()
    costs = {"cpu float32 train": [[7, 1, 2, 3, 4]], "xpu float32 train": [[1, 2, 2, 2, 2]]}
    tuned.write_text(json.dumps({"costs": costs}))
    added = {"cpu float32 train": [(7, 1.0, 2.0, 3.0, 4.0)], "xpu float32 train": [(1, 2, 2, 2, 2)]}
    assert load_costs() == {**shipped, **added}
    assert shipped["cpu float32 train"] != load_costs()["cpu float32 train"]


@pytest.mark.parametrize("text", ["", "[]", '{"costs": 1}', '{"costs": {"a": [[1, 2]]}}', '{"costs": {"a": []}}'])
def test_a_damaged_tuned_file_is_named_in_one_sentence(tuned, text):
    tuned.write_text(text)
    with pytest.raises(ValueError) as error:
        load_costs()
    assert str(error.value) == f"{tuned} holds no costs: move it away, and vitreuse tune writes it anew."


def test_rates_are_of_the_file_that_the_costs_are_of(tuned):
    costs = {"cpu float32 inference": [[7, 1, 2, 3, 4]]}
    tuned.write_text(json.dumps({"costs": costs}))  # of a time before there were rates
    assert load_rates().keys() == {"cpu bfloat16 inference"}
    tuned.write_text(json.dumps({"costs": costs, "rates": {"cpu float32 inference": [[64, 5, 7]]}}))
    assert load_rates()["cpu float32 inference"] == [(64, 5, 7)]
    tuned.write_text(json.dumps({"costs": costs, "rates": {"cpu float32 inference": [[64, 5]]}}))
    with pytest.raises(ValueError, match=r"costs.json holds no rates: move it away, and vitreuse tune writes it anew"):
        load_rates()


def test_the_shipped_costs_are_whole():
    costs = load_costs()
    names = {f"cpu {dtype} {mode}" for dtype in ("float32", "bfloat16") for mode in ("inference", "train")}
    assert names <= costs.keys()
    for points in costs.values():
        keys = [point[0] for point in points]
        assert keys == sorted(set(keys)) and keys
        assert all(len(point) == 1 + len(COST_NAMES) + len(SIZED_NAMES) and min(point) > 0 for point in points)
    assert load_rates().keys() == {key for key in costs if key.endswith("inference")}


def always(way):
    """Costs by which auto carries maps, computes attention fused, or does neither."""
    fused, unfused, make, apply = {"map": (9, 9, 1, 1), "fused": (1, 2, 9, 9), "unfused": (2, 1, 9, 9)}[way]
    return {
        key: [(7, float(fused), float(unfused), float(make), float(apply))]
        for key in ("cpu float32 inference", "cpu float32 train")
    }


def with_costs(monkeypatch, case, costs, **keywords):
    monkeypatch.setattr("vitreuse.model.vit.load_costs", lambda: costs)
    return case.build(**keywords).eval()


def test_maps_that_do_not_fit_are_recomputed_from_q_and_k(monkeypatch):
    model = with_costs(monkeypatch, CASES["reuse of some heads twice"], always("map"))
    x, conditions = images(), Conditions(CPU, torch.float64, False, 2)
    wanted = model(x)
    assert summary(model, conditions) == "map"
    num_bytes = 2 * 5 * 16 * 16 * 8  # one map of 2 images
    monkeypatch.setattr(policy, "memory_bytes", lambda device_type: 4 * num_bytes)
    assert summary(model, conditions) == "map"
    monkeypatch.setattr(policy, "memory_bytes", lambda device_type: 4 * num_bytes - 1)
    assert summary(model, conditions).startswith("qk + ")
    assert "maps would fill over a quarter of the memory" in sentence(model, conditions)
    _, handed = model.blocks[0](torch.randn(2, 16, 15, dtype=torch.float64), EMPTY_CARRY)
    assert handed.made.weights is None and handed.made.q is not None and handed.made.k is not None
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_in_training_all_maps_are_alive_together(monkeypatch):
    model = with_costs(monkeypatch, CASES["lazy"], always("map"))
    num_bytes = 2 * 5 * 16 * 16 * 8
    monkeypatch.setattr(policy, "memory_bytes", lambda device_type: 4 * num_bytes)
    assert summary(model, Conditions(CPU, torch.float64, False, 2)) == "map"
    assert summary(model, Conditions(CPU, torch.float64, True, 2)).startswith("qk")
    assert summary(model, Conditions(CPU, torch.float64, True, 1)) == "map"


def counted(monkeypatch, owner, name):
    """A list that grows with every call of a function."""
    calls, function = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


NAMES = (
    *("reuse", "merge by values", "merge mixture", "reuse of some heads twice", "lazy", "lowrank of several k"),
    *("span dense reused", "mixture tiled"),
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["map", "fused", "unfused"])
@pytest.mark.parametrize(
    ("name", "backend"), [("exact", "auto"), *itertools.product(NAMES, ("auto", "map", "qk"))]
)
def test_what_is_said_is_what_runs(name, way, training, backend, monkeypatch):
    case = CASES[name]
    model = with_costs(monkeypatch, case, always(way), reuse_backend=backend)
    layers = layer_backends(model, Conditions(CPU, torch.float64, training, 2))
    kernels = [layer.kernel for layer in layers if layer is not None]
    fused = counted(monkeypatch, F, "scaled_dot_product_attention")
    blocked = counted(monkeypatch, maps, "blocked_attention")
    with torch.set_grad_enabled(training):
        model.train(training)(images(case.grid))
    assert (len(fused), len(blocked)) == (kernels.count("fused"), kernels.count("blocked"))
    for block, layer in zip(model.blocks, layers, strict=True):
        assert (layer is None) == (not block.has_attention)


@pytest.mark.parametrize("order", [(2.0, 1.5), (1.5, 2.0), (5.0, 4.0)], ids=["channel", "bias", "unfused"])
def test_sizes_are_told_in_the_way_that_costs_least(order, monkeypatch):
    costs = {KEY: [(7, 1.0, 3.0, 9.0, 9.0, *order)]}
    case = CASES["merge in every layer"]
    model, x = with_costs(monkeypatch, case, costs), images(case.grid)
    wanted = [None] + [None if min(order) > 3.15 else ("bias", "channel")[order[1] < order[0]]] * 2
    layers = layer_backends(model, Conditions(CPU, torch.float64, False, 2))
    assert [layer.sizes for layer in layers if layer is not None] == wanted
    assert {layer.kernel for layer in layers[1:] if layer is not None} == {"blocked" if min(order) > 3.15 else "fused"}
    padded = counted(monkeypatch, maps, "padded_attention")
    reference = case.reference(model)
    with torch.no_grad():
        found = model(x)
    assert len(padded) == wanted.count("channel")
    assert ("sizes by a" in sentence(model, Conditions(CPU, torch.float64, False, 2))) == (wanted[1] is not None)
    torch.testing.assert_close(found, torch.stack([reference.logits(image) for image in x]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("device", "dtype", "way"),
    [
        ("cpu", torch.float32, "bias"),
        ("cpu", torch.bfloat16, "bias"),
        ("meta", torch.float32, "bias"),
        ("cuda", torch.float32, "bias"),
        ("cuda", torch.float16, "channel"),
        ("cuda", torch.bfloat16, "channel"),
    ],
)
def test_where_no_sizes_were_measured_a_gpu_has_them_in_a_channel_in_half_precision(device, dtype, way):
    settings = CASES["exact"].build().blocks[0].attn.settings._replace(training=False, costs=costs_of(1, 2, 9, 9))
    found = policy.choose(policy.Call(device, dtype, 7, has_sizes=True), settings)
    assert (found.kernel, found.sizes) == ("fused", way) and "nothing measured of sizes" in found.why_sizes


def test_a_channel_for_sizes_is_counted_as_it_runs(monkeypatch):
    case = CASES["merge in every layer"]
    bias, channel = (
        with_costs(monkeypatch, case, {KEY: [(7, 1.0, 3.0, 9.0, 9.0, *sized)]}) for sized in ((1.5, 2.0), (2.0, 1.5))
    )
    x = images(case.grid, num_images=1)
    for model in (bias, channel):
        assert 2 * sum(count_macs(model).values()) == torch_flops(model, x)[""]
    left, heads = parse_plan(case.plan).patches_left(15), 5
    more = 2 * heads * ((1 + left[1]) ** 2 + (1 + left[2]) ** 2)
    assert sum(count_macs(channel).values()) - sum(count_macs(bias).values()) == more
    assert count_macs(channel, theoretical=True) == count_macs(bias, theoretical=True)


@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.ones(16, 16, dtype=torch.bool)}])
def test_a_mask_after_a_merge_is_refused(mask):
    model = CASES["merge in every layer"].build()
    with pytest.raises(ValueError, match=r"^a layer after a merge takes no attn_mask and no is_causal, since"):
        model(images(), **mask)


def test_the_sentence_gives_the_costs_that_decided(monkeypatch):
    model = with_costs(monkeypatch, CASES["lazy"], always("map"))
    assert sentence(model, Conditions(CPU, torch.float32, True)) == (
        "attention on cpu in float32, training: map carried by 1 anchor (1.00 + 2 x 1.00 against 2 x 9.00 ns a pair), "
        "map carried by 1 anchor (1.00 + 3 x 1.00 against 3 x 9.00 ns a pair)"
    )
    model = with_costs(monkeypatch, CASES["span dense reused"], always("unfused"), reuse_backend="qk")
    assert sentence(model, Conditions(CPU, torch.float64, False, compiled=True)) == (
        "attention on cpu in float64, inference: (q, k) carried by 1 anchor (reuse_backend=qk), "
        "unfused in 3 layers (span of 3), unfused in 1 layer (1.00 against 2.00 ns a pair)"
    )
    assert "nothing measured for cpu bfloat16 train" in sentence(model, Conditions(CPU, torch.bfloat16, True))


def test_the_sentence_stays_short_where_each_layer_has_its_own_costs(monkeypatch):
    points = [(3, 1.0, 4.0, 9.0, 9.0, 1.5, 2.0), (16, 2.0, 8.0, 9.0, 9.0, 2.5, 3.0)]
    monkeypatch.setattr("vitreuse.model.vit.load_costs", lambda: {KEY: points})
    shape = {"img_size": 30, "patch_size": (6, 10), "depth": 4, "embed_dim": 10, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_merge_tiny_patch16_224", plan="exact-2*4", **shape).eval()  # 16, 14, 12, 10 keys
    assert sentence(model, Conditions(CPU, torch.float32, False)) == (
        "attention on cpu in float32, inference: fused in 4 layers (2.00 against 8.00 ns a pair in the first, "
        "2.04 against 6.15 ns a pair in the last), sizes by a bias in 3 layers (2.35 against 2.85 ns a pair in the "
        "first, 2.04 against 2.54 ns a pair in the last)"
    )
