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
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from vitreuse.attention import AttentionConfig, Carry, ExactAttention, SpanAttention
from vitreuse.attention.base import CarryingAttention
from vitreuse.attention.costs import Costs, load_costs
from vitreuse.attention.maps import Mask
from vitreuse.model.block import InplaceMlp, PlanBlock, PlanBlocks
from vitreuse.plan import Plan, Spec
from vitreuse.plan.options import PlanOptions

Rows = tuple[Any, slice]  # output rows of a linear layer


def fold(
    model: Any,
    steps: Sequence[str] | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Any:
    """A copy of a ViT for inference, whose logits are those of the model.

    Source: Graef, 2024 (arXiv 2402.13388) for the idea; what is exact for images is written at each step.

    Args:
        model: a model with a plan, or a plain timm VisionTransformer.
        steps: names of STEPS, applied in the order of that table; DEFAULT_STEPS when None.
        normalisation: mean and standard deviation per channel of images between 0 and 1. When given, the folded model
            takes pixels from 0 to 255 as they are.

    Returns:
        The folded model, in evaluation mode and without gradients. Its logits are the model's; tokens inside it are
        not, and with the step ``class_rows`` forward_features returns the class rows alone.

    Raises:
        ValueError: an unknown step, or a model that is no ViT of timm.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"fold has no step {unknown[0]!r}: the steps are {', '.join(STEPS)}.")
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{type(model).__name__} cannot be folded: fold takes timm's VisionTransformer and ours.")
    folded: Any = copy.deepcopy(model).eval().requires_grad_(False)
    dtype = folded.patch_embed.proj.weight.dtype
    folded.to(torch.promote_types(dtype, torch.float32))
    if not isinstance(folded.blocks, PlanBlocks):
        costs = load_costs()
        folded.blocks = PlanBlocks(*(with_plan_block(block, folded, costs) for block in folded.blocks))
    with torch.no_grad():
        if normalisation is not None:
            fold_normalisation(folded, *normalisation)
        for name, step in STEPS.items():
            if name in steps:
                step(folded)
    return folded.to(dtype)


def with_plan_block(block: Any, model: Any, costs: Costs) -> PlanBlock:
    """A layer of timm's as a layer of a plan, around the same submodules.

    Raises:
        ValueError: the layer is not timm's standard one.
    """
    attn = block.attn
    if type(block) is not TimmBlock or type(attn) is not TimmAttention:
        raise ValueError(
            f"layers of {type(block).__name__} around {type(attn).__name__} have no plan: use a model of timm's Block "
            "and Attention, as vit, deit and deit3 are."
        )
    if attn.gate is not None or attn.attn_dim != attn.qkv.in_features:
        raise ValueError("attention that is gated, or not as wide as its tokens, has no plan: use a standard ViT.")
    config = AttentionConfig(
        plan=Plan((Spec("exact"),)),
        layer=0,
        dim=attn.qkv.in_features,
        num_heads=attn.num_heads,
        grid=model.patch_embed.grid_size,
        num_prefix_tokens=model.num_prefix_tokens,
        options=PlanOptions(),
        qkv_bias=attn.qkv.bias is not None,
        qk_norm=False,
        scale_attn_norm=False,
        proj_bias=attn.proj.bias is not None,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        norm_layer=nn.LayerNorm,
        device=torch.device("meta"),  # every submodule is replaced
        dtype=None,
        costs=costs,
    )
    adopted = PlanBlock(config)
    for name, module in attn.named_children():
        setattr(adopted.attn, name, module)
    for name, module in block.named_children():
        if name == "mlp" and type(module) is Mlp:
            for part, submodule in module.named_children():
                setattr(adopted.mlp, part, submodule)
        elif name != "attn":
            setattr(adopted, name, module)
    return adopted.train(block.training)


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
        start = 0
        for token in _prefix_tokens(model):
            token += table[:, start : start + token.shape[1]]
            start += token.shape[1]
        model.pos_embed = _frozen(table[:, start:].clone())
        model.no_embed_class = True
    if proj.bias is not None:
        model.pos_embed += proj.bias
        proj.bias = None


def fold_layer_scale(model: Any) -> None:
    """LayerScale into the linear layer before it."""
    for block in model.blocks:
        writers = _writers(block)
        for name, linear in (("ls1", writers.get("proj")), ("ls2", writers.get("fc2"))):
            scale = getattr(block, name)
            if isinstance(scale, nn.Identity) or linear is None:
                continue
            linear.weight *= scale.gamma[:, None]
            if linear.bias is not None:
                linear.bias *= scale.gamma
            setattr(block, name, nn.Identity())


def fold_norm_affine(model: Any) -> None:
    """Weight and bias of a LayerNorm into the linear layers that read it."""
    for owner, name, readers in _norms(model):
        norm = getattr(owner, name)
        for linear in readers:
            if norm.bias is not None:
                _add_bias(linear, linear.weight @ norm.bias)
            linear.weight *= norm.weight
        setattr(owner, name, nn.LayerNorm(list(norm.normalized_shape), norm.eps, elementwise_affine=False))


def fold_softmax_scale(model: Any) -> None:
    """The factor 1 / sqrt(D) into the rows of the queries; queries that are normalised keep it."""
    attentions = [block.attn for block in model.blocks if block.has_attention]
    if any(not isinstance(attn.q_norm, nn.Identity) for attn in attentions):
        return
    for attn in attentions:
        if "q" in _projections(attn):
            linear, rows = _projections(attn)["q"]
            linear.weight[rows] *= attn.scale
            if linear.bias is not None:
                linear.bias[rows] *= attn.scale
        attn.scale = 1.0


def fold_key_bias(model: Any) -> None:
    """The bias of the keys adds one number to all logits of a query, which softmax does not see.

    Left where keys are normalised or are projected tokens, whose bias is scaled from key to key.
    """
    for block in model.blocks:
        if not block.has_attention or _is_low_rank(block.attn) or not isinstance(block.attn.k_norm, nn.Identity):
            continue
        linear, rows = _projections(block.attn).get("k", (None, None))
        if linear is not None and linear.bias is not None:
            linear.bias[rows] = 0


def fold_value_bias(model: Any) -> None:
    """The bias of the values into that of the output projection, since the rows of a map sum to 1.

    Left where the keys are projected tokens, whose bias is scaled from key to key, and under a norm of the output.
    """
    for block in model.blocks:
        if not block.has_attention or _is_low_rank(block.attn) or not isinstance(block.attn.norm, nn.Identity):
            continue
        linear, rows = _projections(block.attn)["v"]
        if linear.bias is not None:
            _add_bias(block.attn.proj, block.attn.proj.weight @ linear.bias[rows])
            linear.bias[rows] = 0


def fold_centring(model: Any) -> None:
    """The mean over channels out of all that writes the residual stream, so that LayerNorm becomes RMSNorm.

    Left as it is unless every norm that reads the stream is a LayerNorm without bias (so after ``norm_affine``), every
    writer a linear layer (so after ``layer_scale``), and tokens are pooled by a mean or a class token.
    """
    norms = [found for found in _norms(model, needs_affine=False) if getattr(*found[:2]).bias is None]
    if model.global_pool not in ("token", "avg"):
        return
    num_norms = sum(block.has_attention + 1 for block in model.blocks) + 1
    writers = [_writers(block) for block in model.blocks]
    is_linear = all(len(found) == block.has_attention + 1 for found, block in zip(writers, model.blocks, strict=True))
    scales = [getattr(block, name) for block in model.blocks for name in ("ls1", "ls2")]
    if len(norms) < num_norms or not is_linear or not all(isinstance(scale, nn.Identity) for scale in scales):
        return
    if not all(isinstance(norm, nn.Identity) for norm in (model.norm_pre, model.patch_embed.norm)):
        return
    for table in (*_prefix_tokens(model), model.pos_embed):
        if table is not None:
            table -= table.mean(-1, keepdim=True)
    for linear in (model.patch_embed.proj, *(linear for found in writers for linear in found.values())):
        linear.weight -= linear.weight.mean(0, keepdim=True)
        if linear.bias is not None:
            linear.bias -= linear.bias.mean()
    for owner, name, _ in norms:
        setattr(owner, name, _rms_norm(getattr(owner, name)))


def fold_class_rows(model: Any) -> None:
    """The last layer under token pooling for the class rows alone: W_k in the query, tokens pooled before W_v.

    A last layer that reuses a map, projects tokens or normalises keys still computes only these rows, as it is.
    """
    if model.global_pool != "token" or model.attn_pool is not None:
        return
    last = model.blocks[-1]
    if type(last.attn) in (ExactAttention, SpanAttention) and isinstance(last.attn.k_norm, nn.Identity):
        last.attn = ClassAttention(last.attn)  # class rows see everything under a span too
    model.blocks = ClassRowsBlocks(*model.blocks)
    model.blocks.num_rows = 1 if getattr(model, "dist_token", None) is None else 2


class ClassRowsBlocks(PlanBlocks):
    """The layers of a folded model, of whose tokens only the class rows are read."""

    num_rows = 1

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        num_queries: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
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
        self.num_heads, self.head_dim, self.scale = exact.num_heads, exact.head_dim, exact.scale
        self.grid = exact.grid
        q, k, v = exact.qkv.weight.chunk(3)
        self.q: Any = nn.Linear(exact.dim, exact.dim, bias=False, device="meta")
        self.q.weight = _frozen(q.clone())
        self.key_heads = _frozen(k.unflatten(0, (self.num_heads, self.head_dim)).clone())  # (H, D, C)
        self.value_heads = _frozen(v.unflatten(0, (self.num_heads, self.head_dim)).mT.clone())  # (H, C, D)
        self.register_parameter("value_bias", None)
        if exact.qkv.bias is not None:
            q_bias, _, v_bias = exact.qkv.bias.chunk(3)  # that of the keys is the same for all logits of a query
            self.q.bias = _frozen(q_bias.clone())
            self.value_bias = _frozen(v_bias.clone())
        self.norm, self.proj = exact.norm, exact.proj

    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        assert num_queries is not None
        if mask.is_given:
            raise ValueError("a model folded with class_rows takes no attn_mask and no is_causal: leave this step out.")
        q = self.q(x[:, :num_queries]).unflatten(-1, (self.num_heads, self.head_dim))  # (B, R, H, D)
        queries = (q * self.scale).transpose(1, 2) @ self.key_heads  # (B, H, R, C)
        weights = (queries.flatten(1, 2) @ x.mT).softmax(dim=-1)
        pooled = (weights @ x).unflatten(1, (self.num_heads, num_queries))
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


def _prefix_tokens(model: Any) -> Iterator[Tensor]:
    """The prefix tokens that the model has, in their order."""
    for name in ("cls_token", "dist_token", "reg_token"):
        token = getattr(model, name, None)
        if token is not None:
            yield token


def _is_low_rank(attn: Any) -> bool:
    return getattr(attn, "projected_dim", 0) > 0


def _projections(attn: Any) -> dict[str, Rows]:
    """Where an attention keeps the weights of its queries, keys and values; those of a reused map it does not have."""
    if isinstance(attn, ExactAttention):
        return {name: (attn.qkv, slice(i * attn.dim, (i + 1) * attn.dim)) for i, name in enumerate("qkv")}
    found: dict[str, Rows] = {"v": (attn.v, slice(None))}
    if attn.qk is not None:
        found["q"] = (attn.qk, slice(0, attn.own_dim))
        found["k"] = (attn.qk, slice(attn.own_dim, 2 * attn.own_dim))
    return found


def _writers(block: Any) -> dict[str, Any]:
    """The linear layers whose outputs are added to the residual stream."""
    found: dict[str, Any] = {"proj": block.attn.proj} if block.has_attention else {}
    return {**found, "fc2": block.mlp.fc2} if type(block.mlp) is InplaceMlp else found


def _norms(model: Any, needs_affine: bool = True) -> Iterator[tuple[Any, str, list[Any]]]:
    """The LayerNorms that linear layers alone read: who owns them, their names, their readers."""
    found: list[tuple[Any, str, list[Any]]] = []
    for block in model.blocks:
        if block.has_attention:
            linears = {id(linear): linear for linear, _ in _projections(block.attn).values()}
            found.append((block, "norm1", list(linears.values())))
        if type(block.mlp) is InplaceMlp:
            found.append((block, "norm2", [block.mlp.fc1]))
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if isinstance(head, nn.Linear)]
    if model.attn_pool is None:
        pooled_first = not isinstance(model.fc_norm, nn.Identity)
        if pooled_first or model.global_pool in ("token", "avg"):
            found.append((model, "fc_norm" if pooled_first else "norm", heads))
    for owner, name, readers in found:
        norm = getattr(owner, name)
        if isinstance(norm, nn.LayerNorm) and readers and (norm.weight is not None or not needs_affine):
            yield owner, name, readers


def _rms_norm(norm: nn.LayerNorm) -> nn.RMSNorm:
    """The same norm for inputs whose mean is 0."""
    rms_norm = nn.RMSNorm(list(norm.normalized_shape), norm.eps, elementwise_affine=norm.weight is not None)
    if norm.weight is not None:
        rms_norm.weight = norm.weight
    return rms_norm
