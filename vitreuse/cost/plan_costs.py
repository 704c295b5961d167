"""What a plan costs, as a sum over its layers, the stem and the head.

A layer's cost depends on its own spec, on the patch tokens that it gets, and on how the map is made that it reads, so
that a search can go through the layers one by one. The metrics, all for one image, as whole numbers:
    macs     multiply-adds of the matrix products that the method needs, see count_macs with theoretical
    latency  nanoseconds of inference in batches that fill the device, from the measured costs of attention/costs.py;
             nothing is timed here, so that the same costs give the same answer
    memory   bytes that a training step in float32 keeps for its backward pass; those of inference are no sum, since
             one layer's memory is free again in the next
    bytes    of the weights in a file, in float32
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from itertools import pairwise
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
from vitreuse.plan import EXACT, Plan, Spec
from vitreuse.plan.language import WHOLE

METRICS = {"macs": "MACs", "latency": "latency", "memory": "training memory", "bytes": "bytes of the file"}
COST_CHANNELS = 64  # of a head, at which the costs of attention are measured
LEADS = Spec("exact", merged=1)  # a layer after which tokens have sizes


class PlanCosts:
    """What each layer of a ViT may cost, found by small models when it is asked for.

    All layers between the first and the last cost the same. Whether an anchor hands on its map or (q, k) is decided as
    for two readers. An MLP costs what a layer without attention does. Of a model without classes all rows of the last
    layer count.

    Args:
        model: One of timm's or ours whose layers are exact.
        metric: One of METRICS.
        device: For latency and memory; the model's own by default.
        dtype: For latency.

    Raises:
        ValueError: The model takes no plan, or nothing was measured of latency on this device.
    """

    def __init__(
        self,
        model: Any,
        metric: str = "macs",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.conditions = Conditions(device or next(model.parameters()).device, dtype, training=False)
        self.metric, self.depth = metric, len(model.blocks)
        self.num_patches, self.num_hidden = model.patch_embed.num_patches, model.blocks[0].mlp.fc2.in_features
        self._name, self._keywords = read_keywords(model)
        self._reads_all = model.num_classes == 0 and model.global_pool == "token"
        self._patch_size, self._grid = model.patch_embed.patch_size, model.patch_embed.grid_size
        self._of_layer = cache(self._layer)
        self.rest = self._measured((EXACT,) * 3, self.num_patches)[-1]

    def of(self, plan: Plan) -> int:
        """The cost of a whole plan, of parts that are added up layer by layer."""
        total, left = self.rest, plan.patches_left(self.num_patches)
        for layer, (spec, anchor) in enumerate(zip(plan, plan.anchors, strict=True)):
            word, patches = Spec(spec.word, spec.number), left[layer]
            if spec.word in WHOLE:
                total += self.whole(layer, word, patches)
                continue
            read = None if anchor is None else plan[anchor]
            total += self.attention(layer, word, read, patches)
            total += self.merging(layer, patches) if spec.merged else 0
            total += self.mlp(layer, self.num_hidden if spec.hidden is None else spec.hidden, left[layer + 1])
        for anchor in {anchor for anchor in plan.anchors if anchor is not None}:
            total += self.handing_on(anchor, plan[anchor], left[anchor])
        return total

    def of_model(self, model: Any) -> int:
        """The cost of a model as it stands, by itself and not put together from parts."""
        return sum(_MEASURES[self.metric](deepcopy(model), self.conditions))

    def whole(self, layer: int, spec: Spec, patches: int) -> int:
        """The cost of a linear or skipped layer that gets so many patch tokens."""
        return self._at(layer, spec, None, patches)

    def attention(self, layer: int, spec: Spec, anchor: Spec | None, patches: int) -> int:
        """The cost of a layer without its MLP; of reuse under the spec of the layer that makes the map."""
        return self._at(layer, spec, anchor, patches) - self.mlp(layer, self.num_hidden, patches)

    def merging(self, layer: int, patches: int) -> int:
        """What it costs that some of the tokens of a layer merge, beside that its MLP then gets fewer."""
        attending = self.attention(layer, EXACT, None, patches)
        return self._at(layer, LEADS, None, patches) - attending - self.mlp(layer, self.num_hidden, patches - 1)

    def mlp(self, layer: int, hidden: int, patches: int) -> int:
        """The cost of an MLP of so many hidden units, for the patch tokens that are left when it runs."""
        if hidden in (0, self.num_hidden):
            return self._at(layer, Spec("none"), None, patches) if hidden else 0
        few, many = self.num_hidden // 2, self.num_hidden  # whose costs say those of all others, which lie on a line
        half, full = (self._at(layer, Spec("none", hidden=each), None, patches) for each in (few, many))
        return half + round((full - half) * (hidden - few) / (many - few))

    def handing_on(self, layer: int, spec: Spec, patches: int) -> int:
        """What a layer costs more once other layers read its map."""
        maker, reader = _word(spec), Spec("reuse")
        lead = [LEADS] if patches < self.num_patches else [] if layer == 0 else [EXACT]
        costs = self._measured((*lead, maker, reader, reader), patches + (LEADS in lead))
        return costs[len(lead)] - self._at(layer, maker, None, patches)

    def _at(self, layer: int, spec: Spec, anchor: Spec | None, patches: int) -> int:
        read = None if anchor is None else _word(anchor)
        return self._of_layer(layer == 0, layer == self.depth - 1, spec, read, patches)

    def _layer(self, is_first: bool, is_last: bool, spec: Spec, anchor: Spec | None, patches: int) -> int:
        """What a layer costs that gets so many patch tokens, which have sizes where they are not all."""
        is_sized = patches < self.num_patches
        before = [LEADS] if is_sized else [] if is_first or anchor is not None else [EXACT]
        before += [] if anchor is None else [anchor]
        beside = EXACT if anchor is None else spec  # of readers there are two
        plan = (*before, *([] if anchor is None or not is_last else [beside]), spec, *([] if is_last else [beside]))
        place = len(plan) - (1 if is_last else 2)
        return self._measured(plan, patches + is_sized)[place]

    def _measured(self, plan: Sequence[Spec], patches: int) -> list[int]:
        """The costs of the layers of a small model for so many patch tokens, and of its stem and head."""
        rows, columns = self._grid if patches == self.num_patches else (1, patches)
        size = (rows * self._patch_size[0], columns * self._patch_size[1])
        keywords = {**self._keywords, "depth": len(plan), "img_size": size, "weight_init": "skip"}
        with torch.device(self.conditions.device if self.metric == "memory" else "meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a span that covers such a grid
            made: Any = timm.create_model(self._name, plan=str(Plan(tuple(plan))), **keywords)
        if self._reads_all:
            made.global_pool = ""
        return _MEASURES[self.metric](made, self.conditions)


def _word(spec: Spec) -> Spec:
    """A spec without what merges and with all hidden units."""
    return Spec(spec.word, spec.number)


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


@torch.inference_mode(False)  # whatever the caller is in, since what autograd keeps is counted
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


def _weight_bytes(model: Any, _: Conditions) -> list[int]:
    """Bytes of the weights of each layer, then of the rest."""
    totals = [0] * (len(model.blocks) + 1)
    for name, parameter in model.named_parameters():
        totals[_layer_of(name)] += parameter.numel() * parameter.element_size()
    return totals


_MEASURES = {"macs": _macs, "latency": _nanoseconds, "memory": _saved_bytes, "bytes": _weight_bytes}
