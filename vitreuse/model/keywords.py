"""The shape of a ViT as a name of ours and keywords, of which timm.create_model makes it under a plan."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import nn

from vitreuse.attention import ExactAttention
from vitreuse.model.block import InplaceMlp, LinearBlock, PlanBlock
from vitreuse.model.registry import SIZES, variant_of
from vitreuse.plan import EXACT

NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm"}  # timm's names of classes, as of the next
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
KINDS = {  # of a layer and its parts
    "": (Block, PlanBlock),
    "attn": (TimmAttention, ExactAttention),
    "mlp": (Mlp, InplaceMlp, SwiGLU, GluMlp),
}
REASONS = {  # what layers of other kinds do that a plan has no word for
    "ParallelScalingBlock": "runs attention and MLP side by side",
    "ParallelThingsBlock": "runs two attentions side by side",
    "ResPostBlock": "has its norms after attention and MLP",
    "DiffAttention": "subtracts one map from another",
    "DiffParallelScalingBlock": "runs attention and MLP side by side",
}


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
        raise unsupported(model, "is no VisionTransformer of timm")
    if type(model.patch_embed) is not PatchEmbed:
        raise unsupported(model, f"embeds patches by a {type(model.patch_embed).__name__}")
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
                kind = type(part).__name__
                does = f", which {REASONS[kind]}" if kind in REASONS else ""
                raise unsupported(model, f"has a {kind} in layer {number}{does}")
        if getattr(layer.attn, "gate", None) is not None:
            raise unsupported(model, f"has a gated attention in layer {number}")
    return layers


def unsupported(model: Any, reason: str) -> ValueError:
    """The refusal of a model that takes no plan."""
    return ValueError(
        f"{architecture(model)} takes no plan, since it {reason}: give a plain ViT of timm (vit, deit, deit3, clip, "
        "siglip, dinov2), or one of ours with exact layers."
    )


def architecture(model: Any) -> str:
    """The name by which timm made a model; that of its class where it did not."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _name(model: Any) -> str:
    """Our variant of the model's own name, else of the family and size that it is nearest to."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    variant = variant_of(architecture)
    if variant is not None:
        return variant
    size = next((size for size, shape in SIZES.items() if shape["embed_dim"] >= model.embed_dim), "large")
    if isinstance(model, VisionTransformerDistilled):
        return f"deit_reuse_{'base' if size == 'large' else size}_distilled_patch16_224"
    return f"vit_reuse_{size}_patch16_224"


@cache
def _usual_shape(name: str) -> dict[str, Any]:
    """The shape of the model that a name of ours makes without keywords."""
    with torch.device("meta"):
        return _shape(timm.create_model(name, plan="exact*" + str(_depth(name)), weight_init="skip"))


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
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": _is_there(attn.q_norm),
        "scale_attn_norm": _is_there(attn.norm),
        "scale_mlp_norm": _is_there(block.mlp.norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": block.ls1.init_values if isinstance(block.ls1, LayerScale) else None,
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
        "embed_norm_layer": _norm(model, patches.norm),
        "norm_layer": _norm(model, block.norm1),
        "norm_eps": block.norm1.eps,
        **_mlp_shape(model, block.mlp),
    }


def mlp_ratio(mlp: Any) -> float:
    """The mlp_ratio of which timm makes an MLP, rounding down; a packed one counts its gates among the units."""
    hidden, dim = mlp.fc2.in_features * (2 if isinstance(mlp, GluMlp) else 1), mlp.fc2.out_features
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _mlp_shape(model: Any, mlp: Any) -> dict[str, Any]:
    """The keywords for the MLP of a layer of a model.

    Raises:
        ValueError: Its activation is none that timm makes by a name of ACTIVATIONS.
    """
    is_tanh = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "tanh"
    act = "GELUTanh" if is_tanh else type(mlp.act).__name__
    if act not in ACTIVATIONS:
        raise unsupported(model, f"has {act} in its MLPs")
    kinds = {SwiGLU: "swiglu", GluMlp: "glu" if getattr(mlp, "gate_last", True) else "swiglu_packed"}
    return {
        "mlp_ratio": mlp_ratio(mlp),
        "act_layer": ACTIVATIONS[act],
        "mlp_layer": kinds.get(type(mlp)),
    }


def _norm(model: Any, norm: nn.Module) -> str | None:
    """timm's name of a norm of a model; None where there is none.

    Raises:
        ValueError: It is none of NORMS.
    """
    kind = type(norm).__name__
    if _is_there(norm) and kind not in NORMS:
        raise unsupported(model, f"has {kind} for its norms")
    return NORMS[kind] if _is_there(norm) else None


def _is_there(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)
