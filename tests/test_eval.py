"""The instruments of `python -m eval`: counted by hand, on clocks that the tests set, and from the command line."""

import csv
import io
import itertools
import json
import os
import re
import shutil
import socket
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers.config import use_fused_attn
from torch import nn

from eval import throughput
from eval.__main__ import main
from eval.card import read_card
from eval.distributed import Ranks, joined
from eval.figures import STYLES, Point, kind_of, scatter_figure
from eval.labelled import Share
from eval.predictions import Predictions
from eval.table import Column, to_csv, to_latex, to_markdown
from eval.throughput import Condition, measure
from eval.top1 import evaluate
from vitreuse.config import load_config, to_yaml
from vitreuse.cost.backends import fused_attention
from vitreuse.cost.macs import count_params
from vitreuse.cost.measure import Timing, _LiveStorages, inference_call, peak_memory_mib
from vitreuse.data import EncodedSample, Sample, write_shards
from vitreuse.files.networks import plain_model, resolve_targets
from vitreuse.model.preprocessing import evaluation_transform, image_settings
from vitreuse.plan import parse_plan

CONFIG = """
model:
  name: deit_reuse_tiny_patch16_224
  plan: exact reuse*2
  keywords:
    {{img_size: 12, patch_size: 4, in_chans: 1, num_classes: {num_classes}, embed_dim: 8, depth: 3, num_heads: 2}}
data: {{root: {root}}}
train: {{epochs: 1, global_batch_size: 2, optimizer: {{lr: 0.1}}}}
eval: {{crop_pct: 1.0}}
"""


class Numbers:
    """Image i shows i and has the label i % 5; a picklable data set."""

    def __init__(self, num_images: int):
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, number: int) -> Sample:
        return Sample(Image.new("L", (1, 1), number), number % 5, str(number))


