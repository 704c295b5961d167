"""The processes that torchrun started: who this one is, what they add up and hand each other, and how all end alike."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vitreuse.config import ConfigError
from vitreuse.io.process import OtherRankError, choose_device

# A rank may wait for one that compiles, reads a cold disk or has the larger images, for longer than torch's 10 minutes.
TIME_OUT_MINUTES = 30.0
SETTLE_S = 0.05  # a thousand times what freeing them takes
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; alone by default.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        local_rank: Its number on this machine.
        device: Where it computes.
        store: Where they meet, and leave each other words; None of a process alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = CPU
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value on every rank; whatever others give is not looked at.

        Tensors in it, which are on the CPU, go one by one, and the rest before them.
        """
        if self.world_size == 1:
            return value
        known = [tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value) if self.is_main else None]
        dist.broadcast_object_list(known)
        if not self.is_main:
            value = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), known[0])
        return tree_map_only(Tensor, _broadcast, value)

    def settle(self) -> None:
        """Lets what the last collective has begun come to its end, before processes are forked.

        gloo's threads free the tensors that it has sent, and become threads of Python for a moment to do so. A process
        that is forked at that moment never starts under Python 3.11 and older, about one in some thousand forks, and a
        loader would wait for its worker for ever.
        """
        if self.world_size > 1:
            time.sleep(SETTLE_S)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends every rank if one meets an error inside the block, which must hold no sum and no gather.

        The first rank that met an error raises it, and so prints it; the others raise OtherRankError, which is not
        printed. So a sentence is printed once however many ranks meet it, and none waits for a rank that is gone. An
        error outside such a block is printed by every rank that meets it: none is ever lost.

        Raises:
            ValueError, OSError: What this rank met, as the first.
            OtherRankError: What another met.
        """
        own: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            own = error
        met = self.gather(None if own is None else str(own))
        first = next((rank for rank, text in enumerate(met) if text is not None), None)
        if own is not None and first == self.rank:
            raise own
        if first is not None:
            raise OtherRankError(met[first])


def _broadcast(tensor: Tensor) -> Tensor:
    """The main rank's tensor, where the others have one of its shape."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor.view(-1).view(torch.uint8), 0)  # bytes: gloo does not know every type
    return tensor


@contextmanager
def joined(device_name: str, time_out_minutes: float = TIME_OUT_MINUTES) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    After an error they are not parted: over NCCL that waits for the others, which may wait for this one.

    Args:
        device_name: auto, cpu or cuda.
        time_out_minutes: How long a rank waits for the others before it gives up.

    Raises:
        ConfigError: cuda is asked for and there is none, or more ranks than devices.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size, store = int(os.environ.get("WORLD_SIZE", "1")), None
    if world_size > 1:
        time_out = timedelta(minutes=time_out_minutes)
        backend = "cpu:gloo,cuda:nccl" if device_name != "cpu" and torch.cuda.is_available() else "gloo"
        store, *_ = next(dist.rendezvous("env://", timeout=time_out))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=time_out)
    ranks = Ranks(rank, world_size, local_rank, store=store)
    with ranks.together():
        device = _own_device(device_name, local_rank)
    yield replace(ranks, device=device)
    if world_size > 1:
        dist.destroy_process_group()


def _own_device(name: str, local_rank: int) -> torch.device:
    device = choose_device(name)
    if device.type != "cuda":
        return device
    num_devices = torch.cuda.device_count()
    if num_devices <= local_rank:
        raise ConfigError(
            f"this machine has {num_devices} CUDA devices, none for its rank {local_rank}: "
            "start no more ranks than devices, or use the device cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
