"""What all kinds of attention layer share: how they are built and called, the carry between them, their output.

``y, carry = attention(x, carry, grid, num_queries, attn_mask, is_causal)`` is the contract. Tokens x are (B, N, C),
prefix tokens first, then the patches row by row; y has the first ``num_queries`` rows, all when None; ``grid`` is this
input's (rows, columns) of patches, the one built for when None. State between layers is this argument and this return
value and nothing else. ``y = attention(x)``, as code written for timm calls it, hands nothing on.

Shapes: B images, N tokens, M keys, C channels, H heads, D = C / H, P prefix tokens.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function, use_fused_attn
from torch import Tensor, nn

from vitreuse.attention.costs import Costs
from vitreuse.attention.maps import Carried, Layout
from vitreuse.attention.masks import NO_MASK, Mask
from vitreuse.attention.policy import Call, Conditions, Settings, Way, choose
from vitreuse.attention.tiles import span_pairs
from vitreuse.plan import Plan, Spec
from vitreuse.plan.language import num_mergeable
from vitreuse.plan.options import PlanOptions


class Carry(NamedTuple):
    """What a layer hands to the next besides its tokens; None where no later layer reads it."""

    made: Carried = Carried()  # the map that later layers reuse, or its queries and keys
    key_proj: Tensor | None = None  # the anchor's token projections, see lowrank.py
    value_proj: Tensor | None = None
    layerwise_proj: Tensor | None = None  # the model's one under layerwise sharing, passed on by every layer
    span_bias: Tensor | None = None  # of the newest span layer, see maps.span_bias; passed on by every layer
    likeness: Tensor | None = None  # (B, N, D), by which this layer's tokens merge; read between its attention and MLP
    sizes: Tensor | None = None  # (B, N), how many tokens of the first layer each stands for, once some have merged
    places: Tensor | None = None  # (B, N0), which token each of the first layer's is part of


EMPTY_CARRY = Carry()


@dataclass(frozen=True)
class AttentionConfig:
    """Everything that the attention of one layer is built from."""

    plan: Plan
    layer: int  # the place of this layer in the plan
    dim: int
    num_heads: int
    grid: tuple[int, int]
    num_prefix_tokens: int
    costs: Costs
    options: PlanOptions
    qkv_bias: bool  # this and the rest as timm's blocks take them
    qk_norm: bool
    scale_attn_norm: bool
    proj_bias: bool
    attn_drop: float
    proj_drop: float
    norm_layer: Callable[..., nn.Module]
    device: torch.device | None
    dtype: torch.dtype | None

    @property
    def spec(self) -> Spec:
        """The spec of this layer."""
        return self.plan[self.layer]

    @property
    def anchor(self) -> Spec | None:
        """The spec of the layer that makes the map of a reuse layer; None for any other layer."""
        anchor = self.plan.anchors[self.layer]
        return None if anchor is None else self.plan[anchor]

    @property
    def num_tokens(self) -> int:
        """N, the prefix tokens and one token per patch."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]


@torch.fx.wrap
@register_notrace_function
def without_mask(kind: str, mask: Mask) -> Mask:
    """No mask, for a kind of layer whose keys are not the tokens that a mask speaks of.

    Raises:
        ValueError: A mask or causal attention was asked for.
    """
    if mask.is_given:
        raise ValueError(
            f"{kind} layers take no attn_mask and no is_causal, since their keys are not all the tokens: "
            "use exact and reuse layers with a mask."
        )
    return NO_MASK


@torch.fx.wrap
@register_notrace_function
def with_sizes(mask: Mask, sizes: Tensor) -> Mask:
    """The mask of a layer whose keys stand for several tokens.

    Raises:
        ValueError: A mask or causal attention was asked for.
    """
    if mask.is_given:
        raise ValueError(
            "a layer after a merge takes no attn_mask and no is_causal, since its tokens are not those that a mask "
            "speaks of: use a plan that merges nothing with a mask."
        )
    return Mask(sizes=sizes)


