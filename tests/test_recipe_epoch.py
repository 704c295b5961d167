"""A recipe of ImageNet on made-up photographs in shards, shrunk by the command line alone: an epoch on two ranks."""

from pathlib import Path

import pytest
from storms.processes import Run

from tests.gpu.training import photographs

RECIPE = Path(__file__).parent.parent / "configs" / "imagenet" / "deit_300_small_exact.yaml"
NUM_IMAGES, BATCH_SIZE = 2000, 64
SHRUNK = (
    "model.keywords={img_size: 32, depth: 2, embed_dim: 48, num_heads: 3}",
    "train.epochs=1",
    "train.schedule.warmup_epochs=0",
    f"train.global_batch_size={BATCH_SIZE}",
    "train.log_every_steps=1",
    "data.num_workers=1",
    "eval.batch_size=50",
)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("plan", "more"),
    [("exact reuse", ()), ("exact-1 exact", ("train.augment_on=device", "train.mixup.groups=2", "data.holdout=0.05"))],
)
def test_an_epoch_on_two_ranks_after_the_doctor(tmp_path, plan, more):
    photographs(tmp_path / "data" / "train", NUM_IMAGES, 40, (200, 150))
    photographs(tmp_path / "data" / "val", 1000, 10, (100, 75))
    recipe = (str(RECIPE), f"model.plan={plan}", f"data.root={tmp_path / 'data'}", *SHRUNK, *more)
    examined = Run(tmp_path / "examined", (*recipe, "--doctor"))
    start = examined.start(ranks=2)
    assert start.end() == 0, start.said
    assert not examined.folder.exists()
    run = Run(tmp_path / "run", recipe)
    run.complete(ranks=2)
    steps = [record for record in run.records() if record["kind"] == "step"]
    num_trained = NUM_IMAGES - round(NUM_IMAGES * 0.05) * ("data.holdout=0.05" in more)
    assert len(steps) == num_trained // BATCH_SIZE and all(step["loss"] is not None for step in steps)
    final = run.records()[-1]
    assert (final["n"], final["skipped"], run.record["status"]) == (1000, 0, "completed")
    assert run.record["augmented_on"] == ("device" if more else "workers")
