"""FSDP2 against DDP on two gloo ranks: the same steps, the same whole state, half of everything on each rank."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_trainer import CONFIG, Images
from test_trainer import _steps as steps
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchvision.transforms.functional import pil_to_tensor

from eval.distributed import Ranks
from eval.labelled import Share
from eval.top1 import evaluate
from train.sharding import OPTIMIZERS, unsharded
from train.trainer import Trainer
from vitreuse.config import ConfigError, load_config
from vitreuse.data import Sample
from vitreuse.model.preprocessing import evaluation_transform, image_settings

pytestmark = pytest.mark.proof  # each rank is a process

NUM_STEPS = 20  # the last step of an epoch, every third, has one image and so none for the second rank
RECIPES = {
    "plain": [],
    "clipped and accumulated": [
        *("train.ema={decay: 0.9}", "train.clip={limit: 1}", "train.accumulation_steps=3"),
        "train.optimizer.name=sgd",  # Adam makes whole steps of the rounding in the keys' biases' gradient of zero
    ],
    "layerwise low rank": ["model.plan=lowrank:3 reuse", "model.keywords.lowrank_sharing=layerwise"],
    "partial reuse, partly frozen": ["model.plan=lowrank:3 reuse:1", "train.freeze=[pos_embed, blocks.0.mlp]"],
    "bfloat16, checkpointed": ["train.precision=bfloat16", "train.grad_checkpointing=true", "train.clip={mode: value}"],
    "merging": ["model.plan=exact-2/7 exact", "train.ema={decay: 0.9}"],
    "linear": ["model.plan=linear exact-1/7 linear", "model.keywords.depth=3"],
    "drop path": ["model.plan=linear exact-1", "model.keywords.drop_path_rate=0.3"],
    "augmented on the device": [
        "train.crop={auto_augment: rand-m9-n2-mstd0.5-inc1, erase_prob: 0.5}",
        *("train.augment_on=device", "train.mixup={groups: 2}"),
    ],
    "layer decay": ["train.optimizer.layer_decay=0.8", "train.optimizer.name=lamb"],
}


class OneImage(Images):
    """A validation set of which the second rank has no share."""

    def __len__(self) -> int:
        return 1


class Photographs(Images):
    """The same as tensors, as what is cropped is decoded."""

    def __getitem__(self, number: int) -> Sample:
        image, *rest = super().__getitem__(number)
        return Sample(pil_to_tensor(image), *rest)


def build(folder: str, ranks: Ranks, strategy: str, *overrides: str) -> Trainer:
    config = load_config(Path(folder, "x.yaml"), ["train.epochs=12", f"train.strategy={strategy}", *overrides])
    torch.manual_seed(config.train.seed)
    model: Any = config.model.create()
    samples = Images() if config.train.crop is None else Photographs()
    return Trainer(config, model, samples, image_settings(model), ranks)


def both_strategies(folder: str, ranks: Ranks) -> dict[str, Any]:
    """Losses of each recipe under both strategies, and by how much their whole weights differ."""
    found = {}
    for name, overrides in RECIPES.items():
        ddp, fsdp2 = (build(folder, ranks, strategy, *overrides) for strategy in ("ddp", "fsdp2"))
        losses = steps(ddp, NUM_STEPS), steps(fsdp2, NUM_STEPS)
        states = ddp.state_dict(), fsdp2.state_dict()
        found[name] = *losses, apart(*states) if ranks.is_main else None
    return found


def apart(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    """The largest difference of a weight, averaged or not, relative to the tensor's largest."""
    return max(
        ((actual[part][name] - tensor).abs().max() / tensor.abs().max().clamp(1e-3)).item()
        for part in {"model", "ema"} & expected.keys()
        for name, tensor in expected[part].items()
    )


def shares(folder: str, ranks: Ranks) -> dict[str, float]:
    """How much of the weights, the optimizer's state and the moving average this rank keeps."""
    trainer = build(folder, ranks, "fsdp2", "train.ema={decay: 0.9}")
    steps(trainer, 1)
    assert trainer.ema is not None
    state = [value for values in trainer.optimizer.state.values() for value in values.values() if value.ndim]
    kept = {"weights": trainer.model.parameters(), "optimizer": state, "average": trainer.ema.module.parameters()}
    return {name: share(list(tensors)) for name, tensors in kept.items()}


def share(tensors: list[Tensor]) -> float:
    local = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
    return local / sum(t.numel() for t in tensors)


def goes_on(folder: str, ranks: Ranks) -> dict[str, list[float]]:
    """Losses after a whole state is taken up, by the strategies before and after; 'whole' is without a break."""
    found = {}
    for before in ("ddp", "fsdp2"):
        trainer = build(folder, ranks, before, "train.ema={decay: 0.9}")
        steps(trainer, 4)
        state = [trainer.state_dict()]
        dist.broadcast_object_list(state)
        for after in ("ddp", "fsdp2"):
            resumed = build(folder, ranks, after, "train.ema={decay: 0.9}")
            resumed.load_state_dict(copy.deepcopy(state[0]))
            found[f"{before} {after}"] = steps(resumed, 4)
        found[f"{before} whole"] = steps(trainer, 4)
    return found


