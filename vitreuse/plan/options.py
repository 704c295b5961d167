"""What a plan leaves open: keywords that all layers share, and warnings where a keyword or a spec has no effect."""

from __future__ import annotations

from dataclasses import dataclass, fields
from warnings import warn

from vitreuse.plan import Plan

REUSE_BACKENDS = ("auto", "map", "qk")
SHARINGS = ("none", "headwise", "key_value", "layerwise")
PROJECTIONS = ("linear", "mean", "max", "conv")
POOLS = ("mean", "max")  # projections without parameters
INITS = ("random", "mean")
_ALLOWED = {
    "reuse_backend": REUSE_BACKENDS,
    "lowrank_sharing": SHARINGS,
    "lowrank_projection": PROJECTIONS,
    "lowrank_init": INITS,
}


@dataclass(frozen=True)
class PlanOptions:
    """What a plan leaves open and every layer shares.

    Attributes:
        reuse_backend: What an anchor hands on: its map, (q, k), or what is faster (see attention/policy.py).
        lowrank_sharing: What shares a token projection: none, headwise (the heads of a layer), key_value (and its keys
            and values), layerwise (all layers).
        lowrank_projection: How tokens are projected (see lowrank.project_tokens).
        lowrank_init: What linear and conv projections start as.

    Raises:
        ValueError: An unknown value.
    """

    reuse_backend: str = "auto"
    lowrank_sharing: str = "key_value"
    lowrank_projection: str = "linear"
    lowrank_init: str = "random"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.")

    def settled(self, plan: Plan) -> PlanOptions:
        """The options as this plan uses them, with a warning for each given one that has no effect."""
        words = {spec.word for spec in plan}
        idle = [] if "reuse" in words else ["reuse_backend"]
        if "lowrank" not in words:
            idle += ["lowrank_sharing", "lowrank_projection", "lowrank_init"]
        elif self.lowrank_projection in POOLS:
            idle += ["lowrank_sharing", "lowrank_init"]
        defaults = {name: getattr(PlanOptions, name) for name in idle}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                warn(f"{name}={getattr(self, name)!r} has no effect on plan '{plan}': leave it out.", stacklevel=4)
        return PlanOptions(**{**self.__dict__, **defaults})


PLAN_KEYWORDS = tuple(field.name for field in fields(PlanOptions))


def warn_if_map_is_carried(options: PlanOptions, attn_drop_rate: float) -> None:
    """Warns of a (q, k) backend that dropout on the map overrules while training."""
    if options.reuse_backend == "qk" and attn_drop_rate > 0.0:
        warn(
            f"reuse_backend='qk' has no effect while training with attn_drop_rate={attn_drop_rate}, since dropout must "
            "fall on one map: set attn_drop_rate=0, or reuse_backend='auto'.",
            stacklevel=4,
        )


def layerwise_k(plan: Plan) -> int:
    """The k of the low-rank layers of a plan that has one projection for all of them.

    Raises:
        ValueError: They are of several k.
    """
    sizes = sorted({spec.number for spec in plan if spec.word == "lowrank" and spec.number is not None})
    if len(sizes) > 1:
        raise ValueError(
            f"lowrank_sharing='layerwise' is one projection for all layers and plan '{plan}' has k of "
            f"{', '.join(map(str, sizes))}: use one k, or lowrank_sharing='key_value'."
        )
    return sizes[0]


def warn_if_idle(plan: Plan, grid: tuple[int, int], num_tokens: int) -> None:
    """Warns once of a k that is not below the number of tokens, and of a span that covers the grid."""
    for spec in dict.fromkeys(plan):
        if spec.word == "lowrank" and spec.number is not None and spec.number >= num_tokens:
            warn(f"{spec} keeps as many keys as the {num_tokens} tokens or more: it saves nothing here.", stacklevel=4)
        if spec.word == "span" and spec.number is not None and spec.number >= 2 * max(grid) - 1:
            warn(f"{spec} covers the grid of {grid[0]} x {grid[1]} patches: it is exact attention here.", stacklevel=4)
