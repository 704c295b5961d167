"""Checkpoints of plain ViTs loaded into a plan: what the plan has no use for is dropped, what it adds is new."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import vision_transformer as timm_vit
from timm.models._input import get_pretrained_grid_size
from torch import Tensor, nn

from vitreuse.attention import LowRankAttention
from vitreuse.attention.lowrank import at_grid, kernel_size
from vitreuse.io.checkpoint_file import Weights, as_weights, read_weights
from vitreuse.model.plan_weights import ADDED, TOKEN_PROJECTIONS, Units, in_plan, split_key

Grid = tuple[int, int]
HEADS = ("head.", "head_dist.")
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
# What every input passes through; of all else, such as a decoder, a model without it computes the same.
BODY = re.compile(
    r"(blocks|patch_embed|norm|norm_pre|fc_norm|attn_pool)\.|(pos_embed|cls_token|dist_token|reg_token|key_proj)$"
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What loading a checkpoint did.

    Attributes:
        new: Keys that stayed as initialised.
        dropped: Keys or rows that the model has no use for.
        source_grid: The (rows, columns) of patches that position embeddings and token projections were read as; None
            where the checkpoint has none of them.
        is_grid_guessed: Whether nothing says so but their number: give img_size where it is wrong.
    """

    new: tuple[str, ...]
    dropped: tuple[str, ...]
    source_grid: Grid | None = None
    is_grid_guessed: bool = False

    def said(self, model: Any) -> list[str]:
        """What a user should know about the loading, each point in a few words."""
        parts = []
        if self.new:
            parts.append(f"new: {_listed(self.new)}")
        if self.dropped:
            parts.append(f"left out: {_listed(self.dropped)}")
        if self.source_grid is not None:
            (rows, columns), own = self.source_grid, model.patch_embed.grid_size
            grid = f"{rows} x {columns} patches" + (", a guess by their number" if self.is_grid_guessed else "")
            if own != self.source_grid:
                parts.append(f"resampled to {own[0]} x {own[1]} from {grid}")
            elif self.is_grid_guessed and rows != columns:
                parts.append(f"taken to be of {grid}")
        return parts


def _listed(keys: tuple[str, ...]) -> str:
    """The first keys by name, and how many more there are."""
    rest = len(keys) - 2
    return ", ".join(keys[:2]) + (f" and {rest} more" if rest > 0 else "")


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any] | Weights,
    img_size: int | tuple[int, int] | None = None,
    units: Units | None = None,
) -> LoadReport:
    """Loads a checkpoint of a plain ViT, or of the same plan, into a model of ours, or of timm.

    Position embeddings, patch embeddings and token projections of another resolution are resampled. Weights by the
    names of timm, DeiT, DINO, MoCo, MAE, Hugging Face transformers and whatever else timm converts are known, with the
    prefixes that training puts before them. A checkpoint without a head leaves the model's as it is.

    Args:
        model: A ViT of ours or of timm; any other model of timm takes its own weights alone.
        checkpoint: A file, or what one holds; nothing in a file is run.
        img_size: The side, or (rows, columns), of the images in pixels that the checkpoint was trained at, where
            neither it nor the model's pretrained_cfg says so. Else patches that are as many as the model's are taken
            to lie as the model's do, and any others in a square.
        units: By layer, the hidden units of the checkpoint that stay where the plan has fewer, in the order in which
            they are to stand; of layers without, those of largest norm of fc1's row times norm of fc2's column stay.

    Raises:
        ValueError: The file holds no weights, a key is missing that the plan does not add, is unknown, or has another
            shape; the number of patches is no square, or not that of img_size; or units are not those of a layer.
    """
    weights = as_weights(checkpoint) if isinstance(checkpoint, (Mapping, Weights)) else read_weights(checkpoint)
    if units and not hasattr(model, "plan"):
        raise ValueError(f"units are of layers of a plan, {type(model).__name__} has none: leave them out.")
    if not isinstance(model, timm_vit.VisionTransformer):
        load_exactly(model, weights.state)
        return LoadReport((), weights.left_out)
    if img_size is not None:
        if not isinstance(img_size, int) and len(img_size) != 2:
            raise ValueError(f"img_size {tuple(img_size)} is no size of an image: give the side, or (rows, columns).")
        weights = weights._replace(img_size=(img_size, img_size) if isinstance(img_size, int) else tuple(img_size))
    adapted, dropped, source = adapt_state_dict(weights, model, img_size is not None, units)
    own = model.state_dict()
    _refuse_other_model(adapted, own)
    nn.Module.load_state_dict(model, adapted, strict=False)  # by the plan's keys already
    new = tuple(key for key in own if key not in adapted)
    return LoadReport(new, tuple(dropped), source and source.grid, source is not None and source.is_guessed)


