"""Exact rewriting of a trained model for inference: fewer kernels and parameters, the same logits.

Every step is an identity of real numbers, applied in float32 or wider. What it costs or saves in time depends on the
device, so that a step that does not pay is left out of DEFAULT_STEPS (experiments.md has the measurements).

Shapes: B images, R class rows, N tokens, C channels, H heads, D = C / H.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreuse.attention import Carry, ExactAttention, ReuseAttention, SpanAttention
from vitreuse.attention.base import CarryingAttention
from vitreuse.attention.masks import Mask, log_sizes
from vitreuse.model.block import InplaceMlp, LinearBlock, PlanBlocks
from vitreuse.model.copies import adopted_layers


def fold(
    model: Any,
    steps: Sequence[str] | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Any:
    """A copy of a ViT for inference, whose logits are those of the model.

    Source: Graef, 2024 (arXiv 2402.13388) for the idea; what is exact for images is written at each step.

    Args:
        model: A model with a plan, or a plain timm VisionTransformer.
        steps: Names of STEPS, applied in the order of that table; DEFAULT_STEPS when None.
        normalisation: Mean and standard deviation per channel of images between 0 and 1. When given, the folded model
            takes pixels from 0 to 255 as they are.

    Returns:
        The folded model, in evaluation mode and without gradients. Its logits are the model's; tokens inside it are
        not, and with the step ``class_rows`` forward_features returns the class rows alone.

    Raises:
        ValueError: An unknown step, or a model that is no ViT of timm.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"fold has no step {unknown[0]!r}: the steps are {', '.join(STEPS)}.")
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{type(model).__name__} cannot be folded: fold takes timm's VisionTransformer and ours.")
    folded: Any = copy.deepcopy(model)
    if not isinstance(folded.blocks, PlanBlocks):
        folded.blocks = adopted_layers(folded)  # which are faster
    dtype = folded.patch_embed.proj.weight.dtype
    folded.eval().requires_grad_(False).to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        if normalisation is not None:
            fold_normalisation(folded, *normalisation)
        for name, step in STEPS.items():
            if name in steps:
                step(folded)
    return folded.to(dtype)


