"""Keys and values projected along the tokens, from N to k: low-rank attention.

A projection E is a k x N matrix, k adaptive bins (mean, max), or one convolution kernel whose stride is its length.
Where the heads of a layer share E, E(xW + b) = (Ex)W + (E1)b: projecting the tokens first and applying W to k rows is
the same function at far fewer multiply-adds. Max is not linear, and unshared projections differ by head: these project
keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vitreuse.attention.base import AttentionConfig, split_heads
from vitreuse.attention.exact import ExactAttention, Inputs
from vitreuse.attention.submodules import is_plain_linear, linear_rows, rows_of
from vitreuse.plan import Plan
from vitreuse.plan.options import POOLS, PlanOptions, layerwise_k


def kernel_size(num_tokens: int, projected_dim: int) -> int:
    """Length and stride of the convolution that takes N tokens to at most k."""
    return (num_tokens + projected_dim - 1) // projected_dim


def projected_length(num_tokens: int, kind: str, projected_dim: int) -> int:
    """Keys that N tokens become: k, or as many windows as a convolution has."""
    if kind != "conv":
        return projected_dim
    return -(-num_tokens // kernel_size(num_tokens, projected_dim))


def projection_macs(num_tokens: int, kind: str, projected_dim: int) -> int:
    """Multiply-adds of projecting one channel of N tokens; pooling has none, a convolution pads its last window."""
    if kind == "linear":
        return projected_dim * num_tokens
    if kind == "conv":
        return projected_length(num_tokens, kind, projected_dim) * kernel_size(num_tokens, projected_dim)
    return 0


def projection_shape(config: AttentionConfig) -> tuple[int, ...] | None:
    """Shape of one token projection: k x N, (H x k x N without sharing), the kernel's length, None for pooling."""
    assert config.spec.number is not None
    if config.options.lowrank_projection in POOLS:
        return None
    heads = (config.num_heads,) if config.options.lowrank_sharing == "none" else ()
    if config.options.lowrank_projection == "conv":
        return (*heads, kernel_size(config.num_tokens, config.spec.number))
    return (*heads, config.spec.number, config.num_tokens)


def layerwise_shape(plan: Plan, options: PlanOptions, num_tokens: int) -> tuple[int, ...] | None:
    """Shape of the model's one token projection, None where layers have their own.

    Raises:
        ValueError: low-rank layers of several k.
    """
    if options.lowrank_sharing != "layerwise":
        return None
    projected_dim = layerwise_k(plan)
    if options.lowrank_projection == "conv":
        return (kernel_size(num_tokens, projected_dim),)
    return (projected_dim, num_tokens)


def tokens_first(config: AttentionConfig) -> bool:
    """Whether the tokens are projected before W: E must be linear and shared by the heads."""
    return config.options.lowrank_projection != "max" and config.options.lowrank_sharing != "none"


def init_projection(projection: Tensor, kind: str, init: str) -> None:
    """Fills a token projection in place: ``mean`` as the pooling it generalises, ``random`` normal.

    Differs from the paper: the variance is 1 / N and not 1 / k, so that projected tokens keep the tokens' scale.
    """
    length = projection.shape[-1]
    with torch.no_grad():
        if init == "random":
            nn.init.normal_(projection, std=length**-0.5)
        elif kind == "conv":
            projection.fill_(1 / length)
        else:
            bins = F.adaptive_avg_pool1d(torch.eye(length, dtype=torch.float64)[None], projection.shape[-2])[0].T
            projection.copy_(bins)


