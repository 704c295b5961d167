"""What a plan costs, as a sum over its layers, the stem and the head.

A layer's cost depends on its own spec and on how the map is made that it reads, so that a search can go through the
layers one by one. The metrics, all for one image, as whole numbers:
    macs     multiply-adds of the matrix products that the method needs, see count_macs with theoretical
    latency  nanoseconds of inference in batches that fill the device, from the measured costs of attention/costs.py;
             nothing is timed here, so that the same costs give the same answer
    memory   bytes that a training step in float32 keeps for its backward pass; those of inference are no sum, since
             one layer's memory is free again in the next
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitreuse.attention import Attention, ReuseAttention
from vitreuse.attention.costs import cost_at, cost_key, load_costs, load_rates
from vitreuse.attention.policy import Conditions, Way
from vitreuse.attention.tiles import tile_size
from vitreuse.cost.backends import layer_backends
from vitreuse.cost.macs import count_macs
from vitreuse.cost.measure import saved_storages
from vitreuse.model.keywords import read_keywords
from vitreuse.model.preprocessing import example
from vitreuse.plan import Plan, Spec

METRICS = {"macs": "MACs", "latency": "latency", "memory": "training memory"}
COST_CHANNELS = 64  # of a head, at which the costs of attention are measured


@dataclass(frozen=True)
class PlanCosts:
    """What each layer may cost.

    Attributes:
        layers: The cost of each layer under each spec, for reuse under each spec of the layer that makes the map.
        handing_on: For each spec, what a layer under it costs in addition once reuse layers read its map.
        rest: The cost of stem and head.
    """

    layers: Mapping[tuple[int, Spec, Spec | None], int]
    handing_on: Mapping[Spec, int]
    rest: int

    def of(self, plan: Plan) -> int:
        """The cost of a whole plan; compress/search.py adds the same numbers up layer by layer."""
        total = self.rest
        for layer, (spec, anchor) in enumerate(zip(plan, plan.anchors, strict=True)):
            total += self.layers[layer, spec, None if anchor is None else plan[anchor]]
        return total + sum(self.handing_on[plan[anchor]] for anchor in {*plan.anchors} if anchor is not None)


def plan_costs(
    model: Any,
    specs: Sequence[Spec],
    metric: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> PlanCosts:
    """What each layer of a ViT may cost under the specs.

    Models of three layers are enough to measure, since all layers but the first and the last cost the same. Whether an
    anchor hands on its map or (q, k) is decided as for two readers.

    Args:
        model: One of timm's or ours whose layers are exact.
        specs: What a layer may become.
        metric: One of METRICS.
        device: For latency and memory; the model's own by default.
        dtype: For latency.

    Raises:
        ValueError: The model takes no plan, or nothing was measured of latency on this device.
    """
    conditions = Conditions(device or next(model.parameters()).device, dtype, training=False)
    name, keywords = read_keywords(model)
    depth = len(model.blocks)

    def three_costs(first: Spec, other: Spec) -> list[int]:
        """The costs of a first, a middle and a last layer, if there are so many, and of stem and head."""
        plan = Plan((first, other, other)[:depth])
        with torch.device(conditions.device if metric == "memory" else "meta"):
            made = timm.create_model(name, plan=str(plan), **{**keywords, "depth": len(plan)})
        return _MEASURES[metric](made, conditions)

    layers: dict[tuple[int, Spec, Spec | None], int] = {}
    handing_on: dict[Spec, int] = {}
    rest = 0
    for spec in (spec for spec in specs if spec.word != "reuse"):
        *costs, rest = three_costs(spec, spec)
        layers |= {(layer, spec, None): _cost_in(costs, layer, depth) for layer in range(depth)}
    readers = [spec for spec in specs if spec.word == "reuse"]
    for anchor, reader in product((spec for spec in specs if spec.makes_map), readers):
        *costs, _ = three_costs(anchor, reader)
        layers |= {(layer, reader, anchor): _cost_in(costs, layer, depth) for layer in range(1, depth)}
        handing_on[anchor] = costs[0] - layers[0, anchor, None]
    return PlanCosts(layers, handing_on, rest)


def _cost_in(costs: Sequence[int], layer: int, depth: int) -> int:
    """What a layer of the whole model costs, by what a first, a middle and a last one do."""
    return costs[-1] if layer == depth - 1 else costs[min(layer, 1)]


def _macs(model: Any, _: Conditions) -> list[int]:
    """Multiply-adds of each layer, then of the rest."""
    totals = [0] * (len(model.blocks) + 1)
    for part, macs in count_macs(model, theoretical=True).items():
        totals[_layer_of(part)] += macs
    return totals


def _layer_of(part: str) -> int:
    """The layer that a part of count_macs is in, -1 for stem and head."""
    fields = part.split(".")
    return int(fields[1]) if fields[0] == "blocks" else -1


def _nanoseconds(model: Any, conditions: Conditions) -> list[int]:
    """Time of each layer, then of the rest: the products that run, each at its measured rate.

    Raises:
        ValueError: Nothing was measured under these conditions.
    """
    key = cost_key(conditions.device.type, conditions.dtype, training=False)
    costs, rates = load_costs(), load_rates()
    if key not in costs or key not in rates:
        dtype = str(conditions.dtype).removeprefix("torch.")
        tune = f"vitreuse tune --device {conditions.device.type} --dtype {dtype}"
        raise ValueError(f"latency needs measured costs for {key} and there are none of all parts: run {tune}.")
    channels, mlp, linear = zip(*rates[key], strict=True)
    mlp_ns, linear_ns = (float(np.interp(model.embed_dim, channels, rate)) for rate in (mlp, linear))
    totals = [0.0] * (len(model.blocks) + 1)
    ways = layer_backends(model, conditions)
    for part, macs in count_macs(model).items():
        layer, kind = _layer_of(part), part.rpartition(".")[2]
        if kind == "values":  # with the logits and the softmax
            attn, way = model.blocks[layer].attn, ways[layer]
            assert way is not None
            totals[layer] += macs / COST_CHANNELS * _attention_ns(attn, way, cost_at(costs[key], _row_length(attn)))
        elif kind != "logits":
            totals[layer] += macs * (mlp_ns if ".mlp." in part else linear_ns)
    return [round(total) for total in totals]


def _row_length(attn: Attention) -> int:
    """Keys that a query sees at a time: of windows in tiles, those of a tile."""
    if not attn.layout(attn.grid, None).is_tiled:
        return attn.num_keys
    rows, columns = tile_size(attn.grid, attn.width)
    return attn.num_prefix_tokens + (rows + attn.width - 1) * (columns + attn.width - 1)


def _attention_ns(attn: Attention, way: Way, costs: tuple[float, ...]) -> float:
    """Nanoseconds per head, query and key."""
    fused, unfused, make, apply, *of_sizes = costs
    if way.sizes is not None and of_sizes:
        by_bias, by_channel = of_sizes
        fused = by_bias if way.sizes == "bias" else by_channel
    if way.kernel == "map":
        made = attn.own_dim / attn.dim if isinstance(attn, ReuseAttention) else 1.0  # share of the heads
        return made * make + apply
    return fused if way.kernel == "fused" else unfused


def _saved_bytes(model: nn.Module, _: Conditions) -> list[int]:
    """Bytes that a further image of a batch makes autograd keep in each layer, then in the rest; each storage once."""
    few, more = (_saved_by_layer(model, batch_size) for batch_size in (2, 3))  # with one some copies turn into views
    return [of_more - of_few for of_more, of_few in zip(more, few, strict=True)]


def _saved_by_layer(model: Any, batch_size: int) -> list[int]:
    """What a batch makes autograd keep in each layer, then before and after them."""
    images = example(model, batch_size)
    reached: list[int] = []
    with saved_storages() as storages:

        def reach(*_: object) -> None:
            reached.append(sum(storage.nbytes() for storage in storages.values()))

        model.blocks[0].register_forward_pre_hook(reach)
        for block in model.blocks:
            block.register_forward_hook(reach)
        model.train()(images)
        reach()
    grown = [after - before for before, after in pairwise(reached)]
    return [*grown[:-1], reached[0] + grown[-1]]


_MEASURES = {"macs": _macs, "latency": _nanoseconds, "memory": _saved_bytes}
