"""Healing: a converted model wins back, with its original as the teacher, the accuracy that the conversion cost.

While a plan is annealed in, a converted layer's attention is (1 - a) times exact attention by the queries and keys that
it had in the original, plus a times the plan's. Those queries and keys are constants: values and output projection are
the layer's own and are trained by both. So the model has the plan's parameters and no others at every step, and with it
its checkpoints, its moving average and what a run leaves; a is a function of the step alone.

Shapes: B images, H heads, N tokens, C channels, D = C / H.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.attention import EMPTY_CARRY, ReuseAttention
from vitreuse.attention.base import split_heads
from vitreuse.attention.submodules import rows_of
from vitreuse.compress.head_matching import rows_of_heads
from vitreuse.config import ConfigError, HealConfig

Outputs = dict[int, Tensor]  # of each layer with attention, what its output projection gives


TOKEN_PROJECTIONS = ("key_proj", "value_proj")  # what no plain model has


def create_healing(settings: HealConfig, model: Any, original: Any) -> Healing | None:
    """Leaves in training what healing trains; what runs layers beside the original's, where the settings ask for it.

    Args:
        settings: The experiment's train.heal.
        model: The converted model.
        original: The teacher.

    Raises:
        ConfigError: The model has no plan, nothing is left to train, or the teacher is not the original.
    """
    if not hasattr(model, "plan"):
        raise ConfigError(f"train.heal needs a model with a plan, {type(model).__name__} has none: convert it first.")
    _train_only(model, settings.parameters)
    if not settings.compares_layers:
        return None
    _check_original(model, original)
    if settings.outputs and all(spec.word == "none" for spec in model.plan):
        raise ConfigError(f"train.heal.outputs has no effect on plan '{model.plan}', without attention: set it to 0.")
    return Healing(model, original if settings.anneal_epochs else None)


def _train_only(model: Any, parameters: str) -> None:
    """Takes out of training all but the parameters that are chosen by a word of train.heal.parameters."""
    chosen = _chosen(model, parameters)
    if not chosen:
        ways = "'touched' or 'all'" if _chosen(model, "touched") else "'all'"
        raise ConfigError(
            f"train.heal.parameters {parameters!r} leaves nothing to train under plan '{model.plan}': choose {ways}."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze holds all that train.heal.parameters {parameters!r} trains: freeze fewer.")


def _chosen(model: Any, parameters: str) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    if parameters == "all":
        return names
    converted = [layer for layer, spec in enumerate(model.plan) if spec.word != "exact"]
    touched = tuple(f"blocks.{layer}.{part}." for layer in converted for part in ("norm1", "attn", "ls1"))
    prefixes = touched if parameters == "touched" else ()
    return {name for name in names if name.startswith(prefixes) or name.endswith(TOKEN_PROJECTIONS)}


def plan_share(step: int, num_steps: int) -> float:
    """The plan's share a of the attention of converted layers in a step that comes after so many: 0, rising to 1."""
    return min(1.0, step / num_steps) if num_steps else 1.0


