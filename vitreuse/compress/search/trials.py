"""Plans tried on images: how far what they say is from what the original says, without anything being trained.

A plan is put together from pieces and run from where it parts from one that has been run, so that a change of a late
layer costs little. What was tried is known by the plan's text, in a file too if one is given: a search that was killed
goes on where it was, and has used up the time that it had used.

Shapes: B images, N tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vitreuse
from vitreuse.attention import EMPTY_CARRY, Carry
from vitreuse.compress.closed_form import bias_before
from vitreuse.compress.fidelity import answer_of_tokens, output_distance
from vitreuse.compress.search.pieces import Pieces
from vitreuse.io.durable import write_durably
from vitreuse.model.block import all_tokens
from vitreuse.model.class_names import has_classes
from vitreuse.model.keywords import read_keywords
from vitreuse.plan import Plan

WORST = 1e6  # a distance beyond all others, of answers that are no numbers


class State(NamedTuple):
    """Some images before a layer: tokens (B, N, C), the carry, and the grid where it is not the built one."""

    tokens: Tensor
    carry: Carry
    grid: tuple[int, int] | None


class Trial(NamedTuple):
    """How far a plan's answers are from the original's, a mean over the images, and how long it took to find out."""

    distance: float
    seconds: float


@dataclass(frozen=True)
class Standing:
    """A plan that was run: its images before each of its layers, by layer and batch."""

    plan: Plan
    states: Sequence[Sequence[State]]


@dataclass
class Trials:
    """Images on which plans are tried.

    Attributes:
        pieces: What plans are put together from.
        starts: The images before the first layer, batch by batch.
        wanted: What the original says of them.
        known: What was found, by the plan's text.
        path: A file that takes it, a line each.
        seconds_saved: What the trials took that an earlier start made and this one has asked for.
        asked: The texts of the plans that this start has asked for.
    """

    pieces: Pieces
    starts: Sequence[State]
    wanted: Sequence[Tensor]
    known: dict[str, Trial] = field(default_factory=dict)
    path: Path | None = None
    seconds_saved: float = 0.0
    asked: set[str] = field(default_factory=set)

    @classmethod
    @torch.no_grad()
    def on(cls, pieces: Pieces, batches: Iterable[Tensor], path: Path | None = None) -> Trials:
        """Trials on images (B, channels, rows, columns), with what a file of earlier ones holds."""
        original, starts = pieces.original, []
        for images in batches:
            tokens, grid = original.embed(images.to(next(original.parameters()).device))
            starts.append(State(tokens, EMPTY_CARRY, grid))
        exact = Plan(tuple(block.spec for block in original.blocks))
        wanted = [answer for answer, _ in (_run(pieces, original, exact, 0, start) for start in starts)]
        known = {} if path is None else _read(path)
        return cls(pieces, starts, wanted, known, path)

    @property
    def saturate(self) -> bool:
        """Whether distances end at 1, since answers are tokens, and are compared by cosines."""
        return self.wanted[0].ndim == 3

    def distance(self, plan: Plan, standing: Standing | None = None) -> float:
        """How far a plan's answers are from the original's, see output_distance, a mean over the images.

        Args:
            plan: What is tried.
            standing: One that was run, from whose images the plan goes on where it parts from it.
        """
        text = str(plan)
        if text not in self.known:
            first = 0 if standing is None else parting(plan, standing.plan)
            states, begun = self.starts if standing is None else standing.states[first], time.monotonic()
            self._learn(text, self._run_from(plan, first, states)[0], begun)
        elif text not in self.asked:
            self.seconds_saved += self.known[text].seconds
        self.asked.add(text)
        return self.known[text].distance

    def run(self, plan: Plan) -> Standing:
        """Runs a plan from the start, and keeps its images before each layer."""
        begun = time.monotonic()
        distances, states = self._run_from(plan, 0, self.starts)
        if str(plan) not in self.known:
            self._learn(str(plan), distances, begun)
        self.asked.add(str(plan))
        return Standing(plan, states)

    @torch.no_grad()
    def _run_from(self, plan: Plan, first: int, states: Sequence[State]) -> tuple[Tensor, list[list[State]]]:
        """The distances of a plan, from images before a layer on, and its images before that layer and all behind."""
        model, passed = self.pieces.model(plan), []
        distances = []
        for state, wanted in zip(states, self.wanted, strict=True):
            answer, on_the_way = _run(self.pieces, model, plan, first, state)
            passed.append(on_the_way)
            distances.append(output_distance(self.pieces.original, wanted, answer))
        by_layer = [list(batches) for batches in zip(*passed, strict=True)]
        return torch.cat(distances), by_layer

    def _learn(self, text: str, distances: Tensor, begun: float) -> None:
        mean = float(distances.double().mean())
        self.known[text] = trial = Trial(mean if math.isfinite(mean) else WORST, time.monotonic() - begun)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"plan": text, **trial._asdict()}) + "\n")


def _run(pieces: Pieces, model: Any, plan: Plan, first: int, state: State) -> tuple[Tensor, list[State]]:
    """What a model under a plan says of images that are before one of its layers, and the images before each layer."""
    tokens, carry, grid = state
    reads_class_rows = model.reads_class_rows and has_classes(pieces.original)
    passed, rows = [], None
    for layer in range(first, len(plan)):
        passed.append(State(tokens, carry, grid))
        mean = pieces.mean_before(layer, plan[layer])
        if mean is not None and bias_before(model, layer) is None:
            mean = None  # nothing of this plan could carry it
        if layer == len(plan) - 1 and reads_class_rows:
            rows = model.num_class_rows
        tokens, carry = model.blocks[layer](tokens if mean is None else tokens + mean, carry, grid, rows)
    tokens = tokens if rows is not None else all_tokens(tokens, carry)
    return answer_of_tokens(pieces.original, model.norm(tokens)), passed


def parting(plan: Plan, other: Plan) -> int:
    """The first layer before which two plans have different images: the first that differs, or the anchor whose map a
    reuse layer behind it reads."""
    pairs = zip(plan, other, strict=True)
    first = next((layer for layer, (spec, its) in enumerate(pairs) if spec != its), len(plan) - 1)
    while first > 0 and (plan.num_readers[first - 1] or other.num_readers[first - 1]):
        first -= 1
    return first


def begin_trials(path: Path, original: Any, fitted: Iterable[Tensor], tried: Iterable[Tensor], rows: object) -> None:
    """Begins a file of trials, by a first line that says what they are of, or finds that it is of the same.

    Args:
        path: The file.
        original: The model that is searched.
        fitted: Batches of images that its pieces are fitted on.
        tried: Batches that plans are tried on.
        rows: Which rows of maps heads are matched by, if any are.

    Raises:
        ValueError: It is of another model or version, or of other images.
    """
    weights = (value for _, value in sorted(original.state_dict().items()))
    about = {"weights": digest(weights), "fitted": digest(fitted), "tried": digest(tried), "rows": rows}
    about["vitreuse"] = vitreuse.__version__  # another one may fit otherwise
    name, keywords = read_keywords(original)
    about["model"] = f"{name}, {keywords}, classes: {has_classes(original)}"
    line = json.dumps(about)
    first = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    if first and first != line:
        of = f"{path} has trials of another model or version of vitreuse, or on other images"
        raise ValueError(f"{of}, by its first line: give another folder, or the same arguments.")
    if not first:
        write_durably(path, (line + "\n").encode())


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the numbers in tensors, one after the other."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(path: Path) -> dict[str, Trial]:
    """The trials in a file, whose last line may be cut short, and is then ended."""
    found = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            trial = json.loads(line)
            found[trial["plan"]] = Trial(trial["distance"], trial["seconds"])
        except (ValueError, LookupError, TypeError):
            continue
    return found