class Reader(nn.Module):
    """Seven classes; right on an image's number modulo 5, unless 3 divides the number: then the label comes third."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        labels = images.long() % 5
        logits = nn.functional.one_hot(labels, 7).double()
        others = nn.functional.one_hot((labels + 1) % 7, 7) + nn.functional.one_hot((labels + 2) % 7, 7)
        return logits + 2 * others * (images % 3 == 0)[:, None]


def to_number(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)))


def expected(num_images: int) -> tuple[int, float, float]:
    """n, top-1 and top-5."""
    num_wrong = len(range(0, num_images, 3))
    return num_images, 100 * (num_images - num_wrong) / num_images, 100.0


def measured(predictions: Predictions) -> tuple[int, float, float]:
    return predictions.n, predictions.top1, predictions.top5


@pytest.mark.parametrize(("num_images", "batch_size", "num_workers"), [(1, 4, 0), (11, 4, 0), (12, 4, 2), (13, 20, 0)])
def test_one_rank_counts_every_image_once(num_images, batch_size, num_workers):
    model = Reader().train()
    dataset = Numbers(num_images)
    share = Share(dataset, transform=to_number, batch_size=batch_size, num_workers=num_workers)
    result = evaluate(model, share)
    assert measured(result) == expected(num_images)
    assert result.keys == tuple(map(str, range(num_images)))
    assert model.training


@pytest.mark.parametrize("num_images", [1, 11, 12])
def test_a_batch_that_is_filled_up_counts_no_image_more(num_images):
    model, sizes = Reader(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    plain, filled = (
        Share(Numbers(num_images), transform=to_number, batch_size=4, fills_up=fills_up) for fills_up in (False, True)
    )
    assert evaluate(model, filled).to_csv() == evaluate(Reader(), plain).to_csv()
    assert sizes == [4] * -(-num_images // 4)


def test_several_ranks_need_a_process_group():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        evaluate(Reader(), Share(Numbers(3), transform=to_number, ranks=Ranks(0, 2)))


def test_an_empty_data_set_has_no_accuracy():
    with pytest.raises(ValueError, match="0 of 0 batches, 0 in all: a set must have an image"):
        evaluate(Reader(), Share(Numbers(0), transform=to_number))


@pytest.fixture
def experiment(tmp_path):
    """A config of a tiny model and its data: three classes, told apart by brightness."""
    for (label, grey), number in itertools.product(enumerate((0, 100, 200)), range(3)):
        folder = tmp_path / "data" / "val" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), grey + number).save(folder / f"{number}.png")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "data", num_classes=3))
    return path


def make_run(path: Path, config_path: Path, status: str = "completed", top1: float = 50.0) -> Path:
    """A run folder as `python -m train` leaves it."""
    config = load_config(config_path)
    path.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(config.model.create().state_dict(), path / "model.safetensors")
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "run.json").write_text(json.dumps({"status": status}))
    records = [{"kind": "epoch", "top1": 1.0}, {"kind": "final", "n": 9, "top1": top1, "top5": 100.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_images_have_the_size_and_channels_of_the_model(experiment):
    model = resolve_targets([str(experiment)])[0].model.create()
    assert image_settings(model)["input_size"] == (1, 12, 12)
    mean, std = sum((0.485, 0.456, 0.406)) / 3, sum((0.229, 0.224, 0.225)) / 3
    framed = Image.new("L", (24, 24), 255)
    framed.paste(0, (6, 6, 18, 18))
    assert evaluation_transform(model, crop_pct=0.5)(framed).eq(torch.tensor(-mean / std)).all()
    whole = evaluation_transform(model, crop_pct=1.0)(framed)
    assert whole.shape == (1, 12, 12)
    assert whole[0, 0, 0].item() == pytest.approx((1 - mean) / std)


def test_labels_stay_apart_when_runs_share_a_name(tmp_path, experiment):
    runs = [str(make_run(tmp_path / seed / "reuse", experiment)) for seed in "ab"]
    assert [target.label for target in resolve_targets([*runs, str(experiment)])] == [*runs, "tiny"]


def test_weights_of_an_unfinished_run_are_its_newest_checkpoint(tmp_path, experiment):
    run = make_run(tmp_path / "run", experiment, status="running")
    (run / "model.safetensors").unlink()
    target = resolve_targets([str(run)])[0]
    for step, filling in ((5, 0.5), (10, 1.0), (15, 1.5)):
        folder = run / "checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        state = {name: torch.full_like(tensor, filling) for name, tensor in target.model.create().state_dict().items()}
        torch.save({"model": {}, "ema": state}, folder / "state.pt")
        if step < 15:  # the last one was being written
            (folder / "complete.json").write_text("{}")
    assert all(parameter.eq(1.0).all() for parameter in target.load().parameters())


def run_json(capsys, *arguments: str) -> dict:
    """The one JSON object that a command prints."""
    assert main([*arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_top1_of_a_run_folder(tmp_path, experiment, capsys):
    run = make_run(tmp_path / "run", experiment)
    model = resolve_targets([str(run)])[0].load().eval()
    transform = evaluation_transform(model, crop_pct=1.0)
    greys = [(label, grey + number) for label, grey in enumerate((0, 100, 200)) for number in range(3)]
    logits = {grey: model(transform(Image.new("L", (12, 12), grey))[None])[0] for _, grey in greys}
    num_correct = sum(int(logits[grey].argmax()) == label for label, grey in greys)
    row = run_json(capsys, "top1", str(run), "--batch-size", "4")["rows"][0]
    assert (row["n"], row["top1"], row["top5"]) == (9, pytest.approx(100 * num_correct / 9), 100.0)


def test_a_card_is_of_the_model_that_was_evaluated(tmp_path, experiment, capsys):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=12)
    save_file(model.state_dict(), tmp_path / "three.safetensors")
    options = ("--checkpoint", str(tmp_path / "three.safetensors"), "--image-size", "32", "-o", str(tmp_path / "out"))
    run_json(capsys, "top1", "vit_tiny_patch16_224", *options, "--data", str(tmp_path / "data"))
    card = read_card(tmp_path / "out" / "vit_tiny_patch16_224.32px.card.json")
    assert card.params == count_params(model) and card.model["keywords"] == {"img_size": 32, "num_classes": 3}


def test_a_model_without_a_head_has_no_accuracy(tmp_path, experiment, capsys):
    picture = (tmp_path / "data" / "val" / "class0" / "0.png").read_bytes()
    write_shards([EncodedSample("a", picture, "png", 1)], tmp_path / "shards" / "val", ("cat", "dog", "cow"), 10)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "features.safetensors")
    options = ["--checkpoint", str(tmp_path / "features.safetensors"), "--data", str(tmp_path / "shards")]
    assert main(["top1", "vit_tiny_patch16_224", *options, "--device", "cpu"]) == 2
    assert "has no head, so that nothing it says is a class: python -m eval knn measures" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_found_out_first(tmp_path, experiment, capsys, monkeypatch):
    (tmp_path / "file").touch()
    run = str(make_run(tmp_path / "run", experiment))
    for work in ("eval.top1.evaluate", "eval.knn.features", "eval.throughput.measure", "eval.report._report"):
        monkeypatch.setattr(work, lambda *arguments, **keywords: pytest.fail("it was measured first"))
    monkeypatch.setattr("eval.report.read_series", lambda paths: [])
    for argv in (
        ["top1", run, "-o", str(tmp_path / "file")],
        ["knn", run, "-o", str(tmp_path / "file" / "out")],
        ["throughput", str(experiment), "--csv", str(tmp_path / "file" / "speed.csv")],
        ["throughput", str(experiment), "--csv", str(tmp_path)],
        ["report", run, "-o", str(tmp_path)],
    ):
        assert main([*argv, "--device", "cpu"]) == 2, argv
        told = capsys.readouterr().err
        assert "a file is in its place): choose another place." in told or "is a folder: give a file in it." in told


def test_a_split_in_a_folder_has_a_file_of_its_own(tmp_path, experiment, capsys):
    run = make_run(tmp_path / "run", experiment)
    shutil.copytree(tmp_path / "data" / "val", tmp_path / "data" / "nest" / "val")
    run_json(capsys, "top1", str(run), "--split", "nest/val", "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "run.nest-val.card.json").exists()


def test_results_of_other_images_are_not_replaced(tmp_path, experiment, capsys):
    run, out = str(make_run(tmp_path / "run", experiment)), str(tmp_path / "out")
    for _ in range(2):
        run_json(capsys, "top1", run, "-o", out)
    before = (tmp_path / "out" / "run.card.json").read_bytes()
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    assert main(["top1", run, "-o", out, "--data", str(tmp_path / "other"), "--device", "cpu"]) == 2
    assert "and would be replaced by that of" in capsys.readouterr().err
    assert (tmp_path / "out" / "run.card.json").read_bytes() == before


def test_a_target_without_weights_is_refused_before_the_first_is_evaluated(tmp_path, experiment, capsys, monkeypatch):
    run = str(make_run(tmp_path / "run", experiment))
    for command in ("top1", "knn"):
        monkeypatch.setattr("eval.labelled.Share.answered", lambda *arguments: pytest.fail("one was evaluated"))
        assert main([command, run, str(experiment), "--device", "cpu"]) == 2
        assert "tiny has no weights: give the run folder of its training" in capsys.readouterr().err


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, experiment, capsys):
    assert main(["top1", str(make_run(tmp_path / "run", experiment)), "--batch-size", "4", "--device", "cpu"]) == 0
    assert "run: 3/3 batches, " in capsys.readouterr().err


def test_answers_that_are_not_finite_are_no_accuracy(tmp_path, experiment, capsys):
    run = make_run(tmp_path / "run", experiment)
    state = load_file(run / "model.safetensors")
    save_file({**state, "head.bias": torch.tensor([0.0, torch.nan, 0.0])}, run / "model.safetensors")
    assert main(["top1", str(run), "--device", "cpu"]) == 2
    assert "run gives 9 of 9 images logits that are not finite, so that no accuracy would" in capsys.readouterr().err


RANK_SIZES = (1, 2, 7, 11)


def _rank(rank: int, folder: str, run: str, ports: dict[int, list[int]]) -> None:
    """One of three real processes, in groups of 2, 3 and 1; what it finds goes to a file, an error to the parent."""
    torch.set_num_threads(1)
    found = {}
    for world_size, (first_port, second_port, third_port) in ports.items():
        if rank < world_size:
            os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ["MASTER_PORT"] = str(first_port)
            with joined("cpu") as ranks:
                found[world_size] = _count_as(ranks)
            os.environ["MASTER_PORT"] = str(second_port)
            found[f"printed by {world_size}"] = _many_images(folder, run, world_size)
            os.environ["MASTER_PORT"] = str(third_port)
            found[f"neighbours by {world_size}"] = _neighbours(folder, run, world_size)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def _many_images(folder: str, run: str, world_size: int) -> str:
    """What the command prints of 10,000 images; its files go to FOLDER/WORLD_SIZE."""
    with redirect_stdout(io.StringIO()) as output:
        output_folder = str(Path(folder, str(world_size)))
        main(["top1", run, "--data", f"{folder}/many", "-o", output_folder, "--json", "--device", "cpu"])
    return output.getvalue()


def _neighbours(folder: str, run: str, world_size: int) -> str:
    """What the command prints of 101 images among 211, in batches of 17; its files go to FOLDER/knn/WORLD_SIZE."""
    with redirect_stdout(io.StringIO()) as output:
        output_folder = str(Path(folder, "knn", str(world_size)))
        options = ["--data", f"{folder}/many", "--split", "test", "--batch-size", "17", "-o", output_folder]
        main(["knn", run, *options, "--json", "--device", "cpu"])
    return output.getvalue()


def _write_many_images(folder: Path, num_images: int) -> None:
    """Images of three classes and 64 greys: 10,000 are 39 batches and a short one, not evenly shared by 3 ranks."""
    greys = [io.BytesIO() for _ in range(64)]
    for grey, content in enumerate(greys):
        Image.new("L", (12, 12), 4 * grey).save(content, "PNG")
    samples = (EncodedSample(f"{i:05d}", greys[i % 64].getvalue(), "png", i % 3) for i in range(num_images))
    write_shards(samples, folder, ("dark", "grey", "light"), 4000)


def _count_as(ranks: Ranks) -> list:
    """What evaluate finds in sets of several sizes, then what it says where every rank takes the share of rank 0."""
    reading = {"transform": to_number, "batch_size": 2}
    results = [evaluate(Reader(), Share(Numbers(size), ranks=ranks, **reading)).to_csv() for size in RANK_SIZES]
    if ranks.world_size == 1:
        return results
    with pytest.raises(ValueError) as error:
        evaluate(Reader(), Share(Numbers(7), ranks=replace(ranks, rank=0), **reading))
    return [*results, str(error.value)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_any_number_of_ranks_counts_every_image_once(tmp_path, experiment):
    run = str(make_run(tmp_path / "run", experiment))
    for split, num_images in (("val", 10_000), ("train", 211), ("test", 101)):
        _write_many_images(tmp_path / "many" / split, num_images)
    ports = {world_size: [free_port() for _ in range(3)] for world_size in (2, 3, 1)}
    mp.spawn(_rank, (str(tmp_path), run, ports), nprocs=3)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    alone = [
        evaluate(Reader(), Share(Numbers(size), transform=to_number, batch_size=2)).to_csv() for size in RANK_SIZES
    ]
    assert ranks[0]["1"] == alone
    for rank, world_size in ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
        *results, refusal = ranks[rank][str(world_size)]
        assert results == alone
        num_own = len(range(0, 4, world_size))
        refused = f"{world_size} ranks answered {num_own} of 4 batches, {world_size * num_own} in all: "
        assert refusal == refused + "a set must have an image, and each must be answered once."
    assert_equal_results_of_many_images(tmp_path, ranks)
    assert_equal_neighbours(tmp_path, ranks)


def assert_equal_results_of_many_images(folder: Path, ranks: list[dict]) -> None:
    """The same numbers, and the same files to the byte, from 1, 2 and 3 ranks; only the first prints."""
    printed = [[ranks[rank].get(f"printed by {world_size}", "") for rank in range(3)] for world_size in (1, 2, 3)]
    assert printed[0][0] and printed == [[printed[0][0], "", ""]] * 3
    (row,) = json.loads(printed[0][0])["rows"]
    files = [{path.name: path.read_bytes() for path in (folder / str(size)).iterdir()} for size in (1, 2, 3)]
    assert {*files[0]} == {"run.predictions.csv", "run.classes.csv", "run.card.json"}
    assert files[0] == files[1] == files[2]
    lines = [line.split(",") for line in files[0]["run.predictions.csv"].decode().splitlines()[1:]]
    assert [(line[0], line[1]) for line in lines] == [(f"{i:05d}", str(i % 3)) for i in range(10_000)]
    num_correct = sum(line[3].split()[0] == line[1] for line in lines)
    assert (row["n"], row["top1"]) == (10_000, num_correct / 100)
    assert len({line[3] for line in lines}) > 1  # else every share would count alike


def assert_equal_neighbours(folder: Path, ranks: list[dict]) -> None:
    """The same numbers, and the same files to the byte, from 1, 2 and 3 ranks; only the first prints."""
    printed = [[ranks[rank].get(f"neighbours by {world_size}", "") for rank in range(3)] for world_size in (1, 2, 3)]
    assert printed[0][0] and printed == [[printed[0][0], "", ""]] * 3
    (row,) = json.loads(printed[0][0])["rows"]
    assert (row["num_memory"], row["n"]) == (211, 101)
    files = [{path.name: path.read_bytes() for path in (folder / "knn" / str(size)).iterdir()} for size in (1, 2, 3)]
    assert {*files[0]} == {"run.knn.predictions.csv", "run.knn.classes.csv"}
    assert files[0] == files[1] == files[2]


def _refused_rank(rank: int, folder: str, run: str, ports: list[int]) -> None:
    """One of two processes with wrong input: wrong for both, twice; for the second alone; in the second's images."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    by_rank, broken = (run, "nowhere/run"), ("--data", f"{folder}/broken", "--batch-size", "1")
    told = []
    wrong = (["run", "--splt"], ["nowhere/run"], [by_rank[rank]], [run, *broken])
    for arguments, port in zip(wrong, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # at one and the same the second might find the first's old store
        with redirect_stderr(io.StringIO()) as errors:
            code = exit_code(["top1", *arguments, "--device", "cpu"])
        if dist.is_initialized():  # a process that has failed ends without parting from the others
            dist.destroy_process_group()
        told.append((code, [line for line in errors.getvalue().splitlines() if line.startswith("python -m eval")]))
    Path(folder, f"{rank}.json").write_text(json.dumps(told))


def exit_code(arguments: list[str]) -> int:
    """How the command ends."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


def test_what_a_rank_refuses_ends_all_and_is_told_once(tmp_path, experiment):
    run = str(make_run(tmp_path / "run", experiment))
    shutil.copytree(tmp_path / "data", tmp_path / "broken")
    (tmp_path / "broken" / "val" / "class0" / "1.png").write_bytes(b"no image")
    mp.spawn(_refused_rank, (str(tmp_path), run, [free_port() for _ in range(4)]), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [code for code, _ in [*first, *second]] == [2] * 8
    for lines, others, part in (
        (first[0], second[0], "unrecognized arguments: --splt"),
        (first[1], second[1], "nowhere/run is neither a run folder nor a config"),
        (second[2], first[2], "nowhere/run is neither a run folder nor a config"),
        (second[3], first[3], "1.png has no known image format"),
    ):
        assert others[1] == [] and len(lines[1]) == 1 and part in lines[1][0]


def test_flops_agree_part_by_part(experiment, capsys):
    model = run_json(capsys, "flops", str(experiment))["models"][0]
    parts = {row["part"]: row["macs"] for row in model["parts"]}
    tokens, dim = 10, 8
    assert parts["patch_embed"] == 9 * 16 * dim
    assert parts["blocks.0.attn"] == 4 * tokens * dim**2 + 2 * tokens**2 * dim
    assert parts["blocks.1.attn"] == 2 * tokens * dim**2 + tokens**2 * dim
    assert parts["blocks.1.mlp"] == 8 * tokens * dim**2
    assert parts["head"] == 3 * dim
    assert parts["total"] == model["macs"] == sum(parts.values()) - parts["total"]
    assert model["flops"] == 2 * model["macs"]
    exact_macs = model["macs"] + 2 * tokens * dim**2 + tokens**2 * dim + (1 + tokens) * dim**2 + tokens * dim
    assert model["macs_ratio"] == pytest.approx(model["macs"] / exact_macs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", ["exact*3", "exact reuse*2", "lowrank:3 reuse:1 none"])
def test_saved_memory_is_what_lives_between_forward_and_backward_pass(plan, dtype, experiment, capsys):
    experiment.write_text(experiment.read_text().replace("exact reuse*2", plan))
    row = run_json(capsys, "flops", str(experiment), "--dtype", dtype)["models"][0]
    model = load_config(experiment).model.create().train()
    lives = []
    for num_images in (3, 7):  # whose difference leaves weights and their copies out
        images = torch.randn(num_images, 1, 12, 12)
        kept = [images] if dtype == "float32" else []  # a copy takes its place
        storages = _LiveStorages([*model.parameters(), *kept])
        with storages, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(images)
        lives.append(storages.live_bytes - logits.nbytes)
    assert row["saved_memory_mib"] == (lives[1] - lives[0]) / 4 / 2**20 > 0


def test_inference_memory_is_the_peak_beside_weights_and_image(experiment, capsys):
    row = run_json(capsys, "flops", str(experiment))["models"][0]
    model = load_config(experiment).model.create().eval()
    image = torch.randn(1, 1, 12, 12)
    resident = [*model.parameters(), *model.buffers(), image]
    peak = peak_memory_mib(inference_call(model, image), resident, torch.device("cpu"))
    assert row["inference_memory_mib"] == pytest.approx(peak - sum(tensor.nbytes for tensor in resident) / 2**20)
    tokens, hidden = 10 * 8 * 4, 10 * 32 * 4  # bytes: of an exact layer's MLP, tokens before, hidden units, map
    assert row["inference_memory_mib"] >= (tokens + hidden) / 2**20


def test_flops_of_training_and_of_timms_tables(experiment, capsys):
    model = run_json(capsys, "flops", str(experiment))["models"][0]
    patches = next(row["macs"] for row in model["parts"] if row["part"] == "patch_embed")
    assert model["training_flops"] == 2 * (3 * model["macs"] - patches)
    num_normed = 3 * 10 * 8 + 2 * 10 * 8 + 1 * 8 + 1 * 8  # before attention, MLP (the last for one row), the head
    assert model["macs_with_norms"] == model["macs"] + 5 * num_normed


def test_flops_that_differ_are_refused(experiment, capsys, monkeypatch):
    monkeypatch.setattr("eval.flops.torch_flops", lambda model, images: {"": 2, "head": 2})
    assert main(["flops", str(experiment)]) == 2
    assert "tiny: the counts of patch_embed differ, 1152 MACs by closed form, 1152 by fvcore and 0 by torch" in (
        capsys.readouterr().err
    )


def test_only_the_json_object_reaches_standard_output(experiment, capsys, monkeypatch):
    monkeypatch.setattr("eval.flops.count", lambda target, *_: print("a library's noise") or {"name": target.label})
    assert main(["flops", str(experiment), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["models"] == [{"name": "tiny"}]
    assert output.err == "a library's noise\n"


def test_flops_of_a_plain_model(capsys):
    model = run_json(capsys, "flops", "deit_tiny_patch16_224", "--image-size", "32")["models"][0]
    tokens, dim = 5, 192
    assert model["macs"] == 4 * 768 * dim + 12 * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + 1000 * dim
    assert (model["image_size_px"], model["macs_ratio"]) == ([32, 32], None)


def test_flops_name_both_sides_of_an_image(experiment, capsys):
    experiment.write_text(experiment.read_text().replace("img_size: 12", "img_size: [8, 12]"))
    assert run_json(capsys, "flops", str(experiment))["models"][0]["image_size_px"] == [8, 12]
    assert main(["flops", str(experiment)]) == 0
    assert " 8 x 12 " in capsys.readouterr().out


TIMES_MS = {"tiny": 5.0, "deit_tiny_patch16_224, fused": 8.0, "deit_tiny_patch16_224, unfused": 6.0}


@pytest.fixture
def set_times(monkeypatch):
    """Minimum times by label; the medians tell another story."""

    def time_interleaved(calls, device, num_repeats):
        for call in calls.values():
            call()
        return {label: Timing(100 / TIMES_MS[label], TIMES_MS[label], 1.0, num_repeats) for label in calls}

    monkeypatch.setattr(throughput, "time_interleaved", time_interleaved)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_speedup_is_to_the_best_plain_model(mode, experiment, set_times):
    targets = resolve_targets([str(experiment)])
    rows = measure(targets, Condition(None, "float32", mode, 4, torch.device("cpu")), num_repeats=3)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == list(TIMES_MS)
    assert {row["baseline"] for row in rows} == {"deit_tiny_patch16_224, unfused"}
    assert [row["speedup"] for row in rows] == [pytest.approx(6 / time_ms) for time_ms in TIMES_MS.values()]
    ours, plain = by_name["tiny"], by_name["deit_tiny_patch16_224, fused"]
    assert ours["predicted"] == pytest.approx(plain["theoretical_macs"] / ours["theoretical_macs"])
    assert plain["theoretical_macs"] == 9 * 16 * 8 + 3 * (12 * 10 * 64 + 2 * 100 * 8) + 3 * 8
    assert ours["realised_over_predicted"] == pytest.approx(6 / 5 / ours["predicted"])
    assert ours["images_per_second"] == pytest.approx(4 * 1000 / (100 / 5))
    assert (ours["latency_ms"] is None) == (mode == "train")
    assert ours["peak_memory_mib"] > 0
    assert ours["backend"] in ("map", "map + blocked", "qk + fused", "qk + blocked", "qk + unfused")


@pytest.fixture
def two_targets(experiment):
    """The tiny experiment, and another of the same plain model."""
    other = experiment.with_name("other.yaml")
    other.write_text(experiment.read_text().replace("exact reuse*2", "exact*2 reuse"))
    return resolve_targets([str(experiment), str(other)])


def test_plans_take_the_place_of_a_targets_own(experiment):
    plans = ["exact*12", "(exact reuse*5)*2"]
    targets = resolve_targets(["vit_tiny_patch16_224"], plans)
    assert [target.label for target in targets] == [f"vit_tiny_patch16_224, {plan}" for plan in plans]
    assert [target.model.plan for target in targets] == plans
    assert all(plain_model(target.model).name == "vit_tiny_patch16_224" for target in targets)


def test_every_target_takes_turns_with_its_own_plain_models_alone(two_targets, monkeypatch):
    runs = []

    def time_interleaved(calls, device, num_repeats):
        runs.append(list(calls))
        return {label: Timing(1.0, len(runs) * len(label), 1.0, num_repeats) for label in calls}

    monkeypatch.setattr(throughput, "time_interleaved", time_interleaved)
    rows = measure(two_targets, Condition(None, "float32", "train", 2, torch.device("cpu")), num_repeats=3)
    plain = list(TIMES_MS)[1:]
    assert runs == [["tiny", *plain], ["other", *plain]]
    assert [(row["name"], row["measured_with"]) for row in rows] == [(name, run[0]) for run in runs for name in run]
    assert rows[4]["minimum_ms"] == 2 * rows[1]["minimum_ms"]
    assert rows[3]["speedup"] == rows[4]["minimum_ms"] / rows[3]["minimum_ms"]


def test_a_plain_model_has_no_speedup_and_that_is_said(experiment, set_times, monkeypatch, capsys):
    monkeypatch.setitem(TIMES_MS, "vit_tiny_patch16_224, fused", 3.0)
    monkeypatch.setitem(TIMES_MS, "vit_tiny_patch16_224, unfused", 4.0)
    rows = run_json(capsys, "throughput", "vit_tiny_patch16_224", "--image-size", "16")["rows"]
    assert [(row["name"], row["backend"]) for row in rows] == [
        ("vit_tiny_patch16_224, fused", "fused"),
        ("vit_tiny_patch16_224, unfused", "unfused"),
    ]
    for key in ("baseline", "speedup", "predicted", "realised_over_predicted"):
        assert [row[key] for row in rows] == [None, None]
    for targets, claims in (([], False), ([str(experiment)], True)):
        size = ["--image-size", "16"] if not targets else ["--image-size", "32"]
        assert main(["throughput", "vit_tiny_patch16_224", *targets, *size]) == 0
        shown = capsys.readouterr().out
        assert "no speed-up: vit_tiny_patch16_224 is what others are measured against" in shown
        assert ("predicted: by MACs" in shown) == claims


def test_compiled_models_are_candidates_and_baselines(experiment, set_times, monkeypatch):
    compiled = []

    def fake_compile(model, dynamic):
        compiled.append(model)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", fake_compile)
    for label, time_ms in zip(list(TIMES_MS), (4.0, 3.0, 7.0), strict=True):
        monkeypatch.setitem(TIMES_MS, f"{label}, compiled", time_ms)
    condition = Condition(None, "float32", "inference", 2, torch.device("cpu"))
    rows = measure(resolve_targets([str(experiment)]), condition, num_repeats=2, with_compiled=True)
    names = ["tiny", "deit_tiny_patch16_224, fused", "deit_tiny_patch16_224, unfused"]
    assert [row["name"] for row in rows] == [*names, *(f"{name}, compiled" for name in names)]
    assert {row["baseline"] for row in rows} == {"deit_tiny_patch16_224, fused, compiled"}
    assert [row["speedup"] for row in rows] == pytest.approx([3 / time for time in (5, 8, 6, 4, 3, 7)])
    assert [row["peak_memory_mib"] is None for row in rows] == [False] * 3 + [True] * 3
    assert len(compiled) == 3


def test_compiling_without_a_compiler_is_refused_in_one_sentence(experiment, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["throughput", str(experiment), "--compile"]) == 2
    told = capsys.readouterr().err
    assert "--compile needs a C++ compiler and there is no 'no-such-compiler': install it" in told
    assert told.count("\n") == 1


def test_profiles_stand_beside_the_rows(experiment, set_times, capsys):
    options = ["--profile", "--mode", "train", "inference", "--repeats", "2", "--batch-size", "2"]
    (profile,) = run_json(capsys, "throughput", str(experiment), *options)["profiles"]
    assert (profile["name"], profile["image_size_px"], profile["dtype"]) == ("tiny", [12, 12], "float32")
    parts = {row["part"] for row in profile["parts"]}
    assert {"patch_embed", "blocks.0.attn", "blocks.2.mlp", "head", "total"} <= parts
    assert main(["throughput", str(experiment), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tiny at 12 x 12 px in float32" in shown and re.search(r"product reaches [\d,]+ GMACs/s here, a copy", shown)
    (*_, total) = profile["parts"]
    assert 0 < total["gmacs_per_second"] < profile["product_gmacs_per_second"]


def test_baselines_are_fused_and_unfused_and_the_switch_is_put_back(experiment):
    before = use_fused_attn()
    (target,) = resolve_targets([str(experiment)])
    condition = Condition(None, "bfloat16", "inference", 1, torch.device("cpu"))
    _, fused, unfused = throughput._candidates(target, {target.label: plain_model(target.model)}, condition)
    assert (fused.backend, unfused.backend) == ("fused", "unfused")
    assert fused.model.blocks[0].attn.fused_attn
    assert not unfused.model.blocks[0].attn.fused_attn
    assert next(unfused.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="inside"), fused_attention(not before):
        raise RuntimeError("inside")
    assert use_fused_attn() == before


def test_throughput_covers_every_condition(experiment, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    options = ["--image-size", "8", "12", "--dtype", "float32", "bfloat16", "--batch-size", "2", "--repeats", "2"]
    result = run_json(
        capsys, "throughput", str(experiment), *options, "--mode", "inference", "train", "--csv", str(table)
    )
    rows = result["rows"]
    conditions = {(*row["image_size_px"], row["dtype"], row["mode"]) for row in rows}
    sizes, dtypes, modes = (8, 12), ("float32", "bfloat16"), ("inference", "train")
    assert conditions == {(size, size, dtype, mode) for size in sizes for dtype in dtypes for mode in modes}
    assert len(rows) == 3 * len(conditions)
    assert {"device", "threads", "torch", "timm", "date"} <= result["machine"].keys()
    assert {row["measured_with"] for row in rows} == {"tiny"} and result["profiles"] == []
    lines = table.read_text().splitlines()
    assert len(lines) == 1 + len(rows) and lines[1].startswith("tiny,8 x 8,float32,inference,2,")


def overlaps(figure) -> int:
    """How many pairs of labels and points overlap."""
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(label) for label in axes.texts]  # without the line to the point
    marks = [spot for marks in axes.collections for spot in axes.transData.transform(marks.get_offsets())]
    hidden = sum(box.contains(*mark) for box in boxes for mark in marks)
    return hidden + sum(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def names_in(figure) -> set[str]:
    """The names of the points, beside them or in the list beside the axes, whose numbers are beside them then."""
    labels = {label.get_text() for label in figure.axes[0].texts}
    if not figure.legends:
        return labels
    listed = [text.get_text().split(maxsplit=1) for text in figure.legends[0].get_texts()]
    assert labels == {number for number, _ in listed}
    return {name for _, name in listed}


def crossings(figure) -> int:
    """How many lines from a label to its point run through another label."""
    labels = figure.axes[0].texts
    lines = {label: Outline([label.xy, label.get_position()]) for label in labels}
    boxes = {label: Text.get_window_extent(label) for label in labels}
    return sum(lines[one].intersects_bbox(boxes[two], filled=True) for one, two in itertools.permutations(labels, 2))


@pytest.mark.parametrize("spread", [0.0, 0.1, 10.0])
def test_labels_of_the_plot_do_not_overlap(spread):
    kinds = itertools.cycle(STYLES)
    points = [
        Point(f"deit_reuse_small_{i}", 1000 + spread * i, 80 + spread * (i * 7 % 11) / 10, None, next(kinds))
        for i in range(11)
    ]
    figure = scatter_figure(points, "a caption " * 30, "throughput (images/s)")
    assert names_in(figure) == {point.name for point in points}
    assert overlaps(figure) == 0
    assert figure.axes[0].get_xlabel() == "throughput (images/s)"
    assert figure.axes[0].get_ylabel() == "top-1 accuracy (%)"


def test_no_line_of_a_crowded_plot_runs_through_a_label():
    """The points of the study: 25 models, most of them in a corner."""
    with (Path(__file__).parent.parent / "docs/study/pointer/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = [
        Point(row["name"], float(row["images_per_second"]), float(row["top1"]), float(row["top1_sd"])) for row in rows
    ]
    figure = scatter_figure(points, "a caption " * 30, "throughput (images/s)")
    assert len(points) == 25 and names_in(figure) == {point.name for point in points}
    assert overlaps(figure) == 0 and crossings(figure) == 0


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ("exact*3", "exact"),
        ("exact reuse:2 lowrank:5", "several"),
        ("exact reuse*2", "reuse"),
        ("exact-3 exact*2", "merging"),
        ("exact/9 exact*2", "hidden units"),
        ("exact-3/9 exact*2", "several"),
        ("exact linear skip", "several"),
    ],
)
def test_a_mark_says_what_a_plan_has_besides_exact_attention(plan, kind):
    assert kind_of(parse_plan(plan)) == kind


def test_tables_show_rounded_values_and_store_exact_ones():
    rows = [{"name": "a|b", "macs": 1234567, "top1": 1 / 3}, {"name": "c", "macs": 7, "top1": None}]
    columns = (Column("name", "name"), Column("macs", "MACs", ",d"), Column("top1", "top-1 (%)", ".2f"))
    assert to_markdown(rows, columns, "how").splitlines() == [
        "| name | MACs | top-1 (%) |",
        "|---|---:|---:|",
        "| a\\|b | 1,234,567 | 0.33 |",
        "| c | 7 | - |",
        "",
        "how",
    ]
    assert to_csv(rows, ["macs", "top1"]) == f"macs,top1\n1234567,{1 / 3}\n7,\n"
    assert to_latex(rows, columns, "50 % of -3 [a, b]").splitlines() == [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"name & MACs & top-1 (\%) \\",
        r"\midrule",
        r"a\textbar{}b & 1,234,567 & 0.33 \\",
        r"c & 7 & - \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\caption{50 \% of $-$3 {[}a, b{]}}",
        r"\end{table}",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["flops", "vit_reuse_smal_patch16_224"], "did you mean 'vit_reuse_small_patch16_224'"),
        (["flops", "nowhere/run"], "nowhere/run is neither a run folder nor a config"),
        (["flops", "{tmp}"], "{tmp} is neither a run folder nor a hub folder"),
        (
            ["top1", "vit_tiny_patch16_224"],
            "vit_tiny_patch16_224 is a model name, which knows no data: give --data DIR.",
        ),
        (["top1", "vit_tiny_patch16_224", "--data", "{tmp}/data"], "vit_tiny_patch16_224 has no weights: give the run"),
        (["top1", "{tmp}/tiny.yaml", "--checkpoint", "{tmp}/tiny.yaml"], "tiny.yaml cannot be read as weights"),
        (["top1", "{tmp}/tiny.yaml", "--checkpoint", "{tmp}/none.pt"], "none.pt cannot be read as weights"),
        (
            ["top1", "{tmp}/other", "--checkpoint", "{tmp}/run/model.safetensors"],
            "does not fit deit_reuse_tiny_patch16",
        ),
        (["top1", "{tmp}/run", "--data", "{tmp}/few"], "few/val has 2 class folders and the model 3 classes"),
        (["top1", "{tmp}/run", "--split", "test"], "no folder {tmp}/data/test"),
        (["compare", "{tmp}/tiny.yaml"], "tiny.yaml is no run card"),
        (["compare", "{tmp}/running"], "{tmp}/running has no card.json: the run is not completed but running, go on"),
        (["compare", "{tmp}/run"], "{tmp}/run has no card.json: an older version of this code left it; train it again"),
        (["compare", "{tmp}/broken"], "{tmp}/broken has no card.json: it has no whole run.json either"),
        (["throughput", "{tmp}/tiny.yaml", "--batch-size", "0"], "argument --batch-size: 0 is not a whole number"),
        (["flops", "{tmp}/tiny.yaml", "--image-size", "3"], "images of (3, 3) px are smaller than a patch of (4, 4)"),
        (["flops", "{tmp}/run", "{tmp}/run"], "{tmp}/run is given 2 times: name it once."),
            (["flops", "vit_tiny_patch16_224", "--plan", "exact*6"], "exact*6"),
            (["flops", "resnet18", "--plan", "exact*12"], "resnet18 takes no plan, since it is no VisionT"),
        (["throughput", "{tmp}/tiny.yaml", "--profile", "--mode", "train"], "--profile shows where the time"),
        (["throughput", "{tmp}/tiny.yaml", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["speed"], "invalid choice: 'speed'"),
        (["flops"], "the following arguments are required: TARGET"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, tmp_path, experiment, capsys):
    make_run(tmp_path / "run", experiment)
    make_run(tmp_path / "running", experiment, status="running")
    (make_run(tmp_path / "broken", experiment) / "run.json").write_text("")
    for name in ("a", "c"):
        (tmp_path / "few" / "val" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "few" / "val" / name / "0.png")
    (tmp_path / "seven.yaml").write_text(CONFIG.format(root=tmp_path / "data", num_classes=7))
    make_run(tmp_path / "other", tmp_path / "seven.yaml")
    code = exit_code([argument.format(tmp=tmp_path) for argument in arguments])
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert sentence.format(tmp=tmp_path) in output.err
    assert output.err.count("\n") == 1
