"""Tuning: what it measures, writes and prints, and that models read it."""

import json
import re

import pytest
import timm
import torch

import vitreuse
from vitreuse.__main__ import main
from vitreuse.attention import costs as attention_costs
from vitreuse.attention.costs import COST_NAMES, RATE_NAMES, SIZED_NAMES, load_costs, load_rates
from vitreuse.cost import tune
from vitreuse.cost.measure import Timing
from vitreuse.cost.tune import measure_costs, measure_rates, write_costs
from vitreuse.verbs import tune as verb

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "PAIRS_PER_CALL", 1)
    monkeypatch.setattr(tune, "TOKENS_PER_CALL", 3)
    for module in (tune, verb):
        monkeypatch.setattr(module, "CHANNELS", (64, 128))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_costs_are_times_per_head_query_and_key(monkeypatch):
    times_ms = dict(zip((*COST_NAMES, *SIZED_NAMES), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), strict=True))

    def time_interleaved(calls, device, num_repeats):
        for call in calls.values():
            call()
        return {name: Timing(99.0, times_ms[name], 1.0, num_repeats) for name in calls}

    monkeypatch.setattr(tune, "time_interleaved", time_interleaved)
    told = []
    costs = measure_costs(CPU, [torch.float32], [5, 211], 1, told.append)
    assert list(costs) == ["cpu float32 inference", "cpu float32 train"]
    for points in costs.values():
        assert points == [
            [num_keys, *(float(f"{1e6 * ms / (6 * num_queries * num_keys):.4g}") for ms in times_ms.values())]
            for num_keys, num_queries in ((5, 197), (211, 211))  # a low-rank layer has as many queries as ever
        ]
    assert told[0] == "cpu float32 inference, 5 keys" and len(told) == 4


def test_rates_are_times_per_multiply_add_of_a_layer_without_its_attention(monkeypatch):
    times_ms = dict(zip(RATE_NAMES, (3.0, 5.0), strict=True))

    def time_interleaved(calls, device, num_repeats):
        for call in calls.values():
            call()
        return {name: Timing(99.0, times_ms[name], 1.0, num_repeats) for name in calls}

    monkeypatch.setattr(tune, "time_interleaved", time_interleaved)
    told = []
    rates = measure_rates(CPU, [torch.bfloat16], 1, told.append)
    expected = [[dim, *(float(f"{1e6 * ms / (3 * dim**2):.4g}") for ms in (3 / 8, 5 / 4))] for dim in (64, 128)]
    assert rates == {"cpu bfloat16 inference": expected}
    assert told == ["cpu bfloat16 inference, 64 channels", "cpu bfloat16 inference, 128 channels"]


def test_what_is_written_is_what_models_read():
    measured = {"cpu float32 train": [[7, 1.0, 2.0, 3.0, 4.0], [11, 0.5, 0.25, 3e-5, 4.0]]}
    machines = {"cpu float32 train": {"device": "a", "date": "2026-01-01"}}
    path = attention_costs.tuned_costs_path()
    write_costs(path, machines, measured, {"cpu float32 train": [[64, 0.5, 3e-5]]})
    assert load_rates()["cpu float32 train"] == [(64, 0.5, 3e-5)]
    assert load_costs()["cpu float32 train"] == [(7, 1.0, 2.0, 3.0, 4.0), (11, 0.5, 0.25, 3e-5, 4.0)]
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]
    model = timm.create_model("vit_reuse_tiny_patch16_224", device="meta")
    assert model.blocks[0].attn.costs == load_costs()


def test_costs_of_several_days_keep_their_machine_and_their_points(monkeypatch):
    path = attention_costs.tuned_costs_path()
    path.parent.mkdir(parents=True)
    old = {"machine": {"device": "a", "date": "2026-01-01"}, "costs": {"cuda float16 train": [[7, 1, 2, 3, 4]]}}
    old["costs"]["cpu float32 train"] = [[5, *range(1, 7)], [11, *range(1, 7)]]
    path.write_text(json.dumps(old))
    assert attention_costs.measured_on("cpu float32 train") == "a, 2026-01-01"
    monkeypatch.setattr(verb, "describe_machine", lambda _: {"device": "b", "date": "2026-02-02"})
    vitreuse.tune("cpu", [torch.float32], [8, 5], repeats=1)
    assert [point[0] for point in load_costs()["cpu float32 train"]] == [5, 8, 11]
    assert load_costs()["cpu float32 train"][0] != (5, *range(1, 7)) and load_costs()["cuda float16 train"]
    assert attention_costs.measured_on("cpu float32 train") == "b, 2026-02-02"
    assert attention_costs.measured_on("cuda float16 train") == "a, 2026-01-01"


