"""Models exported in every format: the same logits where they run, the map once, refusals in one sentence."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
from cases import moved
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

import vitreuse
from eval.__main__ import main as eval_main
from vitreuse.__main__ import main
from vitreuse.cli.source import sample_images
from vitreuse.config import ModelConfig, load_config, to_yaml
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import resolve_targets
from vitreuse.files.programs import MARKS, load_onnx, load_torch

ROOT = Path(__file__).resolve().parents[1]
PLAN = "exact reuse:2 lowrank:8 span:3 reuse none"
NAMES = ["zero", "one", "two", "three", "caf\udce9"]  # the last in bytes that are no UTF-8
TILED = (13 * 4, 17 * 4)  # pixels: the span runs as tiles
SMALL = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
KEYWORDS = {**SMALL, "img_size": list(TILED), "depth": 6, "in_chans": 1, "global_pool": "avg", "reg_tokens": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, of a plan with every kind of layer, and its images."""
    root = tmp_path_factory.mktemp("runs")
    (root / "data/val/some").mkdir(parents=True)
    for number in range(5):
        noise = torch.randint(0, 255, (60, 80), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / f"data/val/some/{number}.png")
    keywords = [f"model.keywords.{key}={json.dumps(value)}" for key, value in {**KEYWORDS, "class_token": True}.items()]
    more = ["model.name=vit_lazy_tiny_patch16_224", f"model.plan={PLAN}", "eval.crop_pct=0.7"]
    data = ["data.source=null", f"data.root={root / 'data'}"]
    config = load_config(ROOT / "configs/digits/_base.yaml", [*keywords, *more, *data])
    (root / "mine").mkdir()
    (root / "mine/config.yaml").write_text(to_yaml(config))
    (root / "mine/card.json").write_text(json.dumps({"top1": 91.25, "n": 1360, "data": "some/val"}))
    metadata = {"label_names": json.dumps(NAMES)}
    save_file(moved(config.model.create(), std=0.1).eval().state_dict(), root / "mine/model.safetensors", metadata)
    return root / "mine"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder with all formats of the run, and what the command said."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    argv = ["--format", "safetensors", "hub", "torch", "onnx", "--batch-size", "3", "--repeats", "2", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("vitreuse.cli.console._print_whole", said.append)
        assert main(["export", str(run), "-o", str(folder), *argv]) == 0
    return folder, json.loads(said[0])


@pytest.fixture(scope="module")
def reused(tmp_path_factory):
    """A hub folder of a distilled model whose (q, k) would be carried."""
    folder = tmp_path_factory.mktemp("hub") / "reused"
    model = timm.create_model(
        "deit_reuse_tiny_distilled_patch16_224", plan="exact reuse exact", reuse_backend="qk", **{**SMALL, "depth": 3}
    )
    save_hub_folder(moved(model, std=0.1).eval(), folder)
    return folder


def images_of(run, num_images):
    (target,) = resolve_targets([str(run)])
    model = target.load().eval()
    (images, _), = sample_images(target, model, None, num_images).batches(num_images)
    return model, images


def maps_of(path):
    """How many attention maps an ONNX file computes, and its number of nodes."""
    nodes = Counter(node.op_type for node in onnx.load(path).graph.node)
    return nodes["Softmax"] + nodes["Attention"], nodes.total()


@torch.no_grad()
def test_every_format_has_the_logits_of_the_run(run, exported):
    folder, said = exported
    model, images = images_of(run, 4)  # traced with 4, checked with 3
    for predict in (load_torch((folder / "model.pt2").read_bytes()), load_onnx((folder / "model.onnx").read_bytes())):
        for batch in (images[:1], images[:2], images):
            torch.testing.assert_close(predict(batch), model(batch), atol=1e-5, rtol=1e-4)
    assert {of: difference < 1e-5 for of, difference in said["differences"].items()} == {"torch": True, "onnx": True}
    assert said["images"] == "5 images" and model(images).std() > 0.1
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images)) and str(loaded.plan) == PLAN
    for cropping in (model, loaded):
        assert resolve_model_data_config(cropping)["crop_pct"] == 0.7  # as the run was evaluated, wherever it goes


