"""Healing: a converted model wins back, with its original as the teacher, the accuracy that the conversion cost.

While a plan is annealed in, a part of each layer that it changes is (1 - a) times what it was in the original plus a
times what the plan makes of it: attention, an MLP of fewer hidden units, and all of a linear or skipped layer. Of
attention the old queries and keys are constants, while values and output projection are the layer's own and are trained
by both; of all else the old part is a constant. So the model has the plan's parameters and no others at every step, and
with it its checkpoints, its moving average and what a run leaves; a is a function of the step alone. Of r tokens that a
layer merges the whole part of a r do, one more now and then; old attention weighs merged ones by their sizes.

Shapes: B images, H heads, N tokens, N0 tokens of the first layer, C channels, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.attention import Carry
from vitreuse.attention.maps import Mask, log_sizes
from vitreuse.compress.recording import AttentionCall, project_heads, recorded_attention
from vitreuse.config import ConfigError, HealConfig
from vitreuse.model.block import all_tokens
from vitreuse.model.copies import evaluating
from vitreuse.model.merge import merge_tokens
from vitreuse.model.plan_weights import ADDED
from vitreuse.plan import EXACT
from vitreuse.plan.language import WHOLE


def create_healing(settings: HealConfig, model: Any, original: Any, asks_tokens: bool) -> Healing | None:
    """Leaves in training what healing trains; what compares layers with the original's, where the settings ask for it.

    Raises:
        ConfigError: The model has no plan, nothing is left to train, or the teacher is not the original.
    """
    if not hasattr(model, "plan"):
        raise ConfigError(f"train.heal needs a model with a plan, {type(model).__name__} has none: convert it first.")
    _train_only(model, settings.parameters)
    if not settings.compares_layers:
        return None
    _check_original(model, original)
    if settings.outputs and not any(spec.has_attention for spec in model.plan):
        raise ConfigError(f"train.heal.outputs has no effect on plan '{model.plan}', without attention: set it to 0.")
    return Healing(model, original if settings.anneal_epochs else None, asks_tokens)


def _train_only(model: Any, parameters: str) -> None:
    """Takes out of training all but the parameters that are chosen by a word of train.heal.parameters."""
    chosen = _chosen(model, parameters)
    if not chosen:
        ways = "'touched' or 'all'" if _chosen(model, "touched") else "'all'"
        nothing = f"train.heal.parameters {parameters!r} leaves nothing to train under plan '{model.plan}'"
        raise ConfigError(f"{nothing}: choose {ways}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze holds all that train.heal.parameters {parameters!r} trains: freeze fewer.")


def _chosen(model: Any, parameters: str) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    if parameters == "all":
        return names
    touched: list[str] = []
    for layer, spec in enumerate(model.plan) if parameters == "touched" else ():
        parts = ("norm1", "attn", "ls1") if spec.word != "exact" else ()
        parts += ("norm2", "mlp", "ls2") if spec.hidden is not None else ()
        touched += [f"blocks.{layer}.{part}." for part in parts]
    return {name for name in names if name.startswith(tuple(touched)) or name.endswith(ADDED)}


def plan_share(step: int, num_steps: int) -> float:
    """The plan's share a of what it changes in the layers, in a step that comes after so many: 0, rising to 1."""
    return min(1.0, step / num_steps) if num_steps else 1.0


def _check_original(model: Any, original: Any) -> None:
    """Refuses a teacher whose attentions are not those of the same layers for the same tokens."""
    shape, plan = _shape(model), getattr(original, "plan", ())
    found = _shape(original) if isinstance(original, VisionTransformer) else f"a {type(original).__name__}"
    if found != shape:
        misfit = f"compare layers, and the teacher is {found} where the model is {shape}"
        cure = "give the model that it was converted from, or set both to 0"
    elif any(spec != EXACT for spec in plan):
        misfit = f"need a teacher whose layers are all 'exact', and its plan is '{plan}'"
        cure = "give the model that was converted, or set both to 0"
    elif not isinstance(model.patch_drop, nn.Identity):
        misfit, cure = "need all tokens", "set model.keywords.patch_drop_rate to 0"
    else:
        return
    raise ConfigError(f"train.heal.outputs and anneal_epochs {misfit}: {cure}.")


def _shape(model: Any) -> str:
    """What must be equal for the attentions of two models to have the same inputs and outputs."""
    rows, columns = model.patch_embed.grid_size
    size = f"{len(model.blocks)} layers, {model.embed_dim} channels, {model.num_prefix_tokens} prefix tokens"
    return f"a ViT of {size} and {rows} x {columns} patches"


