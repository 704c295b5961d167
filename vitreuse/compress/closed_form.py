"""A converted model fitted to its original without a gradient, layer after layer, on what those before really give.

A layer of the converted model gets the tokens z that it really has there. What it should hand on is what the original
has behind that layer, x', merged alike, so that a fit also mends what came before. What moves is the matrix that writes
into the tokens, by ridge regression of the error that is left on what that matrix reads:
    attention   its output projection, to the original's tokens between attention and MLP, where it is not exact
    mlp         its second matrix, to those behind the layer, from the first layer on that the plan changes
    linear      the matrix of a linear layer
    mean        what a none or skip layer leaves out, on the average: in the last bias before it, and where there is no
                layer before it in the position embedding, so that it costs nothing
How strong the ridge is is decided on whole images that were not fitted, and so is whether a fit stays, wholly or by
half: by what the whole model says of them then, for less error of a layer may lead later ones to merge other tokens.
The errors of an image's prefix tokens count together as much as those of its patches. What each of these is worth:
experiments.md.

Shapes: B images, N0 tokens of the first layer, N that are left, C channels, F inputs of a matrix, R rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitreuse.attention import EMPTY_CARRY, Carry
from vitreuse.compress.convert import Conversion
from vitreuse.compress.fidelity import answer_of_tokens, output_distance
from vitreuse.compress.recording import inputs_of, layer_pass
from vitreuse.compress.ridge import Rows, best_fit, equations_of, images_apart, row_weights
from vitreuse.io.progress import WorkProgress
from vitreuse.io.spool import Spool
from vitreuse.model.block import all_tokens
from vitreuse.plan import EXACT

SHARES = (1.0, 0.5)  # of a fit that are tried
LEAST_SCALE = 1e-6  # of a LayerScale, below which nothing can be written through it


@dataclass(frozen=True)
class LayerFit:
    """What a fit was worth, on the images that were kept aside.

    Attributes:
        layer: The layer's number.
        part: attention, mlp, linear or mean.
        strength: Of the ridge, as NormalEquations.solve takes it; None where no fit helped and none was kept.
        before: Squared error of the tokens, over the square of what the original's layer adds to them.
        after: The same with the fit.
        distance: How far the answers of the whole model are from the original's behind this fit, see output_distance.
    """

    layer: int
    part: str
    strength: float | None
    before: float
    after: float
    distance: float


class _State(NamedTuple):
    """Some images before a layer; of the original what that layer makes of them, too.

    Attributes:
        original: (B, N0, C), the original's tokens.
        middle: (B, N0, C), those between its attention and MLP.
        after: (B, N0, C), those behind it.
        tokens: (B, N, C), those of the converted model.
        carry: What its layers before hand on.
        grid: The (rows, columns) of patches where it is not the built one.
    """

    original: Tensor
    middle: Tensor
    after: Tensor
    tokens: Tensor
    carry: Carry
    grid: tuple[int, int] | None


class _Writer(NamedTuple):
    """What writes into the tokens: a matrix, or a bias alone, and the LayerScale (C,) behind it if there is one."""

    linear: Any | None
    bias: Tensor | None
    scale: Tensor | None

    def copies(self) -> list[Tensor]:
        """What is written with, as it is now."""
        return [parameter.clone() for parameter in self._parameters()]

    def restore(self, copies: list[Tensor]) -> None:
        """Takes what is written with back to what it was."""
        for parameter, before in zip(self._parameters(), copies, strict=True):
            parameter.copy_(before)

    def _parameters(self) -> list[Tensor]:
        return [each for each in (self.linear and self.linear.weight, self.bias) if each is not None]

    def written(self, update: Tensor) -> Tensor:
        """What of an update (..., C) comes to lie in the tokens: nothing in channels that the LayerScale closes."""
        return update if self.scale is None else update.where(self.scale.abs() > LEAST_SCALE, 0.0)

    def add(self, update: Tensor) -> None:
        """Adds an update (F, C) of what is written, whose last row is the bias where there is one."""
        update = before_scale(update, self.scale)
        if self.linear is not None:
            self.linear.weight.add_(update[: self.linear.in_features].T)
        if self.bias is not None:
            self.bias.add_(update[-1])


def before_scale(update: Tensor, scale: Tensor | None) -> Tensor:
    """What is to be written (..., C), as it is before a LayerScale (C,) if there is one; nothing in channels that the
    scale all but closes."""
    return update if scale is None else (update / scale).where(scale.abs() > LEAST_SCALE, 0.0)


@torch.no_grad()
def fit_layers(conversion: Conversion, batches: Iterable[Tensor], progress: WorkProgress) -> list[LayerFit]:
    """Takes the layers that a plan changes to what best gives back the original's tokens; the model changes.

    Args:
        conversion: What convert returned.
        batches: Images (B, channels, rows, columns), each once; every fourth is kept aside. Their tokens lie in a
            temporary folder, some four times N C numbers an image, so that memory does not grow with them.
        progress: Told the number of layers that are done.

    Returns:
        What each fit was worth, in the order in which they were made.

    Raises:
        ValueError: There are fewer than four images.
    """
    model, original = conversion.model, conversion.original
    found: list[LayerFit] = []
    with Spool() as fitted, Spool() as states, Spool() as answers:
        for images, is_aside in images_apart(batches):
            images = images.to(next(model.parameters()).device)
            (states if is_aside else fitted).append(_start(model, original, images))
            if is_aside:
                answers.append(answer_of_tokens(original, original.forward_features(images)))
        aside, is_changed = _Aside(model, original, states, answers), False
        for layer, (block, old) in enumerate(zip(model.blocks, original.blocks, strict=True)):
            for each in (fitted, states):
                each.replace(partial(_with_original, old))
            is_changed = is_changed or block.spec != EXACT
            for part in _parts_of(block) if is_changed else ():
                writer = _writer(model, layer, part)
                if writer is not None:
                    found.append(_fit(block, layer, part, writer, fitted, aside))
            for each in (fitted, states):
                each.replace(partial(_behind, block))
            progress.reach(layer + 1)
    return found


class _Aside:
    """The images that are kept aside, and what the whole model says of them.

    Args:
        model: The converted model.
        original: The original.
        states: The images, before the first layer now and before each that is fitted then.
        answers: What the original says of them.

    Attributes:
        distance: How far the answers of the model, as it stands, are from the original's, a mean over the images.
    """

    def __init__(self, model: Any, original: Any, states: Spool, answers: Spool) -> None:
        self.model, self.original, self.states, self.answers = model, original, states, answers
        self.distance = self._measure(0)

    def keep_nearest(self, layer: int, writer: _Writer, update: Tensor) -> float:
        """Writes the share of an update (F, C) by which the answers come nearest; the share, 0 where they do not."""
        before, kept = writer.copies(), 0.0
        for share in SHARES:
            writer.restore(before)
            writer.add(share * update)
            added = writer.written(share * update[-1]) if writer.linear is None else None
            distance = self._measure(layer, added)
            if distance < self.distance:
                self.distance, kept = distance, share
        writer.restore(before)
        writer.add(kept * update)
        return kept

    def _measure(self, layer: int, added: Tensor | None = None) -> float:
        """The distance, by the layers from one on, and with something added to all tokens (C,) before it."""
        parts = []
        for state, wanted in zip(self.states, self.answers, strict=True):
            tokens, carry = state.tokens if added is None else state.tokens + added.to(state.tokens), state.carry
            for block in self.model.blocks[layer:]:
                tokens, carry = block(tokens, carry, state.grid)
            found = answer_of_tokens(self.model, self.model.norm(all_tokens(tokens, carry)))
            parts.append(output_distance(self.original, wanted, found))
        return float(torch.cat(parts).double().mean())


def _parts_of(block: Any) -> list[str]:
    """What is fitted of a layer, in order; of exact attention nothing where an MLP follows that is fitted."""
    if block.spec.word == "linear":
        return ["linear"]
    parts = [] if block.has_attention else ["mean"]
    parts += ["attention"] if block.has_attention and not (block.spec.word == "exact" and block.has_mlp) else []
    return [*parts, "mlp"] if block.has_mlp else parts


def _writer(model: Any, layer: int, part: str) -> _Writer | None:
    """What a part of a layer writes with; None of a mean that no bias before the layer can take."""
    block = model.blocks[layer]
    if part == "mean":
        return bias_before(model, layer)
    if part == "linear":
        return _Writer(block.linear, block.linear.bias, None)
    linear, scale = (block.attn.proj, block.ls1) if part == "attention" else (block.mlp.fc2, block.ls2)
    return _Writer(linear, linear.bias, getattr(scale, "gamma", None))


def bias_before(model: Any, layer: int) -> _Writer | None:
    """The last bias that is added to all tokens before a layer; None where there is none."""
    for before in reversed(range(layer)):
        block = model.blocks[before]
        parts = {"linear": block.spec.word == "linear", "mlp": block.has_mlp, "attention": block.has_attention}
        part = next((part for part, is_there in parts.items() if is_there), None)
        if part is not None:
            writer = _writer(model, before, part)
            return None if writer is None or writer.bias is None else writer._replace(linear=None)
    return _Writer(None, model.pos_embed, None) if embedding_takes_bias(model) else None


def embedding_takes_bias(model: Any) -> bool:
    """Whether what is added to the position embedding reaches all tokens of the first layer as it is."""
    return model.pos_embed is not None and not model.no_embed_class and isinstance(model.norm_pre, nn.Identity)


def _start(model: Any, original: Any, images: Tensor) -> _State:
    """Images before the first layer."""
    tokens, grid = model.embed(images)
    theirs, _ = original.embed(images)
    return _State(theirs, theirs, theirs, tokens, EMPTY_CARRY._replace(layerwise_proj=model.key_proj), grid)


def _with_original(old: Any, state: _State) -> _State:
    """A state with what a layer of the original makes of its tokens."""
    seen = layer_pass(old, state.original, EMPTY_CARRY, state.grid)
    return state._replace(middle=seen.middle, after=seen.after)


def _behind(block: Any, state: _State) -> _State:
    """The state behind a layer."""
    seen = layer_pass(block, state.tokens, state.carry, state.grid)
    return state._replace(original=state.after, tokens=seen.after, carry=seen.carry)


def _fit(block: Any, layer: int, part: str, writer: _Writer, fitted: Spool, aside: _Aside) -> LayerFit:
    """Fits a part of a layer, and keeps of the fit what helps on the images that are kept aside."""
    observed, has_bias = partial(_observe, block, part, writer), writer.bias is not None
    errors = equations_of(map(observed, aside.states), has_bias)
    added = sum(_added(state, block.attn.num_prefix_tokens) for state in aside.states)
    added = max(added, sys.float_info.min)  # of a layer that adds nothing
    fit, before = best_fit(equations_of(map(observed, fitted), has_bias), errors), errors.energy / added
    share = 0.0 if fit is None else aside.keep_nearest(layer, writer, fit.update)
    if fit is None or not share:
        return LayerFit(layer, part, None, before, before, aside.distance)
    update = writer.written(share * fit.update)
    if part == "mean":
        for states in (fitted, aside.states):
            states.replace(lambda state: state._replace(tokens=state.tokens + update[-1].to(state.tokens)))
    return LayerFit(layer, part, fit.strength, before, errors.error(update) / added, aside.distance)


def _observe(block: Any, part: str, writer: _Writer, state: _State) -> Rows:
    """What a writer reads, the error that is left where it writes, and what each token there counts."""
    wanted = state.middle if block.has_mlp and part != "mlp" else state.after
    if writer.linear is None:
        features, found, carry = state.tokens[..., :0], state.tokens, state.carry
    else:
        with inputs_of(writer.linear) as inputs:
            seen = layer_pass(block, state.tokens, state.carry, state.grid)
        features = inputs[0]
        found, carry = (seen.middle, state.carry) if part == "attention" else (seen.after, seen.carry)
    errors = merged_alike(wanted, carry) - found
    return Rows(features, errors, row_weights(errors, carry.sizes, block.attn.num_prefix_tokens))


def merged_alike(x: Tensor, carry: Carry) -> Tensor:
    """The tokens (B, N, C) of the first layer's (B, N0, C), each the mean of those that are in its place."""
    if carry.places is None or carry.sizes is None:
        return x
    sums = x.new_zeros(x.shape[0], carry.sizes.shape[1], x.shape[2])
    return sums.scatter_add_(1, carry.places[..., None].expand_as(x), x) / carry.sizes[..., None].to(x)


def _added(state: _State, num_prefix_tokens: int) -> float:
    """The square of what the original's layer adds to images, weighed as errors are."""
    added = (state.after - state.original).double()
    return float((added.square().sum(-1) * row_weights(added, None, num_prefix_tokens)).sum())
