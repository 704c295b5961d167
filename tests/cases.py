"""The table of plans and options that every proof runs over, and small random float64 models of them.

Sizes are primes and differ: patches of 2 x 3 pixels, 5 heads of 3 channels, 7 classes; an image has 3 x 5 patches
unless a span needs a grid that is worth tiling.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import WORDS as WRITTEN
from reference import Reference
from torch import Tensor, nn

from vitreuse import PlanVisionTransformer, PlanVisionTransformerDistilled, parse_plan
from vitreuse.plan import WORDS

PATCH_SIZE = (2, 3)
NUM_CLASSES = 7


@dataclass(frozen=True)
class Case:
    """A plan, the grid of patches it is built for, and the keywords that it is built with."""

    plan: str
    grid: tuple[int, int] = (3, 5)
    distilled: bool = False
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens of its models."""
        return self.keywords.get("class_token", True) + self.distilled + self.keywords.get("reg_tokens", 0)

    @property
    def num_merged(self) -> int:
        """Tokens that are fewer after the last layer than before the first."""
        return sum(spec.merged for spec in parse_plan(self.plan))

    def build(self, seed: int = 0, **more: Any) -> Any:
        """A random model in float64; ``more`` are further keywords."""
        torch.manual_seed(seed)
        return randomized(self.fresh(**more))

    def fresh(self, **more: Any) -> Any:
        """A model in float64 as it begins; ``more`` are further keywords."""
        defaults = {
            "img_size": image_size(self.grid),
            "patch_size": PATCH_SIZE,
            "embed_dim": 15,
            "depth": len(parse_plan(self.plan)),
            "num_heads": 5,
            "mlp_ratio": 2,
            "num_classes": NUM_CLASSES,
            "plan": self.plan,
            "dtype": torch.float64,
        }
        model_class = PlanVisionTransformerDistilled if self.distilled else PlanVisionTransformer
        return model_class(**{**defaults, **self.keywords, **more})

    def reference(self, model: nn.Module, grid: tuple[int, int] | None = None) -> Any:
        """The naive reference of a model of this case, on copies of its weights that take gradients."""
        if any(spec.word not in WRITTEN for spec in parse_plan(self.plan)):
            return Itself(model)
        state = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
        read = {"global_pool", "lowrank_sharing", "lowrank_projection"}
        keywords = {key: value for key, value in self.keywords.items() if key in read}
        plan, num_heads = list(parse_plan(self.plan)), self.keywords.get("num_heads", 5)
        return Reference(state, plan, grid or self.grid, PATCH_SIZE, num_heads, self.num_prefix_tokens, **keywords)


class Itself:
    """A model in place of the reference, image by image: of a kind of layer that is not yet written naively."""

    def __init__(self, model: Any):
        self.model, self.state = model, dict(model.named_parameters())

    def tokens(self, image: Tensor) -> Tensor:
        """All tokens of an image after the last layer, with the final norm."""
        return self.model.forward_features(image[None])[0]

    def head(self, tokens: Tensor) -> Tensor:
        """Logits of an image's tokens."""
        return self.model.forward_head(tokens[None])[0]

    def logits(self, image: Tensor) -> Tensor:
        """Logits of an image."""
        return self.head(self.tokens(image))


def image_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a grid of patches."""
    return grid[0] * PATCH_SIZE[0], grid[1] * PATCH_SIZE[1]


def images(grid: tuple[int, int] = (3, 5), num_images: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images."""
    generator = torch.Generator().manual_seed(13)
    return torch.randn(num_images, 3, *image_size(grid), generator=generator, dtype=torch.float64).to(dtype)


def randomized(model: nn.Module) -> nn.Module:
    """The model with every parameter random, and large enough that an error anywhere moves the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("key_proj", "value_proj")):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("gamma")
                parameter.normal_(mean=float(is_scale), std=0.4)
    return model


def moved(model: Any, std: float) -> Any:
    """The model with every parameter away from where it began, by the same noise of this deviation every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


def _lowrank_cases() -> dict[str, Case]:
    """Every sharing with every projection that has weights, alone and under full and partial reuse."""
    cases = {}
    for sharing in ("none", "headwise", "key_value", "layerwise"):
        for projection in ("linear", "conv"):
            options = {"lowrank_sharing": sharing, "lowrank_projection": projection}
            cases[f"lowrank {sharing} {projection}"] = Case("lowrank:3*2", keywords=options)
            cases[f"lowrank {sharing} {projection} reused"] = Case("lowrank:7 reuse:3 reuse:1 reuse", keywords=options)
    for projection in ("mean", "max"):
        options = {"lowrank_projection": projection}
        cases[f"lowrank {projection}"] = Case("lowrank:3*2", keywords=options)
        cases[f"lowrank {projection} reused"] = Case("lowrank:7 reuse:3 reuse:1 reuse", keywords=options)
    return cases


