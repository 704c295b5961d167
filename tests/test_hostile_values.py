"""Any value that a config can hold is right, or refused in one sentence, up to a first step of training."""

import types
import typing
from dataclasses import fields, is_dataclass

import pytest
from storms.pictures import write_pictures

from eval.distributed import Ranks
from train.experiment import set_up
from train.trainer import DivergedError
from vitreuse.config import Config, ConfigError
from vitreuse.data import DataError
from vitreuse.files.networks import load_experiment

CONFIG = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 8, depth: 2, num_heads: 2}}
data: {{root: {root}, num_workers: 0, source_root: {root}}}
train: {{epochs: 2, global_batch_size: 4, device: cpu, num_threads: 1, optimizer: {{name: sgd, lr: 1e-3}}}}
"""
WHOLE = ("0", "-1", "1", "3", "1000000", "-99999999999999999999", "18446744073709551615", "18446744073709551616")
NUMBERS = ("0.0", "-0.5", "1e-300", "0.5", "1.5", "1e30", "1e300", "1e999", ".nan", ".inf", "nan")
TEXTS = ('""', '" "', "x", '"\\0"', '"é*[%"', "true", "null", "9" * 5000)
SHAPES = ("[]", "{}", "[0]", "[0.5, 0.5]", "[5, 1]", "[1e-300, 1e300]", "[x, '']", "{a: 1}")
OF_TYPE = {int: WHOLE, float: (*WHOLE[:5], *NUMBERS), str: TEXTS, bool: ("true", "1"), tuple: SHAPES, dict: SHAPES}
ALL = ("7", "1e300", '"x"', "null", "[1, 2]", "{b: 2}", "9" * 5000)  # of any type
# What a key needs beside it to be looked at.
SECTIONS = {
    "train.ema": "{decay: 0.9}",
    "train.resolution": "{from_px: 4, epochs: 1}",
    "train.reference": "{curve: none.csv}",
    "train.distill": "{kind: soft, teacher: {name: vit_tiny_patch16_224, weights: none.pt}}",
}
# Tested below, or slow.
APART = {"model.keywords", "model.name", "data.num_workers", "train.num_threads", "train.compile"}
KEYWORDS = {
    "img_size": ("0", "-8", "7", "[]", "[8, 12]", "{}", "x"),
    "patch_size": ("0", "-4", "3", "true", "100", "[4, 0]"),
    "in_chans": ("0", "-1", "2", "3", "4", "5", "1.5", "true"),
    "num_classes": ("0", "-1", "4", "x"),
    "embed_dim": ("0", "-8", "7", "1.5"),
    "depth": ("0", "-1", "3", "x"),
    "num_heads": ("0", "-1", "3", "0.5", "false"),
    "mlp_ratio": ("0", "-1", "0.01", "x", "[1]"),
    "drop_rate": ("-1", "1", "5", "x"),
    "drop_path_rate": ("-1", "1", "5", "x"),
    "patch_drop_rate": ("-1", "0.5", "1", "5"),
    "global_pool": ('""', "avg", "x", "map", "0"),
    "proj_bias": ("[]", "{}", "x"),
    "init_values": ("-1", "1e300", "x"),
    "features_only": ("true",),
    "norm_layer": ("x", "batchnorm2d"),
    "act_layer": ("x", "0"),
    "dtype": ("float16", "x"),
    "reg_tokens": ("-1", "2", "x"),
    "pretrained_cfg": ("x", "{a: 1}"),
    "nonsense": ("1",),
}
OPTIMIZERS = (
    "{lr: 1e-3, name: adahessian}",
    "{lr: 1e-3, name: adamw, keywords: {betas: x}}",
    "{lr: 1e-3, name: adamw, keywords: {betas: [0.9]}}",
    "{lr: 1e-3, name: lamb, keywords: {betas: 5}}",
    "{lr: 1e-3, name: adafactor, keywords: {eps: [0.9, x]}}",
    "{lr: 1e-3, name: adamw, keywords: {capturable: true}}",
    "{lr: 1e-3, name: adamw, keywords: {lr: 5}}",
    "{lr: 1e-3, name: sgd, keywords: {momentum: 1e300}}",
    "{lr: 1e30, name: adamw, weight_decay: 1e6}",
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, 8, 4, per_shard=4)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(root=folder))
    return path


def plain(kind):
    """A declared type without None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(kind) if option is not types.NoneType)
    return typing.get_origin(kind) or kind


