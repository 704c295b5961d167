"""A search from images to the model that is handed over: some are fitted, plans tried on others, the last are shown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group

from vitreuse.compress.convert import Conversion
from vitreuse.compress.damage import check_specs, refuse_other_layers
from vitreuse.compress.row_sample import NUM_ROWS
from vitreuse.compress.search import Candidate, Found, Space, least_cost
from vitreuse.compress.search import search as find_plan
from vitreuse.compress.search.audit import batch_of
from vitreuse.compress.search.delivery import Delivery, deliveries, nearest
from vitreuse.compress.search.healing import Regained, heal_for, regained
from vitreuse.cost.plan_costs import METRICS, PlanCosts
from vitreuse.io.tables import Shown
from vitreuse.model.copies import exact_copy, seeded
from vitreuse.model.keywords import architecture, layers_of
from vitreuse.plan import EXACT, Plan
from vitreuse.verbs.plots import front_plot
from vitreuse.verbs.search.measured import Measured
from vitreuse.verbs.search.table import table
from vitreuse.verbs.split import Split, split_apart
from vitreuse.verbs.words import SearchWords


@dataclass(frozen=True)
class SearchOptions:
    """What a search is seldom told.

    Attributes:
        dtype: Of inference where times are measured, and predicted.
        num_rows: Patches of each image whose rows of the maps are looked at, where heads are matched.
        trials: A file that takes every trial, so that a search which was killed goes on by the same call.
    """

    dtype: torch.dtype = torch.float32
    num_rows: int = NUM_ROWS
    trials: Path | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Searched(Shown):
    """What a search hands over.

    Attributes:
        plan: Of the model.
        conversion: The model, converted and mostly fitted, and what was made of the original's weights.
        split: The images, by what they were for.
        facts: What was found, forecast and measured, as the command has it under --json.
    """

    plan: Plan
    conversion: Conversion
    split: Split
    facts: dict[str, Any]

    @property
    def model(self) -> Any:
        """In evaluation mode, on the device of the original."""
        return self.conversion.model

    def table(self) -> Group:
        return table(self.facts)

    def picture(self) -> bytes:
        """The front by forecast and what was measured, as a PNG."""
        return front_plot(self.facts)

    def expected_of_healing(self, minutes: float) -> Regained:
        """What healing so long regains, measured on copies: a tenth of it at each of three learning rates, then on to
        all of it at the best one."""
        original, (fitted, tried, shown) = self.conversion.original, self.split
        pupil = heal_for(original, self.model, fitted, tried, minutes, 2 * batch_of(original))
        return regained(original, self.model, pupil, shown)


@torch.inference_mode(False)
def search(
    model: Any,
    images: Any,
    budget: float = 0.75,
    metric: str = "macs",
    minutes: float = 10.0,
    words: str | SearchWords | None = None,
    seed: int = 0,
    shown: Any = None,
    options: SearchOptions = SearchOptions(),
) -> Searched:
    """The plan that does a trained model the least damage at a share of its cost, and the model converted into it.

    Args:
        model: A plain ViT of timm, or one of ours whose layers are exact, on any device; it stays as it is.
        images: What Images takes, as a tensor, a data set or a loader: most to fit layers on, others to try plans on.
        budget: The most that the plan may cost, as a share of the exact model.
        metric: What it is a share of: macs, latency, memory of training, or bytes of the file, see PlanCosts.
        minutes: How long plans may be improved by running them, 0 to take the best of the front.
        words: What a layer may become, as "exact,reuse,none,-8,/192": words of the plan language, -R for tokens that
            merge by steps of R, /H for hidden units by steps of H. All words by default.
        seed: Of which images are for what, and of the rows of maps that are looked at.
        shown: Other images, on which the result is measured; an eighth of the images by default.
        options: What is seldom told.

    Raises:
        ValueError: The model's layers are not exact, there are too few such images, or no plan meets the budget.
    """
    _refuse_odd(model, budget, metric, minutes)
    chosen = words if isinstance(words, SearchWords) else SearchWords.of(model, words)
    check_specs(model, chosen.space(model).attention_words)
    split = split_apart(model, images, shown, seed)
    original = exact_copy(model)
    aim = _Aim(chosen.space(model), PlanCosts(original, metric, dtype=options.dtype), budget, minutes)
    settings = {"name": architecture(model), "metric": metric, "budget": budget, "words": chosen.texts()}
    settings["num_images"] = sum(map(len, split[: 2 if shown is not None else 3]))
    with seeded(seed):
        found = aim.search(original, split, options, seed, words is not None)
        return aim.hand_over(original, split, found, {**settings, "minutes": minutes})


class _Aim(NamedTuple):
    """What is searched, and for what."""

    space: Space
    costs: PlanCosts
    budget: float
    minutes: float

    @property
    def exact(self) -> int:
        """The cost of the exact model."""
        return self.costs.of(self.space.exact)

    def search(self, original: Any, split: Split, options: SearchOptions, seed: int, are_given: bool) -> Found:
        """What comes of it; raises ValueError where no plan of the words, which were given or not, meets the budget."""
        least, found = least_cost(self.space, self.costs) / self.exact, None
        if least <= self.budget:
            settings = (self.budget, self.minutes, options.trials, (options.num_rows, seed))
            found = find_plan(original, split.fitted, split.tried, self.space, self.costs, *settings)
        if found is None:
            given = "the words given" if are_given else "all words"
            raise ValueError(
                f"no plan of {given} has {self.budget:g} of the {METRICS[self.costs.metric]} of the exact model: the "
                f"least is {math.ceil(1000 * max(least, self.budget)) / 1000:g}: raise the "
                f"budget{', or give more words' if are_given else ''}."
            )
        return found

    def hand_over(self, original: Any, split: Split, found: Found, settings: dict[str, Any]) -> Searched:
        """The nearest of the models that are made, measured beside others."""
        measured = Measured(original, self.space, self.costs, found, split.shown)
        made = deliveries(found.trials.pieces, measured.rivals(), split.fitted, split.tried)
        name = nearest(made, self.costs, self.budget * self.exact)
        facts = {
            **settings,
            "images": {part: len(images) for part, images in split._asdict().items()},
            **_found(found, self.exact),
            **_delivered(name, made[name], found, self.costs, self.exact),
            **measured.audited(made, name),
        }
        return Searched(made[name].plan, made[name].conversion, split, facts)


def _refuse_odd(model: Any, budget: float, metric: str, minutes: float) -> None:
    """Raises ValueError for a model that cannot be searched, and arguments that are none of their kind."""
    refuse_other_layers(model)
    layers_of(model)  # raises for what no plan can be laid over
    if not 0 < budget <= 1:
        raise ValueError(f"{budget} is no share of an exact model's cost: give a number above 0, up to 1.")
    if not 0 <= minutes < math.inf:
        raise ValueError(f"{minutes} is no time in minutes: give a number, 0 or more.")
    if metric not in METRICS:
        raise ValueError(f"{metric!r} is no metric: give one of {', '.join(METRICS)}.")


def _found(found: Found, exact: int) -> dict[str, Any]:
    return {
        "start": {**_row(found.start, exact), "distance": found.trials.distance(found.start.plan)},
        "distance": found.distance,
        "is_best": found.is_best,
        "num_tried": len(found.trials.asked),
        "front": [_row(candidate, exact) for candidate in found.front],
    }


def _delivered(name: str, made: Delivery, found: Found, costs: PlanCosts, exact: int) -> dict[str, Any]:
    """The model that is handed over: its plan, and what became of the original's weights."""
    candidate = Candidate(costs.of(made.plan), found.forecast.of(made.plan), made.plan)
    conversion = made.conversion
    return {
        "chosen": _row(candidate, exact),
        "delivered": {
            "name": name,
            "distance": made.distance,
            "layer_fits": None if made.fits is None else [asdict(fit) for fit in made.fits],
            "matches": conversion.matches,
            **{key: list(getattr(conversion, key)) for key in ("new", "touched", "dropped")},
        },
    }


def _row(candidate: Candidate, exact: int) -> dict[str, Any]:
    return {
        "plan": str(candidate.plan),
        "cost": candidate.cost,
        "share": candidate.cost / exact,
        "damage": candidate.damage,
        "num_changed": sum(spec != EXACT for spec in candidate.plan),
    }
