"""Models of which each rank keeps a part, by FSDP2; whatever is saved or measured is whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from eval.distributed import Ranks
from vitreuse.config import ConfigError, TrainConfig

# Those of timm's that go on from a whole state and do the same steps on parts as on whole parameters, muon up to its
# bfloat16; others fail on parts or take norms of a part for those of the whole.
OPTIMIZERS = (
    *("adam", "adamw", "adan", "lamb", "laprop", "lars", "lion", "momentum"),
    *("muon", "nadam", "nadamw", "nesterov", "radamw", "rmsprop", "sgd"),
)


def check_shardable(recipe: TrainConfig) -> None:
    """Refuses fsdp2 with an optimizer or a clipping that needs whole parameters."""
    if recipe.strategy != "fsdp2":
        return
    if recipe.optimizer.name not in OPTIMIZERS:
        needs = f"train.optimizer.name {recipe.optimizer.name!r} needs whole parameters"
        raise ConfigError(f"{needs}: with train.strategy fsdp2 use one of {', '.join(OPTIMIZERS)}, or train with ddp.")
    if recipe.clip is not None and recipe.clip.mode == "agc":
        raise ConfigError("train.clip.mode 'agc' needs whole parameters: use norm or value, or train.strategy ddp.")


def shard(model: Any, ranks: Ranks) -> None:
    """Lets each rank keep its part of every parameter, a ViT's layer by layer; it exchanges nothing yet.

    A layer's parameters are gathered once a step and kept for its backward pass: a reuse layer reads the token
    projection of an earlier one.
    """
    # A carried token projection is a view of a parameter, and nothing is written into it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, ranks.device.type)
    for module in (*getattr(model, "blocks", ()), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gradients_kept(replica: nn.Module) -> Iterator[None]:
    """Accumulates gradients in each rank inside the block, without an exchange; ranks may differ in such passes."""
    parts = _parts(replica)
    with replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext():
        for part in parts:
            part.set_requires_gradient_sync(False)
            part.set_reshard_after_backward(False)
        yield
        for part in parts:
            part.set_requires_gradient_sync(True)
            part.set_reshard_after_backward(True)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Holds whole parameters on every rank inside the block, where forward passes then exchange nothing."""
    parts = _parts(model)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a part, by all ranks together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of which each rank has one; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any, ranks: Ranks) -> Any:
    """A state whose tensors are whole and copies on the CPU, which training leaves as they are.

    All ranks call this together; the main rank's alone has tensors.
    """

    def taken(tensor: Tensor) -> Tensor | None:
        tensor = whole(tensor.detach())
        return tensor.to("cpu", copy=True) if ranks.is_main else None

    return tree_map_only(Tensor, taken, state)


def part_like(value: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor, as it has one of ``like``; of anything of another shape, itself."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts_like(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This rank's parts of whole weights, for a model that is sharded or not."""
    own = model.state_dict()
    return {name: part_like(tensor, own[name]) for name, tensor in state.items()}