TILED = (13, 17)  # no tile divides it
THREE_HEADS = {"num_heads": 3}  # the naive reference is slow on large grids
NO_CLASS = {"class_token": False, "global_pool": "avg"}
EXTRAS = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1}


def _width_cases() -> dict[str, Case]:
    """MLPs of other widths and none at all, linear layers and skipped ones."""
    return {
        "hidden": Case("exact/7 exact/31 reuse/3 none/5 reuse:2/13 exact/2"),
        "hidden none at all": Case("exact/0 span:3/0 reuse:2/0 none lowrank:3/0 reuse/0"),
        "linear": Case("linear exact linear reuse linear lowrank:3 linear reuse:2 linear"),
        "skip": Case("skip exact skip reuse skip span:3 skip reuse:2 skip"),
        "linear and skip": Case("exact skip linear reuse:2/7 skip none linear*2 reuse/0 skip exact linear skip"),
        "linear distilled": Case("span:3 linear reuse:1/7 skip linear", distilled=True),
        "linear average": Case("linear exact/0 linear skip", keywords={**NO_CLASS, "reg_tokens": 2}),
        "hidden extras": Case("exact/7 linear reuse:3/13 skip none/5 reuse/0", keywords=EXTRAS),
        "hidden no bias": Case("exact/7 linear reuse:2/0 none/3", keywords={"qkv_bias": False, "proj_bias": False}),
    }


def _merge_cases() -> dict[str, Case]:
    """Tokens that merge by keys and by values, with what comes before and after."""
    registers, average = {"reg_tokens": 2}, {"global_pool": "avg"}
    return {
        "merge": Case("exact-3 exact-2 exact"),
        "merge in the only layer": Case("exact-7", keywords=average),
        "merge in the last layer": Case("exact exact-5"),
        "merge in every layer": Case("exact-3*3", keywords=average),
        "merge as often as it can": Case("exact-7 exact-4 exact-2 exact-1 exact"),
        "merge by values": Case("(exact reuse-2)*2 exact"),
        "merge by values in the last layer": Case("(exact reuse-2)*2", keywords=average),
        "merge by values of some heads": Case("exact reuse:2-3 exact reuse:0-1 exact reuse:1-2 exact"),
        "merge after a second reuse": Case("exact reuse:3 none reuse-5 exact reuse reuse:4-2 exact"),
        "merge before reuse": Case("exact-5 exact reuse*2 exact-2 exact reuse:2 none reuse:4 reuse"),
        "merge of spans": Case("span:3-4 exact-3 exact"),
        "merge of spans by values": Case("span:3 reuse-2 exact reuse:1-3 exact"),
        "merge after low rank": Case("lowrank:3 reuse:2 exact-4 exact reuse:3"),
        "merge mixture": Case("exact/7 exact/0 linear skip exact-2/5 linear none/3 exact-3/0 skip exact reuse/11"),
        "merge mixture by values": Case("none span:5 skip reuse:2-3/0 none linear exact skip reuse-4/7 exact linear"),
        "merge distilled": Case("exact-4 exact reuse:2-3 exact", distilled=True),
        "merge with registers": Case("exact-4 exact reuse-3 exact linear", keywords=registers),
        "merge average": Case("exact-3 exact reuse:2-5/7 exact", keywords=average | {"no_embed_class": True}),
        "merge average without class": Case("exact-6 exact reuse-3 exact-2", keywords=NO_CLASS),
        "merge average of registers": Case("span:3-4 exact reuse:3-5", keywords={**NO_CLASS, "reg_tokens": 3}),
        "merge extras": Case("exact-3 exact reuse:2-2 exact/5", keywords={**EXTRAS, **registers}),
        "merge no bias": Case("exact-3 exact reuse:2-2 exact", keywords={"qkv_bias": False, "proj_bias": False}),
        "merge tiled": Case("span:3-53 exact reuse:1", TILED, keywords=THREE_HEADS),
        "merge tiled by values": Case("span:3 reuse:2-29 exact-31 exact", TILED, keywords={**THREE_HEADS, **NO_CLASS}),
    }


