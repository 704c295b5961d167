"""What a search hands over: of the plan that it found and of constant merging, fitted and as they come, the nearest.

Plans are tried in pieces, each layer fitted alone; the model that is handed over is fitted as a whole, which is another
thing. So it is looked at once more, on the same images that plans were tried on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vitreuse.compress.closed_form import LayerFit
from vitreuse.compress.convert import Conversion, take_into
from vitreuse.compress.fidelity import mean_distance
from vitreuse.compress.fitting import take_into_on_images
from vitreuse.compress.search.pieces import Pieces
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.plan import EXACT, Plan


@dataclass(frozen=True)
class Delivery:
    """A model that may be handed over.

    Attributes:
        plan: Its plan.
        conversion: The model, and what was made of the original's weights.
        fits: What each fit of a layer was worth; None of a model as it comes.
        distance: How far its answers are from the original's, a mean over the images that plans were tried on.
    """

    plan: Plan
    conversion: Conversion
    fits: list[LayerFit] | None
    distance: float


def deliveries(
    pieces: Pieces,
    plans: Mapping[str, Plan],
    fitted: Iterable[Tensor],
    tried: Iterable[Tensor],
) -> dict[str, Delivery]:
    """Each plan fitted as a whole, as "NAME, fitted", and as it comes, as "NAME".

    Args:
        pieces: What plans were tried in, which have the original, and say how its heads are matched.
        plans: By name.
        fitted: Batches of images (B, channels, rows, columns) to fit on, which are gone over several times.
        tried: Batches of other images, on which the distances are measured.
    """
    original, found = pieces.original, {}
    for name, plan in plans.items():
        if any(spec != EXACT for spec in plan):
            made = take_into_on_images(original, plan, fitted, pieces.distances)
            distance = mean_distance(original, made.conversion.model, tried)
            found[f"{name}, fitted"] = Delivery(plan, made.conversion, list(made.layers), distance)
        bare = take_into(original, plan, pieces.distances)
        found[name] = Delivery(plan, bare, None, mean_distance(original, bare.model, tried))
    return found


def nearest(made: Mapping[str, Delivery], costs: PlanCosts, most: float) -> str:
    """The name of the nearest of those that cost no more than is allowed, of equal ones the first."""
    affordable = {name: delivery for name, delivery in made.items() if costs.of(delivery.plan) <= most}
    return min(affordable, key=lambda name: affordable[name].distance)
