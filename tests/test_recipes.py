"""The recipes of configs/imagenet/: each file, and each plan in its header, is what name, header and source say."""

import math
import re
import shlex
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.scheduler import CosineLRScheduler
from torchvision.transforms.v2.functional import InterpolationMode, resize

from eval.flops import model_macs
from train.augmentation import CropTransform, train_transform
from train.pipeline import create_mixup
from train.randomness import seed_generators
from train.recipe import create_criterion, create_optimizer, create_scheduler, freeze, step_of_rate
from train.weights import start_from
from vitreuse.__main__ import main as vitreuse_main
from vitreuse.config import Config, ConfigError, CropConfig, ModelConfig, load_config
from vitreuse.files.networks import load_experiment
from vitreuse.model.preprocessing import Normalize, image_settings
from vitreuse.plan import PRESETS, preset_plan

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "imagenet"
FILES = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.yaml"))}
NUM_IMAGES = 1_281_167  # of ImageNet-1k for training
NAME = re.compile(
    r"(?P<family>plain|deit|deit3|continual)_(?P<epochs>\d+)_(?P<size>tiny|small|base)(?P<distilled>_distilled)?"
    r"(_(?P<px>\d+))?_(?P<plan>exact|reuse|lazy|lowrank|mixspan|merge)"
)
MODELS = {"plain": "vit", "deit": "deit", "deit3": "deit3", "continual": "deit"}  # timm's families
FINE_TUNED = {"deit_300_base_384": 30, "deit3_800_small_384": 20, "deit3_400_base_224": 20, "deit3_800_base_224": 20}

PAPERS = {
    "reuse": "2110.06821",
    "lazy": "2102.12702",
    "lowrank": "2006.04768",
    "mixspan": "2310.12442",
    "merge": "2210.09461",
}


class Recipe(NamedTuple):
    """An experiment: a file, what is said of it in its header, and what a line of that adds to the command."""

    path: Path
    header: str  # as one line
    overrides: list[str]


def recipes() -> dict[str, Recipe]:
    """Every experiment by its name: a file's, or in a header the one that a line for another plan gives the run."""
    found = {}
    for stem, path in FILES.items():
        own, _, others = path.read_text().partition("\nbase:")[0].partition("\n# Other plans: the command with one of")
        found[stem] = Recipe(path, joined(own), [])
        *said, rest = re.split(r"\n#     (model\.name=.*)", others)
        assert not rest
        for text, line in zip(said[::2], said[1::2], strict=True):
            *overrides, run_dir = shlex.split(line)
            found[run_dir.removeprefix("run_dir=runs/")] = Recipe(path, joined(text), overrides)
    return found


def joined(comment: str) -> str:
    return comment.replace("\n#  ", "").replace("\n", " ")


RECIPES = recipes()
each_recipe = pytest.mark.parametrize("stem", RECIPES)
each_file = pytest.mark.parametrize("stem", FILES)


@cache
def built(stem: str) -> tuple[Config, Any]:
    """An experiment and its model on the meta device."""
    path, _, overrides = RECIPES[stem]
    config = load_config(path, overrides)
    return config, config.model.create("meta")


def parts(stem: str) -> dict[str, Any]:
    match = NAME.fullmatch(stem)
    assert match, f"{stem} is not RECIPE_SIZE[_distilled][_PX]_PLAN"
    return match.groupdict()