@torch.fx.wrap
@register_notrace_function
def with_all_tokens(kind: str, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The tokens, for a kind of layer that must know where on the grid each of them lies.

    Raises:
        ValueError: The number of tokens is not that of the grid, as under patch_drop_rate.
    """
    if x.shape[1] != num_prefix_tokens + grid[0] * grid[1]:
        raise ValueError(
            f"{kind} layers need all {num_prefix_tokens} + {grid[0]} x {grid[1]} tokens and got {x.shape[1]}: "
            "set patch_drop_rate to 0, or use exact and reuse layers."
        )
    return x


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, heads * D) to (B, heads, N, D)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class CarryingAttention(nn.Module):
    """What a layer calls: attention that takes and returns a carry, or tokens alone as timm's does."""

    grid: tuple[int, int]  # built for
    num_prefix_tokens: int
    merges: tuple[int, ...] = ()  # patch tokens that each layer before it merges

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        grid: tuple[int, int] | None = None,
        num_queries: int | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Tokens (B, num_queries, C), and the carry for the next layer where one was given."""
        given, mask = carry or EMPTY_CARRY, Mask(attn_mask, is_causal)
        if given.sizes is not None:
            mask = with_sizes(mask, given.sizes)
        y, handed = self.attend(x, given, grid or self.grid, num_queries, mask)
        return y if carry is None else (y, handed)

    @abstractmethod
    def attend(
        self, x: Tensor, carry: Carry, grid: tuple[int, int], num_queries: int | None, mask: Mask
    ) -> tuple[Tensor, Carry]:
        """Tokens (B, num_queries, C), and the carry for the next layer."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Makes ``grid`` the one built for."""
        self.grid = grid

    def place(self, plan: Plan, layer: int) -> None:
        """Notes what comes before and after the layer in a plan."""
        self.merges = tuple(spec.merged for spec in plan.specs[:layer] if spec.merged)

    def patches_of(self, grid: tuple[int, int]) -> int:
        """Patch tokens of a grid that the layers before have not merged."""
        num_patches = grid[0] * grid[1]
        for num_merged in self.merges:
            num_patches -= num_mergeable(num_merged, num_patches)
        return num_patches

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """N, the prefix tokens and the patch tokens of a grid that the layers before have not merged."""
        return self.num_prefix_tokens + self.patches_of(grid)


class Attention(CarryingAttention):
    """Head geometry, qk-norm and output projection; a subclass per kind of layer adds its inputs and ``attend``."""

    makes_map = True  # False where a layer reads a map and hands it on

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        if config.dim % config.num_heads:
            raise ValueError(f"embed_dim {config.dim} is not a multiple of num_heads {config.num_heads}.")
        self.dim = config.dim
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.scale = self.head_dim**-0.5  # of the logits
        self.grid = config.grid
        self.num_prefix_tokens = config.num_prefix_tokens
        self.costs = config.costs
        self.place(config.plan, config.layer)
        self.reuse_backend = config.options.reuse_backend
        self.fused_attn = use_fused_attn()
        map_spec = config.anchor or config.spec  # of the layer that makes the map
        self.map_word = map_spec.word
        self.width = map_spec.number or 0 if self.map_word == "span" else 0  # of the span, 0 for all keys
        self.projected_dim = map_spec.number or 0 if self.map_word == "lowrank" else 0  # k, 0 for all tokens

    def build_output(self, config: AttentionConfig, computes_map: bool) -> None:
        """Adds timm's submodules after the input projections, in timm's order, so that a seed gives timm's weights."""
        factory = {"device": config.device, "dtype": config.dtype}
        qk_norm = config.qk_norm and computes_map
        self.q_norm = config.norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = config.norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(config.attn_drop)
        self.norm = config.norm_layer(self.dim, **factory) if config.scale_attn_norm else nn.Identity()
        self.proj = nn.Linear(self.dim, self.dim, bias=config.proj_bias, **factory)
        self.proj_drop = nn.Dropout(config.proj_drop)

    def place(self, plan: Plan, layer: int) -> None:
        """Notes how many layers of a plan read what this one hands on, and how many maps are alive at the same time."""
        super().place(plan, layer)
        self.hands_likeness = plan[layer].merged > 0
        anchor = plan.anchors[layer]
        self.num_readers = plan.num_readers[layer]  # reuse layers that read what this layer hands on
        self.anchor_readers = 0 if anchor is None else plan.num_readers[anchor]
        self.num_maps = plan.num_maps  # that are alive at the same time in training
        self.takes_span_bias = plan.repeats_span[layer]

    @property
    def settings(self) -> Settings:
        """What decides how this layer computes attention in its mode."""
        return Settings(
            self.scale,
            self.training,
            self.fused_attn,
            self.costs,
            self.reuse_backend,
            self.num_readers,
            self.num_maps,
            self.num_keys,
        )

    def way(self, conditions: Conditions, num_queries: int | None = None) -> Way:
        """How the layer would compute attention, without a mask and handed no map; see policy.choose."""
        layout = self.layout(self.grid, self.computed_rows(num_queries))
        dropout = self.attn_drop.p if conditions.training else 0.0
        is_eager = not (conditions.training or conditions.compiled)
        call = Call(
            device_type=conditions.device.type,
            dtype=conditions.dtype,
            num_keys=self.num_keys,
            num_logits=conditions.batch_size * self.num_heads * self.num_tokens * self.num_keys,
            width=layout.width,
            is_tiled=layout.is_tiled,
            dropout=dropout,
            in_blocks=conditions.device.type == "cpu" and is_eager,
            has_sizes=self.has_sizes,
        )
        num_readers = self.num_readers if self.makes_map else 0
        return choose(call, self.settings._replace(training=conditions.training, num_readers=num_readers))

    @property
    def num_tokens(self) -> int:
        """N of the grid that the layer is built for."""
        return self.tokens_of(self.grid)

    @property
    def has_sizes(self) -> bool:
        """Whether tokens of that grid stand for several of the first layer's."""
        return self.patches_of(self.grid) < self.grid[0] * self.grid[1]

    @property
    def num_keys(self) -> int:
        """Keys of a query over that grid."""
        return self.num_tokens

    def layout(self, grid: tuple[int, int], num_rows: int | None) -> Layout:
        """Where the tokens lie; the first rows, where only these are computed, see every key."""
        return Layout(grid, self.width if num_rows is None else 0, self.num_prefix_tokens)

    def on_grid(self, x: Tensor, grid: tuple[int, int], mask: Mask) -> tuple[Tensor, Mask]:
        """The tokens and the mask; low-rank and windowed maps need all tokens of the grid and take no mask."""
        if self.map_word not in ("lowrank", "span"):
            return x, mask
        return with_all_tokens(self.map_word, x, grid, self.num_prefix_tokens), without_mask(self.map_word, mask)

    def computed_rows(self, num_queries: int | None) -> int | None:
        """How many query rows to compute: those asked for, or all (None) where windows need whole tiles."""
        if num_queries is not None and self.width > 0 and num_queries > self.num_prefix_tokens:
            return None
        return num_queries

    def likeness(self, of_heads: Tensor, num_queries: int | None) -> Tensor | None:
        """By what tokens merge, (B, N, D): the mean over heads of keys or values (B, H, N, D), in float32.

        None where the layer merges nothing, or computes only rows that never merge. No gradient flows through a choice.
        """
        if not self.hands_likeness or num_queries is not None:
            return None
        return of_heads.detach().mean(1, dtype=torch.float32)

    def output(self, mixed: Tensor, num_queries: int | None) -> Tensor:
        """Output projection of mixed values (B, H, N, D): (B, num_queries, C)."""
        if num_queries is not None:
            mixed = mixed[:, :, :num_queries]
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))

    def num_size_channels(self, num_keys: int) -> int:
        """By how many channels of all heads the fused kernel of this device is told sizes; none where by a bias."""
        weight = self.proj.weight
        call = Call(weight.device.type, weight.dtype, num_keys, has_sizes=self.has_sizes)
        num_readers = self.num_readers if self.makes_map else 0
        way = choose(call, self.settings._replace(training=False, num_readers=num_readers))
        return self.num_heads if way.sizes == "channel" else 0

    def num_rows(self, num_queries: int, num_tokens: int) -> int:
        """Query rows that run when ``num_queries`` are asked for."""
        return num_tokens if self.computed_rows(num_queries) is None else num_queries

    def num_pairs(self, grid: tuple[int, int], num_queries: int, num_keys: int, theoretical: bool) -> int:
        """Query-key pairs of the map, whole tiles with their halo unless ``theoretical``."""
        if self.width == 0 or num_queries <= self.num_prefix_tokens:
            return num_queries * num_keys
        return span_pairs(grid, self.width, self.num_prefix_tokens, theoretical)

    @abstractmethod
    def macs(self, grid: tuple[int, int], num_queries: int, theoretical: bool) -> dict[str, int]:
        """Multiply-adds of the matrix products of one image, by part.

        ``theoretical`` counts a carried map and exact neighbourhoods; else the products that run, those of the
        backend on this device and of whole tiles with their halo.
        """
