"""What training needs of its processes beside eval.distributed: one model for all, a signal that stops all, deaths."""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from eval.distributed import Ranks


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the ranks; itself where there is one rank."""
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers are constants here; exchanging them would tie the ranks' numbers of forward passes together.
    return DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False)


def shard(model: Any, ranks: Ranks) -> None:
    """Lets each rank keep its part of every parameter of a ViT, by FSDP2, layer by layer.

    A layer's parameters are gathered once a step and kept for its backward pass: a reuse layer reads the token
    projection of the layer before it.
    """
    # A carried token projection is a view, and nothing is written into it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Accumulates gradients in each rank inside the block, without an exchange."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)  # ranks may differ in the number of these passes
        yield
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Holds whole parameters on every rank inside the block, where a forward pass then exchanges nothing."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, and the optimizer's state by parameter name, whole and on the CPU; of sharded ones on the main rank.

    All ranks call this together.
    """
    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(
    model: nn.Module, optimizer: Optimizer, weights: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Takes up what full_state gave, under this or another number of ranks, sharded or not."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state, options=options)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a part; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lost_process(error: RuntimeError) -> str | None:
    """The sentence for a process that this one waited for in vain; None for any other error.

    torch has no type for most of them: the texts are those of its DataLoader and of gloo's transport.
    """
    reason = str(error).partition("\n")[0].partition(". ")[0]
    if reason.startswith("DataLoader worker (pid"):
        return f"{reason}: run it again to go on, with a smaller data.num_workers if memory was short."
    if isinstance(error, dist.DistError) or "/gloo/" in reason:
        reason = re.sub(r"^\[.*?\] ", "", reason)  # where in gloo's sources
        return f"another rank does not answer ({reason}): run it again to go on."
    return None


class StopSignal:
    """Remembers a SIGTERM, SIGINT or SIGUSR1 instead of dying of it, so that the step in hand can be finished."""

    def __init__(self):
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Catches the three signals inside the block."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        previous = [signal.signal(number, self._remember) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.received = True
