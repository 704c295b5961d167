"""A trained ViT in pieces: each layer under each word, fitted alone to the original, so that a plan is put together
in a moment and tried. The plan that is chosen in the end is fitted as a whole, by closed_form.py.

Shapes: B images, N tokens, C channels, F hidden units of an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from vitreuse.attention import EMPTY_CARRY
from vitreuse.compress.closed_form import before_scale, embedding_takes_bias
from vitreuse.compress.convert import in_order_of_heads, pooled_projection
from vitreuse.compress.hidden_units import unit_ranking
from vitreuse.compress.recording import inputs_of, layer_pass
from vitreuse.compress.ridge import NormalEquations, Rows, best_fit, equations_of, images_apart, row_weights
from vitreuse.io.progress import WorkProgress
from vitreuse.model.keywords import read_keywords
from vitreuse.model.plan_weights import in_plan
from vitreuse.plan import Plan, Spec

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the ridge; fewer than where a whole plan is fitted, since pieces are many


class Matrix(NamedTuple):
    """What writes into the tokens: a weight (C, inputs), and a bias (C,) where there is one."""

    weight: Tensor
    bias: Tensor | None

    def entries(self, prefix: str) -> dict[str, Tensor]:
        """The same by the keys of a linear layer."""
        return {f"{prefix}.{name}": value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Pieces:
    """What plans are put together from.

    Attributes:
        original: One of ours, with exact layers.
        distances: Between heads, as convert takes them; None leaves heads in their order.
        units: By layer and number of hidden units, those that stay.
        fc2: By the same, the second matrix of the MLP, fitted to what all units write.
        linear: By layer, the affine map that the whole layer is most like.
        proj_bias: By layer, the bias of its attention's output that takes what a missing MLP writes on the average.
        means: By layer and word, none or skip, what it leaves out on the average, (C,).
    """

    original: Any
    distances: Tensor | None = None
    units: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    fc2: dict[tuple[int, int], Matrix] = field(default_factory=dict)
    linear: dict[int, Matrix] = field(default_factory=dict)
    proj_bias: dict[int, Tensor] = field(default_factory=dict)
    means: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def model(self, plan: Plan) -> Any:
        """The model under a plan, in evaluation mode; it shares what it can with the original.

        What a none or skip layer leaves out is not in it: mean_before says what to add to the tokens.
        """
        name, keywords = read_keywords(self.original)
        with torch.device("meta"):
            made = timm.create_model(name, plan=str(plan), **{**keywords, "weight_init": "skip"}).eval()
        num_heads = self.original.blocks[0].attn.num_heads
        state, _ = in_order_of_heads(self.original.state_dict(), plan, num_heads, self.distances)
        units = {
            layer: self.units[layer, spec.hidden]
            for layer, spec in enumerate(plan)
            if spec.hidden and (layer, spec.hidden) in self.units
        }
        adapted, _ = in_plan(state, made, units)
        like = next(self.original.parameters())
        made.load_state_dict({**adapted, **self._fitted(plan), **_pooled(made, like)}, assign=True)
        return made

    def mean_before(self, layer: int, spec: Spec) -> Tensor | None:
        """What is to be added to all tokens before a layer, (C,), since the layer leaves it out."""
        return self.means.get((layer, spec.word))

    def _fitted(self, plan: Plan) -> dict[str, Tensor]:
        """What of a plan is not the original's, by key."""
        found: dict[str, Tensor] = {}
        for layer, spec in enumerate(plan):
            prefix = f"blocks.{layer}"
            if spec.word == "linear":
                found |= self.linear[layer].entries(f"{prefix}.linear")
            elif spec.hidden == 0 and layer in self.proj_bias:
                found[f"{prefix}.attn.proj.bias"] = self.proj_bias[layer]
            elif spec.hidden and (layer, spec.hidden) in self.fc2:
                found |= self.fc2[layer, spec.hidden].entries(f"{prefix}.mlp.fc2")
        return found


def _pooled(model: Any, like: Tensor) -> dict[str, Tensor]:
    """Token projections that pool over the grid, by key, of the dtype and on the device of a tensor."""
    return {
        key: pooled_projection(model.blocks[int(key.split(".")[1])].attn, parameter).to(like)
        for key, parameter in model.named_parameters()
        if key.endswith("_proj") and ".attn." in key
    }


class _Layer(NamedTuple):
    """Some images before a layer of the original and behind it, tokens (B, N, C), what fc2 reads (B, N, F), and whether
    the images are kept aside."""

    before: Tensor
    middle: Tensor
    after: Tensor
    hidden: Tensor
    is_aside: bool


