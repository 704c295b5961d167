"""Larger models at the MACs of exact attention."""

import json
import re

import pytest
import timm

from vitreuse import count_macs
from vitreuse.__main__ import main
from vitreuse.cost.summary import describe, equal_macs
from vitreuse.verbs.describe import SUMMED

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


@pytest.mark.parametrize("arguments", [("exact/96*12", "mlp"), ("skip*12", "width")], ids=str)
def test_a_plan_that_costs_less_at_any_size_is_refused(arguments, capsys):
    """The units of a layer that says how many it has do not grow with mlp_ratio."""
    plan, part = arguments
    assert main(["plan", plan, "--equal-macs", part]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"vitreuse plan: plan '{plan}' costs fewer MACs in vit_small_patch16_224 than exact")


ALL_WORDS = "lowrank:64 reuse span:7-8 exact exact-90/96 linear exact-49/32 skip none exact reuse-20/0 exact-2"


def test_each_layer_says_its_tokens_and_hidden_units():
    layers = describe("deit_small_distilled_patch16_224", ALL_WORDS)["layers"]
    patches = [196, 196, 196, 188, 188, 98, 98, 49, 49, 49, 49, 29]
    assert [row["tokens"] for row in layers] == [2 + count for count in patches]
    assert [row["merged"] for row in layers] == [0, 0, 8, 0, 90, 0, 49, 0, 0, 0, 20, 2]
    assert [row["hidden"] for row in layers] == [1536] * 4 + [96, 0, 32, 0, 1536, 1536, 0, 1536]


def shown(capsys, plan: str) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a plan's table, each split at two spaces or more."""
    assert main(["plan", plan]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    rows = [re.split("  +", line) for line in lines if re.match(r"layer|\d+(-\d+)? ", line)]
    return rows[0], rows[1:]


def test_every_part_of_a_layer_is_in_a_column(capsys):
    layers = describe("vit_small_patch16_224", ALL_WORDS)["layers"]
    parts = {part for row in layers for part in row["theoretical_macs"]}
    assert parts <= {part for summed in SUMMED.values() for part in summed} and {"linear", "token_projection"} < parts
    headings, _ = shown(capsys, ALL_WORDS)
    assert headings[:6] == ["layer", "word", "map of", "tokens", "left", "hidden"] and {"lowrank", "linear"} < {
        *headings
    }


@pytest.mark.parametrize(
    ("plan", "headings"),
    [
        ("exact*12", "layer word qkv logits values proj mlp total"),
        ("exact reuse*11", "layer word map~of qkv logits values proj mlp total"),
        ("exact*11 exact-8", "layer word tokens left qkv logits values proj merge mlp total"),
        ("exact*11 exact/8", "layer word hidden qkv logits values proj mlp total"),
        ("exact*11 skip", "layer word qkv logits values proj mlp total"),
        ("none*11 linear", "layer word mlp linear total"),
    ],
)
def test_columns_that_say_nothing_of_the_plan_are_left_out(plan, headings, capsys):
    expected = [heading.replace("~", " ") for heading in f"{headings} of~exact".split(" ")]
    found, _ = shown(capsys, plan)
    assert [heading for heading in found if heading != "merge"] == [part for part in expected if part != "merge"]


def test_a_strip_is_as_long_as_the_tokens_that_are_left(capsys, monkeypatch):
    plan = "exact-49 exact-64 exact-41 exact-2 exact*8"
    _, rows = shown(capsys, plan)
    assert [row[:4] for row in rows] == [
        ["0", "exact-49", "197", 12 * "█"],
        ["1", "exact-64", "148", 9 * "█"],
        ["2", "exact-41", "84", 5 * "█" + "▏"],
        ["3", "exact-2", "43", 2 * "█" + "▋"],
        ["4-10", "exact", "41", 2 * "█" + "▌"],
        ["11", "exact", "41", 2 * "█" + "▌"],
    ]
    assert all(round(8 * 12 * int(row[2]) / 197) == measure(row[3]) for row in rows)
    monkeypatch.setattr("vitreuse.verbs.describe.for_terminal", ascii)
    assert [row[3] for row in shown(capsys, plan)[1]] == ["#" * number for number in (12, 9, 5, 3, 2, 2)]


def measure(strip: str) -> int:
    """The length of a strip in eighths of a character."""
    return sum(" ▏▎▍▌▋▊▉█".index(character) for character in strip)
