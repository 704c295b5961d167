"""An evaluation in float32 is one on a GPU, too: without TF32, whatever a run trains with or torch begins with."""

from itertools import product
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from eval.knn import features
from eval.labelled import Share
from eval.precision import evaluated_in
from eval.top1 import evaluate
from train.distill import Teacher
from train.findings import look
from vitreuse.config import load_config
from vitreuse.data import Sample
from vitreuse.model.preprocessing import evaluation_transform, image_settings

CPU = torch.device("cpu")
SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 5}
CONFIG = """\
model: {name: vit_tiny_patch16_224}
data: {root: unused}
train: {epochs: 1, global_batch_size: 2, optimizer: {lr: 1e-2}}
"""


def switched_on() -> tuple[bool, ...]:
    return tuple(switch.allow_tf32 for switch in SWITCHES)


@pytest.fixture
def switches():
    """Sets both, and puts them back."""
    before = switched_on()

    def set_to(*are_on: bool) -> None:
        for switch, is_on in zip(SWITCHES, are_on, strict=True):
            switch.allow_tf32 = is_on

    yield set_to
    set_to(*before)


class Squares:
    """Three grey images."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> Sample:
        return Sample(Image.new("RGB", (8, 8), (9 * number,) * 3), number, str(number))


@pytest.mark.parametrize("were_on", [*product((False, True), repeat=2)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_both_switches_are_off_inside_and_as_they_were_after(switches, precision, were_on):
    switches(*were_on)
    with evaluated_in(precision, CPU):
        assert switched_on() == (False, False)
        made = torch.ones(2, 2) @ torch.ones(2, 2)
    assert switched_on() == were_on and made.dtype == precision
    with pytest.raises(ZeroDivisionError), evaluated_in(precision, CPU):
        raise ZeroDivisionError
    assert switched_on() == were_on


@pytest.mark.parametrize("what", ["top1", "knn", "look", "look without labels"])
def test_every_evaluation_computes_without_tf32(switches, what, tmp_path):
    switches(True, True)
    model: Any = timm.create_model("vit_tiny_patch16_224", **SIZES)
    met = []
    model.patch_embed.register_forward_pre_hook(lambda *_: met.append(switched_on()))
    transform = evaluation_transform(model, 1.0)
    share = Share(Squares(), transform=transform.to_bytes, prepare=transform.normalize, batch_size=2)
    (tmp_path / "x.yaml").write_text(CONFIG)
    if what == "top1":
        evaluate(model, share)
    elif what == "knn":
        features(model, share)
    else:
        teacher = None if what == "look" else Teacher(model, image_settings(model))
        look(load_config(tmp_path / "x.yaml"), model, teacher, share)
    assert set(met) == {(False, False)} and switched_on() == (True, True)


def test_images_that_fill_up_a_batch_are_compared_with_no_features(tmp_path):
    (tmp_path / "x.yaml").write_text(CONFIG)
    model, other = (timm.create_model("vit_tiny_patch16_224", **SIZES) for _ in range(2))
    teacher, transform = Teacher(other, image_settings(other)), evaluation_transform(model, 1.0)
    reading = {"transform": transform.to_bytes, "prepare": transform.normalize, "batch_size": len(Squares()) + 3}
    plain, filled = (Share(Squares(), **reading, fills_up=fills_up) for fills_up in (False, True))
    config = load_config(tmp_path / "x.yaml")
    wanted = look(config, model, teacher, plain).figures
    assert look(config, model, teacher, filled).figures == pytest.approx(wanted, rel=1e-5)
    assert wanted["n"] == len(Squares())
