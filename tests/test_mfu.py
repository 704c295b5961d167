"""Model FLOPs utilization against products counted by hand, on a device whose peak the tests decide."""

import pytest
import torch

from eval.distributed import Ranks
from eval.labelled import ALONE
from train.heal import create_healing
from train.mfu import PEAK_TFLOPS, Mfu, Peak, peak_flops
from train.recipe import freeze
from vitreuse.config import Config, HealConfig, load_config
from vitreuse.cost.measure import device_name

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact
  keywords: {img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 1, num_heads: 2}
data: {root: unused}
train: {epochs: 5, global_batch_size: 8, optimizer: {lr: 1e-2}}
"""
# One layer of 16 channels, of which the head reads the class token alone: patches; its query; keys and values of all
# tokens; logits and values by the map; projection; MLP; head.
MACS_OF_4_PATCHES = 4 * 16 * 16 + 16 * 16 + 5 * 16 * 32 + 2 * 5 * 16 + 16 * 16 + 2 * 16 * 64 + 16 * 3
MACS_OF_2_PATCHES = 2 * 16 * 16 + 16 * 16 + 3 * 16 * 32 + 2 * 3 * 16 + 16 * 16 + 2 * 16 * 64 + 16 * 3
# timm's own model has all rows in its last layer
MACS_OF_TIMMS = 4 * 16 * 16 + 5 * 16 * 48 + 2 * 5 * 5 * 16 + 5 * 16 * 16 + 5 * 2 * 16 * 64 + 16 * 3


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Reads the small experiment with overrides, on a CPU of 3 GFLOP/s in float32 and 5 in bfloat16."""
    monkeypatch.setitem(PEAK_TFLOPS, device_name(torch.device("cpu")), Peak(0.005, None, 0.003))
    (tmp_path / "x.yaml").write_text(CONFIG)

    def load_with(*overrides: str) -> Config:
        return load_config(tmp_path / "x.yaml", overrides)

    return load_with


def mfu_of(config: Config, ranks: Ranks = ALONE) -> Mfu:
    """Of an experiment whose model is frozen as it says."""
    model = config.model.create("meta")
    freeze(model, config.train.freeze)
    return Mfu(config, model, ranks)


def test_utilization_is_three_forward_passes_over_the_peak_of_all_ranks(load):
    used = mfu_of(load(), Ranks(world_size=2)).percent({(8, 8): 700}, seconds=2)
    assert used == pytest.approx(100 * 700 * 3 * 2 * MACS_OF_4_PATCHES / (2 * 2 * 3e9))
    used = mfu_of(load("train.precision=bfloat16")).percent({(8, 8): 700}, seconds=2)
    assert used == pytest.approx(100 * 700 * 3 * 2 * MACS_OF_4_PATCHES / (2 * 5e9))


def test_images_count_by_their_size(load):
    mfu = mfu_of(load("model.keywords.dynamic_img_size=true"))
    flops = 3 * 2 * (100 * MACS_OF_4_PATCHES + 50 * MACS_OF_2_PATCHES)
    assert mfu.percent({torch.Size((8, 8)): 100, torch.Size((4, 8)): 50}, seconds=1) == pytest.approx(flops / 3e7)


def test_a_plain_model_is_counted_too(load):
    plain = load("model.name=vit_tiny_patch16_224", "model.plan=null")
    assert mfu_of(plain).percent({(8, 8): 1}, seconds=1) == pytest.approx(6 * MACS_OF_TIMMS / 3e7)


def test_an_attention_pool_is_counted(load):
    used = [mfu_of(load(f"model.keywords.global_pool={pool}")).percent({(8, 8): 1}, 1) for pool in ("avg", "map")]
    assert used[1] > used[0]


def test_what_has_no_peak_has_no_utilization(load):
    assert mfu_of(load("train.precision=float16")).percent({(8, 8): 1}, seconds=1) is None


@pytest.mark.parametrize("frozen", ["blocks", "blocks.0.mlp.fc1.weight", "patch_embed", "*.key_proj"])
def test_frozen_matrices_shorten_the_backward_pass_and_leave_no_utilization(load, frozen):
    config = load(f"train.freeze=['{frozen}']", "model.plan=lowrank:2")
    assert mfu_of(config).percent({(8, 8): 1}, seconds=1) is None
    assert mfu_of(load("model.plan=lowrank:2")).percent({(8, 8): 1}, seconds=1) is not None


@pytest.mark.parametrize("frozen", ["pos_embed", "cls_token", "*norm*", "*.bias", "head"])
def test_what_is_frozen_without_a_product_leaves_utilization_as_it_is(load, frozen):
    expected = mfu_of(load()).percent({(8, 8): 1}, seconds=1)
    assert mfu_of(load(f"train.freeze=['{frozen}']")).percent({(8, 8): 1}, seconds=1) == expected


@pytest.mark.parametrize(("parameters", "is_known"), [("all", True), ("touched", False), ("new", False)])
def test_healing_a_part_of_a_model_has_no_utilization(load, parameters, is_known):
    config = load("model.plan=lowrank:2 exact", "model.keywords.depth=2")
    model = config.model.create("meta")
    create_healing(HealConfig(parameters=parameters, outputs=0.0, anneal_epochs=0.0), model, None, asks_tokens=False)
    assert (Mfu(config, model, ALONE).percent({(8, 8): 1}, seconds=1) is not None) == is_known


def test_tf32_has_a_peak_of_its_own(load):
    plain, tf32 = (mfu_of(load(f"train.tf32={used}")).percent({(8, 8): 1}, seconds=1) for used in ("false", "true"))
    assert plain is not None and tf32 == pytest.approx(plain * 3 / 2.5)  # half of 5 in place of 3
    beside = mfu_of(load("train.tf32=true", "train.precision=bfloat16"))
    assert beside.percent({(8, 8): 1}, 1) == pytest.approx(plain * 3 / 5)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("Tesla T4", "tf32", 8.1),  # which has none
        ("A100-SXM4-80GB", "float16", 312),  # before driver 470
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H20", "bfloat16", None),
    ],
)
def test_the_peak_is_that_of_the_name_and_the_precision(name, precision, tflops):
    assert peak_flops(name, precision) == (None if tflops is None else pytest.approx(1e12 * tflops))
