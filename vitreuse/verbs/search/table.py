"""What a search found, as tables and sentences."""

import sys
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from rich.console import Group
from rich.table import Table

from vitreuse.cost.plan_costs import METRICS
from vitreuse.io.tables import table_of, titled
from vitreuse.verbs.convert import AGREEMENT

MAX_ROWS = 12  # of the front
ESTIMATES = (
    "predicted is put together from times of single layers, forecast from what single changes did; where they differ "
    "from the times as fast and the distance beside them, those were measured"
)


def table(result: dict[str, Any]) -> Group:
    """The front, thinned, what was measured, and, of a command, how to go on."""
    of_split = f" of {result['split']}" if "split" in result else ""
    title = f"{result['name']}, {result['num_images']:,} images{of_split}, words {','.join(result['words'])}"
    headings = ("", f"{METRICS[result['metric']]} / exact", "forecast damage", "plan")
    front = thinned(result["front"])
    shown = table_of(headings, (("", *_cells(row)) for row in front), ("", "plan"))
    command = [result["command"]] if "command" in result else []
    return titled(title, shown, _measured(result), *_sentences(result), *command)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['share']:.3f}", f"{row['damage']:.3g}", row["plan"]


def _measured(result: dict[str, Any]) -> Table:
    """The chosen model and others, measured on images that nothing was chosen on."""
    share = f"{METRICS[result['metric']]} / exact"
    headings = ("measured", share, "as it is", "times as fast", "predicted", "distance", "forecast", "plan")
    rows = [
        (
            name,
            f"{row['share']:.3f}",
            f"{row['measured_share']:.3f}",
            f"{row['speedup']:.2f}",
            "-" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}",
            f"{row['distance']:.3g}",
            f"{row['damage']:.3g}",
            row["plan"],
        )
        for name, row in result["audited"].items()
    ]
    return table_of(headings, rows, ("measured", "plan"))


def _sentences(result: dict[str, Any]) -> list[str]:
    """What a user needs to know of the chosen model, and how it was found."""
    chosen, metric = result["audited"]["chosen"], METRICS[result["metric"]]
    found = {name: value for name, value in chosen["agreement"].items() if value is not None}
    said = [form.format(found[name]) for name, form in AGREEMENT.items() if name in found]
    how = f"time was up after {result['minutes']:g} minutes"
    if result["is_best"]:
        how = "no combination of the changes that were tried improves it"
    elif not result["minutes"]:
        how = "no minutes were given to improve it"
    start, delivered = result["start"], result["delivered"]
    healing = [of_healing(result["healing"])] if "healing" in result else []
    over = []
    if round(chosen["measured_share"], 2) > result["budget"]:
        over = [f"over the budget of {result['budget']:g}: {chosen['measured_share']:.3f} of the {metric} as it is"]
    predicted = []
    if result["costs_of"] is not None:
        predicted = [f"times are predicted by those of {result['costs_of']}: vitreuse tune measures another device"]
    return [
        ESTIMATES,
        *predicted,
        f"chosen: {', '.join(said)} over {found['num_images']:,} images on which nothing was chosen, "
        f"{chosen['speedup']:.2f} times as fast as the best plain model in batches of {result['batch_size_timed']}",
        f"distance of answers on the images that plans were tried on: {start['distance']:.3g} for the best of the "
        f"front (forecast {start['damage']:.3g}), {result['distance']:.3g} after {result['num_tried']:,} trials: {how}",
        f"handed over: {delivered['name']}, the nearest of those that were made, {delivered['distance']:.3g} there",
        *over,
        *healing,
    ]


def of_healing(healing: dict[str, Any]) -> str:
    """What a short healing regained."""
    share = 100 * (1 - healing["after"] / max(healing["before"], sys.float_info.min))
    regained = f"regained {share:.0f} % of the distance" if share > 0 else "regained nothing"
    return (
        f"healing: {healing['num_steps']:,} steps in {healing['seconds'] / 60:.1f} minutes at a learning rate of "
        f"{healing['rate']:g}, the best of three, {regained} on the images on which nothing was chosen: "
        f"{healing['before']:.3g} before, {healing['after']:.3g} after"
    )


def thinned(front: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a front, evenly spread over its cost, with the first and the last one."""
    low, high = front[0]["cost"], front[-1]["cost"]
    steps = [low + (high - low) * step / (MAX_ROWS - 1) for step in range(MAX_ROWS)]
    kept = [max((row for row in front if row["cost"] <= step), key=itemgetter("cost")) for step in steps]
    return sorted({row["cost"]: row for row in kept}.values(), key=itemgetter("cost"))