@torch.no_grad()
def fit_pieces(
    original: Any,
    batches: Iterable[Tensor],
    words: Sequence[Spec],
    hidden: Sequence[int],
    distances: Tensor | None,
    progress: WorkProgress,
) -> Pieces:
    """Fits each layer of a trained ViT under each word, alone and on the original's own tokens, without a gradient.

    Args:
        original: One of ours with exact layers.
        batches: Images (B, channels, rows, columns); every fourth is not fitted and decides how strong a ridge is.
        words: Which of linear, skip and none are fitted; others are passed over.
        hidden: Numbers of hidden units that a layer may have.
        distances: See Pieces.
        progress: Told the number of layers that are done.
    """
    pieces, kinds = Pieces(original, distances), {spec.word for spec in words}
    device = next(original.parameters()).device
    states = [(*original.embed(images.to(device)), is_aside) for images, is_aside in images_apart(batches)]
    for layer, block in enumerate(original.blocks):
        seen = [_seen(block, tokens, grid, is_aside) for tokens, grid, is_aside in states]
        takes_mean = layer > 0 or embedding_takes_bias(original)
        if "none" in kinds and takes_mean:
            pieces.means[layer, "none"] = _mean(of.middle - of.before for of in seen).to(seen[0].before)
        if "skip" in kinds and takes_mean:
            pieces.means[layer, "skip"] = _mean(of.after - of.before for of in seen).to(seen[0].before)
        if "linear" in kinds:
            pieces.linear[layer] = _linear_fit(block, seen)
        _fit_hidden(pieces, layer, seen, hidden)
        if 0 in hidden and block.attn.proj.bias is not None:
            pieces.proj_bias[layer] = _with_mean(block, _mean(of.after - of.middle for of in seen))
        states = [(of.after, grid, of.is_aside) for of, (_, grid, _) in zip(seen, states, strict=True)]
        progress.reach(layer + 1)
    return pieces


def _seen(block: Any, tokens: Tensor, grid: tuple[int, int] | None, is_aside: bool) -> _Layer:
    with inputs_of(block.mlp.fc2) as hidden:
        made = layer_pass(block, tokens, EMPTY_CARRY, grid)
    return _Layer(tokens, made.middle, made.after, hidden[0], is_aside)


def _mean(parts: Iterator[Tensor]) -> Tensor:
    """The mean over all tokens of all images, (C,), of parts (B, N, C)."""
    means, counts = zip(*((part.double().mean((0, 1)), len(part)) for part in parts), strict=True)
    total = torch.stack([mean * count for mean, count in zip(means, counts, strict=True)]).sum(0)
    return total / sum(counts)


def _with_mean(block: Any, mean: Tensor) -> Tensor:
    """The bias of an attention's output that adds so much more to the tokens, (C,), through its LayerScale."""
    bias = block.attn.proj.bias
    return (bias + before_scale(mean, getattr(block.ls1, "gamma", None))).to(bias)


def _equations(block: Any, rows: Iterable[tuple[Tensor, Tensor, bool]], has_bias: bool) -> list[NormalEquations]:
    """Of features (B, N, F) and errors (B, N, C): those of the images that are fitted, and of those kept aside."""
    parts: dict[bool, list[Rows]] = {False: [], True: []}
    for features, errors, is_aside in rows:
        weights = row_weights(errors, None, block.attn.num_prefix_tokens)
        parts[is_aside].append(Rows(features, errors, weights))
    return [equations_of(parts[is_aside], has_bias) for is_aside in (False, True)]


def _linear_fit(block: Any, seen: Sequence[_Layer]) -> Matrix:
    """The affine map of a token (C, C) that a layer is most like; zero where none is better than nothing."""
    fitted, aside = _equations(block, ((of.before, of.after - of.before, of.is_aside) for of in seen), True)
    fit = best_fit(fitted, aside, STRENGTHS)
    num_channels = seen[0].before.shape[-1]
    update = torch.zeros(num_channels + 1, num_channels) if fit is None else fit.update
    update = update.to(seen[0].before)
    return Matrix(update[:-1].T.contiguous(), update[-1])


def _fit_hidden(pieces: Pieces, layer: int, seen: Sequence[_Layer], hidden: Sequence[int]) -> None:
    """Chooses hidden units for each number of them, and fits the second matrix to what all of them write.

    All fits are made of one matrix of products, since what is left out is a linear function of the hidden units.
    """
    block = pieces.original.blocks[layer]
    fc2, num_units = block.mlp.fc2, block.mlp.fc2.in_features
    fewer = [number for number in hidden if 0 < number < num_units]
    if not fewer:
        return
    has_bias, weight = fc2.bias is not None, fc2.weight.double()
    fitted, aside = _equations(block, ((of.hidden, of.hidden[..., :0], of.is_aside) for of in seen), has_bias)
    ranking = torch.tensor(unit_ranking(fitted.covariance(), weight.square().sum(0)), device=weight.device)
    for number in fewer:
        kept, dropped = ranking[:number].sort().values, ranking[number:]
        wanted, others = (_left_out(sums, kept, dropped, weight, has_bias) for sums in (fitted, aside))
        fit = best_fit(wanted, others, STRENGTHS)
        new, bias = weight[:, kept], fc2.bias
        if fit is not None:
            new = new + fit.update[:number].T
            bias = None if bias is None else (bias + fit.update[-1]).to(bias)
        pieces.units[layer, number] = kept.tolist()
        pieces.fc2[layer, number] = Matrix(new.to(fc2.weight).contiguous(), bias)


def _left_out(sums: NormalEquations, kept: Tensor, dropped: Tensor, weight: Tensor, has_bias: bool) -> NormalEquations:
    """Normal equations of what the dropped units write, by the kept ones."""
    features = torch.cat([kept, kept.new_tensor([len(sums.gram) - 1])]) if has_bias else kept
    columns = weight[:, dropped]
    cross = sums.gram[features][:, dropped] @ columns.T
    energy = ((sums.gram[dropped][:, dropped] @ columns.T) * columns.T).sum()
    return NormalEquations(sums.gram[features][:, features], cross, float(energy), len(kept))
