"""What training needs of its processes beside eval.distributed: averaged gradients, and a signal that stops all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eval.distributed import Ranks


def replicated(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the ranks; itself where there is one rank."""
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers are constants here; exchanging them would tie the ranks' numbers of forward passes together.
    return DistributedDataParallel(model, device_ids=device_ids, forward_sync_buffers=False)


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
