"""The models that a plan must beat, in every size: what is left without one of its savings, smaller exact models that
save as much, and larger models of the plan."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from vitreuse.config import ModelConfig
from vitreuse.cost.summary import LARGEST
from vitreuse.files.networks import exact_model
from vitreuse.model.keywords import mlp_ratio
from vitreuse.plan import MAX_LAYERS, PRESETS, Plan, Spec, parse_plan, preset_plan
from vitreuse.plan.language import ON_GRID, WHOLE, num_mergeable

QUANTITIES = ("macs", "params", "latency_ms")  # in which a control may equal its target
UNITS = 16  # of hidden units to one channel
EXACT_NAME = "the exact model"


class Control(NamedTuple):
    """Models that cost more and more, of which one comes closest to what the target costs."""

    name: str
    meaning: str
    sizes: Sequence[int]
    at: Callable[[int], ModelConfig]
    target: ModelConfig
    target_name: str
    quantities: Sequence[str] = QUANTITIES


@dataclass(frozen=True)
class Shape:
    """What a control changes of a model: its own width, depth, hidden units, image; the steps of width and of image."""

    embed_dim: int
    depth: int
    mlp_ratio: float
    grid: tuple[int, int]
    step: int
    patch: tuple[int, int]

    @property
    def hidden(self) -> float:
        """Units of an MLP."""
        return self.mlp_ratio * self.embed_dim

    def resize(self, config: ModelConfig, keyword: str, value: float) -> ModelConfig:
        """The model with another value of a keyword; the one given where the value is the own one."""
        own = getattr(self, keyword)
        return config if value == own else replace(config, keywords={**config.keywords, keyword: value})

    def with_patches(self, config: ModelConfig, num_patches: int) -> ModelConfig:
        """The model for images of so many patches along the shorter side; the one given where these are its own."""
        shorter = min(self.grid)
        sides = [count * num_patches // shorter * patch for count, patch in zip(self.grid, self.patch, strict=True)]
        size: Any = sides[0] if sides[0] == sides[1] else sides
        return config if num_patches == shorter else replace(config, keywords={**config.keywords, "img_size": size})


class _Claim(NamedTuple):
    """A model with a plan, the name of its experiment, and the exact model beside it."""

    config: ModelConfig
    plan: Plan
    name: str
    exact: ModelConfig
    own: Shape


def controls(config: ModelConfig, name: str, smallest_px: int = 0) -> list[Control]:
    """The controls of a model with a plan, whose experiment has the name.

    What costs as much as the plan is what is left without one of its savings, or a smaller exact model; what costs as
    much as the exact model is a larger one of the plan. A control that says nothing of the plan is left out: "removed"
    where all attention is exact, "skipped" without linear layers, "narrower_mlp" where no MLP is narrower,
    "smaller_image" where nothing merges. The last has no row for parameters, since the size of an image changes the
    position embedding alone.

    Args:
        config: The model, its plan spelled out.
        name: What the targets are called.
        smallest_px: The shorter side of the images that the experiment begins with, which a smaller image must exceed.
    """
    plan = parse_plan(str(config.plan))
    exact = exact_model(config, len(plan))
    claim = _Claim(config, plan, name, exact, _shape(exact))
    return [*_without_a_saving(claim), *_exact_and_smaller(claim, smallest_px), *_larger(claim)]


def _without_a_saving(claim: _Claim) -> Iterator[Control]:
    config, plan, name, exact, own = claim
    if any(spec.word not in ("exact", *WHOLE) for spec in plan):
        left = without_attention(plan)
        removed, meaning = replace(exact, plan=str(left)), "no attention where the plan is not exact"
        yield Control("removed", meaning, range(1), lambda _: removed, config, name)

        def wider_mlp(num_units: int) -> ModelConfig:
            ratio = num_units / UNITS
            grown = replace(removed, plan=str(_widened(left, ratio / own.mlp_ratio)))
            return own.resize(grown, "mlp_ratio", ratio)

        units = math.ceil(UNITS * own.mlp_ratio)
        more = range(units, LARGEST * units)
        yield Control("removed_mlp", f"{meaning}, a wider MLP everywhere", more, wider_mlp, config, name)
    if any(spec.word == "linear" for spec in plan):
        idle = Plan(tuple(Spec("skip") if spec.word == "linear" else spec for spec in plan))
        skipped, meaning = replace(config, plan=str(idle)), "no layer where the plan has a linear one"
        yield Control("skipped", meaning, range(1), lambda _: skipped, config, name)


def _exact_and_smaller(claim: _Claim, smallest_px: int) -> Iterator[Control]:
    config, plan, name, exact, own = claim

    def narrower_mlp(num_units: int) -> ModelConfig:
        return own.resize(exact, "mlp_ratio", num_units / UNITS)

    def shallower(depth: int) -> ModelConfig:
        return own.resize(exact_model(exact, depth), "depth", depth)

    if any(spec.hidden is not None and spec.hidden < own.hidden for spec in plan):
        fewer = range(math.ceil(UNITS / own.embed_dim), math.floor(UNITS * own.mlp_ratio) + 1)
        yield Control("narrower_mlp", "a narrower MLP everywhere, all layers exact", fewer, narrower_mlp, config, name)
    if any(spec.merged for spec in plan):
        shorter, smaller, quantities = min(own.grid), partial(own.with_patches, exact), ("macs", "latency_ms")
        patches = range(min(smallest_px // own.patch[own.grid.index(shorter)] + 1, shorter), shorter + 1)
        meaning = "smaller images, all layers exact"
        yield Control("smaller_image", meaning, patches, smaller, config, name, quantities)
    yield Control("shallower", "fewer layers, all exact", range(1, own.depth + 1), shallower, config, name)
    channels, narrower = range(own.step, own.embed_dim + 1, own.step), partial(own.resize, exact, "embed_dim")
    yield Control("narrower", "fewer channels, all layers exact", channels, narrower, config, name)


def _larger(claim: _Claim) -> Iterator[Control]:
    config, plan, _, exact, own = claim

    def wider(width: int) -> ModelConfig:
        grown = replace(config, plan=str(_widened(plan, width / own.embed_dim)))
        return own.resize(grown, "embed_dim", width)

    def deeper(depth: int) -> ModelConfig:
        grown = deepened(plan, depth, math.prod(own.grid))
        return own.resize(replace(config, plan=str(grown)), "depth", depth)

    channels = range(own.embed_dim, LARGEST * own.embed_dim, own.step)
    layers = range(own.depth, min(LARGEST * own.depth, MAX_LAYERS) + 1)
    yield Control("wider", "the plan with more channels", channels, wider, exact, EXACT_NAME)
    yield Control("deeper", "the plan with more layers", layers, deeper, exact, EXACT_NAME)


def without_attention(plan: Plan) -> Plan:
    """The plan without attention where it is not exact; what such a layer merged, the exact layer before it merges."""
    specs = [*plan]
    anchor = None
    for layer, spec in enumerate(plan):
        if spec.word == "exact":
            anchor = layer
        elif spec.has_attention:
            specs[layer] = Spec("skip") if spec.hidden == 0 else Spec("none", hidden=spec.hidden)
            if anchor is not None:
                specs[anchor] = replace(specs[anchor], merged=specs[anchor].merged + spec.merged)
    return Plan(tuple(specs))


def deepened(plan: Plan, depth: int, num_patches: int) -> Plan:
    """The plan in a deeper model: the preset that it is, or its shortest period going on, at most all of it.

    Where too few patch tokens are left it merges half of them, and layers that need the grid are exact after a merge.
    """
    for method in PRESETS:
        sizes = (num_patches,) if method == "merge" else ()
        if plan == preset_plan(method, len(plan), *sizes):
            return preset_plan(method, depth, *sizes)
    specs = plan.specs
    period = next(p for p in range(1, len(specs) + 1) if specs[p:] == specs[:-p])
    left = num_patches
    going_on: list[Spec] = []
    for layer in range(depth):
        spec = specs[layer % period]
        if left < num_patches and spec.word in ON_GRID:
            spec = replace(spec, word="exact", number=None)
        going_on.append(replace(spec, merged=num_mergeable(spec.merged, left)))
        left -= going_on[-1].merged
    return Plan(tuple(going_on))


def _widened(plan: Plan, factor: float) -> Plan:
    """The plan with so many times the hidden units in layers that say how many they have."""
    hidden = [None if spec.hidden is None else round(factor * spec.hidden) for spec in plan]
    return Plan(tuple(replace(spec, hidden=units) for spec, units in zip(plan, hidden, strict=True)))


def _shape(exact: ModelConfig) -> Shape:
    model = on_meta(exact)
    layer, width, stem = model.blocks[0], model.embed_dim, model.patch_embed
    step = math.lcm(layer.attn.num_heads, 4)  # channels: heads divide them, and fixed sines and cosines come in fours
    ratio = mlp_ratio(layer.mlp)
    return Shape(width, len(model.blocks), ratio, stem.grid_size, step, stem.patch_size)


def on_meta(model: ModelConfig) -> Any:
    """The model without memory, where initialising it would only take time."""
    return replace(model, keywords={**model.keywords, "weight_init": "skip"}).create("meta")
