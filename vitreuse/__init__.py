"""Vision transformers that exploit redundancy in attention: one plan per model, one attention spec per layer.

Importing registers the models: ``timm.create_model("vit_reuse_small_patch16_224", plan="exact reuse*6 exact*5")``.
"""
from vitreuse.compress.fold import fold
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.model import registry
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.vit import PlanVisionTransformer, PlanVisionTransformerDistilled
from vitreuse.plan import PRESETS, Plan, Spec, parse_plan, preset_plan

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "LoadReport",
    "Plan",
    "PlanVisionTransformer",
    "PlanVisionTransformerDistilled",
    "Spec",
    "count_macs",
    "count_params",
    "fold",
    "load_checkpoint",
    "parse_plan",
    "preset_plan",
    "registry",
]