def settings(kind, path=""):
    """Every setting of the schema by its dotted path, sections too, and its type."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        dotted, own = f"{path}{field.name}", plain(hints[field.name])
        yield dotted, own
        if is_dataclass(own):
            yield from settings(own, f"{dotted}.")


def outcome(path, *overrides):
    """Builds an experiment and takes its first step; the sentence that refuses it, None for success."""
    try:
        trainer = set_up(load_experiment(path, overrides), Ranks()).trainer
        trainer.train_step(next(iter(trainer.remaining_batches())), stop=False)
    except (ConfigError, DataError, DivergedError) as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        return str(error)
    return None


def test_a_model_without_a_head_is_told_how_to_get_one(config_path):
    """A backbone of timm, as DINOv2 is, has none by its name."""
    said = outcome(config_path, "model.keywords.num_classes=0")
    assert said.endswith("it has no head, so set model.keywords.num_classes to the number of classes.")


@pytest.mark.parametrize(("dotted", "kind"), [setting for setting in settings(Config) if setting[0] not in APART])
def test_a_setting_is_right_or_refused(config_path, dotted, kind):
    needed = [f"{key}={value}" for key, value in SECTIONS.items() if dotted.startswith(f"{key}.")]
    values = dict.fromkeys((*OF_TYPE.get(kind, ()), *ALL))
    told = [said for value in values if (said := outcome(config_path, *needed, f"{dotted}={value}")) is not None]
    assert told  # some hostile value of every setting is refused


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_of_the_model_is_right_or_refused(config_path, keyword):
    found = {value: outcome(config_path, f"model.keywords.{keyword}={value}") for value in KEYWORDS[keyword]}
    if keyword == "in_chans":
        assert {value for value, said in found.items() if said is None} == {"3", "true"}  # which is 1
        assert "takes images of 4 channels" in found["4"] and "set model.keywords.in_chans" in found["4"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_is_right_or_refused(config_path, optimizer):
    said = outcome(config_path, f"train.optimizer={optimizer}")
    assert said is None or "\n" not in said


def test_a_seed_has_64_bits(config_path):
    assert outcome(config_path, f"train.seed={2**64 - 1}") is None
    for seed in (-1, 2**64, 10**30):
        assert "train.seed is " in outcome(config_path, f"train.seed={seed}")


def test_numbers_of_processes_and_threads_are_limited(config_path):
    for key in ("data.num_workers", "train.num_threads"):
        for number in ("-1", "1025", "99999999999"):
            assert f"{key} is {number}, it must be " in outcome(config_path, f"{key}={number}")


def test_a_name_is_of_a_model(config_path):
    for name in ('""', "x", '"\\0"', "null", "7", '"local-dir:"', "local-dir:none", "[]", "9" * 5000):
        assert outcome(config_path, f"model.name={name}") is not None


@pytest.mark.parametrize(
    "augmentation",
    [
        "crop={color_jitter: 100}",
        "crop={scale: [1e-300, 1e-200]}",
        "crop={ratio: [1e-300, 1e300]}",
        "crop={ratio: [1e300, 1e300], erase_prob: 1}",
        "affine={scale: [0.001, 1000], degrees: 180, shift: 1}",
        "mixup={mixup: 1e-300, cutmix: 1e300}",
        "mixup={mixup: 1e300, cutmix: 1e-300, prob: 0.5}",
    ],
)
def test_extreme_augmentation_can_be_drawn(config_path, augmentation):
    for seed in range(5):
        assert outcome(config_path, f"train.{augmentation}", f"train.seed={seed}") is None
