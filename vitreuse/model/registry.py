"""Model names: families x methods x sizes x resolutions, registered with timm.

Registering builds nothing. Every default config is that of timm's plain model of the same family, size and resolution,
without its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from warnings import warn

from timm.layers import GluMlp, LayerNorm, SwiGLU, SwiGLUPacked, get_norm_layer, to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from vitreuse.model.checkpoint import checkpoint_filter_fn
from vitreuse.model.vit import PlanVisionTransformer, PlanVisionTransformerDistilled
from vitreuse.plan import PRESETS, preset_plan

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
FAMILY_ARGS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
}
# resolutions where timm has the plain model
RESOLUTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "vit": {"tiny": (224, 384), "small": (224, 384), "base": (224, 384), "large": (224, 384)},
    "deit": {"tiny": (224,), "small": (224,), "base": (224, 384)},
    "deit3": {"small": (224, 384), "base": (224, 384), "large": (224, 384)},
}
GATED_MLPS = {"swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked, "glu": GluMlp}  # by names, which JSON can hold
DISTILLED_SIZES = ("tiny", "small", "base")


def plain_name(name: str) -> str:
    """timm's name of the plain model that a name of ours is a variant of."""
    return _PLAIN_NAMES[name]


def variant_of(name: str) -> str | None:
    """One of our names for the plain model that ``name`` is, or is a variant of; None of any other."""
    if name in _PLAIN_NAMES:
        return name
    return next((variant for variant, plain in _PLAIN_NAMES.items() if plain == name), None)


def _name_table() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """For each name of ours timm's plain name, the method, and the keywords of the size."""
    table = {}
    for method in PRESETS:
        for family, sizes in RESOLUTIONS.items():
            for size, resolutions in sizes.items():
                args = {"patch_size": 16, **SIZES[size], **FAMILY_ARGS[family]}
                for resolution in resolutions:
                    tail = f"{size}_patch16_{resolution}"
                    table[f"{family}_{method}_{tail}"] = f"{family}_{tail}", method, args
        for size in DISTILLED_SIZES:
            tail = f"{size}_distilled_patch16_224"
            table[f"deit_{method}_{tail}"] = f"deit_{tail}", method, {"patch_size": 16, **SIZES[size]}
    return table


def _default_cfg(plain: str) -> dict[str, Any]:
    """The plain model's default config without where its weights lie."""
    cfg = get_pretrained_cfg(plain)
    assert cfg is not None
    kept = ("input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "classifier", "fixed_input_size")
    return {"num_classes": 1000, "pool_size": None, **{key: getattr(cfg, key) for key in kept}}


def _create(
    name: str,
    distilled: bool,
    pretrained: bool,
    plan: str | None,
    method: str,
    out_indices: Any = 3,
    norm_eps: float | None = None,
    mlp_layer: str | Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model with its method's preset plan, or another plan.

    ``norm_eps`` is of all norms and ``mlp_layer`` may be one of GATED_MLPS: JSON, and so a hub folder, cannot hold
    timm's ``norm_layer=partial(...)`` and classes.
    """
    if plan is None:
        preset = preset_plan(method, kwargs["depth"], _num_patches(name, kwargs))
        if method == "merge" and not any(spec.merged for spec in preset):
            few = f"{name} merges nothing: its images have fewer than two patches for each of {len(preset)} layers"
            warn(f"{few}. Give a plan, such as 'exact-1 exact*{len(preset) - 1}'.", stacklevel=2)
        plan = str(preset)
    if norm_eps is not None:
        kwargs["norm_layer"] = partial(get_norm_layer(kwargs.get("norm_layer")) or LayerNorm, eps=norm_eps)
        if kwargs.get("embed_norm_layer") is not None:
            kwargs["embed_norm_layer"] = partial(get_norm_layer(kwargs["embed_norm_layer"]) or LayerNorm, eps=norm_eps)
    if mlp_layer is not None:
        kwargs["mlp_layer"] = _mlp_class(mlp_layer)
    return build_model_with_cfg(
        PlanVisionTransformerDistilled if distilled else PlanVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        plan=plan,
        **kwargs,
    )


def _mlp_class(mlp_layer: str | Any) -> Any:
    """A kind of MLP by its name, or itself.

    Raises:
        ValueError: No such name.
    """
    if not isinstance(mlp_layer, str):
        return mlp_layer
    if mlp_layer not in GATED_MLPS:
        raise ValueError(f"mlp_layer={mlp_layer!r} is none of {', '.join(GATED_MLPS)}: give one, or a class.")
    return GATED_MLPS[mlp_layer]


def _num_patches(name: str, kwargs: Mapping[str, Any]) -> int:
    """Patches of the images that timm will build a model for."""
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    image, patch = to_2tuple(kwargs.get("img_size") or cfg.input_size[-2:]), to_2tuple(kwargs["patch_size"])
    return math.prod(int(pixels) // int(side) for pixels, side in zip(image, patch, strict=True))


def _entrypoint(name: str, method: str, args: dict[str, Any]) -> Callable[..., nn.Module]:
    """The function that timm.create_model calls for ``name``."""

    def create(pretrained: bool = False, plan: str | None = None, **kwargs: Any) -> nn.Module:
        return build(pretrained=pretrained, plan=plan, method=method, **{**args, **kwargs})

    build = partial(_create, name, "_distilled_" in name)
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{_PLAIN_NAMES[name]} with the plan of the {method} preset, or any ``plan=``."
    return create


_TABLE = _name_table()
_PLAIN_NAMES = {name: plain for name, (plain, _, _) in _TABLE.items()}
default_cfgs = generate_default_cfgs({name: _default_cfg(plain) for name, (plain, _, _) in _TABLE.items()})
__all__: list[str] = []  # timm adds each name
for _name, (_, _method, _args) in _TABLE.items():
    globals()[_name] = register_model(_entrypoint(_name, _method, _args))
