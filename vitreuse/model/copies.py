"""A trained ViT as a model of ours: its shape as keywords, a copy under any plan, or layers around its own modules."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import DropPath, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import nn

from vitreuse.attention import ExactAttention
from vitreuse.model.block import InplaceMlp, LinearBlock, PlanBlock, PlanBlocks
from vitreuse.model.class_names import name_classes, names_of
from vitreuse.model.preprocessing import PREPROCESSING
from vitreuse.model.registry import SIZES, variant_of
from vitreuse.model.vit import PlanVisionTransformer
from vitreuse.plan import EXACT, Plan, Spec

NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm"}  # timm's names of classes, as of the next
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}
KINDS = {"": (Block, PlanBlock), "attn": (TimmAttention, ExactAttention), "mlp": (Mlp, InplaceMlp)}  # of a layer
IDLE = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # in inference
SUPPORTED = "vit, deit, deit3, clip and dino models of timm can, and ours with exact layers"


def exact_copy(model: Any) -> Any:
    """A trained ViT as a model of ours with exact attention in all layers and equal outputs, in evaluation mode.

    Raises:
        ValueError: It is no ViT of timm or ours, or has parts that a model with a plan lacks.
    """
    copy = untrained_copy(model, f"exact*{len(layers_of(model))}").eval()
    own, given = copy.state_dict(), model.state_dict()
    odd = [key for key in {**own, **given} if key not in own or key not in given or own[key].shape != given[key].shape]
    if odd:
        raise _unsupported(model, f"has a {odd[0]} of its own")
    copy.load_state_dict(given)
    _check_parts(model, copy)
    difference = _difference(copy, model)
    if not difference < torch.finfo(next(model.parameters()).dtype).eps ** 0.5:  # sums in another order
        raise _unsupported(model, f"makes something else of the same weights, {difference:.1g} of its largest output")
    return copy


def untrained_copy(model: Any, plan: str | Plan, **options: Any) -> Any:
    """A model of ours of the shape of a ViT, with its preprocessing, device and dtype, a plan, and random weights.

    Args:
        model: One of timm's or ours.
        plan: One spec per layer.
        options: Further keywords, such as lowrank_sharing.

    Raises:
        ValueError: It is no ViT of timm or ours, or the plan does not suit it.
    """
    name, keywords = read_keywords(model)
    images = getattr(model, "pretrained_cfg", None) or {}
    overlay = {key: images[key] for key in PREPROCESSING if images.get(key) is not None}
    made = timm.create_model(name, plan=str(plan), pretrained_cfg_overlay=overlay, **keywords, **options)
    name_classes(made, names_of(model))
    return made.to(next(model.parameters()))


def adopted_layers(model: Any, spec: Spec = EXACT, grid: tuple[int, int] | None = None) -> PlanBlocks:
    """Layers of ours, all under one spec, around the submodules of a ViT whose layers are exact: nothing is copied.

    Args:
        model: One of timm's or ours.
        spec: Of a kind of layer that has timm's submodules and computes its map; token projections are uninitialised.
        grid: The (rows, columns) of patches that the layers are built for, the model's own when None.

    Raises:
        ValueError: A layer is not a standard one.
    """
    for block in model.blocks:
        attn = block.attn
        if type(block) not in KINDS[""] or type(attn) not in KINDS["attn"]:
            raise ValueError(
                f"layers of {type(block).__name__} around {type(attn).__name__} have no plan: use a model of timm's "
                "Block and Attention, as vit, deit and deit3 are."
            )
        if getattr(attn, "gate", None) is not None or attn.proj.in_features != attn.qkv.in_features:
            raise ValueError("attention that is gated, or not as wide as its tokens, has no plan: use a standard ViT.")
    attn, depth, given = model.blocks[0].attn, len(model.blocks), next(model.parameters())
    trunk = {"depth": depth, "embed_dim": attn.proj.in_features, "num_heads": attn.num_heads, "class_token": False}
    size = {"img_size": grid or model.patch_embed.grid_size, "patch_size": 1, "reg_tokens": model.num_prefix_tokens}
    ours = PlanVisionTransformer(plan=f"{spec}*{depth}", **trunk, **size, global_pool="avg", device="meta")
    layers: Any = ours.blocks
    for layer, block in zip(layers, model.blocks, strict=True):
        layer.attn.scale = block.attn.scale  # 1 where fold has put it into the weights
        for name, projection in layer.attn.named_parameters(recurse=False):
            setattr(layer.attn, name, nn.Parameter(given.new_empty(projection.shape)))
        for own, found in ((layer, block), (layer.attn, block.attn), (layer.mlp, block.mlp)):
            for name, module in found.named_children():
                if name not in ("attn", "mlp"):
                    setattr(own, name, module)
        if type(block.mlp) not in KINDS["mlp"]:
            layer.mlp = block.mlp
    return layers


def read_keywords(model: Any) -> tuple[str, dict[str, Any]]:
    """The name of one of ours, and the keywords that make it the shape of a ViT where its own shape is another.

    Raises:
        ValueError: It is no ViT of timm or ours, or its layers are not exact.
    """
    layers_of(model)
    name = _name(model)
    usual, found = _usual_shape(name), _shape(model)
    different = {key: value for key, value in found.items() if value != usual[key]}
    if "global_pool" in different:
        different["fc_norm"] = found["fc_norm"]  # which timm else derives from it
    return name, different


def layers_of(model: Any) -> list[Any]:
    """The layers of a ViT that is exact: with full attention, all tokens and all hidden units in every layer.

    Raises:
        ValueError: It is no such model.
    """
    if not isinstance(model, VisionTransformer):
        raise _unsupported(model, "is no VisionTransformer of timm")
    if model.attn_pool is not None:
        raise _unsupported(model, f"pools by attention (global_pool={model.global_pool!r})")
    if type(model.patch_embed) is not PatchEmbed:
        raise _unsupported(model, f"embeds patches by a {type(model.patch_embed).__name__}")
    layers: list[Any] = list(model.blocks)
    for number, layer in enumerate(layers):
        if isinstance(layer, (PlanBlock, LinearBlock)) and layer.spec != EXACT:
            raise ValueError(
                f"layer {number} is '{layer.spec}' already: give the model with exact attention, all tokens and all "
                "hidden units in every layer."
            )
        for name, kinds in KINDS.items():
            part = layer.get_submodule(name)
            if type(part) not in kinds:
                raise _unsupported(model, f"has a {type(part).__name__} in layer {number}")
    return layers


def _name(model: Any) -> str:
    """Our variant of the model's own name, else of the family and size that it is nearest to."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    try:
        return variant_of(architecture)
    except ValueError:
        size = next((size for size, shape in SIZES.items() if shape["embed_dim"] >= model.embed_dim), "large")
    if isinstance(model, VisionTransformerDistilled):
        return f"deit_reuse_{'base' if size == 'large' else size}_distilled_patch16_224"
    return f"vit_reuse_{size}_patch16_224"


