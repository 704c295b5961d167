"""The weights of a plain ViT by the keys and shapes of a plan.

A layer keeps timm's keys except that a reuse layer has no queries and keys for the heads it reuses (``attn.v``, and
``attn.qk`` for the others), a none layer no attention at all, one of no hidden units no MLP, and linear and skipped
layers neither. Of an MLP with fewer hidden units than the checkpoint's, those stay that are named, else the largest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitreuse.attention import ReuseAttention
from vitreuse.plan import Spec

Units = Mapping[int, Sequence[int]]  # by layer the hidden units of its MLP that stay
TOKEN_PROJECTIONS = ("key_proj", "value_proj")
ADDED = (*TOKEN_PROJECTIONS, ".linear.weight", ".linear.bias")  # what a plan adds to a plain checkpoint, by its end
# Of the entries of an MLP the dimension that numbers its hidden units.
UNITS_OF = {"mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.norm.weight": 0, "mlp.norm.bias": 0, "mlp.fc2.weight": 1}


def in_plan(state: Mapping[str, Tensor], model: Any, units: Units | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict by the keys of a model's plan, and what the plan has no use for.

    Raises:
        ValueError: A layer keeps more hidden units than there are, or units are named that are not as many of its own.
    """
    units = units or {}
    _check_units(units, model, state)
    chosen = {layer: _kept_units(block, layer, state, units.get(layer)) for layer, block in enumerate(model.blocks)}
    adapted: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, value in state.items():
        layer, name = split_key(key)
        if layer is None or layer >= len(model.blocks):
            adapted[key] = value
            continue
        kept_units, dim = chosen[layer], UNITS_OF.get(name)
        cut = value if kept_units is None or dim is None else value.index_select(dim, kept_units.to(value.device))
        kept = _layer_entries(model.blocks[layer], name, cut)
        adapted.update({f"blocks.{layer}.{new_name}": part for new_name, part in kept.items()})
        if name not in kept:
            dropped.append(key if not kept else f"{key} (all but {', '.join(sorted(kept))})")
        elif kept[name].shape != value.shape:
            dropped.append(f"{key} (all but {model.blocks[layer].spec.hidden} units)")
    return adapted, dropped


def split_key(key: str) -> tuple[Any, str]:
    """Layer index and name within the layer; None for a key outside the layers."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    return (int(match[1]), match[2]) if match else (None, key)


def refuse_more_units(layer: int, spec: Spec, num_units: int) -> None:
    """Raises ValueError where a layer has more hidden units than there are trained ones for it."""
    if (spec.hidden or 0) > num_units:
        raise ValueError(
            f"layer {layer} is '{spec}', and trained are {num_units} hidden units for it: give /{num_units} or less, "
            "or train the plan from nothing."
        )


def _check_units(units: Units, model: Any, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless each layer of which units are named keeps so many of those that it has."""
    for layer, named in units.items():
        if layer not in range(len(model.blocks)):
            raise ValueError(f"units of layer {layer} are named, the model's layers are 0 to {len(model.blocks) - 1}.")
        spec = model.blocks[layer].spec
        if not spec.hidden:
            raise ValueError(f"units of layer {layer} are named, which is '{spec}' and chooses none: leave them out.")
        num_units = len(state.get(f"blocks.{layer}.mlp.fc1.weight", range(spec.hidden)))
        wanted = f"layer {layer} is '{spec}' and keeps {spec.hidden} different units of 0 to {num_units - 1}"
        if len(named) != spec.hidden:
            raise ValueError(f"{wanted}, and {len(named)} are named.")
        for place, unit in enumerate(named):
            if unit in named[:place] or not 0 <= unit < num_units:
                how = "named twice" if unit in named[:place] else "none of them"
                raise ValueError(f"{wanted}, and {unit} is {how}.")


def _kept_units(block: Any, layer: int, state: Mapping[str, Tensor], named: Sequence[int] | None) -> Tensor | None:
    """The hidden units that a layer keeps of a checkpoint, by default those of largest norm of fc1's row times norm of
    fc2's column, of equals the first, in their order; None where it keeps all.

    Raises:
        ValueError: The checkpoint has too few.
    """
    num_kept = block.spec.hidden
    rows, columns = (state.get(f"blocks.{layer}.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if not num_kept or rows is None or columns is None or columns.shape[1:] != rows.shape[:1]:
        return None  # nothing to choose, or what the model refuses
    refuse_more_units(layer, block.spec, len(rows))
    if named is not None:
        return torch.tensor(named)
    if num_kept == len(rows):
        return None
    norms = rows.float().norm(dim=1) * columns.float().norm(dim=0)
    return norms.sort(descending=True, stable=True).indices[:num_kept].sort().values


def _layer_entries(block: Any, name: str, value: Tensor) -> dict[str, Tensor]:
    """What a layer keeps of one entry of its plain checkpoint, by its own names."""
    attn = block.attn
    if not block.has_attention and name.startswith(("norm1.", "attn.", "ls1.")):
        return {}
    if not block.has_mlp and name.startswith(("norm2.", "mlp.", "ls2.")):
        return {}
    if isinstance(attn, ReuseAttention):
        if name.startswith("attn.qkv."):
            return _reuse_entries(attn, name.removeprefix("attn.qkv."), value)
        if attn.qk is None and name.startswith(("attn.q_norm.", "attn.k_norm.")):
            return {}
    return {name: value}


def _reuse_entries(attn: ReuseAttention, name: str, value: Tensor) -> dict[str, Tensor]:
    """The rows of a fused projection that a reuse layer has: its own heads' q and k, and all of v."""
    q, k, v = value.chunk(3)
    entries = {f"attn.v.{name}": v}
    if attn.qk is not None:
        first_own = attn.num_reused_heads * attn.head_dim
        entries[f"attn.qk.{name}"] = torch.cat([q[first_own:], k[first_own:]])
    return entries
