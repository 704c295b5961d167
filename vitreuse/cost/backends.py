"""Which way of computing attention each layer of a model takes under given conditions, said without running it.

The layers are asked, which ask attention/policy.py as they do when the model runs: for the tokens that the model is
built for and without a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vitreuse.attention import Attention
from vitreuse.attention.policy import READS_MAP, Conditions, Way


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
    carried = Counter((layer.carried, layer.why_carried) for layer in layers if layer.carried is not None)
    kernels = Counter((layer.kernel, layer.why) for layer in layers if layer.kernel != "map")
    texts = [f"{names[way]} carried by {_counted(count, 'anchor')} ({why})" for (way, why), count in carried.items()]
    texts += [f"{way} in {_counted(count, 'layer')} ({why})" for (way, why), count in kernels.items()]
    sizes = Counter((layer.sizes, layer.why_sizes) for layer in layers if layer.sizes is not None)
    return texts + [f"sizes by a {way} in {_counted(count, 'layer')} ({why})" for (way, why), count in sizes.items()]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