def outputs_loss(outputs: dict[int, Tensor], originals: dict[int, Tensor]) -> Tensor:
    """Mean over layers and images of the squared error of attention outputs over the mean square of the original's.

    Of the last layer a model may have computed the rows of its class tokens alone. Each image has its own divisor, so
    that the loss of a batch is the mean of those of its parts.
    """
    errors = []
    for layer, output in outputs.items():
        original = originals[layer][:, : output.shape[1]].float()
        errors.append((output.float() - original).square().mean((1, 2)) / original.square().mean((1, 2)))
    return torch.stack(errors).mean()


class Held(NamedTuple):
    """What a converted layer holds on to: a block of the original, whose modules are constants."""

    block: Any
    order: list[int] | slice  # of its heads, as they stand in the converted layer; all where that has no attention


class Healing(nn.Module):
    """A model of ours whose converted layers hold on to a part of what they were in the original.

    The original becomes a constant; without one the layers hold on to nothing.

    Raises:
        ConfigError: No layer is converted, or the values of one are not the original's.
    """

    def __init__(self, model: Any, original: Any = None, asks_tokens: bool = False):
        super().__init__()
        self.model, self.asks_tokens, self.is_annealed = model, asks_tokens, False
        self.held: dict[int, Held] = {}  # by layer; a plain dict, so that the original is no part of this module
        if original is None:
            return
        if all(spec == EXACT for spec in model.plan):
            raise ConfigError(f"train.heal.anneal_epochs has no effect on plan '{model.plan}': set it to 0.")
        self.is_annealed = True
        changed = [spec.word != "exact" or spec.hidden is not None for spec in model.plan]
        original.eval().requires_grad_(False)
        for layer, (block, old) in enumerate(zip(model.blocks, original.blocks, strict=True)):
            if changed[layer]:
                is_other = block.has_attention and block.spec.word != "exact"
                order = _order_of_values(old.attn, block.attn, layer) if is_other else slice(None)
                self.held[layer] = Held(old, order)

    def forward(self, images: Tensor, share: float) -> tuple[Any, dict[int, Tensor]]:
        """Logits as the model gives them, or all tokens if these are asked for, and its attention outputs, with the
        plan's share of what it changes.

        Outputs are those of the tokens of the first layer, each that of the one that it was merged into; of the last
        layer they may be the first rows alone, which never merge.
        """
        with self._holding(share), recorded_attention(self.model) as calls:
            said = self.model.forward_features(images) if self.asks_tokens else self.model(images)
        return said, {layer: _of_all_tokens(call) for layer, call in calls.items()}

    @contextmanager
    def _holding(self, share: float) -> Iterator[None]:
        """Mixes the old parts into those of converted layers inside the block; none at a share of 1."""
        with ExitStack() as hooks:
            hooks.callback(self.model.blocks[0].register_forward_pre_hook(_ask_for_places).remove)
            for block in self.model.blocks if self.is_annealed and share < 1 else ():
                merging = getattr(block, "merge", None)
                if merging is not None:
                    hooks.callback(merging.register_forward_hook(partial(_merge_fewer, share)).remove)
            for layer, held in self.held.items() if share < 1 else ():
                for hook in _hold(self.model.blocks[layer], held, share):
                    hooks.callback(hook.remove)
            yield


def _ask_for_places(block: Any, args: Any) -> Any:
    """A hook by which the first layer, and so all, say where tokens go, as a model that pools class tokens need not."""
    x, carry, *rest = args
    return x, carry._replace(wants_places=True), *rest


def _merge_fewer(share: float, merging: Any, args: Any, output: Any) -> Any:
    """A hook by which as many tokens merge as is the plan's share of them, rounded down."""
    return merge_tokens(*args, num_merged=int(share * merging.num_merged), num_prefix_tokens=merging.num_prefix_tokens)


def _of_all_tokens(call: AttentionCall) -> Tensor:
    """An attention's output for each token of the first layer, or for the first rows where these alone are computed."""
    _, carry, _, num_queries, *_ = call.inputs
    return call.output if num_queries is not None else all_tokens(call.output, carry)