def _refuse_other_model(adapted: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless weights have the keys and shapes of a model, but for token projections and heads."""
    headless = tuple(head for head in HEADS if not any(key.startswith(head) for key in adapted))
    optional = [key for key in own if key.endswith(ADDED) or key.startswith(headless)]
    missing = [key for key in own if key not in adapted and key not in optional]
    unknown = [key for key in adapted if key not in own]
    if missing or unknown:
        what = f"no {missing[0]}" if missing else f"a {unknown[0]} that the model lacks"
        raise ValueError(
            f"the checkpoint has {what} ({len(missing)} keys missing, {len(unknown)} unknown): "
            "it is of another model; create the model that it was trained as, with the plan you want."
        )
    for key, value in adapted.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{key} is {tuple(value.shape)} in the checkpoint and {tuple(own[key].shape)} in the model: "
                f"create the model with the checkpoint's sizes (num_classes, in_chans, embed_dim{_of_units(key)})."
            )


def _of_units(key: str) -> str:
    """What else an entry depends on, where it has hidden units."""
    return ", mlp_ratio, /hidden in the plan" if ".mlp." in key else ""


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills a model with weights of its own keys and shapes.

    Raises:
        ValueError: They are another model's; it says the first key that does not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch's second line names all keys that are missing, or not expected
        reason = str(error).splitlines()[1].strip().rstrip(".")
        first = re.match(r'[^"]*"[^"]*"', reason) if reason.count('"') > 2 else None
        raise ValueError(f"{first[0] if first else reason}; give the model that it was trained as.") from error


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for pretrained weights, which it looks for in the module of the model's class too."""
    adapted, dropped, _ = adapt_state_dict(as_weights(state_dict), model)
    _log_dropped(dropped)
    return adapted


def in_plan_for_timm(state_dict: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """A plain state dict that load_state_dict takes, with the model's own new token projections; any other as it is.

    timm loads a checkpoint_path by load_state_dict alone. What a plain checkpoint has no weights for, and what the plan
    leaves out of it, is logged.
    """
    own = model.state_dict()
    if _shapes(state_dict) == _shapes(own):
        return state_dict
    adapted, dropped = in_plan(state_dict, model)
    new = [key for key in own if key.endswith(ADDED) and key not in adapted]
    if new and "patch_embed.proj.weight" in adapted:
        _logger.warning("new, since the checkpoint is of a plain ViT: %s", _listed(tuple(new)))
        adapted |= {key: own[key] for key in new}
    _log_dropped(dropped)
    return adapted


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each entry; None of what is no tensor, which a module may keep too."""
    return {key: getattr(value, "shape", None) for key, value in state_dict.items()}


def _log_dropped(dropped: list[str]) -> None:
    if dropped:
        _logger.warning("left out, since the model has no use for it: %s", _listed(tuple(dropped)))


class _Source(NamedTuple):
    """The grid of patches that a checkpoint is of, and whether nothing but their number says so."""

    grid: Grid
    is_guessed: bool


def adapt_state_dict(
    weights: Weights, model: Any, is_size_certain: bool = False, units: Units | None = None
) -> tuple[dict[str, Tensor], list[str], _Source | None]:
    """A checkpoint with the keys and shapes of a ViT and its plan, what was dropped of it, and the grid that it is of.

    Raises:
        ValueError: The grid cannot be known, or is not that of a size which is certain.
    """
    own = model.state_dict()
    source = _source(weights, model, is_size_certain)
    plain = _plain(weights.state, model, own, source)
    foreign = [key for key in plain if key not in own and not BODY.match(key)]
    kept = {key: value for key, value in plain.items() if key not in foreign}
    dropped = [*weights.left_out, *foreign, *["mask_token"] * ("mask_token" in weights.state)]
    if not hasattr(model, "plan"):
        return kept, dropped, source
    resampled = {
        key: _resampled(value, key, model, source) if key.endswith(TOKEN_PROJECTIONS) else value
        for key, value in kept.items()
    }
    adapted, of_plan = in_plan(resampled, model, units)
    return adapted, [*of_plan, *dropped], source


def _plain(state: Mapping[str, Tensor], model: Any, own: Mapping[str, Tensor], source: _Source | None) -> Any:
    """A checkpoint as timm converts it for a ViT, its position embeddings read as of the source's grid."""
    state, as_is = dict(state), {}
    tokens = {"reg_token" if key == "register_tokens" else key for key in state}
    if source is not None and any((key in tokens) != (key in own) for key in PREFIX_TOKENS):
        as_is["pos_embed"] = state.pop("pos_embed")  # of another kind of model, which timm would resample to pieces
    known = copy.copy(model)  # timm reads the source's size off the model
    patch_size = _patch_size(state)
    if source is not None and patch_size is not None:
        size = [patches * side for patches, side in zip(source.grid, patch_size, strict=True)]
        known.pretrained_model_args = {**getattr(model, "pretrained_model_args", {}), "img_size": size}
    return {**timm_vit.checkpoint_filter_fn(state, known, adapt_layer_scale=True), **as_is}


def _patch_size(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Pixels of a patch in a checkpoint; None where its weights do not show them."""
    weight = state.get("patch_embed.proj.weight")
    return None if weight is None or weight.ndim != 4 else tuple(weight.shape[-2:])


def _resampled(projection: Tensor, key: str, model: Any, source: _Source | None) -> Tensor:
    """A token projection at the model's grid, unchanged where the model has no such projection."""
    attn = _projecting(model, key)
    if attn is None or source is None:
        return projection
    kernel = kernel_size(attn.num_prefix_tokens + attn.grid[0] * attn.grid[1], attn.projected_dim)
    old_grid = attn.grid if attn.kind == "conv" and projection.shape[-1] == kernel else source.grid
    resampled = at_grid(projection, attn.kind, old_grid, attn.grid, attn.num_prefix_tokens, attn.projected_dim)
    assert resampled is not None
    return resampled


def _projecting(model: Any, key: str) -> LowRankAttention | None:
    """The low-rank layer that a token projection is of, the first one of the model's own projection."""
    layer, _ = split_key(key)
    blocks = model.blocks if layer is None else model.blocks[layer : layer + 1]
    return next((block.attn for block in blocks if isinstance(block.attn, LowRankAttention)), None)


def _source(weights: Weights, model: Any, is_size_certain: bool) -> _Source | None:
    """The grid that a checkpoint is of: by the size that the caller or the file says, by the pretrained config where
    it has so many patches, as timm has it, else the model's own or a square. None where no weight depends on it."""
    num_patches = _num_patches(weights.state, model)
    if num_patches is None:
        return None
    patch_size = _patch_size(weights.state)
    if weights.img_size is not None and patch_size is not None:
        rows, columns = (px // side for px, side in zip(weights.img_size, patch_size, strict=True))
        if rows * columns == num_patches:
            return _Source((rows, columns), False)
        if is_size_certain:
            raise ValueError(
                f"img_size={weights.img_size} makes {rows} x {columns} patches and the checkpoint is of {num_patches}: "
                "give the (rows, columns) in pixels that it was trained at."
            )
    own, side = model.patch_embed.grid_size, math.isqrt(max(num_patches, 0))
    could_be_own = num_patches == own[0] * own[1]
    configured = get_pretrained_grid_size(model, weights.state.get("patch_embed.proj.weight"), num_patches)
    if configured is not None:
        return _Source(configured, could_be_own and configured != own)
    if could_be_own or side * side == num_patches:
        return _Source(own if could_be_own else (side, side), True)
    raise ValueError(
        f"the checkpoint is of {num_patches} patches, which make no square, and the model of {own[0]} x {own[1]}: "
        "give img_size, the (rows, columns) in pixels that it was trained at."
    )


def _num_patches(state: Mapping[str, Tensor], model: Any) -> int | None:
    """How many patches the position embeddings of a checkpoint are for, or else its token projections."""
    if "pos_embed" in state and model.pos_embed is not None:
        if model.no_embed_class:
            return state["pos_embed"].shape[1] - ("register_tokens" in state)  # DINOv2's has one for the class
        return state["pos_embed"].shape[1] - sum(state[key].shape[1] for key in PREFIX_TOKENS if key in state)
    for key, value in state.items() if hasattr(model, "plan") else ():
        attn = _projecting(model, key) if key.endswith(TOKEN_PROJECTIONS) else None
        if attn is not None and attn.kind == "linear":
            return value.shape[-1] - attn.num_prefix_tokens
    return None
