"""The report's page: whole and safe, its numbers those of the runs, what is refused. `make proof` looks at it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from report.fabricated import PLANS, make_runs

from eval.__main__ import main
from eval.card import read_card
from eval.report import to_html
from eval.report.measured import CURVE_POINTS, by_layer, layer_macs, shortened
from vitreuse import count_macs
from vitreuse.compress.redundancy import map_similarity
from vitreuse.plan.language import WORDS

HOSTILE = "</script><script>alert('x')</script><!-- \u2028 & \" ' <b>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two seeds each of a lazy and of a low-rank model."""
    return make_runs(tmp_path_factory.mktemp("runs"), PLANS[1:3], 2)


def build(capsys, output, *arguments):
    """The page that is built, and its data."""
    assert main(["report", *arguments, "-o", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    html = Path(result["output"]).read_text()
    assert result["bytes"] == len(html.encode())
    return html, data_of(html), result


def data_of(html):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def refuse(capsys, *arguments):
    assert main(["report", *arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture
def cards(folders, tmp_path):
    """Sixty cards: thirty seeds of each model."""
    paths = []
    for number, folder in enumerate((folders[0], folders[2])):
        card = read_card(Path(folder) / "card.json")
        for seed in range(30):
            paths.append(tmp_path / f"{number}-{seed}.json")
            replace(card, seed=seed, top1=card.top1 - seed).write(paths[-1])
    return [str(path) for path in paths]


def test_sixty_cards_make_a_small_page_soon(cards, tmp_path, capsys):
    _, data, result = build(capsys, tmp_path / "report.html", *cards)
    assert result["bytes"] < 3_000_000 and result["seconds"] < 20
    assert [len(shown["runs"]) for shown in data["experiments"]] == [30, 30]
    for shown in data["experiments"]:
        top1 = [run["top1"] for run in shown["runs"]]
        assert shown["top1"] == pytest.approx(np.mean(top1)) and shown["top1_sd"] == pytest.approx(np.std(top1, ddof=1))
        assert shown["curves"] is None and "Only cards were given" in shown["similarity"]["reason"]
    assert data["speed"] == {"batch_size": 32, "repeats": 30, "profile_repeats": 3}
    for model in data["models"].values():
        ms = model["ms"]
        whole_ms = sum(ms["attention"]) + sum(ms["mlp"]) + ms["rest"]
        assert 0.05 < whole_ms * model["images_per_second"] / 32000 < 20  # of the order of the call: it may be busy
        assert model["memory_mib"] > 4 * model["params"] / 2**20


def test_the_page_needs_nothing_else(folders, tmp_path, capsys):
    html, _, _ = build(capsys, tmp_path / "report.html", *folders, "--no-speed")
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", re.sub(r'"http://www.w3.org/2000/svg"', "", html)) == []
    assert re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"|@import|url\(', html) == []
    assert "default-src 'none'" in html
    assert re.findall(r"\$(?:style|script|data)", html) == []


def test_names_stay_text():
    html = to_html({"label": HOSTILE})
    assert data_of(html) == {"label": HOSTILE}
    assert html.count("</script>") == to_html({}).count("</script>")
    script = Path("eval/report/page.js").read_text()
    assert re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(", script) == []


def test_it_shows_what_the_runs_hold(folders, tmp_path, capsys):
    _, data, _ = build(capsys, tmp_path / "report.html", *folders, "--no-speed")
    assert data["speed"] is None
    assert [shown["label"] for shown in data["experiments"]] == ["model0", "model1"]
    lazy = data["experiments"][0]
    model = data["models"][lazy["model"]]
    assert (model["plan"], [layer["anchor"] for layer in model["layers"]]) == (PLANS[1], [None, 0, 0, None, 3, 3])
    cards = [read_card(Path(folder) / "card.json") for folder in folders[:2]]
    assert model["macs"] == cards[0].macs == sum(sum(model["layer_macs"][half]) for half in ("attention", "mlp")) + \
        model["layer_macs"]["rest"]
    assert [run["top1"] for run in lazy["runs"]] == [card.top1 for card in cards]
    curves = lazy["curves"]["top1"]
    records = [json.loads(line) for line in (Path(folders[1]) / "metrics.jsonl").read_text().splitlines()]
    expected = [[record["epoch"], round(record["top1"], 4)] for record in records if record["kind"] == "epoch"]
    assert curves["seeds"][1] == {"seed": 1, "points": expected}
    first, second = (np.array(seed["points"])[:, 1] for seed in curves["seeds"])
    assert np.allclose(np.array(curves["mean"])[:, 1], (first + second) / 2, atol=1e-3)
    rows = lazy["similarity"]["rows"]
    assert lazy["similarity"]["seed"] == 0 and rows[0][:3] == [1.0, 1.0, 1.0] and 0.3 < rows[0][3] < 0.999
    assert data["experiments"][1]["similarity"]["rows"][0][1] is None  # low-rank keys of their own


def test_similarity_is_that_of_the_trained_weights(folders, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("eval.report.measured.map_similarity", lambda model, images: seen.append((model, images)) or
                        map_similarity(model, images))
    build(capsys, tmp_path / "report.html", folders[0], "--no-speed")
    ((model, images),) = seen
    torch.manual_seed(0)
    made = read_card(Path(folders[0]) / "card.json").model_config().create()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made.parameters(), strict=True))
    assert images.shape == (8, 1, 12, 12) and images.std() > 0.1


def test_a_run_without_its_data_says_so(folders, tmp_path, capsys):
    config = Path(folders[0]) / "config.yaml"
    text = config.read_text()
    try:
        config.write_text(re.sub("source_root: .*", "source_root: elsewhere", text))
        _, data, _ = build(capsys, tmp_path / "report.html", folders[0], "--no-speed")
    finally:
        config.write_text(text)
    assert data["experiments"][0]["similarity"] == {"reason": "The validation images are not at elsewhere/digits."}
    assert not Path("elsewhere").exists()


def test_the_page_says_how_it_is_made_again_and_what_is_not_trained_to_its_end(folders, tmp_path, capsys):
    card = read_card(Path(folders[0]) / "card.json")
    replace(card, facts={**card.facts, "training": "the run is not completed"}).write(tmp_path / "card.json")
    page = str(tmp_path / "report.html")
    _, data, _ = build(capsys, Path(page), str(tmp_path / "card.json"), "--repeats", "3", "--batch-size", "2")
    options = f"-o {page} --batch-size 2 --repeats 3"
    assert data["command"] == f"python -m eval report {tmp_path / 'card.json'} {options}"
    assert data["experiments"][0]["training"] == "the run is not completed"
    idle = ["--no-speed", "--repeats", "7", "-o", page]
    assert "have no effect under --no-speed: leave them out" in refuse(capsys, folders[0], *idle)


def test_what_is_no_run_is_refused(folders, tmp_path, capsys):
    output = ["-o", str(tmp_path / "report.html")]
    assert "2 runs of model0 have the seed 0" in refuse(capsys, folders[0], folders[0], *output)
    assert "is neither a run folder nor one of run cards" in refuse(capsys, str(tmp_path), *output)
    assert "is no run card" in refuse(capsys, str(Path(folders[0]) / "config.yaml"), *output)
    assert not (tmp_path / "report.html").exists()


def test_models_of_one_name_are_told_apart(folders, tmp_path, capsys):
    card = read_card(Path(folders[0]) / "card.json")
    others = [replace(card, recipe={**(card.recipe or {}), "train.epochs": 9}), replace(card, set_digest="another")]
    for number, made in enumerate((card, *others)):
        made.write(tmp_path / f"{number}.json")
    _, data, _ = build(capsys, tmp_path / "r.html", *(str(tmp_path / f"{i}.json") for i in range(3)), "--no-speed")
    assert [shown["label"] for shown in data["experiments"]] == ["model0", "model0 (2)", "model0 (3)"]


def test_the_page_knows_every_word_of_the_language():
    script, style = (Path(f"eval/report/page.{kind}").read_text() for kind in ("js", "css"))
    (kinds,) = re.findall(r"const KINDS = \{(.*?)\n\};", script, flags=re.DOTALL)
    assert re.findall(r"^  (\w+): ", kinds, flags=re.MULTILINE) == list(WORDS)
    assert all(re.search(rf"\.{word}\b[^{{}}]*\{{ fill:", style) for word in WORDS)


def test_layers_without_parts_have_their_place():
    model = timm.create_model("vit_reuse_tiny_patch16_224", plan="exact linear skip", img_size=32, depth=3).eval()
    found = layer_macs(model)
    assert found["attention"][1:] == [5 * 192**2, 0] and found["mlp"][1:] == [0, 0]
    assert sum(found["attention"]) + sum(found["mlp"]) + found["rest"] == sum(count_macs(model).values())


def test_parts_are_summed_by_layer():
    parts = {"patch_embed": 1, "blocks.0.norm1": 2, "blocks.0.attn": 4, "blocks.0.mlp": 8, "blocks.1.norm2": 16,
             "blocks.1.mlp": 32, "between parts": 64}
    assert by_layer(parts.items(), 2) == {"attention": [6, 0], "mlp": [8, 48], "rest": 65}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_lazy_tiny_patch16_224"])
def test_macs_by_layer_are_those_of_the_model(name):
    model = timm.create_model(name, img_size=32, depth=3, num_classes=7).eval()
    found = layer_macs(model)
    tokens, width = 5, 192
    rows = tokens if name == "vit_tiny_patch16_224" else 1  # ours computes the class token alone in the last layer
    assert found["mlp"] == [8 * tokens * width**2, 8 * tokens * width**2, 8 * rows * width**2]
    assert found["attention"][0] == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert found["rest"] == 4 * 3 * 16**2 * width + width * 7
    if hasattr(model, "plan"):
        assert sum(found["attention"]) + sum(found["mlp"]) + found["rest"] == sum(count_macs(model).values())


def test_a_long_curve_is_shortened_by_means():
    curve = [(x / 7, float(x)) for x in range(3 * CURVE_POINTS)]
    short = shortened(curve)
    assert len(short) == CURVE_POINTS
    assert short[0] == (round(1 / 7, 3), 1.0) and short[-1][1] == 3 * CURVE_POINTS - 2
    assert shortened(curve[:5]) == [(round(x, 3), y) for x, y in curve[:5]]
