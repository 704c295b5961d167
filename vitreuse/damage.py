"""What a change of one layer's attention does to a trained model: the error that it makes in the layer's output."""

from __future__ import annotations

from typing import NamedTuple

from vitreuse.plan import Spec


class Change(NamedTuple):
    """One layer under another attention.

    Attributes:
        layer: Which.
        spec: What it becomes.
        anchor: Of a reuse spec the layer that makes the map, else None.
        anchor_spec: How that one makes it: exact, a span or low-rank; else None.
    """

    layer: int
    spec: Spec
    anchor: int | None = None
    anchor_spec: Spec | None = None
