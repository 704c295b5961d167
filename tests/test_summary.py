"""Larger models at the MACs of exact attention."""

import json

import pytest
import timm

from vitreuse import count_macs
from vitreuse.__main__ import main
from vitreuse.cost.summary import equal_macs

LAZY = "(exact reuse*2)*4"
NAME = "vit_reuse_small_patch16_224"


def _macs(plan: str, **keywords) -> int:
    model = timm.create_model(NAME, plan=plan, device="meta", weight_init="skip", **keywords)
    return sum(count_macs(model, theoretical=True).values())


@pytest.mark.parametrize("plan", [LAZY, "lowrank:64*12", "none*12", "(span:7*2 exact)*4"])
@pytest.mark.parametrize(("part", "keyword", "unit"), [("width", "embed_dim", 24), ("mlp", "mlp_ratio", 1 / 16)])
def test_a_plan_grows_until_the_next_step_costs_more_than_exact_attention(plan, part, keyword, unit):
    found = equal_macs(NAME, plan, part)
    assert found.keys() == {keyword} and found[keyword] % unit == 0
    assert _macs(plan, **found) <= _macs("exact*12") < _macs(plan, **{keyword: found[keyword] + unit})


def test_exact_attention_stays_as_large_as_it_is():
    assert equal_macs(NAME, "exact*12", "width") == {"embed_dim": 384}
    assert equal_macs("deit_tiny_patch16_224", "exact*12", "mlp", image_size=96) == {"mlp_ratio": 4.0}


def test_lazy_layers_by_hand():
    """An exact layer's products of one image at width C: qkv 3NCC, logits and values 2NNC, proj NCC, MLP 8NCC."""
    tokens = 197

    def macs(width: int) -> int:
        exact, reuse = 12 * tokens * width**2 + 2 * tokens**2 * width, 10 * tokens * width**2 + tokens**2 * width
        unread = (tokens - 1) * 9 * width**2 + (tokens - 1) * tokens * width  # the last layer is asked for one row
        return 4 * exact + 8 * reuse - unread + 196 * 768 * width + 1000 * width

    assert macs(408) == _macs(LAZY, embed_dim=408)
    assert equal_macs("vit_small_patch16_224", LAZY, "width") == {"embed_dim": 408}


def test_the_command_compares_with_the_exact_model_of_the_original_size(capsys):
    assert main(["plan", LAZY, "--equal-macs", "mlp", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["keywords"] == {"mlp_ratio": 4.8125}
    assert result["macs_ratio"] == _macs(LAZY, mlp_ratio=4.8125) / _macs("exact*12")
    assert main(["plan", LAZY, "--equal-macs", "width"]) == 0
    assert f"{LAZY}  in vit_small_patch16_224 at 224 x 224 px, embed_dim 408" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:lowrank.9999 keeps as many keys")
def test_a_plan_that_costs_more_at_any_size_is_refused(capsys):
    assert main(["plan", "lowrank:9999*12", "--equal-macs", "mlp"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vitreuse plan: plan 'lowrank:9999*12' costs more MACs in vit_small_patch16_224 than exact")
    assert told.endswith("at any mlp_ratio.\n")
