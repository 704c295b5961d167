"""Any plain ViT that timm knows by name, under a plan."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs

from vitreuse.io.errors import nearest
from vitreuse.model.class_names import name_classes, names_of
from vitreuse.model.copies import preprocessing_of
from vitreuse.model.keywords import read_keywords
from vitreuse.model.registry import default_cfgs, plain_name
from vitreuse.plan import Plan
from vitreuse.plan.options import PLAN_KEYWORDS

# What the shape of a plain model says nothing of, and the model that is returned is given beside it.
OF_THE_RESULT = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "features_only", "out_indices", "checkpoint_path", "device", "dtype"),
    *PLAN_KEYWORDS,
)


def create_model(name: str, plan: str | Plan | None = None, pretrained: bool = False, **keywords: Any) -> Any:
    """A ViT by its name in timm or here, with a plan.

    Args:
        name: Of timm, with a tag or without, such as vit_small_patch14_dinov2 or vit_base_patch16_siglip_224.v2_webli,
            or of vitreuse.
        plan: One spec per layer; without one all layers of a plain model are exact, and ours have their preset.
        pretrained: Whether to load the weights that timm publishes under the name. What of them the plan has no use
            for is logged, and so is what is new.
        keywords: Those of timm.create_model, and reuse_backend and the like beside them.

    Raises:
        ValueError: No such name; the model takes no plan; the plan or a keyword does not suit it.
    """
    text = None if plan is None else str(plan)
    if name.partition(".")[0] in default_cfgs:
        if pretrained and not {"pretrained_cfg", "pretrained_cfg_overlay"} & {*keywords}:
            raise ValueError(
                f"{name} has no published weights: those of {plain_name(name.partition('.')[0])} go into a plan, as by "
                f"create_model({plain_name(name.partition('.')[0])!r}, plan=..., pretrained=True)."
            )
        return timm.create_model(name, pretrained=pretrained, plan=text, **keywords)
    of_shape = {key: value for key, value in keywords.items() if key not in OF_THE_RESULT}
    plain = _on_meta(name, of_shape)
    if hasattr(plain, "plan"):  # a hub folder of ours
        return timm.create_model(name, pretrained=pretrained, plan=text, **keywords)
    ours, shape = read_keywords(plain)
    rest = {key: value for key, value in keywords.items() if key in OF_THE_RESULT}
    text = f"exact*{len(plain.blocks)}" if text is None else text
    made = timm.create_model(ours, plan=text, pretrained_cfg_overlay=preprocessing_of(plain), **shape, **rest)
    inner = getattr(made, "model", made)  # of timm's wrapper for features_only
    name_classes(inner, names_of(plain))
    if pretrained:
        trained: Any = timm.create_model(name, pretrained=True, **of_shape)
        inner.load_state_dict(trained.state_dict(), strict=inner is made)  # the wrapper has cut what it does not read
    return made


def _on_meta(name: str, keywords: dict[str, Any]) -> Any:
    """timm's model without memory."""
    if ":" not in name and not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or ", timm.list_models() has the names."
        raise ValueError(f"{name!r} is not a model of timm or vitreuse{hint}")
    architecture, _, tag = name.partition(".")
    if ":" not in name and tag and name not in (tags := get_arch_pretrained_cfgs(architecture)):
        hint = nearest(name, tags) or f": give one of {', '.join(tags)}."
        raise ValueError(f"{architecture} has no weights {tag!r}{hint}")
    with torch.device("meta"):
        return timm.create_model(name, **keywords)