def test_weights_say_what_they_are_of(run, exported):
    folder, _ = exported
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    config = ModelConfig(name=metadata["name"], plan=metadata["plan"], keywords=json.loads(metadata["keywords"]))
    config.create().load_state_dict(load_file(run / "model.safetensors"))
    props = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert (props["name"], props["plan"]) == ("vit_lazy_tiny_patch16_224", PLAN)
    assert json.loads(props["preprocessing"])["crop_pct"] == 0.7


def test_every_format_names_the_classes(exported):
    folder, _ = exported
    props = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    facts = {"model.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=facts)
    with safe_open(folder / "model.safetensors", "pt") as file:
        texts = [file.metadata()["label_names"], props["label_names"], json.loads(facts["model.json"])["label_names"]]
    assert [json.loads(text) for text in texts] == [NAMES] * 3
    assert json.loads((folder / "config.json").read_text())["label_names"] == NAMES
    assert timm.create_model(f"local-dir:{folder}").pretrained_cfg["label_names"] == NAMES


def test_the_model_card_has_plan_cost_and_accuracy(exported):
    text = (exported[0] / "README.md").read_text()
    assert text.startswith("---\ntags:\n- image-classification\n") and "# Model card for mine" in text
    assert f"`{PLAN}`" in text and "91.25 % of the 1,360 images of some/val" in text
    assert "1 x 52 x 68" in text and 'timm.create_model("hf-hub:' in text
    model = timm.create_model(f"local-dir:{exported[0]}")
    macs = sum(vitreuse.count_macs(model).values())
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in text and f"{macs / 1e6:,.1f} M per" in text


def test_the_files_tell_nothing_of_this_machine(exported):
    for name in ("model.pt2", "model.onnx"):
        assert str(ROOT).encode() not in (exported[0] / name).read_bytes()


def test_onnx_is_timed_beside_eager(exported):
    speed = exported[1]["speed"]
    assert set(speed["images_per_second"]) == {"eager", "onnxruntime"} and speed["speedup"]["eager"] == 1
    assert (speed["batch_size"], speed["threads"], exported[1]["opset"]) == (3, 1, 23)


def test_a_map_is_computed_once_and_carried(exported, reused, tmp_path, capsys):
    maps, num_nodes = maps_of(exported[0] / "model.onnx")
    assert maps == 1 + 1 + 1 + 2  # exact, reuse:2's own heads, lowrank, span: its tiles and its prefix tokens' rows
    assert num_nodes < 50 * 6  # no loop over blocks of a map
    assert main(["export", str(reused), "-o", str(tmp_path), "--format", "onnx", "--repeats", "1"]) == 0
    assert maps_of(tmp_path / "model.onnx")[0] == 2
    assert "8 random images, for want of --data DIR" in " ".join(capsys.readouterr().out.split())


def test_a_folded_program_has_the_logits_of_the_model(reused, tmp_path, capsys):
    assert main(["export", str(reused), "-o", str(tmp_path), "--format", "torch", "--fold"]) == 0
    images = torch.randn(3, 3, 24, 24)
    model = timm.create_model(f"local-dir:{reused}", pretrained=True).eval()
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-4)
    assert "blocks.2.attn.key_heads" in program.state_dict  # of fold's class_rows


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A hub folder of a model that merges, with layers that are linear, skipped, narrow and without an MLP."""
    folder = tmp_path_factory.mktemp("hub") / "merging"
    plan = "exact-5/7 linear exact*2 reuse-4 skip exact/0"
    model = timm.create_model("vit_merge_tiny_patch16_224", plan=plan, **{**SMALL, "depth": 7})
    save_hub_folder(moved(model, std=0.1).eval(), folder)
    return folder


@pytest.mark.parametrize(
    ("opset", "fold"),
    [
        pytest.param(18, []),
        *(pytest.param(opset, [], marks=pytest.mark.proof) for opset in (20, 23)),
        *(pytest.param(opset, ["--fold"], marks=pytest.mark.proof) for opset in (18, 20, 23)),
    ],
)
def test_programs_that_merge_have_the_logits_of_the_model(merging, tmp_path, capsys, opset, fold):
    argv = ["--format", "torch", "onnx", "--opset", str(opset), "--repeats", "1", "--json", *fold]
    assert main(["export", str(merging), "-o", str(tmp_path), *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_images"] == 8 and said["num_left_out"] == {"torch": 0, "onnx": 0}
    model = timm.create_model(f"local-dir:{merging}", pretrained=True).eval()
    program, graph = (tmp_path / f"model.{suffix}" for suffix in ("pt2", "onnx"))
    for predict in (load_torch(program.read_bytes()), load_onnx(graph.read_bytes())):
        for num_images in (1, 3, 5):
            x = torch.randn(num_images, 3, 24, 24, generator=torch.Generator().manual_seed(num_images))
            with torch.no_grad():
                torch.testing.assert_close(predict(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which, code", [(slice(0, 2), 0), (slice(0, 8), 2), (slice(2, 4), 2)])
def test_images_whose_merges_rounding_decides_are_left_out(merging, tmp_path, capsys, monkeypatch, which, code):
    """Other logits are excused for images of equal patches, unless there are no others, and for no other image."""
    model = timm.create_model(f"local-dir:{merging}", pretrained=True).eval()
    x = torch.randn(8, 3, 24, 24)
    torch.nn.init.zeros_(model.pos_embed)
    x[which if code == 2 and which.stop == 8 else slice(0, 2)] = 0.5
    monkeypatch.setattr("vitreuse.cli.export.load_model", lambda args: (SimpleNamespace(
        config=None, label="merging", run_dir=None, hub_dir=None), model))  # fmt: skip
    monkeypatch.setattr("vitreuse.cli.export.training_note", lambda *_: None)
    monkeypatch.setattr("vitreuse.cli.export.example", lambda *_: x)
    monkeypatch.setattr("vitreuse.files.programs.trace", lambda *_: None)
    monkeypatch.setattr("vitreuse.files.programs.pack_torch", lambda *_: b"")
    shift = torch.zeros(8, 1)
    shift[which] = 0.1

    def other(images):
        return model(images) + shift[: len(images)]

    monkeypatch.setattr("vitreuse.files.programs.load_torch", lambda _: other)
    assert main(["export", str(merging), "-o", str(tmp_path), "--format", "torch"]) == code
    told = capsys.readouterr()
    if code == 0:
        said = "left out of the difference of torch: 2 of 8 images, of whose tokens rounding decides"
        assert said in " ".join(told.out.split())
    else:
        said = "for each of 8 images, of whose tokens rounding decides" if which.stop == 8 else "above 1e-04"
        assert said in told.err and told.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("left, is_replaced", [
    ([], True),
    (["model.safetensors", "config.json", "README.md"], True),
    (["model.safetensors", ".config.json.123.tmp"], True),
    (["README.md"], False),
    (["model.safetensors", "notes.txt"], False),
    (["model.safetensors", "model.onnx"], False),
])  # fmt: skip
def test_only_an_earlier_export_is_replaced(reused, tmp_path, capsys, left, is_replaced):
    for name in left:
        mark = MARKS[name].decode() if name in MARKS and (is_replaced or name.startswith("model.")) else ""
        (tmp_path / name).write_text(f"before {mark}")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    code = main(["export", str(reused), "-o", str(tmp_path)])
    told = capsys.readouterr().err
    if is_replaced:
        assert code == 0 and "before" not in (tmp_path / "config.json").read_text()
    else:
        assert code == 2 and f"{tmp_path} holds " in told and "choose another -o DIR" in told
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("argv, said", [
    (["vit_lazy_tiny_patch16_224"], "neither a file nor pretrained weights of timm"),
    (["{reused}", "--opset", "20"], "--opset has no effect without --format onnx: leave it out."),
    (["{reused}", "--format", "safetensors", "--fold"], "--fold has no effect without --format torch or onnx"),
    (["{reused}", "--data", "{tmp}"], "--data has no effect without --format torch or onnx: leave it out."),
    (["{reused}", "--images", "64"], "--images has no effect without --format torch or onnx: leave it out."),
    (["{reused}", "--batch-size", "4"], "--batch-size has no effect without --format torch or onnx: leave it out."),
    (["{reused}", "--format", "torch", "--repeats", "5"], "--repeats has no effect without --format onnx: leave it"),
    (["{reused}", "--format", "torch", "--seed", "3"], "--seed has no effect without images: give --data DIR"),
    (["{reused}", "-o", "{reused}/config.json"], "config.json cannot be made (File exists): choose another -o DIR."),
    (["{reused}", "--format", "torch", "--data", "{tmp}/none"], "no folder"),
])  # fmt: skip
def test_wrong_input_is_one_sentence(reused, tmp_path, capsys, argv, said):
    argv = [text.format(reused=reused, tmp=tmp_path) for text in argv]
    assert main(["export", "-o", str(tmp_path / "out"), *argv]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("argv", [["--format", "coreml"], ["--format", "onnx", "--opset", "17"]])
def test_an_unknown_format_is_one_sentence(reused, tmp_path, capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(reused), "-o", str(tmp_path), *argv])
    told = capsys.readouterr().err
    assert "invalid choice" in told and told.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(reused, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert main(["export", str(reused), "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"vitreuse export: {tmp_path} cannot be written: choose another -o DIR.\n"


def test_a_model_that_cannot_be_traced_says_why(reused, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vitreuse.PlanVisionTransformer, "forward", lambda self, x: x if x.sum() > 0 else -x)
    assert main(["export", str(reused), "-o", str(tmp_path), "--format", "hub", "torch"]) == 2
    told = capsys.readouterr().err
    assert "torch.export cannot take this PlanVisionTransformerDistilled (" in told and told.count("\n") == 1
    assert "data-dependent" in told and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_a_program_with_other_logits_is_not_kept(reused, tmp_path, capsys, monkeypatch, wrong):
    model = timm.create_model(f"local-dir:{reused}", pretrained=True).eval()
    monkeypatch.setattr("vitreuse.files.programs.trace", lambda *_: None)
    monkeypatch.setattr("vitreuse.files.programs.pack_torch", lambda *_: b"")

    def other(images):
        return model(images) + wrong * (len(images) > 1)

    monkeypatch.setattr("vitreuse.files.programs.load_torch", lambda _: other)
    assert main(["export", str(reused), "-o", str(tmp_path), "--format", "torch"]) == 2
    told = capsys.readouterr().err
    assert "the torch program's logits differ" in told and not list(tmp_path.iterdir())


def test_a_missing_package_is_one_sentence(reused, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(reused), "-o", str(tmp_path), "--format", "onnx"]) == 2
    told = capsys.readouterr().err
    assert told == (
        "vitreuse export: the format onnx needs onnxruntime: install it with pip install 'vitreuse[export]'.\n"
    )


def unfinished(folder, status, ema=False, final=False, **facts):
    """A run folder whose training did not end, with a checkpoint or the weights of its end."""
    keywords = [f"model.keywords.{key}={json.dumps(value)}" for key, value in {**SMALL, "depth": 2}.items()]
    plan = ["model.name=vit_reuse_tiny_patch16_224", "model.plan=exact*2", "train.epochs=9", "train.ema=null"]
    if ema:
        plan[-1] = "train.ema.decay=0.9"
    config = load_config(ROOT / "configs/digits/_base.yaml", [*keywords, *plan])
    model = moved(config.model.create(), std=0.1).eval()
    step = folder / "checkpoints/step-000000006"
    step.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"status": status, **facts}))
    raw = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    average = {"ema": model.state_dict()} if ema else {}
    torch.save({"model": raw if ema else model.state_dict(), **average, "optimizer": {}}, step / "state.pt")
    (step / "complete.json").write_text("{}")
    if final:
        save_file(model.state_dict(), folder / "model.safetensors")
    return model


EPOCHS = "9 epochs were to be trained"
UNFINISHED = {  # status, what else is there, what is said
    "running": ("running", {}, f"running: its weights at step 6, {EPOCHS}"),
    "stopped": ("stopped", {"ema": True}, f"stopped: its moving average at step 6, {EPOCHS}"),
    "failed": ("failed", {"error": "no disk."}, f"failed, no disk: its weights at step 6, {EPOCHS}"),
    "failed late": ("failed", {"final": True, "error": "x"}, f"failed, x: its weights as it left them, {EPOCHS}"),
    "damaged": (None, {}, f"without a whole run.json: its weights at step 6, {EPOCHS}"),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_export_of_an_unfinished_run_says_so_everywhere(name, tmp_path, capsys):
    status, how, reason = UNFINISHED[name]
    said = f"the run is not completed but {reason}"
    model = unfinished(tmp_path / "run", status, **how)
    formats = ["hub", "torch"] if name == "stopped" else ["hub"]
    images = tmp_path / "images/val/some"
    images.mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(images / "0.png")
    data = ["--data", str(tmp_path / "images")] if "torch" in formats else []
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--format", *formats, *data]) == 0
    shown = capsys.readouterr()
    assert said in " ".join(shown.out.split()) and said in shown.err
    card, config = ((tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))
    assert f"**Training:** {said}" in card and json.loads(config)["training"] == said
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata()["training"] == said
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    if "torch" in formats:
        facts = {"model.json": ""}
        torch.export.load(tmp_path / "out/model.pt2", extra_files=facts)
        assert json.loads(facts["model.json"])["training"] == said
    assert main(["export", str(tmp_path / "out"), "-o", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == said


def test_a_completed_run_has_nothing_to_say(tmp_path, capsys):
    unfinished(tmp_path / "run", "completed", final=True)
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["training"] is None and shown.err == ""
    assert "Training" not in (tmp_path / "out/README.md").read_text()
    assert "training" not in json.loads((tmp_path / "out/config.json").read_text())
    state = str(tmp_path / "run/checkpoints/step-000000006/state.pt")
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--checkpoint", state, "--json"]) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert training == "weights of state.pt, not those that the run run left"


@pytest.mark.parametrize("command", ["convert", "similarity", "search", "top1"])
def test_what_else_reads_an_unfinished_run_says_so(command, tmp_path, capsys):
    unfinished(tmp_path / "run", "stopped")
    for number in range(10):
        (tmp_path / f"data/val/{number % 5}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (number, 9, 9)).save(tmp_path / f"data/val/{number % 5}/{number}.png")
    more = {
        "convert": ["--plan", "exact none", "-o", str(tmp_path / "out")],
        "similarity": ["--words", "none"],
        "search": ["--words", "exact,none", "--budget", "0.9", "--minutes", "0"],
        "top1": ["-o", str(tmp_path / "cards")],
    }[command]
    run_command = eval_main if command == "top1" else main
    assert run_command([command, str(tmp_path / "run"), "--data", str(tmp_path / "data"), *more, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    said = f"the run is not completed but stopped: its weights at step 6, {EPOCHS}"
    assert (result["rows"][0] if command == "top1" else result)["training"] == said and said in shown.err
    if command == "convert":
        assert json.loads((tmp_path / "out/config.json").read_text())["training"] == said
    if command == "top1":
        assert eval_main(["compare", str(tmp_path / "cards/run.card.json"), "--no-speed"]) == 0
        assert f"run: {said}." in " ".join(capsys.readouterr().out.split())
