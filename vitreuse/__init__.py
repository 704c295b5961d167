"""Vision transformers that exploit redundancy in attention: one plan per model, one attention spec per layer.

Importing registers the models: ``timm.create_model("vit_reuse_small_patch16_224", plan="exact reuse*6 exact*5")``.
"""
from vitreuse import models
from vitreuse.fold import fold
from vitreuse.macs import count_macs, count_params
from vitreuse.plan import PRESETS, Plan, Spec, parse_plan, preset_plan
from vitreuse.vit import PlanVisionTransformer, PlanVisionTransformerDistilled
from vitreuse.weights import LoadReport, load_checkpoint

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
    "models",
    "parse_plan",
    "preset_plan",
]
