"""Which way of computing attention each layer of a model takes under given conditions, said without running it.

The layers are asked, which ask attention/policy.py as they do when the model runs: for the tokens that the model is
built for and without a mask.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from timm.layers.config import set_fused_attn, use_fused_attn

from vitreuse.attention import Attention
from vitreuse.attention.policy import READS_MAP, Conditions, Way

MAX_REASONS = 2  # of one way, each said


def layer_backends(model: Any, conditions: Conditions) -> list[Way | None]:
    """The way of each layer; None where a layer has no attention, or one of another package's."""
    found: list[Way | None] = []
    for layer, block in enumerate(model.blocks):
        attn, anchor = block.attn, model.plan.anchors[layer]
        handed = None if anchor is None else found[anchor]
        if not block.has_attention or not isinstance(attn, Attention):
            found.append(None)
        elif handed is not None and handed.carried == "map":
            found.append(READS_MAP)
        else:
            reads_rows = model.reads_class_rows and layer == len(model.blocks) - 1
            found.append(attn.way(conditions, model.num_class_rows if reads_rows else None))
    return found


def summary(model: Any, conditions: Conditions) -> str:
    """The ways that occur in a model, such as "map + blocked"."""
    layers = [layer for layer in layer_backends(model, conditions) if layer is not None]
    words = ["qk"] * any(layer.carried == "qk" for layer in layers) + [layer.kernel for layer in layers]
    return " + ".join(dict.fromkeys(words)) or "none"


def sentence(model: Any, conditions: Conditions) -> str:
    """One line for a log: what was chosen and why, costs in nanoseconds per head, query and key."""
    name = str(conditions.dtype).removeprefix("torch.")
    parts = _grouped([layer for layer in layer_backends(model, conditions) if layer is not None])
    mode = "training" if conditions.training else "inference"
    return f"attention on {conditions.device.type} in {name}, {mode}: {', '.join(parts) or 'none'}"


def _grouped(layers: Sequence[Way]) -> list[str]:
    """What is carried, what computes the other layers, and how they are told sizes, each with the number of layers and
    the reason."""
    names = {"map": "map", "qk": "(q, k)"}
    carried = [(names[layer.carried], layer.why_carried) for layer in layers if layer.carried is not None]
    kernels = [(layer.kernel, layer.why) for layer in layers if layer.kernel != "map"]
    sizes = [(f"sizes by a {layer.sizes}", layer.why_sizes) for layer in layers if layer.sizes is not None]
    texts = [f"{way} carried by {_counted(count, 'anchor')} ({why})" for way, why, count in _with_reasons(carried)]
    others = [*_with_reasons(kernels), *_with_reasons(sizes)]
    return texts + [f"{way} in {_counted(count, 'layer')} ({why})" for way, why, count in others]


def _with_reasons(ways: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Each way with its reason and its number of layers; of many reasons, as where tokens merge, the first and last."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for way, why in ways:
        reasons[way][why] += 1
    found = []
    for way, counts in reasons.items():
        if len(counts) > MAX_REASONS:
            first, *_, last = counts
            found.append((way, f"{first} in the first, {last} in the last", counts.total()))
        else:
            found += [(way, why, count) for why, count in counts.items()]
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    """timm's choice of attention for the models made inside: it is read at construction, and is global."""
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enabled)
    try:
        yield
    finally:
        set_fused_attn(*before)
