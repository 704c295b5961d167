"""The plan language: one attention spec per layer, as data and as text, and what it leaves open."""

from vitreuse.plan.language import EXACT, MAX_LAYERS, PRESETS, WORDS, Plan, Spec, parse_plan, preset_plan

__all__ = ["EXACT", "MAX_LAYERS", "PRESETS", "WORDS", "Plan", "Spec", "parse_plan", "preset_plan"]