def fold_normalisation(model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Input normalisation into the patch embedding, which then takes pixels from 0 to 255."""
    proj = model.patch_embed.proj
    shift, scale = (proj.weight.new_tensor(values)[:, None, None] for values in (mean, std))
    constant = -(proj.weight * (shift / scale)).sum((1, 2, 3))
    proj.weight.div_(255 * scale)
    _add_bias(proj, constant)


def fold_embedding(model: Any) -> None:
    """Bias of the patch embedding into the position table; a prefix token and its position are one constant.

    Left as it is where the table is resampled to each image, or something stands between the embedding and the table.
    """
    proj, table = model.patch_embed.proj, model.pos_embed
    if table is None or model.dynamic_img_size or not isinstance(model.patch_embed.norm, nn.Identity):
        return
    if not model.no_embed_class:
        for token in _prefix_tokens(model):
            token += table[:, : token.shape[1]]
            table = table[:, token.shape[1] :]
        model.no_embed_class = True
    model.pos_embed = _frozen(table.clone() if proj.bias is None else table + proj.bias)
    proj.bias = None


def fold_layer_scale(model: Any) -> None:
    """LayerScale into the linear layer before it."""
    for block, number, _, linear in _halves(model):
        scale = block.get_submodule(f"ls{number}")
        if not isinstance(scale, nn.Identity):
            linear.weight *= scale.gamma[:, None]
            if linear.bias is not None:
                linear.bias *= scale.gamma
            setattr(block, f"ls{number}", nn.Identity())


def fold_norm_affine(model: Any) -> None:
    """Weight and bias of a LayerNorm into the linear layers that read it."""
    for owner, name, norm, readers in _norms(model):
        if norm.weight is None:
            continue
        for linear in readers:
            if norm.bias is not None:
                _add_bias(linear, linear.weight @ norm.bias)
            linear.weight *= norm.weight
        setattr(owner, name, nn.LayerNorm(list(norm.normalized_shape), norm.eps, elementwise_affine=False))


def fold_softmax_scale(model: Any) -> None:
    """The factor 1 / sqrt(D) into the rows of the queries; queries that are normalised keep it."""
    attentions = [block.attn for block in model.blocks if block.has_attention]
    if all(isinstance(attn.q_norm, nn.Identity) for attn in attentions):
        for attn in attentions:
            for rows in _rows(attn, "q"):
                rows *= attn.scale
            attn.scale = 1.0


def fold_key_bias(model: Any) -> None:
    """The bias of the keys adds one number to all logits of a query, which softmax does not see.

    Left where keys are normalised or are projected tokens, whose bias is scaled from key to key, and where they say
    which tokens merge.
    """
    for attn, bias in _biases(model, "k", "k_norm"):
        if isinstance(attn, ReuseAttention) or not attn.hands_likeness:
            bias.zero_()


def fold_value_bias(model: Any) -> None:
    """The bias of the values into that of the output projection, since the rows of a map sum to 1.

    Left where the keys are projected tokens, whose bias is scaled from key to key, under a norm of the output, and
    where values say which tokens merge.
    """
    for attn, bias in _biases(model, "v", "norm"):
        if not (isinstance(attn, ReuseAttention) and attn.hands_likeness):
            _add_bias(attn.proj, attn.proj.weight @ bias)
            bias.zero_()


def fold_centring(model: Any) -> None:
    """The mean over channels out of all that writes the residual stream, so that LayerNorm becomes RMSNorm.

    Left as it is unless every norm that reads the stream is a LayerNorm without bias (so after ``norm_affine``), every
    writer a linear layer (so after ``layer_scale``) that such a norm feeds, as none feeds a layer that is linear, and
    tokens are pooled by a mean or a class token.
    """
    norms = [found for found in _norms(model) if found[2].bias is None]
    halves, num_halves = _halves(model), sum(_num_halves(block) for block in model.blocks)
    scales = [block.get_submodule(f"ls{number}") for block, number, _, _ in halves]
    is_linear = all(isinstance(each, nn.Identity) for each in (model.patch_embed.norm, model.norm_pre, *scales))
    is_linear = is_linear and (len(norms), len(halves)) == (num_halves + 1, num_halves)
    if not is_linear or model.global_pool not in ("token", "avg"):
        return
    for table in (*_prefix_tokens(model), model.pos_embed):
        if table is not None:
            table -= table.mean(-1, keepdim=True)
    for linear in (model.patch_embed.proj, *(writer for *_, writer in halves)):
        linear.weight -= linear.weight.mean(0, keepdim=True)
        if linear.bias is not None:
            linear.bias -= linear.bias.mean()
    for owner, name, norm, _ in norms:
        rms_norm = nn.RMSNorm(list(norm.normalized_shape), norm.eps, elementwise_affine=False)
        rms_norm.weight = norm.weight
        setattr(owner, name, rms_norm)


def fold_class_rows(model: Any) -> None:
    """The last layer under token pooling for the class rows alone: W_k in the query, tokens pooled before W_v.

    A last layer that reuses a map, projects tokens or normalises keys still computes only these rows, as it is.
    """
    if model.global_pool != "token" or model.attn_pool is not None:
        return
    last = model.blocks[-1]
    if type(last.attn) in (ExactAttention, SpanAttention) and isinstance(last.attn.k_norm, nn.Identity):
        last.attn = ClassAttention(last.attn)  # class rows see everything under a span too
    last.merge = None  # class tokens never merge
    model.blocks = ClassRowsBlocks(*model.blocks)
    model.blocks.num_rows = 1 if getattr(model, "dist_token", None) is None else 2


class ClassRowsBlocks(PlanBlocks):
    """The layers of a folded model, of whose tokens only the class rows are read."""

    num_rows = 1

    def forward(self, x: Tensor, grid: Any = None, num_queries: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The class rows (B, R, C) after the last layer, however many are asked for."""
        return super().forward(x, grid, self.num_rows, *args, **kwargs)


class ClassAttention(CarryingAttention):
    """Softmax attention of a few class rows to all tokens, whose keys and values are never made.

    (x_r W_q) (x W_k)^T = (x_r W_q W_k^T) x^T, and a map times x W_v is the map times x, times W_v.

    Shape: x (B, N, C) to (B, R, C).
    Cost: 4 R C^2 + 2 R H N C multiply-adds an image, against 2 (N + R) C^2 + 2 R N C.
    """

    def __init__(self, exact: ExactAttention) -> None:
        super().__init__()
        self.scale, self.grid, self.norm, self.proj = exact.scale, exact.grid, exact.norm, exact.proj
        self.num_prefix_tokens, self.merges = exact.num_prefix_tokens, exact.merges
        q, k, v = (rows.clone() for rows in exact.qkv.weight.unflatten(0, (3, exact.num_heads, exact.head_dim)))
        self.q: Any = nn.Linear(exact.dim, exact.dim, bias=False, device="meta")
        self.q.weight = _frozen(q.flatten(0, 1))
        self.key_heads = _frozen(k)  # (H, D, C)
        self.value_heads = _frozen(v.mT)  # (H, C, D)
        self.value_bias: nn.Parameter | None = None
        if exact.qkv.bias is not None:  # that of the keys is the same for all logits of a query
            self.q.bias, _, self.value_bias = (_frozen(bias.clone()) for bias in exact.qkv.bias.chunk(3))

    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        if mask.is_given:
            raise ValueError("a model folded with class_rows takes no attn_mask and no is_causal: leave this step out.")
        num_heads, head_dim, _ = self.key_heads.shape
        q = self.q(x[:, :num_queries]).unflatten(-1, (num_heads, head_dim))  # (B, R, H, D)
        queries = (q * self.scale).transpose(1, 2) @ self.key_heads  # (B, H, R, C)
        logits, sizes = queries.flatten(1, 2) @ x.mT, log_sizes(mask, x)  # (B, H * R, N)
        weights = (logits if sizes is None else logits + sizes[:, 0]).softmax(dim=-1)
        pooled = (weights @ x).unflatten(1, (num_heads, -1))
        mixed = (pooled @ self.value_heads).transpose(1, 2).flatten(2)
        if self.value_bias is not None:
            mixed = mixed + self.value_bias
        return self.proj(self.norm(mixed)), carry


STEPS = {
    "embedding": fold_embedding,
    "layer_scale": fold_layer_scale,
    "norm_affine": fold_norm_affine,
    "softmax_scale": fold_softmax_scale,
    "key_bias": fold_key_bias,
    "value_bias": fold_value_bias,
    "centring": fold_centring,
    "class_rows": fold_class_rows,
}
# Those that paid on a CPU (experiments.md); a GPU: not yet run.
DEFAULT_STEPS = ("layer_scale", "class_rows")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _add_bias(linear: Any, bias: Tensor) -> None:
    linear.bias = _frozen(bias if linear.bias is None else linear.bias + bias)


def _prefix_tokens(model: Any) -> list[Any]:
    """The prefix tokens that the model has, in their order."""
    tokens = (getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    return [token for token in tokens if token is not None]


def _inputs(attn: Any) -> dict[str, Any]:
    """The linear layers that read an attention's tokens, by the letters of what they make of them."""
    linears = {name: getattr(attn, name, None) for name in ("qkv", "qk", "v")}
    return {name: linear for name, linear in linears.items() if linear is not None}


def _rows(attn: Any, letter: str) -> list[Tensor]:
    """Weight and bias, where there are any, that make an attention's queries, keys or values: views, to be changed."""
    return [
        parameter.chunk(len(name))[name.index(letter)]
        for name, linear in _inputs(attn).items()
        if letter in name
        for parameter in linear.parameters()
    ]


def _biases(model: Any, letter: str, norm: str) -> Iterator[tuple[Any, Tensor]]:
    """The attentions without such a norm whose keys are the tokens, one each, and what biases their keys or values."""
    for attn in (block.attn for block in model.blocks if block.has_attention):
        if isinstance(attn.get_submodule(norm), nn.Identity) and not getattr(attn, "projected_dim", 0):
            for bias in _rows(attn, letter)[1:]:
                yield attn, bias


def _halves(model: Any) -> list[tuple[Any, str, list[Any], Any]]:
    """The halves of layers that read and write the tokens by linear layers: layer, number, readers, writer."""
    halves = []
    for block in model.blocks:
        if block.has_attention:
            halves.append((block, "1", [*_inputs(block.attn).values()], block.attn.proj))
        if type(getattr(block, "mlp", None)) is InplaceMlp:
            halves.append((block, "2", [block.mlp.fc1], block.mlp.fc2))
    return halves


def _num_halves(block: Any) -> int:
    """Of how many halves, which read and write the tokens, a layer is."""
    return 1 if isinstance(block, LinearBlock) else block.has_attention + block.has_mlp


def _norms(model: Any) -> list[tuple[Any, str, Any, list[Any]]]:
    """The LayerNorms that linear layers alone read: who owns them, their names, they themselves, their readers."""
    found = [(block, f"norm{number}", readers) for block, number, readers, _ in _halves(model)]
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if isinstance(head, nn.Linear)]
    name = "norm" if isinstance(model.fc_norm, nn.Identity) else "fc_norm"
    if model.attn_pool is None and (name == "fc_norm" or model.global_pool in ("token", "avg")):
        found.append((model, name, heads))
    return [
        (owner, name, norm, readers)
        for owner, name, readers in found
        if isinstance(norm := owner.get_submodule(name), nn.LayerNorm) and readers
    ]
