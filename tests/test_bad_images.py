"""Images that cannot be decoded: they end a run, or others replace them in training up to a ceiling."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from storms.processes import Run
from torchvision.transforms import Compose, PILToTensor

from train.__main__ import main
from train.draws import Augmented
from train.order import Draw
from train.pipeline import TrainingImages
from vitreuse.data import DecodeError, EncodedSample, ShardDataset, open_split, write_shards

TO_BYTES = Compose([PILToTensor(), Augmented])
BAD = {"train": (3, 8), "val": ()}  # which the first epoch meets in its first and its second step
CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0}}
train:
  epochs: 2
  global_batch_size: 8
  device: cpu
  num_threads: 1
  optimizer: {{name: sgd, lr: 1e-2}}
  affine: {{degrees: 10}}
  checkpoint: {{every_steps: 1}}
  log_every_steps: 1
  ledger: true
eval: {{crop_pct: 1.0}}
"""


def _write(root: Path, bad: dict[str, tuple[int, ...]]) -> None:
    """Seventeen training images and seven others in shards of five, of which some are text."""
    rng = np.random.default_rng(0)
    for split, number in {"train": 17, "val": 7}.items():
        samples = []
        for i in range(number):
            content = io.BytesIO()
            Image.fromarray(rng.integers(60 * (i % 3), 255, (8, 8), dtype=np.uint8)).save(content, "PNG")
            image = b"no image" if i in bad[split] else content.getvalue()
            samples.append(EncodedSample(f"{split}-{i}", image, "png", i % 3))
        write_shards(samples, root / split, "abc", 5)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    _write(folder, BAD)
    (folder / "x.yaml").write_text(CONFIG.format(root=folder))
    return folder


def _train(root: Path, folder: Path, *overrides: str, code: int = 0) -> Run:
    run = Run(folder, (str(root / "x.yaml"), *overrides))
    assert main([*run.arguments, f"run_dir={folder}"]) == code
    return run


@pytest.fixture(scope="module")
def replaced(root, tmp_path_factory) -> Run:
    """A run that replaced what it could not decode."""
    return _train(root, tmp_path_factory.mktemp("runs") / "replaced", "data.max_bad_images=2")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_by_default_the_first_one_ends_a_run(root, tmp_path, capsys, num_workers):
    run = _train(root, tmp_path / "run", f"data.num_workers={num_workers}", code=2)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("train: ")] == said[-1:]
    assert "sample 'train-" in said[-1] and said[-1].endswith("write it again or leave it out.")
    assert run.record["status"] == "failed"


def test_replaced_images_are_counted_and_batches_stay_whole(replaced):
    used = [record["keys"] for record in replaced.records("ledger")]
    assert [len(keys) for keys in used] == [8, 8, 1] * 2
    bad = {f"train-{number}" for number in BAD["train"]}
    for epoch in (used[:3], used[3:]):
        keys = [key for step in epoch for key in step]
        assert len({*keys}) == 15 and not bad & {*keys}  # each of the others is there
    counts = {kind: [r["bad_images"] for r in replaced.records() if r["kind"] == kind] for kind in ("step", "epoch")}
    assert counts == {"step": [1, 2, 2, 2, 2, 2], "epoch": [2, 2]}
    assert {*replaced.state()["counters"]["bad_images"]} == bad


def test_workers_make_no_difference(root, replaced, tmp_path, capsys):
    other = _train(root, tmp_path / "run", "data.max_bad_images=2", "data.num_workers=2")
    other.check_equals(replaced)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.endswith("Another image takes its place.")]) == len(BAD["train"])


def test_a_run_beyond_the_ceiling_goes_on_when_it_is_raised(root, replaced, tmp_path, capsys):
    folder = tmp_path / "run"
    stopped = _train(root, folder, "data.max_bad_images=1", code=2)
    known = replaced.state()["counters"]["bad_images"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"train: 2 training images cannot be decoded ({', '.join(known)}), and data.max_bad_images")
    assert stopped.record["status"] == "failed" and stopped.state()["counters"]["bad_images"] == known[:1]
    _train(root, folder, "data.max_bad_images=2").check_equals(replaced)