def _hold(block: Any, held: Held, share: float) -> list[Any]:
    """Hooks by which the parts of a layer that a plan changes are mixed with the old ones."""
    spec = block.spec
    if spec.word in WHOLE:
        return [block.register_forward_hook(partial(_mix_layer, held, share))]
    hooks = []
    if not spec.has_attention:
        hooks.append(block.register_forward_pre_hook(partial(_add_attention, held, share)))
    elif spec.word != "exact":
        hooks.append(block.attn.register_forward_hook(partial(_mix_attention, held, share)))
    if spec.hidden == 0:
        hooks.append(block.register_forward_hook(partial(_add_mlp, held, share)))
    elif spec.hidden is not None:
        hooks.append(block.mlp.register_forward_hook(partial(_mix_mlp, held, share)))
    return hooks


def _mix_attention(held: Held, share: float, attn: Any, args: Any, output: tuple[Tensor, Carry]) -> Any:
    """A hook that mixes the plan's share of an attention's output with the old attention."""
    x, carry, _, num_queries, *_ = args
    return torch.lerp(_exact_output(held, attn, x, num_queries, carry.sizes), output[0], share), output[1]


def _add_attention(held: Held, share: float, block: Any, args: Any) -> Any:
    """A hook that adds the old attention, as far as the plan has no share yet, before a layer without attention."""
    x, carry, grid, num_queries, *rest = args
    rows = x[:, :num_queries] + (1 - share) * _old_attention(held, x, num_queries, carry)
    return rows, carry, grid, num_queries, *rest


def _mix_mlp(held: Held, share: float, mlp: Any, args: Any, output: Tensor) -> Tensor:
    """A hook that mixes the plan's share of an MLP's output with that of the old one, by the layer's own norm."""
    return torch.lerp(held.block.mlp(args[0]), output, share)


def _add_mlp(held: Held, share: float, block: Any, args: Any, output: tuple[Tensor, Carry]) -> Any:
    """A hook that adds the old MLP, as far as the plan has no share yet, after a layer without one."""
    return output[0] + (1 - share) * _old_mlp(held, output[0]), output[1]


def _mix_layer(held: Held, share: float, block: Any, args: Any, output: tuple[Tensor, Carry]) -> Any:
    """A hook that mixes the plan's share of a linear or skipped layer's output with that of the old layer."""
    x, carry, _, num_queries, *_ = args
    rows = x[:, :num_queries] + _old_attention(held, x, num_queries, carry)
    return torch.lerp(rows + _old_mlp(held, rows), output[0], share), output[1]


def _old_attention(held: Held, x: Tensor, num_queries: int | None, carry: Carry) -> Tensor:
    """What the attention of the old layer adds to the first of its tokens (B, N, C)."""
    return held.block.ls1(_exact_output(held, held.block.attn, held.block.norm1(x), num_queries, carry.sizes))


def _old_mlp(held: Held, x: Tensor) -> Tensor:
    """What the MLP of the old layer adds to tokens (B, N, C)."""
    return held.block.ls2(held.block.mlp(held.block.norm2(x)))


def _exact_output(held: Held, attn: Any, x: Tensor, num_queries: int | None, sizes: Tensor | None) -> Tensor:
    """Exact attention (B, num_queries, C) by the original's queries and keys on an attention's values and way out.

    Tokens x (B, N, C) are normalised, and stand for as many of the first layer's as sizes (B, N) say, None for one
    each; the attention, of timm's or ours, may be the original's own. Both project all of q, k and v, since modules are
    called: twice the products that it needs.
    """
    old = held.block.attn
    q, k, _ = project_heads(old, x)
    q, k, v = q[:, held.order], k[:, held.order], project_heads(attn, x).v
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    bias = log_sizes(Mask(sizes=sizes), q)
    mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout_p, scale=old.scale)
    return attn.proj_drop(attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2)[:, :num_queries])))


def _order_of_values(old: Any, attn: Any, layer: int) -> list[int]:
    """For each value head of a layer the one of the original that it is; refuses one that is none of these."""
    theirs, ours = _value_heads(old), _value_heads(attn)
    order: list[int] = []
    for head in ours:
        same = [number for number, other in enumerate(theirs) if number not in order and torch.equal(head, other)]
        if not same:
            found = f"the values of layer {layer} are not the teacher's"
            cure = "begin with the converted model as vitreuse convert left it, or set it to 0"
            raise ConfigError(f"train.heal.anneal_epochs needs the original as the teacher, and {found}: {cure}.")
        order.append(same[0])
    return order


@torch.no_grad()
def _value_heads(attn: Any) -> Tensor:
    """What each head makes of every channel, (H, numbers), which a conversion leaves as it was; equal heads are one."""
    channels = torch.eye(attn.proj.in_features).to(next(attn.parameters()))
    with evaluating(attn):
        return project_heads(attn, channels[None]).v[0].flatten(1)
