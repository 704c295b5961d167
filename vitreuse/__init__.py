"""Vision transformers that exploit redundancy in maps, tokens, hidden units and layers, by one plan per model.

Importing registers the models: ``timm.create_model("vit_reuse_small_patch16_224", plan="exact reuse*6 exact*5")``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitreuse.compress.closed_form import fit_layers
from vitreuse.compress.damage import measure_damage
from vitreuse.compress.fitting import convert_on_images, fit_projections
from vitreuse.compress.fold import fold
from vitreuse.compress.recording import attention_maps
from vitreuse.compress.redundancy import measure_redundancy
from vitreuse.compress.search import Space
from vitreuse.cost.macs import count_macs, count_params
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.io.progress import quiet
from vitreuse.model import registry
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.create import create_model
from vitreuse.model.vit import PlanVisionTransformer, PlanVisionTransformerDistilled
from vitreuse.plan import PRESETS, Plan, Spec, parse_plan, preset_plan

if TYPE_CHECKING:
    from vitreuse.data.samples import Images
    from vitreuse.verbs.convert import Converted, convert
    from vitreuse.verbs.describe import Description, describe, models
    from vitreuse.verbs.export import Exported, export
    from vitreuse.verbs.heal import Healed, heal
    from vitreuse.verbs.search import Searched, SearchOptions, search
    from vitreuse.verbs.similarity import Similarity, similarity
    from vitreuse.verbs.tune import Tuned, tune

__version__ = "0.1.0"

__all__ = [
    "Converted",
    "Description",
    "Exported",
    "Healed",
    "Images",
    "LoadReport",
    "PRESETS",
    "Plan",
    "PlanCosts",
    "PlanVisionTransformer",
    "PlanVisionTransformerDistilled",
    "SearchOptions",
    "Searched",
    "Similarity",
    "Space",
    "Spec",
    "Tuned",
    "attention_maps",
    "convert",
    "convert_on_images",
    "count_macs",
    "count_params",
    "create_model",
    "describe",
    "export",
    "fit_layers",
    "fit_projections",
    "fold",
    "heal",
    "load_checkpoint",
    "measure_damage",
    "measure_redundancy",
    "models",
    "parse_plan",
    "preset_plan",
    "quiet",
    "registry",
    "search",
    "similarity",
    "tune",
]

# Found when they are first asked for: with all that they import, import vitreuse would take three times as long.
_LATER = {
    "Images": "data.samples",
    **dict.fromkeys(("Converted", "convert"), "verbs.convert"),
    **dict.fromkeys(("Description", "describe", "models"), "verbs.describe"),
    **dict.fromkeys(("Exported", "export"), "verbs.export"),
    **dict.fromkeys(("Healed", "heal"), "verbs.heal"),
    **dict.fromkeys(("SearchOptions", "Searched", "search"), "verbs.search"),
    **dict.fromkeys(("Similarity", "similarity"), "verbs.similarity"),
    **dict.fromkeys(("Tuned", "tune"), "verbs.tune"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
