"""What each choice in merging tokens is worth: exact models of the study under `exact-r*6`, without any training.

A variant changes one thing of vitreuse/model/merge.py, by hooks, in five teachers of each task of configs/study. It
prints the share of held-out images that are still right, and the time of a ViT-S/16 at 224 px under `exact-13*12`:

    python -m train.sweep configs/study/{digits,pointer}_exact.yaml seeds=5 runs=runs/study jobs=2
    python -m docs.study.merging
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.table import Column, to_markdown
from vitreuse import convert
from vitreuse.cli.source import sample_images
from vitreuse.compress.recording import project_heads
from vitreuse.cost.measure import inference_call, time_interleaved
from vitreuse.files.networks import resolve_targets
from vitreuse.model.merge import Merging, TokenMerging, merge

TEACHERS = Path("runs/study")
TASKS, SEEDS, MERGED = ("digits", "pointer"), range(5), (1, 2)
TIMED, CPU = "vit_small_patch16_224", torch.device("cpu")


class Variant(NamedTuple):
    """What differs from vitreuse/model/merge.py.

    Attributes:
        name: In the table.
        likeness: By what tokens are likened: keys, values, or tokens themselves.
        split: How sets A and B are drawn: alternating, or once at random for each number of tokens.
        order: Of what is left: kept, or A before B.
        weighs: Whether attention weighs keys by sizes.
        before: Whether tokens merge before the layer, by its own keys, and not between its attention and its MLP.
    """

    name: str
    likeness: str = "keys"
    split: str = "alternating"
    order: str = "kept"
    weighs: bool = True
    before: bool = False


VARIANTS = (
    Variant("as built"),
    Variant("without log(size)", weighs=False),
    Variant("by values", likeness="values"),
    Variant("by tokens", likeness="tokens"),
    Variant("before the layer", before=True),
    Variant("random halves", split="random"),
    Variant("A before B", order="A before B"),
)


class VariedMerging(TokenMerging):
    """Merging under a variant; slower than the library's, since it can do all of them."""

    def __init__(self, variant: Variant, num_merged: int, num_prefix_tokens: int) -> None:
        super().__init__(num_merged, num_prefix_tokens)
        self.variant = variant

    def forward(
        self, x: Tensor, likeness: Tensor, sizes: Tensor | None, places: Tensor | None, wants_places: bool = True
    ) -> Any:
        """As the library's."""
        sizes = torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes
        merging = self.choose(x if self.variant.likeness == "tokens" else likeness)
        x, sizes = merge(x, sizes, merging)
        return x, sizes, merging.moved() if places is None else merging.moved().gather(1, places)

    def choose(self, likeness: Tensor) -> Merging:
        """Which tokens merge into which."""
        num_tokens, prefix = likeness.shape[1], self.num_prefix_tokens
        patches = torch.arange(prefix, num_tokens)
        if self.variant.split == "random":
            patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(num_tokens))]
        directions = F.normalize(likeness.float(), dim=-1)
        strength, partner = (directions[:, patches[::2]] @ directions[:, patches[1::2]].mT).max(-1)
        strongest = strength.sort(dim=-1, descending=True, stable=True).indices[:, : self.num_merged]
        merged, tied = patches[::2][strongest], patches[1::2][partner.gather(1, strongest)]
        rank = torch.arange(num_tokens).expand(len(merged), -1).clone()
        if self.variant.order == "A before B":
            rank[:, patches[1::2]] += num_tokens
        order = rank.scatter(1, merged, 3 * num_tokens).argsort(dim=1, stable=True)
        moved = order.argsort(1)
        into = moved.gather(1, tied)
        return Merging(order[:, : num_tokens - self.num_merged], merged, into)


@contextmanager
def varied(model: Any, variant: Variant) -> Iterator[None]:
    """A model whose merges follow a variant inside the block; it stays changed."""
    with ExitStack() as hooks:
        for block in model.blocks:
            merging = VariedMerging(variant, block.spec.merged, model.num_prefix_tokens)
            block.merge = None if variant.before else merging
            if variant.before:
                hooks.callback(block.register_forward_pre_hook(partial(_merge_before, merging)).remove)
            if variant.likeness == "values":
                hooks.callback(block.attn.register_forward_hook(_likened_by_values).remove)
            if not variant.weighs:
                held: list[Any] = []  # the sizes, while the attention does not see them
                hooks.callback(block.attn.register_forward_pre_hook(partial(_without_sizes, held)).remove)
                hooks.callback(block.attn.register_forward_hook(partial(_with_sizes, held)).remove)
        yield


def _merge_before(merging: VariedMerging, block: Any, args: Any) -> Any:
    x, carry, *rest = args
    likeness = project_heads(block.attn, block.norm1(x)).k.mean(1)
    x, sizes, places = merging(x, likeness, carry.sizes, carry.places)
    return x, carry._replace(sizes=sizes, places=places), *rest


def _likened_by_values(attn: Any, args: Any, output: Any) -> Any:
    y, carry = output
    return y, carry._replace(likeness=project_heads(attn, args[0]).v.mean(1))


def _without_sizes(held: list[Any], attn: Any, args: Any) -> Any:
    held.append(args[1].sizes)
    return args[0], args[1]._replace(sizes=None), *args[2:]


def _with_sizes(held: list[Any], attn: Any, args: Any, output: Any) -> Any:
    y, carry = output
    return y, carry._replace(sizes=held.pop())


@torch.inference_mode()
def right(task: str, seed: int, num_merged: int | None, variant: Variant) -> float:
    """Percent of a task's held-out images that a teacher says right under merging, under none for None."""
    (target,) = resolve_targets([str(TEACHERS / f"{task}_exact-seed{seed}")])
    model: Any = target.load().eval()
    sample = sample_images(target, model, None, 10**6)
    correct = count = 0
    plan = "exact*6" if num_merged is None else f"exact-{num_merged}*6"
    merged = convert(model, plan).model
    with varied(merged, variant) if num_merged else ExitStack():
        for images, labels in sample.batches(256):
            correct += int((merged(images).argmax(1) == labels).sum())
            count += len(labels)
    return 100 * correct / count


def milliseconds() -> dict[str, float]:
    """The minimum time of a batch of 8 by variant, in one run of turns, and of the library's own merging."""
    images, calls = torch.randn(8, 3, 224, 224), {}
    with ExitStack() as entered, torch.inference_mode():
        for variant in (None, *VARIANTS):
            model: Any = timm.create_model(TIMED.replace("vit_", "vit_merge_"), plan="exact-13*12").eval()
            if variant is not None:
                entered.enter_context(varied(model, variant))
            calls["the library's" if variant is None else variant.name] = inference_call(model, images)
        timings = time_interleaved(calls, CPU, 10)
    return {name: timing.minimum_ms for name, timing in timings.items()}


def main() -> None:
    """Prints the table."""
    columns = [Column("name", "variant")]
    columns += [Column(f"{task}-{r}", f"{task}, exact-{r}*6 (%)", ".2f") for task in TASKS for r in MERGED]
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {"name": variant.name}
        for task in TASKS:
            for r in MERGED:
                row[f"{task}-{r}"] = sum(right(task, seed, r, variant) for seed in SEEDS) / len(SEEDS)
        rows.append(row)
        print(row, flush=True)
    teachers = {task: sum(right(task, seed, None, VARIANTS[0]) for seed in SEEDS) / len(SEEDS) for task in TASKS}
    print(to_markdown(rows, columns, f"Teachers: {teachers}."))
    print(milliseconds())


if __name__ == "__main__":
    main()