def optimizers(folder: str, ranks: Ranks) -> dict[str, Any]:
    """Losses of a few steps under both strategies with every optimizer that may be sharded."""
    recipe = "train.optimizer.lr=1e-3"
    return {
        name: [steps(build(folder, ranks, way, recipe, f"train.optimizer.name={name}"), 4) for way in ("ddp", "fsdp2")]
        for name in OPTIMIZERS
    }


def scales(folder: str, ranks: Ranks) -> list[float]:
    """The loss's scale before and after a step in which one number of the first rank's gradients overflows."""
    trainer = build(folder, ranks, "fsdp2", "train.precision=float16")
    before, unscale = trainer.scaler.get_scale(), trainer.scaler.unscale_
    weight: Any = trainer.model.blocks[0].mlp.fc1.weight

    def overflow(optimizer: torch.optim.Optimizer) -> None:
        if ranks.is_main:
            weight.grad.to_local()[0, 0] = torch.inf
        unscale(optimizer)

    trainer.scaler.unscale_ = overflow
    steps(trainer, 1)
    return [before, trainer.scaler.get_scale()]


def measured(folder: str, ranks: Ranks) -> list[float]:
    """Accuracy on one image, and the loss of a step before and after it."""
    trainer = build(folder, ranks, "fsdp2")
    model: nn.Module = trainer.model
    before = steps(trainer, 1)
    with unsharded(model):
        share = Share(OneImage(), transform=evaluation_transform(model), ranks=ranks, batch_size=2)
        top1 = evaluate(model, share).top1
    return [top1, *before, *steps(trainer, 1)]


CHECKS = (both_strategies, shares, goes_on, optimizers, scales, measured)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank)
    found = {check.__name__: check(folder, ranks) for check in CHECKS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks found in every check above."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "x.yaml").write_text(CONFIG)
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fsdp2_takes_the_steps_of_ddp(found, recipe):
    ddp, fsdp2, difference = found[0]["both_strategies"][recipe]
    assert len(set(ddp)) == NUM_STEPS and fsdp2 == pytest.approx(ddp, rel=1e-5)
    assert difference < 1e-4
    assert found[1]["both_strategies"][recipe][:2] == [ddp, fsdp2]


@pytest.mark.parametrize(
    "recipe", ["plain", "partial reuse, partly frozen", "merging", "linear", "augmented on the device"]
)
def test_two_ranks_take_the_steps_of_one(found, recipe, tmp_path):
    (tmp_path / "x.yaml").write_text(CONFIG)
    alone = steps(build(str(tmp_path), Ranks(), "ddp", *RECIPES[recipe]), NUM_STEPS)
    assert found[0]["both_strategies"][recipe][0] == pytest.approx(alone, rel=1e-5)


def test_each_rank_keeps_half_of_everything(found):
    for rank in found:
        assert rank["shares"] == pytest.approx({"weights": 0.5, "optimizer": 0.5, "average": 0.5}, abs=0.05)


def test_a_whole_state_goes_on_under_either_strategy(found):
    losses = found[0]["goes_on"]
    assert losses["ddp ddp"] == losses["ddp whole"] and losses["fsdp2 fsdp2"] == losses["fsdp2 whole"]
    assert losses["ddp fsdp2"] == pytest.approx(losses["ddp whole"], rel=1e-5)
    assert losses["fsdp2 ddp"] == pytest.approx(losses["fsdp2 whole"], rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_on_parts_as_on_whole_parameters(found, name):
    ddp, fsdp2 = found[0]["optimizers"][name]
    assert len(set(ddp)) == 4 and fsdp2 == pytest.approx(ddp, rel=1e-4 if name == "muon" else 1e-6)


def test_overflow_on_one_rank_halves_the_scale_of_all(found):
    assert found[0]["scales"] == found[1]["scales"] == [65536.0, 32768.0]


def test_a_rank_without_validation_images_waits_for_nothing(found):
    assert found[0]["measured"] == found[1]["measured"]
    _, before, after = found[0]["measured"]
    assert [before, after] == pytest.approx(found[0]["both_strategies"]["plain"][1][:2], rel=1e-6)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.optimizer.name=adafactor", "train.optimizer.name 'adafactor' needs whole parameters: with train.strat"),
        ("train.clip={mode: agc}", "train.clip.mode 'agc' needs whole parameters: use norm or value, or train.strateg"),
    ],
)
def test_what_needs_whole_parameters_is_refused(tmp_path, override, sentence):
    (tmp_path / "x.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=sentence):
        build(str(tmp_path), Ranks(), "fsdp2", override)
    assert steps(build(str(tmp_path), Ranks(), "ddp", override), 1)