def plan_text(name: str, image_size: int) -> str:
    return "exact*12" if name == "exact" else str(preset_plan(name, 12, (image_size // 16) ** 2))


@each_recipe
def test_the_name_says_model_plan_size_and_epochs(stem):
    config, model = built(stem)
    named = parts(stem)
    method = "reuse" if named["plan"] == "exact" else named["plan"]
    family, tail = MODELS[named["family"]], f"{named['size']}{named['distilled'] or ''}_patch16_"
    assert config.model.name.startswith(f"{family}_{method}_{tail}")
    image_size = int(named["px"] or 224)
    assert str(model.plan) == config.model.plan == plan_text(named["plan"], image_size)
    assert model.patch_embed.img_size == (image_size,) * 2
    assert model.num_classes == 1000
    recipe = stem.removesuffix(f"_{named['plan']}")
    assert RECIPES[stem].path.stem == f"{recipe}_exact"
    assert named["plan"] == "exact" or PAPERS[named["plan"]] in RECIPES[stem].header
    assert config.train.epochs == FINE_TUNED.get(recipe, int(named["epochs"]))
    assert (config.model.weights is not None) == (recipe in FINE_TUNED or named["family"] == "continual")
    assert (config.train.distill is not None) == (named["distilled"] is not None)


@each_file
def test_the_header_has_the_commands_and_the_batch(stem):
    config, _ = built(stem)
    command = f"-m train configs/imagenet/{stem}.yaml"
    batch_size = config.train.global_batch_size
    for text in (
        f"# Command: torchrun --nproc-per-node 8 {command} #",
        "# Two nodes: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        f"\\ {command} #",
        f"8 GPUs, {batch_size // 8} images of each step on every one.",
        "ours: not yet run.",
    ):
        assert text in RECIPES[stem].header
    assert batch_size % (2 * 16) == 0  # mixup pairs the images of each of 16 ranks


@each_recipe
def test_the_header_has_the_cost(stem):
    """Training counts as three forward passes; a teacher's forward comes on top."""
    config, model = built(stem)
    text, passes = RECIPES[stem].header, "three forward passes of " if stem in FILES else ""
    flops, gmacs = re.search(rf"about ([\d.e]+) FLOPs, {passes}([\d.]+) GMACs", text).groups()
    macs, taught = model_macs(model), re.search(r"and the teacher's one of ([\d.]+) for", text)
    assert gmacs == f"{macs / 1e9:.2f}"
    teacher_macs = 0
    if config.train.distill is not None:
        teacher_macs = model_macs(config.train.distill.teacher.create("meta").eval())
        assert stem not in FILES or taught[1] == f"{teacher_macs / 1e9:.2f}"
    total = 2 * (3 * macs + teacher_macs) * NUM_IMAGES * config.train.epochs
    assert float(flops) == float(f"{total:.1e}")
    assert (taught is None) == (config.train.distill is None or stem not in FILES)


@each_recipe
def test_optimizer_schedule_loss_and_images_can_be_made(stem):
    config, _ = built(stem)
    model: Any = config.model.create("meta")  # a fresh one, to be frozen
    freeze(model, config.train.freeze)
    optimizer = create_optimizer(config, model)
    steps_per_epoch = NUM_IMAGES // config.train.global_batch_size
    scheduler = create_scheduler(config, optimizer, steps_per_epoch)
    settings, schedule = config.train.optimizer, config.train.schedule
    warmup_steps = schedule.warmup_steps or int(schedule.warmup_epochs * steps_per_epoch)

    def lr_at(step: int) -> float:
        scheduler.step_update(step)
        return max(group["lr"] for group in optimizer.param_groups)

    assert lr_at(0) == pytest.approx(schedule.warmup_lr)
    assert lr_at(warmup_steps) == pytest.approx(settings.lr, rel=0.03)
    end = settings.lr if schedule.name == "constant" else schedule.min_lr
    assert lr_at(config.train.epochs * steps_per_epoch - 1) == pytest.approx(end, rel=0.01, abs=1e-10)

    images = image_settings(model)
    photograph = torch.randint(256, (3, 250, 333), dtype=torch.uint8)
    image = Normalize(images)(train_transform(config, images)(photograph).image)
    assert image.shape == images["input_size"]
    mixup = create_mixup(config, model.num_classes)
    assert mixup is not None
    _, targets = mixup(torch.stack([image, image]), torch.tensor([3, 5]))
    loss = create_criterion(config)(torch.zeros(2, 1000), targets)
    assert loss.item() == pytest.approx(math.log(1000 if config.train.loss.name == "ce" else 2), rel=1e-4)


@each_recipe
def test_images_are_normalised_as_in_the_source(stem):
    """timm's plain ViTs take 0.5 for mean and deviation, DeiT's ImageNet's: the other costs accuracy in silence."""
    settings = image_settings(built(stem)[1])
    if stem.startswith("plain"):
        assert settings["mean"] == settings["std"] == (0.5, 0.5, 0.5)
    else:
        assert (settings["mean"], settings["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@each_recipe
def test_weights_are_timms_or_those_of_another_recipe(stem):
    config, _ = built(stem)
    distill = config.train.distill
    assert distill is None or timm.is_model_pretrained(distill.teacher.weights)
    weights = config.model.weights
    if weights is not None and not timm.is_model_pretrained(weights):
        first_stage = weights.removeprefix("runs/").removesuffix("/model.safetensors")
        assert first_stage in RECIPES and first_stage != stem


def test_every_recipe_has_every_plan_or_says_how_to_get_it():
    plans = defaultdict(set)
    for stem in RECIPES:
        recipe, _, plan = stem.rpartition("_")
        plans[recipe].add(plan)
    single = {recipe for recipe, known in plans.items() if known == {"exact"}}
    assert all(plans[recipe] == {"exact", *PRESETS} for recipe in plans.keys() - single)
    headers = {recipe: RECIPES[f"{recipe}_exact"].header for recipe in plans}
    assert {recipe for recipe, text in headers.items() if "# Other plans: add model.plan=TEXT" in text} == single
    for recipe in single:
        image_size = int(parts(f"{recipe}_exact")["px"] or 224)
        for plan in (plan_text(name, image_size) for name in PRESETS):
            model: Any = load_config(FILES[f"{recipe}_exact"], [f"model.plan={plan}"]).model.create("meta")
            assert str(model.plan) == plan


def test_plain_90_starts_from_fixed_positions_and_a_head_of_zeros():
    config, _ = built("plain_90_small_exact")
    model: Any = config.model.create()
    freeze(model, config.train.freeze)
    assert torch.equal(model.pos_embed[0], build_sincos2d_pos_embed([14, 14], 384))
    assert not model.pos_embed.requires_grad and model.cls_token is None
    assert not model.head.weight.any() and not model.head.bias.any()


def rates_by_epoch(stem, steps_per_epoch, epochs):
    """The learning rate of the first step of some epochs, which is the one of their last."""
    config, model = built(stem)
    optimizer = create_optimizer(config, model)
    scheduler = create_scheduler(config, optimizer, steps_per_epoch)
    found = []
    for epoch in epochs:
        rates = set()
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            scheduler.step_update(step_of_rate(config.train.schedule, step, steps_per_epoch))
            rates.add(optimizer.param_groups[0]["lr"])
        (rate,) = rates
        found.append(rate)
    return found


def test_deit_moves_its_rate_behind_each_epoch():
    """As its script does, which calls timm's scheduler with the number of the epoch that has ended."""
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    expected = []
    for epoch in range(300):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    assert expected[:5] == pytest.approx([1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4])
    assert rates_by_epoch("deit_300_small_exact", 7, range(300)) == pytest.approx(expected, rel=1e-6)


def test_the_cosine_of_plain_90_begins_after_the_warm_up():
    config, model = built("plain_90_small_exact")
    optimizer, steps_per_epoch = create_optimizer(config, model), NUM_IMAGES // 1024
    scheduler, num_steps = create_scheduler(config, optimizer, steps_per_epoch), 90 * steps_per_epoch
    for step in (0, 2500, 10_000, 10_001, num_steps // 2, num_steps - 1):
        scheduler.step_update(step)
        gone = (step - 10_000) / (num_steps - 10_000)
        expected = step / 10_000 if step < 10_000 else 0.5 * (1 + math.cos(math.pi * gone))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * expected, rel=1e-5, abs=1e-12)


def test_drop_paths_are_those_of_the_source():
    of_source = {"deit3_800_small_exact": 0.05, "deit3_400_base_192_exact": 0.1, "deit3_800_base_224_exact": 0.2}
    for stem, rate in of_source.items():
        model = load_config(FILES[stem]).model.create("meta")
        rates = [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]
        assert rates == [rate] * 24
    growing: Any = built("deit_300_small_exact")[1]
    rates = [block.drop_path2.drop_prob for block in growing.blocks[1:]]
    assert rates == pytest.approx([number / 110 for number in range(1, 12)])
    none = load_config(FILES["deit3_400_small_exact"]).model.create("meta")
    assert not any(isinstance(part, DropPath) for part in none.modules())


def test_a_uniform_drop_path_needs_a_rate_and_a_vision_transformer():
    with pytest.raises(ConfigError, match=r"has no effect without a keywords\.drop_path_rate"):
        ModelConfig(name="vit_tiny_patch16_224", drop_path="uniform", keywords={})
    with pytest.raises(ConfigError, match="needs a vision transformer, and this is a ResNet"):
        ModelConfig(name="resnet10t", drop_path="uniform", keywords={"drop_path_rate": 0.1}).create("meta")
    plan, keywords = "exact*2 none linear exact*8", {"drop_path_rate": 0.3}
    config = ModelConfig(name="vit_reuse_tiny_patch16_224", plan=plan, drop_path="uniform", keywords=keywords)
    blocks: Any = config.create("meta").blocks
    assert blocks[0].drop_path1.drop_prob == blocks[2].drop_path2.drop_prob == blocks[3].drop_path.drop_prob == 0.3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_are_resized_as_the_recipe_says(interpolation):
    crop = CropConfig(interpolation=interpolation, hflip=0.0)
    transform = CropTransform(crop, image_settings(built("deit_300_small_exact")[1]), on_device=False)
    image = torch.randint(256, (3, 97, 131), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for number in range(8):
        seed_generators(np.random.SeedSequence(number))
        made = transform(image).image
        seed_generators(np.random.SeedSequence(number))
        top, left, height, width = transform.crop.get_params(image, crop.scale, crop.ratio)
        region = image[:, top : top + height, left : left + width]
        ways = [resize(region, [224, 224], InterpolationMode(way), antialias=True) for way in ("bilinear", "bicubic")]
        found.append([torch.equal(made, way) for way in ways])
    counts = [sum(column) for column in zip(*found, strict=True)]
    assert counts == {"bilinear": [8, 0], "bicubic": [0, 8]}.get(interpolation, counts)
    assert sum(counts) == 8 and (interpolation != "random" or min(counts) > 0)


def test_continual_training_goes_on_from_a_converted_model(tmp_path, capsys):
    """As docs/training.md says it, with weights of no training."""
    torch.manual_seed(0)
    source: Any = timm.create_model("deit_small_patch16_224")
    save_file(source.state_dict(), tmp_path / "deit.safetensors")
    arguments = ["convert", "deit_small_patch16_224", "--checkpoint", tmp_path / "deit.safetensors"]
    arguments += ["--image-size", 384, "--plan", "exact-24*12", "-o", tmp_path / "merged", "--json"]
    assert vitreuse_main([*map(str, arguments)]) == 0
    overrides = [f"model.name=local-dir:{tmp_path / 'merged'}", "model.plan=null", "model.weights=null", "data.root=x"]
    config = load_experiment(FOLDER / "continual_30_small_384_exact.yaml", overrides)
    model: Any = config.model.create()
    assert str(model.plan) == "exact-24*12" and model.patch_embed.img_size == (384, 384)
    assert config.model.weights == str(tmp_path / "merged" / "model.safetensors")
    start_from(model, config.model.weights)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_query_key_and_value_begin_as_in_the_source():
    """big_vision draws each uniformly, as a matrix of its own (xavier_uniform), and its biases as zeros."""
    torch.manual_seed(0)
    model: Any = load_config(FILES["plain_90_small_exact"]).model.create()
    for block in model.blocks:
        for part in block.attn.qkv.weight.chunk(3):
            bound = math.sqrt(6 / (384 + 384))
            assert 0.995 * bound < part.abs().max() <= bound * (1 + 1e-6)
            assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    mixed: Any = replace(load_config(FILES["plain_90_small_exact"]).model, plan="exact reuse:2*11").create()
    bound = math.sqrt(6 / (384 + 384))
    assert 0.99 * bound < mixed.blocks[1].attn.qk.weight.abs().max() <= bound * (1 + 1e-6)
    other = load_config(FILES["deit_300_small_exact"]).model
    with pytest.raises(ConfigError, match=r"qkv_init 'apart' has no effect without keywords\.weight_init jax"):
        replace(other, qkv_init="apart")
