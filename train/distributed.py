"""The processes of a run: who this one is, what they add up and hand each other, and the signal that stops them all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitreuse.config import ConfigError

# The first step may wait for a rank that compiles or reads a cold disk, for longer than torch's default of 10 minutes.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        local_rank: Its number on this machine.
        device: Where it computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and the progress."""
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

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks; itself where there is one rank."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        # Buffers are constants here; exchanging them would tie the ranks' numbers of forward passes together.
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


@contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Args:
        device_name: auto, cpu or cuda.

    Raises:
        ConfigError: cuda is asked for and there is none, or more ranks than devices.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_devices = torch.cuda.device_count() if device_name != "cpu" else 0
    if device_name == "cuda" and num_devices <= local_rank:
        raise ConfigError(f"train.device is cuda and rank {rank} finds {num_devices} devices: use train.device=cpu.")
    device = torch.device("cuda", local_rank) if num_devices > local_rank else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


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