def test_costs_that_cannot_be_read_leave_the_shipped_ones(monkeypatch):
    path = attention_costs.tuned_costs_path()
    write_costs(path, {"cpu float32 train": {}}, {"cpu float32 train": [[7, 1.0, 2.0, 3.0, 4.0]]}, {})
    assert load_costs()["cpu float32 train"] == [(7, 1.0, 2.0, 3.0, 4.0)]
    monkeypatch.setattr("os.access", lambda found, mode: found == attention_costs.SHIPPED_COSTS)  # of another user
    assert load_costs() == attention_costs.read_costs(attention_costs.SHIPPED_COSTS)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda text: text)  # without a home
    assert timm.create_model("vit_reuse_tiny_patch16_224", device="meta").blocks[0].attn.costs == load_costs()


def test_what_could_not_be_kept_is_not_measured(tmp_path):
    with pytest.raises(ValueError, match=r"dtypes are torch.float64: give some of torch.float32, "):
        vitreuse.tune("cpu", [torch.float64])
    for keys in ([], [0, 5]):
        with pytest.raises(ValueError, match=r"numbers of keys are (none|0, 5): give some above 0"):
            vitreuse.tune("cpu", keys=keys)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"nothing can be written in .*file .a file is in its place.: choose another"):
        vitreuse.tune("cpu", file=tmp_path / "file" / "costs.json")
    path = tmp_path / "costs.json"
    path.write_text('{"machine": {}, "costs": {"cpu float32 inference": []}}')
    with pytest.raises(ValueError, match="holds no costs: move it away"):
        vitreuse.tune("cpu", file=path)


def tune_json(capsys, *more):
    assert main(["tune", "--device", "cpu", "--repeats", "1", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_measures_writes_and_says_what_auto_chooses(capsys):
    result = tune_json(capsys, "--dtype", "float32", "bfloat16", "--keys", "11", "5", "11")
    assert (result["file"], result["is_default"]) == (str(attention_costs.tuned_costs_path()), True)
    assert [(point["dtype"], point["mode"], point["num_keys"]) for point in result["points"]] == [
        (dtype, mode, keys) for dtype in ("float32", "bfloat16") for mode in ("inference", "train") for keys in (5, 11)
    ]
    written = load_costs()
    for point in result["points"]:
        costs = point["costs_ns"]
        points = written[f"cpu {point['dtype']} {point['mode']}"]
        sized = point["sized_costs_ns"]
        measured = (*costs.values(), *sized.values())
        assert (point["num_keys"], *measured) in points and min(measured) > 0
        assert sized.keys() == {*SIZED_NAMES} and sized[point["sizes"]] == min(sized.values())
        assert point["attention"] == ("fused" if costs["fused"] <= 1.05 * costs["unfused"] else "unfused")
        for readers, way in point["carried_by_readers"].items():
            uses = int(readers) + 1
            repays = costs["make"] + uses * costs["apply"] <= uses * min(costs["fused"], costs["unfused"])
            assert way == ("map" if repays else "qk")


def test_another_dtype_is_added_to_the_file(capsys, tmp_path):
    path = tmp_path / "folder" / "mine.json"
    for dtype in ("float32", "bfloat16"):
        result = tune_json(capsys, "--dtype", dtype, "--keys", "5", "--output", str(path))
        assert (result["file"], result["is_default"], len(result["points"])) == (str(path), False, 2)
    written = json.loads(path.read_text())
    assert written["costs"].keys() == {
        f"cpu {dtype} {mode}" for dtype in ("float32", "bfloat16") for mode in ("inference", "train")
    }
    assert written["rates"].keys() == {"cpu float32 inference", "cpu bfloat16 inference"}
    assert written["rates"]["cpu bfloat16 inference"] == result["rates"]["cpu bfloat16 inference"]
    assert not attention_costs.tuned_costs_path().exists()


def test_the_table_says_where_the_costs_went_and_progress_is_apart(capsys, tmp_path):
    path = tmp_path / "mine.json"
    options = ["--device", "cpu", "--repeats", "1", "--dtype", "float32", "--keys", "5", "--output", str(path)]
    assert main(["tune", *options]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"measuring: 4/4 points, [0-9.]+ points/s, 0:00:00 left\n", shown.err)
    assert "mine.json" in "".join(shown.out.split()) and "models read" in shown.out
    assert "carried to 5" in shown.out


def test_the_function_does_what_the_command_does(capsys, tmp_path):
    path = tmp_path / "mine.json"
    with vitreuse.quiet():
        found = vitreuse.tune("cpu", [torch.float32], [5], repeats=1, file=path)
    assert (found.file, found.facts["file"]) == (path, str(path))
    assert json.loads(path.read_text())["costs"].keys() == {"cpu float32 inference", "cpu float32 train"}
    assert "carried to 5" in str(found) and "<table>" in found._repr_html_()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--output", "{tmp}/broken.json"], "vitreuse tune: {tmp}/broken.json holds no costs: move it away, and"),
        (["--output", "{tmp}"], "vitreuse tune: [Errno 21] Is a directory"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_measured(argv, sentence, capsys, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    assert main(["tune", "--device", "cpu", "--keys", "5", *(word.format(tmp=tmp_path) for word in argv)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(sentence.format(tmp=tmp_path)) and told.count("\n") == 1