def test_ranks_share_the_replacements_the_count_and_the_end(root, replaced, tmp_path):
    """The first step of two ranks replaces an image and the second would be beyond the ceiling; one rank goes on."""
    run = Run(tmp_path / "run", (str(root / "x.yaml"), "data.max_bad_images=1"))
    run.start(ranks=2).check_fails(1, "2 training images cannot be decoded (train-3, train-8), and", "allows 1")
    assert run.record["status"] == "failed"
    _train(root, run.folder, "data.max_bad_images=2")
    ledger, whole = run.records("ledger"), replaced.records("ledger")
    assert [record["keys"] for record in ledger[:2]] == [whole[0]["keys"][rank::2] for rank in (0, 1)]
    assert ledger[2:] == whole[1:]
    counts = [[record.get("bad_images") for record in other.records()] for other in (run, replaced)]
    assert counts[0] == counts[1]
    weights, expected = (load_file(other.folder / "model.safetensors") for other in (run, replaced))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "recipe",
    [
        ["train.affine={degrees: 10}"],
        ["train.affine=null", "train.crop={scale: [0.3, 1.0], auto_augment: rand-m9-n2, erase_prob: 0.5}"],
        ["train.affine=null", "train.crop={color_jitter: 0.3}", "model.keywords.in_chans=3"],
    ],
    ids=["affine", "crop of grey", "crop of colour"],
)
def test_any_kind_of_image_is_trained_on(tmp_path, recipe):
    """Inks, 16 bits, a palette with a transparent colour, an alpha channel, two levels, and a single pixel."""
    grey = np.random.default_rng(0).integers(0, 255, (11, 7), dtype=np.uint8)
    images = [
        Image.fromarray(grey).convert("CMYK"),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey).convert("P"),
        Image.fromarray(grey).convert("RGBA"),
        Image.fromarray(grey).convert("1"),
        Image.fromarray(grey[:1, :1]),
        Image.fromarray(grey[:1, :1]).convert("CMYK"),
    ]
    for split in ("train", "val"):
        write_shards([_encoded(number, image) for number, image in enumerate(images)], tmp_path / split, "abc", 4)
    (tmp_path / "x.yaml").write_text(CONFIG.format(root=tmp_path))
    run = _train(tmp_path, tmp_path / "run", *recipe)
    losses = [record["loss"] for record in run.records() if record["kind"] == "step"]
    assert len(losses) == 2 and all(loss is not None for loss in losses)
    assert (run.records()[-1]["n"], run.records()[-2]["bad_images"]) == (len(images), 0)


def _encoded(number: int, image: Image.Image) -> EncodedSample:
    content, kind = io.BytesIO(), "JPEG" if image.mode == "CMYK" else "PNG"
    image.save(content, kind, **({"transparency": 3} if image.mode == "P" else {}))
    return EncodedSample(f"image{number}", content.getvalue(), "jpg" if kind == "JPEG" else "png", number % 3)


def test_none_is_replaced_in_an_evaluation(tmp_path, capsys):
    _write(tmp_path, {"train": (), "val": (2,)})
    (tmp_path / "x.yaml").write_text(CONFIG.format(root=tmp_path))
    _train(tmp_path, tmp_path / "run", "data.max_bad_images=9", code=2)
    assert "train: sample 'val-2' of shard" in capsys.readouterr().err.splitlines()[-1]


def test_a_replacement_is_a_function_of_the_draw(root):
    images = TrainingImages(open_split(root, "train", "L"), [TO_BYTES] * 9, seed=1, max_bad_images=2)
    keys = [images[Draw(epoch, 3, copy)][2] for epoch in range(9) for copy in range(2)]
    assert keys == [images[Draw(epoch, 3, copy)][2] for epoch in range(9) for copy in range(2)]
    assert len({*keys}) > 5
    assert images[Draw(0, 4, 0)][2:] == ("train-4", {})


def test_a_set_without_a_good_image_is_one_sentence(tmp_path):
    write_shards([EncodedSample(str(i), b"no image", "png", 0) for i in range(3)], tmp_path / "none", "a", 3)
    images = TrainingImages(ShardDataset(tmp_path / "none"), [TO_BYTES], seed=1, max_bad_images=100)
    with pytest.raises(DecodeError, match=r"^sample '1' of shard .* has no known image format"):
        images[Draw(0, 1, 0)]
