"""Tokens merged into others that are like them: fewer rows for all that follows, without a word trained.

Patch tokens alternate between set A, the first of them, and set B; prefix tokens (class, distillation, registers) are
in neither and never merge. Each token of A is tied to the token of B that is most like it, and the r strongest ties are
merged into the tokens of B; all that are left keep their order. Of equals the first is taken, on every device.

After ToMe (Bolya et al., 2022, arXiv 2210.09461), where tokens do not keep their order.

Shapes: B images, N tokens, D head dim, C channels, r merged tokens, N0 tokens of the first layer.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple
from warnings import warn

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.plan import Plan
from vitreuse.plan.language import num_mergeable

DECIDED_BY = 1e-5  # of a cosine in float32, some ten times the rounding that a dozen layers add up


class Merging(NamedTuple):
    """Which tokens of some images merge into which.

    Attributes:
        kept: (B, N - r), the tokens that are left, by their places before, in order.
        merged: (B, r), those that are not.
        into: (B, r), the places after of those that they become part of.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor

    def moved(self) -> Tensor:
        """(B, N), the place after of every token."""
        places = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        moved = self.kept.new_zeros(self.kept.shape[0], self.kept.shape[1] + self.merged.shape[1])
        return moved.scatter_(1, self.kept, places).scatter_(1, self.merged, self.into)


