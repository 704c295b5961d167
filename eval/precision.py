"""The precision of products: that of a step's forward pass, and that of an evaluation, where float32 means float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def computed_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Computes products in a precision inside the block, where that is not float32; weights stay as they are."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def evaluated_in(precision: torch.dtype, device: torch.device) -> Iterator[None]:
    """computed_in, with what float32 is left computed without TF32, whatever a run trains with and torch begins with.

    The two switches are the process's: torch begins with that of products off and that of convolutions on.
    """
    switches: Sequence[Any] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        with computed_in(precision, device):
            yield
    finally:
        for switch, was_on in zip(switches, before, strict=True):
            switch.allow_tf32 = was_on