def grid_pooling(grid: tuple[int, int], num_prefix_tokens: int, projected_dim: int) -> Tensor:
    """A token projection (k, N) that keeps the prefix tokens and averages the patches over k - P cells of the grid.

    The rows of the grid fall into bands, each band into cells, as nearly square as k - P cells can be. Where k is no
    more than P, or more than N, it is the mean of all tokens in adaptive bins.
    """
    rows, columns = grid
    num_tokens, num_cells = num_prefix_tokens + rows * columns, projected_dim - num_prefix_tokens
    if not 0 < num_cells <= rows * columns:
        pooled = torch.empty(projected_dim, num_tokens)
        init_projection(pooled, "linear", "mean")
        return pooled
    num_bands = max(-(-num_cells // columns), min(rows, num_cells, round((num_cells * rows / columns) ** 0.5)))
    pooled = torch.zeros(projected_dim, num_tokens)
    pooled[:num_prefix_tokens, :num_prefix_tokens] = torch.eye(num_prefix_tokens)
    cell = num_prefix_tokens
    for band in range(num_bands):
        top, bottom = band * rows // num_bands, (band + 1) * rows // num_bands
        in_band = num_cells // num_bands + (band < num_cells % num_bands)
        for number in range(in_band):
            inside = torch.zeros(rows, columns)
            inside[top:bottom, number * columns // in_band : (number + 1) * columns // in_band] = 1
            pooled[cell, num_prefix_tokens:] = inside.flatten() / inside.sum()
            cell += 1
    return pooled


@torch.fx.wrap
@register_notrace_function
def project_tokens(x: Tensor, projection: Tensor | None, kind: str, projected_dim: int) -> Tensor:
    """Tokens (..., N, D) taken to (..., k, D)."""
    if kind == "linear":
        assert projection is not None
        return _product(projection, x)
    if kind == "conv":
        assert projection is not None
        kernel = projection.shape[-1]
        windows = F.pad(x, (0, 0, 0, -x.shape[-2] % kernel)).unflatten(-2, (-1, kernel))
        return _product(projection[..., None, None, :], windows).squeeze(-2)
    flat = x.transpose(-2, -1).flatten(0, -3)
    if kind == "mean":
        pooled = F.adaptive_avg_pool1d(flat, projected_dim)
    else:
        pooled = F.adaptive_max_pool1d(flat, projected_dim)
    return pooled.unflatten(0, x.shape[:-2]).transpose(-2, -1)


def _product(projection: Tensor, x: Tensor) -> Tensor:
    """projection x; in a trace transposed, since fvcore counts a product by the batch of its first factor."""
    if torch.jit.is_tracing():
        return (x.transpose(-2, -1) @ projection.transpose(-2, -1)).transpose(-2, -1)
    return projection @ x


@torch.fx.wrap
@register_notrace_function
def linear_of_projected(
    linear: nn.Linear, x: Tensor, projection: Tensor | None, kind: str, projected_dim: int, rows: tuple[int, int]
) -> Tensor:
    """Output channels ``rows`` of a plain linear layer for projected tokens, as if they were projected after it.

    Shape: x (B, N, C) to (B, k, channels); E(xW + b) = (Ex)W + (E1)b.
    """
    y = F.linear(project_tokens(x, projection, kind, projected_dim), linear.weight[slice(*rows)])
    bias = rows_of(linear.bias, *rows)
    if bias is None:
        return y
    sums = row_sums(projection, kind, x.shape[1])
    return y + (bias if sums is None else sums * bias).to(y.dtype)  # autocast narrows the product alone


def row_sums(projection: Tensor | None, kind: str, num_tokens: int) -> Tensor | None:
    """E1, by which a bias is scaled when the tokens are projected first: (k, 1), or None for ones."""
    if projection is None:
        return None
    if kind == "linear":
        return projection.sum(-1, keepdim=True)
    kernel = projection.shape[-1]
    inside = F.pad(projection.new_ones(num_tokens), (0, -num_tokens % kernel))
    return (inside.unflatten(0, (-1, kernel)) * projection).sum(-1, keepdim=True)


@torch.fx.wrap
@register_notrace_function
def at_grid(
    projection: Tensor | None,
    kind: str,
    old_grid: tuple[int, int],
    grid: tuple[int, int],
    num_prefix_tokens: int,
    projected_dim: int,
) -> Tensor | None:
    """A projection built for one grid resampled to another: bilinear over the patches and scaled by the ratio of
    their numbers, so that row sums stay; the prefix tokens' columns are kept."""
    if projection is None or old_grid == grid:
        return projection
    old_patches, patches = old_grid[0] * old_grid[1], grid[0] * grid[1]
    wide = projection.to(torch.promote_types(projection.dtype, torch.float32))  # the CPU resizes nothing narrower
    if kind == "conv":
        kernel = kernel_size(num_prefix_tokens + patches, projected_dim)
        flat = wide.reshape(1, -1, projection.shape[-1])
        resized = F.interpolate(flat, size=kernel, mode="linear") * (projection.shape[-1] / kernel)
        return resized.reshape(projection.shape[:-1] + (kernel,)).to(projection.dtype)
    prefix, columns = wide[..., :num_prefix_tokens], wide[..., num_prefix_tokens:]
    images = columns.reshape(1, -1, old_grid[0], old_grid[1])
    resized = F.interpolate(images, size=grid, mode="bilinear", antialias=True) * (old_patches / patches)
    return torch.cat([prefix, resized.reshape(projection.shape[:-1] + (patches,))], dim=-1).to(projection.dtype)


def resampled_parameter(parameter: nn.Parameter, resampled: Tensor | None) -> nn.Parameter:
    """A new parameter with the resampled values that is trained if the old one was."""
    assert resampled is not None
    return nn.Parameter(resampled.detach().clone(), requires_grad=parameter.requires_grad)


class LowRankAttention(ExactAttention):
    """Softmax attention of every token to k projected keys and values.

    Shape: x (B, N, C) to (B, num_queries, C); E (k, N), per head (H, k, N).
    Exact when: k = N and E = F = identity.
    Differs from the paper: prefix tokens are projected like patches; tokens are projected before W_k and W_v where the
        heads share E, which is the same function; mean, max and conv projections, which the paper proposes.
    Cost: key_value sharing: 2 (N + k) C^2 + (1 + 2) N k C multiply-adds an image, against 4 N C^2 + 2 N^2 C.
    Raises: ValueError for an attn_mask, and for fewer tokens than the grid has.
    Paper: Wang et al., 2020, Linformer (arXiv 2006.04768).
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.kind = config.options.lowrank_projection
        self.sharing = config.options.lowrank_sharing
        self.init = config.options.lowrank_init
        shape = projection_shape(config)
        factory: dict[str, Any] = {"device": config.device, "dtype": config.dtype}
        owns_key_proj = self.sharing != "layerwise"
        owns_value_proj = self.sharing in ("none", "headwise")
        self.key_proj = nn.Parameter(torch.empty(shape, **factory)) if shape and owns_key_proj else None
        self.value_proj = nn.Parameter(torch.empty(shape, **factory)) if shape and owns_value_proj else None
        self.tokens_first = tokens_first(config)
        self.one_projection = self.value_proj is None
        self.reset_parameters()

    @property
    def num_keys(self) -> int:
        return projected_length(self.num_tokens, self.kind, self.projected_dim)

    def reset_parameters(self) -> None:
        """Fills the layer's own token projections."""
        for projection in (self.key_proj, self.value_proj):
            if projection is not None:
                init_projection(projection, self.kind, self.init)

    def project(self, x: Tensor, rows: int | None, grid: tuple[int, int], layerwise_proj: Tensor | None) -> Inputs:
        """Queries (B, H, rows, D) of the first rows, projected keys and values (B, H, k, D), and E and F."""
        key_proj, value_proj = self.projections(grid, layerwise_proj)
        if self.tokens_first and is_plain_linear(self.qkv):
            q = split_heads(linear_rows(self.qkv, x if rows is None else x[:, :rows], 0, self.dim), self.head_dim)
            k, v = self.project_tokens_first(x, key_proj, value_proj)
        else:
            q, k, v, *_ = super().project(x, rows, grid, layerwise_proj)
            k = project_tokens(k, key_proj, self.kind, self.projected_dim)
            v = project_tokens(v, value_proj, self.kind, self.projected_dim)
        if self.num_readers == 0:
            return q, k, v, None, None
        carried = None if key_proj is None else key_proj.clone()  # FSDP2 frees a parameter behind its layer
        if value_proj is key_proj or value_proj is None:
            return q, k, v, carried, None if value_proj is None else carried
        return q, k, v, carried, value_proj.clone()

    def project_tokens_first(
        self, x: Tensor, key_proj: Tensor | None, value_proj: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, k, D) of projected tokens."""
        setting, dim = (self.kind, self.projected_dim), self.dim
        if self.one_projection:
            k, v = linear_of_projected(self.qkv, x, key_proj, *setting, (dim, 3 * dim)).chunk(2, dim=-1)
        else:
            k = linear_of_projected(self.qkv, x, key_proj, *setting, (dim, 2 * dim))
            v = linear_of_projected(self.qkv, x, value_proj, *setting, (2 * dim, 3 * dim))
        return split_heads(k, self.head_dim), split_heads(v, self.head_dim)

    def projections(self, grid: tuple[int, int], layerwise_proj: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """E for keys and F for values on this grid; the same tensor twice where the layer has one."""
        own = layerwise_proj if self.sharing == "layerwise" else self.key_proj
        if self.sharing == "layerwise" and self.kind in ("linear", "conv") and own is None:
            raise ValueError(
                "a layerwise low-rank layer was run without the model's key_proj: call the whole model, or "
                "model.blocks(x, layerwise_proj=model.key_proj)."
            )
        key_proj = self.at_grid(own, grid)
        return key_proj, key_proj if self.value_proj is None else self.at_grid(self.value_proj, grid)

    def at_grid(self, projection: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
        """A projection of the grid that the layer is built for resampled to another."""
        return at_grid(projection, self.kind, self.grid, grid, self.num_prefix_tokens, self.projected_dim)

    def set_grid(self, grid: tuple[int, int]) -> None:
        for name in ("key_proj", "value_proj"):
            own = getattr(self, name)
            if own is not None and grid != self.grid:
                setattr(self, name, resampled_parameter(own, self.at_grid(own, grid)))
        self.grid = grid

    def macs(self, grid: tuple[int, int], num_queries: int, theoretical: bool) -> dict[str, int]:
        num_tokens = self.tokens_of(grid)
        num_keys = projected_length(num_tokens, self.kind, self.projected_dim)
        projected = num_keys if self.tokens_first else num_tokens
        products = projection_macs(num_tokens, self.kind, self.projected_dim)
        return {
            "qkv": (num_queries + 2 * projected) * self.dim**2,
            "token_projection": (1 if self.one_projection else 2) * products * self.dim,
            "logits": num_queries * num_keys * self.dim,
            "values": num_queries * num_keys * self.dim,
            "proj": num_queries * self.dim**2,
        }
