"""Healing without labels: a converted model wins back the features of its original on images that have no classes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cases import moved
from PIL import Image
from storms.processes import CHECKOUT, Run
from torch.nn.functional import cosine_similarity

import vitreuse
from eval.__main__ import main as eval_main
from train.__main__ import main
from train.distill import features_loss
from train.heal import plan_share
from vitreuse.compress.fidelity import agreement, worst_tenth
from vitreuse.data import EncodedSample, open_without_labels, write_shards
from vitreuse.files.hub import save_hub_folder
from vitreuse.files.networks import resolve_targets
from vitreuse.model.preprocessing import evaluation_transform

SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
CONFIG = """\
model: {{name: "local-dir:{folder}/converted"}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 3
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{lr: 3e-3, weight_decay: 0.0}}
  distill: {{kind: features, teacher: {{name: "local-dir:{folder}/original"}}}}
  heal: {{anneal_epochs: 0.0}}
  log_every_steps: 1
  ledger: true
eval: {{crop_pct: 1.0}}
"""


def write_photographs(folder: Path, number: int, seed: int = 0) -> None:
    """Smooth random pictures."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for count in range(number):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BILINEAR).save(folder / f"{count:02d}.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flat") / "photographs"
    write_photographs(folder, 23)
    return folder


def models(folder: Path, plan: str = "exact-3 none exact/17", **keywords: Any) -> tuple[Any, Any]:
    """A random ViT and its conversion, saved as hub folders."""
    torch.manual_seed(1)
    plain = timm.create_model("vit_tiny_patch16_224", init_values=1.0, **{**SIZES, **keywords})
    original = moved(plain, std=0.2)
    converted = vitreuse.convert(original, plan).model
    for name, model in (("original", original), ("converted", converted)):
        save_hub_folder(model, folder / name)
    return original, converted


@pytest.fixture
def healing(tmp_path, photographs):
    """The arguments of a run that heals without labels."""

    def arguments(*overrides: str, root: Path = photographs, **keywords: Any) -> list[str]:
        models(tmp_path, **keywords)
        path = tmp_path / "heal.yaml"
        path.write_text(CONFIG.format(folder=tmp_path, root=root))
        return [str(path), *overrides]

    return arguments


def test_features_are_compared_in_the_precision_of_the_evaluation(tmp_path, healing):
    """Before the first step, so that training is the same: none has happened."""
    found = {}
    for precision in ("float32", "bfloat16"):
        run = Run(tmp_path / precision, tuple(healing(f"eval.precision={precision}")))
        assert main([*run.arguments, f"run_dir={run.folder}"]) == 0
        found[precision] = run.records()[0]["before_mean_cosine"]
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.05)