@cache
def _usual_shape(name: str) -> dict[str, Any]:
    """The shape of the model that a name of ours makes without keywords."""
    with torch.device("meta"):
        return _shape(timm.create_model(name, plan="exact*" + str(_depth(name))))


def _depth(name: str) -> int:
    return next(shape["depth"] for size, shape in SIZES.items() if f"_{size}_" in name)


def _shape(model: Any) -> dict[str, Any]:
    """timm's keywords for what a ViT has."""
    block, patches, attn = model.blocks[0], model.patch_embed, model.blocks[0].attn
    return {
        "img_size": list(patches.img_size),
        "patch_size": list(patches.patch_size),
        "in_chans": patches.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": _is_there(attn.q_norm),
        "scale_attn_norm": _is_there(attn.norm),
        "scale_mlp_norm": _is_there(block.mlp.norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pre_norm": _is_there(model.norm_pre),
        "final_norm": _is_there(model.norm) or _is_there(model.fc_norm),
        "fc_norm": _is_there(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patches.dynamic_img_pad,
        "norm_layer": NORMS.get(type(block.norm1).__name__, "layernorm"),
        "norm_eps": block.norm1.eps,
        "act_layer": ACTIVATIONS.get(type(block.mlp.act).__name__, "gelu"),
    }


def _ratio(hidden: int, dim: int) -> float:
    """The ratio of which timm makes so many hidden units, rounding down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _is_there(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _check_parts(model: nn.Module, copy: nn.Module) -> None:
    """Compares what no weight shows: activations, and what norms add to a variance."""
    given, own = _parts(model), _parts(copy)
    for name in {**given, **own}:
        if given.get(name) != own.get(name):
            raise _unsupported(model, f"has {name} = {given.get(name)} where ours would have {own.get(name)}")


def _parts(model: nn.Module) -> dict[str, str]:
    """The kind of each module without modules in it that does something in inference; the epsilon of a norm."""
    leaves = {name: part for name, part in model.named_modules() if not any(part.children())}
    return {
        name: f"{type(part).__name__}(eps={part.eps})" if hasattr(part, "eps") else type(part).__name__
        for name, part in leaves.items()
        if not isinstance(part, IDLE)
    }


@torch.no_grad()
def _difference(copy: Any, model: Any) -> float:
    """Largest difference of the outputs for a random image, as a part of the largest output."""
    size = (1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    was_training = model.training
    expected, found = model.eval()(images), copy(images)
    model.train(was_training)
    return float((found - expected).abs().max() / expected.abs().max())


def _unsupported(model: Any, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot take a plan, since it {reason}: {SUPPORTED}.")
