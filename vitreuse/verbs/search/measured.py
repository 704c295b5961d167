"""What a search measures of the model that it hands over, and of others beside it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vitreuse.attention.costs import cost_key, measured_on
from vitreuse.compress.convert import take_into
from vitreuse.compress.search import Found, Space
from vitreuse.compress.search.audit import audit, batch_of
from vitreuse.compress.search.constant import constant_merging
from vitreuse.compress.search.delivery import Delivery
from vitreuse.config import ModelConfig
from vitreuse.cost.backends import fused_attention
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.data.samples import Images, are_classes
from vitreuse.files.networks import plain_model
from vitreuse.model.keywords import read_keywords
from vitreuse.plan import PRESETS, Plan, preset_plan

SEARCHED, CONSTANT = "searched", "constant merging"


@dataclass(frozen=True)
class Measured:
    """A search that is over, and the images on which nothing was chosen.

    Attributes:
        original: What was searched, as one of ours with exact layers.
        space: What was searched.
        costs: By which.
        found: What came of it.
        shown: The images.
    """

    original: Any
    space: Space
    costs: PlanCosts
    found: Found
    shown: Images

    def rivals(self) -> dict[str, Plan]:
        """The plan that was found, and constant merging of its predicted time; of its cost where no time can be
        predicted on this device."""
        equal = self._latency() or self.costs
        constant = constant_merging(self.space, equal, equal.of(self.found.chosen.plan))
        return {SEARCHED: self.found.chosen.plan, **({} if constant is None else {CONSTANT: constant})}

    def audited(self, made: Mapping[str, Delivery], chosen: str) -> dict[str, Any]:
        """Rows of the model that is handed over, of the other ones that were made, and of presets as they come."""
        plans = {"chosen": made[chosen].plan}
        models = {"chosen": made[chosen].conversion.model}
        for name, delivery in made.items():
            if name not in (chosen, SEARCHED):
                plans[name], models[name] = delivery.plan, delivery.conversion.model
        for name, plan in self._presets().items():
            plans[name] = plan
            models[name] = take_into(self.original, plan, self.found.trials.pieces.distances).model
        has_labels, plain = are_classes(self.shown, self.original), partial(plain_model_of, self.original)
        measured = audit(self.original, models, plain, self.shown, has_labels, self.costs.conditions.dtype)
        latency, exact = self._latency(), self.space.exact
        rows = {
            name: {
                "plan": str(plan),
                "cost": self.costs.of(plan),
                "share": self.costs.of(plan) / self.costs.of(exact),
                "measured_share": self._measured_share(models[name], measured[name].speedup),
                "predicted_speedup": None if latency is None else latency.of(exact) / latency.of(plan),
                "damage": self.found.forecast.of(plan),
                **asdict(measured[name]),
            }
            for name, plan in plans.items()
        }
        costs_of = None if latency is None else _measured_on(latency)
        return {"audited": rows, "batch_size_timed": batch_of(self.original), "costs_of": costs_of}

    def _measured_share(self, model: Any, speedup: float) -> float:
        """What a model costs as it stands, as a share of the original; its time, of the best plain model's."""
        if self.costs.metric == "latency":
            return 1 / speedup
        return self.costs.of_model(model) / self.costs.of_model(self.original)

    def _latency(self) -> PlanCosts | None:
        """What predicts times; None where nothing was measured on this device."""
        if self.costs.metric == "latency":
            return self.costs
        try:
            return PlanCosts(self.original, "latency", dtype=self.costs.conditions.dtype)
        except ValueError:
            return None

    def _presets(self) -> dict[str, Plan]:
        """The presets but merging that the words can spell, with the words' own numbers."""
        own = {spec.word: spec for spec in reversed(self.space.words)}
        plans = {
            method: preset_plan(method, self.space.depth, self.space.num_patches)
            for method in PRESETS
            if method != "merge"
        }
        return {
            method: Plan(tuple(own[spec.word] for spec in plan))
            for method, plan in plans.items()
            if all(spec.word in own for spec in plan)
        }


def _measured_on(costs: PlanCosts) -> str:
    """What device, and when, times were measured on by which plans' times are predicted."""
    conditions = costs.conditions
    return measured_on(cost_key(conditions.device.type, conditions.dtype, False))


def plain_model_of(original: Any, fused: bool) -> Any:
    """timm's plain model of the shape of one of ours with exact layers, with fused attention or without."""
    name, keywords = read_keywords(original)
    with fused_attention(fused):
        return plain_model(ModelConfig(name=name, plan=None, keywords=keywords)).create()
