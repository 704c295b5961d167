"""``vitreuse search MODEL --data DIR --budget SHARE``: the plan of least damage to a trained model within a budget."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from rich.console import Group

from vitreuse.cli.console import add_dtype, add_output, table_of, titled
from vitreuse.cli.plots import front_plot, prepare_folder
from vitreuse.cli.source import Source, add_source_arguments, default_words, load_source, measure, rows_remarks, words
from vitreuse.compress.damage import check_specs
from vitreuse.compress.row_sample import count_rows
from vitreuse.compress.search import Candidate, least_cost, score, search
from vitreuse.cost.plan_costs import METRICS, PlanCosts, plan_costs
from vitreuse.io.durable import write_durably
from vitreuse.plan import EXACT, PRESETS, Plan, Spec, preset_plan

HELP = "find the plan that does a trained model the least damage at a share of its cost"
MAX_ROWS = 12  # of the front, on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser, split=None)
    meaning = "the most that the plan may cost, as a share of the exact model; default: %(default)s"
    parser.add_argument("--budget", type=_share, default=0.75, metavar="SHARE", help=meaning)
    meaning = (
        "what it is a share of: macs, multiply-adds that the methods need; latency, inference time by what vitreuse "
        "tune measured; memory, activations that a training step keeps; default: %(default)s"
    )
    parser.add_argument("--metric", choices=METRICS, default="macs", help=meaning)
    add_dtype(parser, "latency", default=None)
    meaning = "what a layer may become; default: exact,reuse,lowrank:64,span:7,none, less for few patches"
    parser.add_argument("--words", type=_words_with_exact, metavar="TEXT", help=meaning)
    add_output(parser, "write search.json and front.png, damage over cost")


def _share(text: str) -> float:
    """A budget, from the command line."""
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of an exact model's cost: give a number above 0, up to 1")
    return share


def _words_with_exact(text: str) -> tuple[Spec, ...]:
    specs = tuple(dict.fromkeys(words(text)))
    if EXACT not in specs:
        raise argparse.ArgumentTypeError(f"{text} is without exact, which layers are that stay as they are: add it")
    return specs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The front of plans, the chosen one, and the presets beside it."""
    if args.dtype is not None and args.metric != "latency":
        raise ValueError(f"--dtype has no effect on {args.metric}: leave it out, or give --metric latency.")
    prepare_folder(args.output)
    source = load_source(args)
    specs = args.words or (EXACT, *default_words(source.model))
    check_specs(source.model, specs)
    costs, depth = _costs(args, source, specs), len(source.model.blocks)
    exact = costs.of(Plan((EXACT,) * depth))
    _refuse_unreachable(args, source, specs, costs, exact)
    _, damage = measure(source, [spec for spec in specs if spec != EXACT])
    found = search(damage, costs, specs, depth, args.budget)
    assert found is not None
    result = {
        "name": source.target.label,
        "training": source.training,
        "metric": args.metric,
        "budget": args.budget,
        "words": [str(spec) for spec in specs],
        "num_images": len(source.sample),
        "rows": count_rows(source.model, source.num_rows),
        "split": source.split,
        "chosen": _row(found.chosen, exact),
        "protected": None if found.protected is None else _row(found.protected, exact),
        "command": _conversion(args, source, found.chosen),
        "presets": {name: _row(score(plan, damage, costs), exact) for name, plan in _presets(specs, depth).items()},
        "front": [_row(candidate, exact) for candidate in found.front],
    }
    if args.output is not None:
        write_durably(args.output / "search.json", json.dumps(result).encode())
        write_durably(args.output / "front.png", front_plot(result))
    return result


def _costs(args: argparse.Namespace, source: Source, specs: Sequence[Spec]) -> PlanCosts:
    return plan_costs(source.model, specs, args.metric, source.device, getattr(torch, args.dtype or "float32"))


def _refuse_unreachable(
    args: argparse.Namespace, source: Source, specs: tuple[Spec, ...], costs: PlanCosts, exact: int
) -> None:
    """Raises ValueError where no plan meets the budget, with the least share and the word by which it would be less."""
    depth = len(source.model.blocks)
    least = least_cost(costs, specs, depth)
    if least <= args.budget * exact:
        return
    wider = {spec: (*specs, spec) for spec in default_words(source.model) if spec not in specs}
    lower = {least_cost(_costs(args, source, more), more, depth): spec for spec, more in wider.items()}
    best = min(lower, default=least)
    hint = f", and {_up(best / exact)} with {lower[best]} too" if best < least else ""
    raise ValueError(
        f"no plan of {','.join(map(str, specs))} has {args.budget:g} of the {METRICS[args.metric]} of "
        f"{source.target.label}: the least is {_up(least / exact)}{hint}: raise --budget."
    )


def _up(share: float) -> str:
    """A share that can be given as a budget."""
    return f"{math.ceil(1000 * share) / 1000:g}"


def _presets(specs: Sequence[Spec], depth: int) -> dict[str, Plan]:
    """The presets that the words can spell, with the words' own numbers."""
    own = {spec.word: spec for spec in reversed(specs)}
    plans = {method: preset_plan(method, depth) for method in PRESETS}
    return {
        method: Plan(tuple(own[spec.word] for spec in plan))
        for method, plan in plans.items()
        if all(spec.word in own and not spec.merged for spec in plan)
    }


def _conversion(args: argparse.Namespace, source: Source, chosen: Candidate) -> str:
    """The command that goes on from here."""
    given = {"--checkpoint": args.checkpoint, "--image-size": args.image_size, "--data": args.data}
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    folder = f"{source.target.label}-{args.metric}-{args.budget:g}"
    return shlex.join(["vitreuse", "convert", args.model, *options, "--plan", str(chosen.plan), "-o", folder])


def _row(candidate: Candidate, exact: int) -> dict[str, Any]:
    return {
        "plan": str(candidate.plan),
        "cost": candidate.cost,
        "share": candidate.cost / exact,
        "damage": candidate.damage,
        "num_changed": candidate.num_changed,
    }


def render(result: dict[str, Any]) -> Group:
    """The front for a terminal, thinned, the presets, and how to go on."""
    title = f"{result['name']}, {result['num_images']:,} images of {result['split']}, words {','.join(result['words'])}"
    headings = ("", f"{METRICS[result['metric']]} / exact", "damage", "plan")
    front = thinned(result["front"], result["chosen"])
    rows = (("chosen" if row == result["chosen"] else "", *_cells(row)) for row in front)
    table = table_of(headings, rows, ("", "plan"))
    table.add_section()
    for method, row in result["presets"].items():
        table.add_row(method, *_cells(row))
    return titled(title, table, _protection(result), *rows_remarks(result["rows"]), result["command"])


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['share']:.3f}", f"{row['damage']:.3g}", row["plan"]


def _protection(result: dict[str, Any]) -> str:
    """What became of the first and the last layer."""
    protected, chosen = result["protected"], result["chosen"]
    if protected == chosen:
        return "first and last layer kept exact"
    if protected is None:
        return "first and last layer not kept exact: no plan that keeps them meets the budget"
    return f"first and last layer not kept exact: the best plan with both has a damage of {protected['damage']:.3g}"


def thinned(front: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a front, evenly spread over its cost, with the first, the last and the chosen one."""
    low, high = front[0]["cost"], front[-1]["cost"]
    steps = [low + (high - low) * step / (MAX_ROWS - 2) for step in range(MAX_ROWS - 1)]
    kept = [*(max((row for row in front if row["cost"] <= step), key=itemgetter("cost")) for step in steps), chosen]
    return sorted({row["cost"]: row for row in kept}.values(), key=itemgetter("cost"))
