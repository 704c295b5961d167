"""What was promised of random plans beside what comes, damage and time: promises.md and promises.png.

    python -m docs.study.dinov2 --promises

Nothing is fitted to these plans. Their damage is that of the images that plans are tried on, and their time that of
``forward_features`` over that of exact layers, all plans in turns in one run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from docs.study.dinov2.figures import promises_figure
from docs.study.dinov2.measure import CPU, SPEED_BATCH
from docs.study.dinov2.packages import HERE
from docs.study.dinov2.searched import images_to_learn_from, space_of
from docs.study.dinov2.weights import trained
from eval.table import Column, to_markdown
from vitreuse.compress.search import Space
from vitreuse.compress.search.forecast import Forecast, measure_changes, tries
from vitreuse.compress.search.found import make_pieces
from vitreuse.compress.search.trials import Trials
from vitreuse.cost.measure import describe_machine, inference_call, time_interleaved
from vitreuse.cost.plan_costs import PlanCosts
from vitreuse.io.durable import write_durably
from vitreuse.io.progress import WorkProgress
from vitreuse.model.copies import exact_copy
from vitreuse.model.preprocessing import example
from vitreuse.plan import EXACT, Plan

SIZE_PX, NUM_PLANS, SEED, REPEATS = 224, 100, 0, 5
CHANGED = (0.1, 0.9)  # of the layers of a plan, whose share is drawn for each plan
KEEPS_EXACT = 0.8  # of the layers that change, those that merge or lose hidden units under the word exact
MOST_STEPS = 5  # of tokens that merge in a layer
COLUMNS = (
    Column("name", "promise"),
    Column("spearman", "Spearman", ".3f"),
    Column("error", "off by, median (%)", ".1f"),
    Column("worst", "worst tenth (%)", ".0f"),
)


class Adding(Trials):
    """Trials whose distances are taken to add up."""

    @property
    def saturate(self) -> bool:
        """They do not end."""
        return False


def random_plan(space: Space, rng: np.random.Generator) -> Plan:
    """A plan of a space, a share of whose layers changes that is drawn first."""
    share, left, specs = rng.uniform(*CHANGED), space.num_patches, []
    others = [word for word in space.words if word != EXACT]
    for _ in range(space.depth):
        if rng.random() > share:
            specs.append(EXACT)
            continue
        word = EXACT if rng.random() < KEEPS_EXACT else others[int(rng.integers(len(others)))]
        if word in space.whole_words:
            specs.append(word)
            continue
        allowed = [*space.merges(left)][: MOST_STEPS + 1] if space.may_merge(word, None) else [0]
        merged = int(rng.choice(allowed))
        specs.append(space.spec(word, merged, int(rng.choice(space.hidden[:-1]))))
        left -= merged
    return Plan(tuple(specs))


def random_plans(space: Space, rng: np.random.Generator) -> list[Plan]:
    """So many plans of a space, all different, that change something."""
    found: dict[Plan, None] = {}
    while len(found) < NUM_PLANS:
        plan = random_plan(space, rng)
        if plan != space.exact:
            found[plan] = None
    return [*found]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks of numbers that are all different."""
    ranks, others = (np.argsort(np.argsort(values)) for values in (one, other))
    return float(np.corrcoef(ranks, others)[0, 1])


def _row(name: str, promised: Sequence[float], realised: Sequence[float]) -> dict[str, Any]:
    off = 100 * np.abs(np.array(promised) / np.array(realised) - 1)
    worst = np.sort(off)[-max(1, len(off) // 10) :].mean()
    return {"name": name, "spearman": spearman(promised, realised), "error": float(np.median(off)), "worst": worst}


def measured() -> list[dict[str, Any]]:
    """What each plan was promised to do and take, and what it does and takes."""
    original = exact_copy(trained(SIZE_PX, global_pool=""))
    space, latency = space_of(original), PlanCosts(original, "latency")
    fitted, tried = images_to_learn_from(SIZE_PX)
    pieces = make_pieces(original, fitted, space)
    trials = Trials.on(pieces, tried)
    with WorkProgress("trying changes", "changes", len(tries(space))) as progress:
        product = measure_changes(trials, space, progress)
    added: Forecast = measure_changes(
        Adding(pieces, trials.starts, trials.wanted, trials.known), space, WorkProgress("", "", 1, enabled=False)
    )
    plans = random_plans(space, np.random.default_rng(SEED))
    images = example(original, SPEED_BATCH[SIZE_PX])
    models = {plan: pieces.model(plan) for plan in (space.exact, *plans)}
    calls = {str(plan): inference_call(model.forward_features, images) for plan, model in models.items()}
    timings = time_interleaved(calls, CPU, REPEATS)
    exact_ms, exact_ns = timings[str(space.exact)].minimum_ms, latency.of(space.exact)
    return [
        {
            "plan": str(plan),
            "added": added.of(plan),
            "product": product.of(plan),
            "damage": trials.distance(plan),
            "predicted": latency.of(plan) / exact_ns,
            "time": timings[str(plan)].minimum_ms / exact_ms,
        }
        for plan in plans
    ]


def main() -> None:
    """Writes promises.jsonl, promises.md and promises.png."""
    lines = measured()
    write_durably(HERE / "promises.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    columns = {key: [line[key] for line in lines] for key in lines[0]}
    rows = [
        _row("damage, changes added up", columns["added"], columns["damage"]),
        _row("damage, each change of what others leave", columns["product"], columns["damage"]),
        _row("time", columns["predicted"], columns["time"]),
    ]
    machine = describe_machine(CPU)
    caption = (
        f"{len(lines)} random plans at {SIZE_PX} px: merges, hidden units by eighths, none, linear and skip. "
        f"{machine['device']}, {machine['threads']} threads, {machine['date']}."
    )
    table = to_markdown(rows, COLUMNS, caption)
    write_durably(HERE / "promises.md", f"# Promises, and what comes\n\n{table}".encode())
    promises_figure(lines, caption, HERE / "promises.png")