CASES = {
    "exact": Case("exact*2"),
    "depth 1": Case("exact"),
    "reuse": Case("exact reuse*2 exact"),
    "reuse of the nearest anchor": Case("exact reuse exact reuse"),
    "reuse of no head": Case("exact reuse:0 reuse"),
    "reuse of all heads by number": Case("exact reuse:5*2"),
    "reuse of some heads": Case("exact reuse:2 exact"),
    "reuse of some heads twice": Case("exact reuse:2*2"),
    "reuse of mixed numbers of heads": Case("exact reuse:3 reuse:1 reuse:4 reuse"),
    "lazy": Case("(exact reuse)*2 none reuse"),
    "none": Case("none exact none reuse none reuse:2 none"),
    **_lowrank_cases(),
    "lowrank of several k": Case("lowrank:7 lowrank:3 reuse lowrank:2"),
    "span dense": Case("span:3*2"),
    "span dense reused": Case("span:3 reuse:3 reuse:1 reuse"),
    "span tiled": Case("span:3*2", TILED, keywords=THREE_HEADS),
    "span tiled reused": Case("span:3 reuse:2 reuse:1 reuse", TILED, keywords=THREE_HEADS),
    "span tiled without prefix": Case("span:3 reuse:2 reuse", TILED, keywords={**THREE_HEADS, **NO_CLASS}),
    "span tiled with registers": Case("span:3 reuse:2 reuse", TILED, keywords={**THREE_HEADS, "reg_tokens": 2}),
    "span tiled evenly": Case("span:3 reuse", (14, 14), keywords=THREE_HEADS),
    "span tiled wide": Case("span:5 reuse:1", (17, 19), keywords=THREE_HEADS),
    "span tiled along one axis": Case("span:3 reuse:1 span:1", (2, 29)),
    "span of several widths": Case("span:3 span:5 exact span:5 reuse:1 none span:3 reuse:2 span:3 exact"),
    "mixture": Case("span:3 reuse lowrank:5 reuse:1 none reuse exact reuse:2 span:3 reuse:4"),
    "mixture tiled": Case("span:3 lowrank:5 reuse:1 none exact reuse:2 span:3", TILED, keywords=THREE_HEADS),
    "distilled": Case("span:3 reuse:1 lowrank:3 reuse exact reuse:2", distilled=True),
    "distilled tiled": Case("span:3 reuse:1", TILED, distilled=True, keywords=THREE_HEADS),
    "extras": Case("span:3 reuse:1 lowrank:3 reuse:2 none exact reuse:3 reuse", keywords={**EXTRAS, "reg_tokens": 2}),
    "extras tiled": Case("span:3 reuse:1", TILED, keywords={**THREE_HEADS, **EXTRAS, "qkv_bias": False}),
    "extras unshared": Case("lowrank:3 reuse:2 reuse:4", keywords={**EXTRAS, "lowrank_sharing": "none"}),
    "no bias": Case("lowrank:3 reuse:2 exact reuse:1", keywords={"qkv_bias": False, "proj_bias": False}),
    "average": Case("span:3 reuse:1 lowrank:3 reuse", keywords={"global_pool": "avg", "no_embed_class": True}),
    "average without class": Case("exact reuse:2 lowrank:3 reuse:1", keywords={**NO_CLASS, "reg_tokens": 3}),
    **_width_cases(),
    **_merge_cases(),
}
# A kind of layer that no row has: alone, with others, and reused.
_used = {spec.word for case in CASES.values() for spec in parse_plan(case.plan)}
CASES |= {word: Case(f"{word} reuse:2 exact {word} reuse") for word in WORDS if word not in _used}
SMALL_CASES = {name: case for name, case in CASES.items() if case.grid == (3, 5)}


# Of layers of other widths and of merging those that make test runs; make proof runs the others, too.
QUICK = (
    *("merge in every layer", "merge by values of some heads", "merge mixture by values"),
    *("merge distilled", "merge extras"),
)
SLOW = {*_width_cases(), *_merge_cases()} - {*QUICK}


def with_backends(cases: dict[str, Case]) -> list[Any]:
    """Names of cases with each backend that a test should run them with, as pytest's parameters."""
    marks = {name: [pytest.mark.proof] if name in SLOW else [] for name in cases}
    return [
        pytest.param(name, backend, marks=marks[name]) for name, case in cases.items() for backend in backends(case)
    ]


def backends(case: Case) -> tuple[str, ...]:
    """The backends that make a difference to a case; a plan without reuse layers has none."""
    return ("map", "qk") if "reuse" in case.plan else ("auto",)