def _check_original(model: Any, original: Any) -> None:
    """Refuses a teacher whose attentions are not those of the same layers for the same tokens."""
    found = _shape(original) if isinstance(original, VisionTransformer) else f"a {type(original).__name__}"
    if found != _shape(model):
        raise ConfigError(
            f"train.heal.outputs and anneal_epochs compare layers, and the teacher is {found} where the model is "
            f"{_shape(model)}: give the model that it was converted from, or set both to 0."
        )
    plan = getattr(original, "plan", ())
    if any(spec.word != "exact" for spec in plan):
        raise ConfigError(
            f"train.heal.outputs and anneal_epochs need a teacher with exact layers, and its plan is '{plan}': give "
            "the model that was converted, or set both to 0."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ConfigError(
            "train.heal.outputs and anneal_epochs need all tokens: set model.keywords.patch_drop_rate to 0."
        )


def _shape(model: Any) -> str:
    """What must be equal for the attentions of two models to have the same inputs and outputs."""
    rows, columns = model.patch_embed.grid_size
    return (
        f"a ViT of {len(model.blocks)} layers, {model.embed_dim} channels, {model.num_prefix_tokens} prefix tokens and "
        f"{rows} x {columns} patches"
    )


@contextmanager
def attention_outputs(model: Any) -> Iterator[Outputs]:
    """Fills what it gives with the attention outputs of the forward pass that is made inside the block."""
    outputs: Outputs = {}

    def taking(layer: int) -> Any:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return take

    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            hooks.callback(block.attn.register_forward_hook(taking(layer)).remove)
        yield outputs


def outputs_loss(outputs: Outputs, originals: Outputs) -> Tensor:
    """Mean over layers and images of the squared error of attention outputs over the mean square of the original's.

    Of the last layer a model may have computed the rows of its class tokens alone. Each image has its own divisor, so
    that the loss of a batch is the mean of those of its parts.
    """
    errors = []
    for layer, output in outputs.items():
        original = originals[layer][:, : output.shape[1]].float()
        errors.append((output.float() - original).square().mean((1, 2)) / original.square().mean((1, 2)))
    return torch.stack(errors).mean()


class Healing(nn.Module):
    """A model whose converted layers hold on to a part of the attention that they had.

    Args:
        model: One of ours.
        original: The exact model it was converted from, whose layers are copied as constants; None to hold on to none.

    Raises:
        ConfigError: No layer is converted, or the values of one are not the original's.
    """

    def __init__(self, model: Any, original: Any = None):
        super().__init__()
        self.model = model
        self.held = nn.ModuleDict()
        if original is None:
            return
        if all(spec.word == "exact" for spec in model.plan):
            raise ConfigError(f"train.heal.anneal_epochs has no effect on plan '{model.plan}': set it to 0.")
        for layer, block in enumerate(model.blocks):
            if block.spec.word != "exact":
                self.held[str(layer)] = _held_layer(original.blocks[layer], block, layer)

    def forward(self, images: Tensor, share: float) -> tuple[Any, Outputs]:
        """Logits as the model gives them, and its attention outputs, with the plan's share of the attention."""
        model, outputs = self.model, {}
        x, grid = model.embed(images)
        carry = EMPTY_CARRY._replace(layerwise_proj=model.key_proj)
        for layer, block in enumerate(model.blocks):
            is_last = layer == len(model.blocks) - 1
            num_queries = model.num_class_rows if is_last and model.reads_class_rows else None
            rows, held = x[:, :num_queries], self._held(layer, share)
            if block.has_attention:
                tokens = block.norm1(x)
                y, carry = block.attn(tokens, carry, grid, num_queries)
                if held is not None:
                    y = torch.lerp(exact_output(held.attn, block.attn, tokens, num_queries), y, share)
                outputs[layer] = y
                rows = rows + block.drop_path1(block.ls1(y))
            elif held is not None:
                y = exact_output(held.attn, held.attn, held.norm1(x), num_queries)
                rows = rows + block.drop_path1((1 - share) * held.ls1(y))
            x = rows + block.drop_path2(block.ls2(block.mlp(block.norm2(rows))))
        return model.forward_head(model.norm(x)), outputs

    def _held(self, layer: int, share: float) -> Any:
        """What a layer still holds on to at a share of the plan's; None for nothing."""
        return self.held[str(layer)] if share < 1 and str(layer) in self.held else None


def exact_output(held: Any, attn: Any, x: Tensor, num_queries: int | None) -> Tensor:
    """Exact attention by the queries and keys of one layer on the values of another, with the other's way out.

    Args:
        held: Attention of timm's or ours that has queries and keys.
        attn: Attention that has values; perhaps the same.
        x: Tokens (B, N, C), normalised.
        num_queries: Rows that are asked for; all when None.
    """
    width = held.qkv.out_features // 3
    qk = split_heads(F.linear(x, held.qkv.weight[: 2 * width], rows_of(held.qkv.bias, 0, 2 * width)), held.head_dim)
    q, k = qk.chunk(2, dim=1)
    v = split_heads(F.linear(x, *_values(attn)), held.head_dim)
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    mixed = F.scaled_dot_product_attention(held.q_norm(q), held.k_norm(k), v, dropout_p=dropout_p, scale=held.scale)
    return attn.proj_drop(attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2)[:, :num_queries])))


def _values(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an attention's values."""
    if isinstance(attn, ReuseAttention):
        return attn.v.weight, attn.v.bias
    width = attn.qkv.out_features // 3
    return attn.qkv.weight[2 * width :], rows_of(attn.qkv.bias, 2 * width, 3 * width)


def _held_layer(original: Any, block: Any, layer: int) -> nn.Module:
    """What a layer's attention was, as constants, with the heads in the order in which the layer has them now."""
    parts = {name: copy.deepcopy(getattr(original, name)) for name in ("norm1", "attn", "ls1")}
    held: Any = nn.ModuleDict(parts).eval().requires_grad_(False)
    if block.has_attention:
        order = _order_of_values(held["attn"], block.attn, layer)
        rows = rows_of_heads(order, held["attn"].head_dim)
        for parameter in (held["attn"].qkv.weight, held["attn"].qkv.bias):
            if parameter is not None:
                parameter.copy_(parameter.unflatten(0, (3, -1))[:, rows].flatten(0, 1))
    return held


def _order_of_values(held: Any, attn: Any, layer: int) -> list[int]:
    """For each value head of a layer the one of the original that it is.

    Raises:
        ConfigError: One is none of the original's.
    """
    theirs, ours = (_value_heads(side, held.num_heads) for side in (held, attn))
    order: list[int] = []
    for head in ours:
        same = [number for number, other in enumerate(theirs) if number not in order and torch.equal(head, other)]
        if not same:
            raise ConfigError(
                f"train.heal.anneal_epochs needs the original as the teacher, and the values of layer {layer} are not "
                "the teacher's: begin with the converted model as vitreuse convert left it, or set it to 0."
            )
        order.append(same[0])
    return order


def _value_heads(attn: Any, num_heads: int) -> Tensor:
    """What makes a head's values and takes them out, (H, numbers): equal heads are one, whatever their order."""
    weight, bias = _values(attn)
    parts = [weight, attn.proj.weight.T, *([] if bias is None else [bias[:, None]])]
    return torch.cat([part.detach().unflatten(0, (num_heads, -1)).flatten(1) for part in parts], dim=1)