class TokenMerging(nn.Module):
    """Merges patch tokens of a layer, as its attention says that they are alike.

    Shape: x (B, N, C), likeness (B, N, D), sizes (B, N) and places (B, N0) or None before the first merge, to x
    (B, N - r, C), sizes (B, N - r) and places (B, N0), None where nobody asks for them; r is at most half of the patch
    tokens.
    Exact when: the tokens that merge are equal, and the layers after it weigh keys by sizes.
    Differs from the paper: what is left keeps its order.
    Cost: N^2 D / 4 multiply-adds an image for the similarities of half of the patch tokens with the other half.
    Paper: Bolya et al., 2022, ToMe (arXiv 2210.09461).
    """

    def __init__(self, num_merged: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_merged = num_merged
        self.num_prefix_tokens = num_prefix_tokens

    def forward(
        self, x: Tensor, likeness: Tensor, sizes: Tensor | None, places: Tensor | None, wants_places: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Fewer tokens, how many of the first layer's each is made of, and where each of those went."""
        num_merged, num_prefix_tokens = self.num_merged, self.num_prefix_tokens
        return merge_tokens(x, likeness, sizes, places, wants_places, num_merged, num_prefix_tokens)

    def macs(self, num_patches: int, head_dim: int) -> int:
        """MACs of the similarities of one image's patch tokens."""
        return (num_patches // 2) * (num_patches - num_patches // 2) * head_dim if num_patches > 1 else 0

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.num_merged}, num_prefix_tokens={self.num_prefix_tokens}"


@torch.fx.wrap
@register_notrace_function
def merge_tokens(
    x: Tensor,
    likeness: Tensor,
    sizes: Tensor | None,
    places: Tensor | None,
    wants_places: bool,
    num_merged: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Merges tokens; see TokenMerging."""
    num_merged = num_mergeable(num_merged, x.shape[1] - num_prefix_tokens)
    if num_merged == 0:
        return x, sizes, places
    if sizes is None:
        sizes = torch.ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    merging = choose_merging(likeness, num_prefix_tokens, num_merged)
    x, sizes = merge(x, sizes, merging)
    if not wants_places:
        return x, sizes, None
    return x, sizes, merging.moved() if places is None else merging.moved().gather(1, places)


def cut_plan(plan: Plan, num_patches: int) -> Plan:
    """The plan that merges as many tokens as another does in images of so many patches."""
    merged = (before - behind for before, behind in pairwise(plan.patches_left(num_patches)))
    return Plan(tuple(replace(spec, merged=next(merged)) for spec in plan))


@torch.fx.wrap
@register_notrace_function
def warn_if_cut(plan: Plan, num_patches: int) -> None:
    """Warns where images have fewer patch tokens than a plan merges; once under Python's filter, whoever calls."""
    if torch.compiler.is_compiling() or not any(spec.merged for spec in plan):
        return
    for layer, (spec, left) in enumerate(zip(plan, plan.patches_left(num_patches), strict=False)):
        if spec.merged > num_mergeable(spec.merged, left):
            said = f"layer {layer} of plan '{plan}' merges {spec.merged} tokens and images of this size leave it {left}"
            warn(f"{said}: half of them merge there, and as many as can in later layers.", stacklevel=1)
            return


@torch.no_grad()
def choose_merging(likeness: Tensor, num_prefix_tokens: int, num_merged: int) -> Merging:
    """The r strongest ties of tokens by the cosine of what they are likened by, (B, N, D), in float32."""
    ties = ties_of(likeness, num_prefix_tokens)
    strength, partner = ties.max(-1)  # the first of equals, as torch promises
    strongest = strength.sort(dim=-1, descending=True, stable=True).indices[:, :num_merged]
    merged = 2 * strongest + num_prefix_tokens
    tied = 2 * partner.gather(1, strongest) + (num_prefix_tokens + 1)
    goes = likeness.new_zeros(likeness.shape[:2], dtype=torch.int64).scatter_(1, merged, 1)  # batched under vmap too
    kept = goes.sort(dim=-1, stable=True).indices[:, : likeness.shape[1] - num_merged]
    return Merging(kept, merged, tied - goes.cumsum(1).gather(1, tied))


def ties_of(likeness: Tensor, num_prefix_tokens: int) -> Tensor:
    """How much each token of A is like each of B, (B, A, B)."""
    with _without_autocast(likeness.device.type):
        directions = F.normalize(likeness[:, num_prefix_tokens:].float(), dim=-1)
        return torch.bmm(directions[:, ::2], directions[:, 1::2].transpose(1, 2))


def choice_margins(likeness: Tensor, num_prefix_tokens: int, num_merged: int) -> Tensor:
    """For each image (B,) by how much of a cosine its choice of merges was decided.

    The least of what is between the r-th tie and the next, and between the best and the second best token for each of
    those that merge; infinite where there is no other choice.
    """
    ties = ties_of(likeness, num_prefix_tokens)
    best = F.pad(ties, (0, 1), value=-math.inf).topk(2).values  # (B, A, 2)
    strongest = best[..., 0].topk(num_merged).indices
    leads = (best[..., 0] - best[..., 1]).gather(1, strongest)
    strengths = F.pad(best[..., 0], (0, 1), value=-math.inf).topk(num_merged + 1).values
    return torch.cat([leads, strengths[:, -2:-1] - strengths[:, -1:]], dim=1).amin(1)


@torch.no_grad()
def are_decided(model: nn.Module, images: Tensor) -> Tensor:
    """For each image (B,) whether no choice of merges in a run of the model is so near that rounding may flip it.

    Where it may, another program, device or batch size rightly comes to other tokens: comparisons leave the image out.
    """
    decided = torch.ones(len(images), dtype=torch.bool, device=images.device)

    def look(module: TokenMerging, inputs: tuple[Any, ...]) -> None:
        x, likeness, *_ = inputs
        num_merged = num_mergeable(module.num_merged, x.shape[1] - module.num_prefix_tokens)
        if num_merged > 0:
            decided.logical_and_(choice_margins(likeness, module.num_prefix_tokens, num_merged) > DECIDED_BY)

    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, TokenMerging)]
    try:
        if hooks:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return decided


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context whose products are of the dtype of their factors."""
    is_on = device_type != "meta" and torch.is_autocast_enabled(device_type)  # which has none
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def merge(x: Tensor, sizes: Tensor, merging: Merging) -> tuple[Tensor, Tensor]:
    """Tokens (B, N - r, C) and their sizes (B, N - r): each is the mean, weighted by sizes, of what it is made of.

    A token d that others become part of moves by the sum of (x_a - x_d) s_a / s: only r rows are computed.
    """
    kept, merged, into = merging
    gone_sizes = sizes.gather(1, merged)
    sizes = sizes.gather(1, kept).scatter_add_(1, into, gone_sizes)
    share = (gone_sizes / sizes.gather(1, into)).to(x.dtype)
    left, gone, rows = rows_of_images(x, kept), rows_of_images(x, merged), _in_batch(into, kept.shape[1])
    change = gone.sub_(left.index_select(0, rows)).mul_(share.view(-1, 1))
    return left.index_add_(0, rows, change).view(kept.shape + x.shape[2:]), sizes


@torch.fx.wrap
@register_notrace_function
def unmerge(x: Tensor, places: Tensor) -> Tensor:
    """All tokens (B, N0, C) of merged ones (B, N, C), each that of the place (B, N0) where it went."""
    return rows_of_images(x, places).unflatten(0, places.shape)


def rows_of_images(x: Tensor, numbers: Tensor) -> Tensor:
    """Rows (B * n, C) of x (B, N, C) by numbers (B, n); whole rows are copied, 15 times as fast as torch.gather."""
    return x.flatten(0, 1).index_select(0, _in_batch(numbers, x.shape[1]))


def _in_batch(numbers: Tensor, num_tokens: int) -> Tensor:
    """Numbers (B, n) of tokens of each image as numbers (B * n,) of those of the whole batch."""
    if type(numbers.shape[0]) is int and numbers.shape[0] == 1:
        return numbers[0]
    first = torch.arange(0, numbers.shape[0] * num_tokens, num_tokens, device=numbers.device)
    return (numbers + first[:, None]).flatten()