def test_features_come_nearer_on_images_that_were_held_out(tmp_path, healing, capsys):
    run = Run(tmp_path / "run", tuple(healing()))
    assert main([*run.arguments, f"run_dir={run.folder}"]) == 0
    told = capsys.readouterr().err
    assert "has no images set apart: 2 of its 23 are held out." in told
    records = run.records()
    page = (CHECKOUT / "docs/training.md").read_text()
    assert {name for record in records for name in record if f"`{name}`" not in page} == {"kind"}
    first, last = records[0], records[-1]
    assert first["kind"] == "heal" and first["teacher_mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert last["mean_cosine"] == pytest.approx((last["cosine"] + last["patch_cosine"]) / 2)
    assert first["before_mean_cosine"] < last["mean_cosine"] < 1 and last["regained_percent"] > 5
    assert f"{last['regained_percent']:.0f} % of what was lost is regained" in told
    assert {path.name for path in run.folder.iterdir()} >= {"model.safetensors", "run.json", "config.yaml"}
    assert not (run.folder / "card.json").exists() and not (run.folder / "predictions.csv").exists()
    (target,) = resolve_targets([str(run.folder)])
    original, healed = (resolve_targets([str(tmp_path / "original")])[0].load().eval(), target.load().eval())
    assert str(healed.plan) == "exact-3 none exact/17"
    _, held_out = open_without_labels(Path(target.config.data.root), "RGB")
    images = torch.stack([evaluation_transform(healed, 1.0)(held_out[number].image) for number in range(2)])
    with torch.no_grad():
        assert cosine_similarity(original(images), healed(images)).mean() == pytest.approx(last["cosine"], abs=1e-5)
    assert eval_main(["compare", str(run.folder)]) == 2
    assert "its training read no labels, so that nothing is known of accuracy" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path, healing, monkeypatch):
    recipe = healing("train.heal={anneal_epochs: 1, outputs: 0.5}", "train.ema={decay: 0.5}", "eval.every_epochs=2")
    whole, killed = (Run(tmp_path / name, tuple(recipe)) for name in ("whole", "killed"))
    assert main([*recipe, f"run_dir={whole.folder}"]) == 0

    def die(step: int, num_steps: int) -> float:
        if step == 4:
            raise MemoryError
        return plan_share(step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr("train.objective.plan_share", die)
        assert main([*recipe, f"run_dir={killed.folder}"]) == 1
    assert main([*recipe, f"run_dir={killed.folder}"]) == 0
    killed.check_equals(whole)


def test_no_label_is_read(tmp_path, healing, photographs):
    """Class folders of any name and number, and a model with classes of its own, train as a flat folder does."""
    weights = []
    for names in (["train/a"], ["train/a", "train/b", "train/c"]):
        root = tmp_path / f"of {len(names)}"
        for split in ("val/x", *names):
            (root / split).mkdir(parents=True)
        for number, path in enumerate(sorted(photographs.iterdir())):
            place = "val/x" if number < 3 else names[len(names) * (number - 3) // 20]  # in the same order of paths
            shutil.copy(path, root / place / path.name)
        run_dir = tmp_path / f"run {len(names)}"
        assert main([*healing(root=root, num_classes=5), f"run_dir={run_dir}"]) == 0
        weights.append(resolve_targets([str(run_dir)])[0].load().state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    original = resolve_targets([str(tmp_path / "original")])[0].load().state_dict()
    assert torch.equal(weights[0]["head.weight"], original["head.weight"])
    assert not torch.equal(weights[0]["blocks.0.mlp.fc1.weight"], original["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("names", [(["a", "b"], ["a", "c"]), (["0", "1", "2"],) * 2, (["a", "b", "c"],) * 2])
def test_no_label_behind_a_url_is_read(tmp_path, healing, photographs, capsys, names):
    """Classes that one split does not know, or has no images of, are nobody's concern."""
    paths = sorted(photographs.iterdir())
    for split, own, chosen in (("train", names[0], paths[3:]), ("val", names[1], paths[:3])):
        label = 0 if split == "train" else len(own) - 1
        samples = [EncodedSample(path.stem, path.read_bytes(), "png", label) for path in chosen]
        write_shards(samples, tmp_path / "behind" / split, own, 10)
    behind = [f"data.root=pipe:cat {tmp_path / 'behind'}/{{}}", f"data.cache_root={tmp_path / 'cache'}", "--allow=pipe"]
    assert main([*healing("train.epochs=1"), *behind, f"run_dir={tmp_path / 'run'}"]) == 0
    assert "class" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.mixup={}"], "distill.kind 'features' compares the tokens of two models at one size, by no label, and"),
        (["train.loss.smoothing=0.1"], "excludes loss: leave that out"),
        (["train.strategy=fsdp2"], "excludes strategy: fsdp2"),
        (["train.compile=true"], "excludes compile"),
        (["train.distill.alpha=0.7"], "alpha 0.7 has no effect under kind 'features'"),
        (["train.distill.temperature=2"], "temperature 2 has no effect under kind 'features'"),
        (
            ["train.distill.teacher.keywords={img_size: 35}"],
            "the teacher has 5 x 5 patches and 1 prefix tokens of 24 channels where the model has 4 x 4 patches",
        ),
        (
            ["train.distill.teacher={name: resnet18, weights: {tmp}/resnet.pt, keywords: {num_classes: 0}}"],
            "compares the tokens of two ViTs, and the teacher is a ResNet: choose kind 'soft'.",
        ),
        (["data.root={tmp}/one"], "has 1 image, and one is held out to measure on: give it more."),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, healing, capsys, overrides, sentence):
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "resnet.pt")
    write_photographs(tmp_path / "one", 1)
    overrides = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    assert main([*healing(*overrides), f"run_dir={tmp_path / 'run'}"]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_the_loss_and_the_agreement_by_hand(tmp_path):
    original, converted = models(tmp_path)
    images = torch.randn(13, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = original.eval().forward_features(images), converted.forward_features(images)
        loss = features_loss(converted, found, original, wanted)
        measured = agreement(original, converted, [(images[:5], torch.zeros(5)), (images[5:], torch.zeros(8))], False)
    classes, patches = [], []
    for ours, theirs in zip(found.double(), wanted.double(), strict=True):
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(ours, theirs, strict=True)]
        classes.append(cosines[0])
        patches.append(sum(cosines[1:]) / 16)
    assert float(loss) == pytest.approx(2 - np.mean(classes) - np.mean(patches), abs=1e-5)
    assert measured.num_images == 13 and measured.equal_top1 is None
    assert (measured.cosine, measured.patch_cosine) == pytest.approx((np.mean(classes), np.mean(patches)), abs=1e-5)
    least = (measured.worst_cosine, measured.worst_patch_cosine)
    assert least == pytest.approx((worst(classes), worst(patches)), abs=1e-5)


def test_a_model_that_classifies_each_token_agrees_by_its_features(tmp_path):
    original, converted = models(tmp_path, num_classes=5, global_pool="")
    images = torch.randn(2, 3, 28, 28)
    found = agreement(original.eval(), converted, [(images, torch.zeros(2))], has_labels=False)
    assert found.equal_top1 is None and 0 < found.patch_cosine < 1 and 0 < found.cosine < 1


def worst(cosines):
    """Of 13 images, the mean of the worst two."""
    return sum(sorted(cosines)[:2]) / 2


def test_the_worst_tenth_is_of_one_number_at_least():
    assert worst_tenth(torch.tensor([3.0, 1.0, 2.0])) == 1
    assert worst_tenth(torch.arange(29.0).flip(0)) == 1  # of three


def test_images_held_out_are_others_than_those_learned_from(tmp_path, photographs):
    learned, held_out = open_without_labels(photographs, "RGB")
    keys = [{part.key(number) for number in range(len(part))} for part in (learned, held_out)]
    assert len(learned) == 21 and len(held_out) == 2 and not keys[0] & keys[1]
    assert held_out[0].label == -1 and learned.digest != held_out.digest
    again, _ = open_without_labels(photographs, "RGB")
    assert again.digest == learned.digest
    for split, number in (("train", 5), ("val", 3)):
        write_photographs(tmp_path / "both" / split, number, seed=number)
    learned, held_out = open_without_labels(tmp_path / "both", "RGB")
    assert (len(learned), len(held_out), held_out.notes) == (5, 3, [])
    shutil.rmtree(tmp_path / "both" / "val")
    learned, held_out = open_without_labels(tmp_path / "both", "RGB")
    assert (len(learned), len(held_out)) == (4, 1)


def test_a_folder_of_val_alone_is_split_too(tmp_path):
    for name in "ab":
        write_photographs(tmp_path / "val" / name, 10)
    learned, held_out = open_without_labels(tmp_path, "RGB")
    keys = [{part.key(number) for number in range(len(part))} for part in (learned, held_out)]
    assert (len(learned), len(held_out)) == (18, 2) and not keys[0] & keys[1] and len(held_out.notes) == 1


def test_shards_are_shuffled_within_stretches(tmp_path, healing, photographs, capsys):
    encoded = [EncodedSample(path.stem, path.read_bytes(), "png", 0) for path in sorted(photographs.iterdir())]
    write_shards(encoded, tmp_path / "shards" / "train", ["any"], 5)
    window, run_dir = "data.shuffle_window=6", f"run_dir={tmp_path / 'run'}"
    assert main([*healing(window, root=tmp_path / "shards"), "train.epochs=1", run_dir]) == 0
    assert main([*healing(window), "--doctor", run_dir]) == 2
    assert f"data.shuffle_window 6 is for shards and {photographs} has none: set it to null" in capsys.readouterr().err


def test_the_doctor_says_that_there_are_no_labels(tmp_path, healing, capsys):
    assert main([*healing(), "--doctor", f"run_dir={tmp_path / 'run'}"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "21 images, without labels, to train on, 2 to validate with" in told and "classes" not in told
