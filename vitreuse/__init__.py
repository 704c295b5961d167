"""Vision transformers that exploit redundancy in maps, tokens, hidden units and layers, by one plan per model.

Importing registers the models: ``timm.create_model("vit_reuse_small_patch16_224", plan="exact reuse*6 exact*5")``.
"""

from vitreuse.compress.closed_form import fit_layers
from vitreuse.compress.convert import convert
from vitreuse.compress.damage import measure_damage
from vitreuse.compress.fitting import convert_on_images, fit_projections
from vitreuse.compress.fold import fold
from vitreuse.compress.recording import attention_maps
from vitreuse.compress.redundancy import measure_redundancy
from vitreuse.compress.search import Space, search
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.model import registry
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.create import create_model
from vitreuse.model.vit import PlanVisionTransformer, PlanVisionTransformerDistilled
from vitreuse.plan import PRESETS, Plan, Spec, parse_plan, preset_plan

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "LoadReport",
    "Plan",
    "PlanCosts",
    "PlanVisionTransformer",
    "PlanVisionTransformerDistilled",
    "Space",
    "Spec",
    "attention_maps",
    "convert",
    "convert_on_images",
    "count_macs",
    "count_params",
    "create_model",
    "fit_layers",
    "fit_projections",
    "fold",
    "load_checkpoint",
    "measure_damage",
    "measure_redundancy",
    "parse_plan",
    "preset_plan",
    "registry",
    "search",
]
