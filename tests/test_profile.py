"""The profile of a model by part and kind of operation."""

import time

import pytest
import timm
import torch
from torch import nn

from eval.profile import _kind_of, profile_parts
from vitreuse import count_macs
from vitreuse.cost.measure import inference_call

SIZES = {"img_size": 42, "patch_size": 6, "embed_dim": 33, "depth": 3, "num_heads": 3, "num_classes": 7}
PARTS = {"patch_embed", "norm", "head", *(f"blocks.{i}.{part}" for i in range(3) for part in ("norm1", "attn", "mlp"))}


class Slow(nn.Module):
    """Takes longer than the rest of the model."""

    def forward(self, x):
        return torch.stack([x * (1 + i) for i in range(2000)]).mean(0)


def profile(name="vit_reuse_tiny_patch16_224", change=lambda model: None, dtype=torch.float32, **keywords):
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES, **keywords).eval().to(dtype)
    change(model)
    call = inference_call(model, torch.randn(2, 3, 42, 42, dtype=dtype))
    call()
    start = time.perf_counter()
    call()
    whole_ms = 1000 * (time.perf_counter() - start)
    return profile_parts(model, call, 2, 3), whole_ms, model


def ms_by(rows, key):
    return {value: sum(row["ms"] for row in rows if row[key] == value) for value in {row[key] for row in rows}}


def test_parts_cover_the_model():
    (*rows, total), whole_ms, _ = profile(plan="exact reuse exact")
    parts = ms_by(rows, "part")
    assert parts.keys() >= PARTS
    assert total["ms"] == pytest.approx(sum(row["ms"] for row in rows))
    assert sum(row["time_percent"] for row in rows) == pytest.approx(100)
    assert 0.05 * whole_ms < total["ms"] < 20 * whole_ms  # of the order of the call: this machine may be busy
    assert parts["between parts"] < 0.5 * total["ms"]


def test_time_is_that_of_the_part_where_it_passes():
    def slow_down(model):
        model.blocks[1].mlp = Slow()

    rows, _, _ = profile("vit_tiny_patch16_224", slow_down)
    parts = ms_by(rows[:-1], "part")
    assert max(parts, key=parts.__getitem__) == "blocks.1.mlp"
    assert parts["blocks.1.mlp"] > 0.5 * sum(parts.values())


def test_a_merge_is_a_part_with_its_own_kinds_of_work():
    rows, _, model = profile("vit_merge_tiny_patch16_224", plan="exact-5 exact-3 exact")
    for layer, pairs in ((0, 24 * 25), (1, 22 * 22)):
        found = {row["kind"]: row for row in rows if row["part"] == f"blocks.{layer}.merge"}
        assert found.keys() >= {"products", "selection", "rows"}
        share = 100 * pairs * 11 / sum(count_macs(model).values())
        assert found["products"]["macs_percent"] == pytest.approx(share)
    assert not any(row["part"] == "blocks.2.merge" for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("costs", [(1.0, 2.0), (2.0, 1.0)], ids=["fused", "unfused"])
def test_macs_sum_to_the_model(costs, dtype, monkeypatch):
    points = [(7, *costs, 9.0, 9.0)]
    keys = ("cpu float32 inference", "cpu bfloat16 inference")
    monkeypatch.setattr("vitreuse.model.vit.load_costs", lambda: dict.fromkeys(keys, points))
    (*rows, total), _, model = profile(plan="exact reuse exact", dtype=dtype)
    assert sum(row["macs_percent"] or 0 for row in rows) == pytest.approx(100)
    assert total["macs_percent"] == 100
    kinds = {row["kind"] for row in rows if row["part"] == "blocks.0.attn"}
    assert ("attention" in kinds, "softmax" in kinds) == ((True, False) if costs == (1.0, 2.0) else (False, True))
    map_macs, products = 2 * 50**2 * 33, 4 * 50 * 33**2  # 50 tokens
    expected = {"products": map_macs + products}
    if "attention" in kinds:
        expected = {"attention": map_macs, "products": products}
    macs = sum(count_macs(model).values())
    for row in rows:
        if row["part"] == "blocks.0.attn" and row["macs_percent"] is not None:
            assert row["macs_percent"] == pytest.approx(100 * expected.pop(row["kind"]) / macs)
    assert expected == {}


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "flash_attention_forward_for_cpu"])
def test_every_fused_kernel_is_attention(kernel):
    names = [f"aten::_{kernel}_attention_{way}" for way in ("forward", "backward")]
    names.append("aten::_scaled_dot_product_efficient_attention")
    assert {_kind_of(name) for name in names} == {"attention"}


def test_kinds_are_those_of_the_operations():
    rows, _, _ = profile(plan="exact reuse exact", reuse_backend="map")
    kinds = {part: {row["kind"] for row in rows if row["part"] == part} for part in PARTS}
    assert kinds["patch_embed"] >= {"products"}
    assert kinds["blocks.0.norm1"] >= {"norm"} and "products" not in kinds["blocks.0.norm1"]
    assert kinds["blocks.0.attn"] >= {"products", "softmax"}
    assert "softmax" not in kinds["blocks.1.attn"] and "attention" not in kinds["blocks.1.attn"]
    assert kinds["blocks.0.mlp"] >= {"products", "activation"}


def test_a_model_without_plan_has_times_and_no_macs():
    rows, _, _ = profile("vit_tiny_patch16_224")
    assert {row["part"] for row in rows} >= PARTS
    assert {row["macs_percent"] for row in rows} == {None}


def test_the_model_is_left_as_it_was():
    _, _, model = profile(plan="exact*3")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
