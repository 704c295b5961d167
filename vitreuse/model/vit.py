"""timm's Vision Transformer with a plan. The one file that knows timm's insides.

Shapes: B images, N tokens (prefix tokens first), C channels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import deit
from timm.models import vision_transformer as timm_vit
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from vitreuse.attention import AttentionConfig
from vitreuse.attention.costs import Costs, load_costs
from vitreuse.attention.lowrank import at_grid, init_projection, layerwise_shape, resampled_parameter
from vitreuse.model import merge
from vitreuse.model.block import LinearBlock, PlanBlock, PlanBlocks
from vitreuse.model.checkpoint import checkpoint_filter_fn, in_plan_for_timm
from vitreuse.plan import Plan, parse_plan
from vitreuse.plan.options import PlanOptions, layerwise_k, warn_if_idle, warn_if_map_is_carried

# What timm's blocks are given that attention is built from.
BLOCK_KEYWORDS = (
    *("dim", "num_heads", "qkv_bias", "qk_norm", "scale_attn_norm", "proj_bias", "attn_drop", "proj_drop"),
    *("norm_layer", "device", "dtype"),
)
__all__ = ["PlanVisionTransformer", "PlanVisionTransformerDistilled", "checkpoint_filter_fn"]  # timm looks here


class PlanVisionTransformer(timm_vit.VisionTransformer):
    """timm's VisionTransformer (ViT, DeiT, DeiT III) with a plan, whose carry is threaded through the layers."""

    num_class_rows = 1  # rows of the last layer that the head reads under token pooling
    plain_class: Any = timm_vit.VisionTransformer

    def __init__(
        self,
        *args: Any,
        plan: str | Plan,
        depth: int = 12,
        num_heads: int = 12,
        reuse_backend: str = "auto",
        lowrank_sharing: str = "key_value",
        lowrank_projection: str = "linear",
        lowrank_init: str = "random",
        **kwargs: Any,
    ) -> None:
        """Builds the model.

        Args:
            *args: timm's.
            plan: One attention spec per layer, as text or parsed.
            depth: Number of layers.
            num_heads: Number of heads of every layer.
            reuse_backend: See PlanOptions.
            lowrank_sharing: See PlanOptions.
            lowrank_projection: See PlanOptions.
            lowrank_init: See PlanOptions.
            **kwargs: timm's.

        Raises:
            ValueError: A wrong plan, an unknown option, or a keyword of timm's that a plan excludes.
        """
        plan = parse_plan(str(plan), depth=depth, num_heads=num_heads)
        options = PlanOptions(reuse_backend, lowrank_sharing, lowrank_projection, lowrank_init).settled(plan)
        warn_if_map_is_carried(options, kwargs.get("attn_drop_rate", 0.0))
        if "block_fn" in kwargs:
            raise ValueError("block_fn cannot be given: the plan decides what the layers are.")
        self._make_plain: Any = partial(self.plain_class, *args, depth=depth, num_heads=num_heads, **kwargs)
        layer: Any = partial(self._make_layer, plan, options, load_costs())
        super().__init__(*args, depth=depth, num_heads=num_heads, block_fn=layer, **kwargs)
        self.plan_options = options
        self.blocks = PlanBlocks(*self.blocks)
        parse_plan(str(plan), num_patches=self.patch_embed.num_patches)
        num_tokens = self.num_prefix_tokens + self.patch_embed.num_patches
        warn_if_idle(plan, self.patch_embed.grid_size, num_tokens)
        self._add_shared_projection(plan, options, num_tokens)

    def _add_shared_projection(self, plan: Plan, options: PlanOptions, num_tokens: int) -> None:
        """Makes the token projection that all low-rank layers share, where they do."""
        shape = layerwise_shape(plan, options, num_tokens)
        self.key_proj = None if shape is None else nn.Parameter(self.patch_embed.proj.weight.new_empty(shape))
        if self.key_proj is not None:
            self.layerwise_dim = layerwise_k(plan)
            init_projection(self.key_proj, options.lowrank_projection, options.lowrank_init)

    def _make_layer(
        self, plan: Plan, options: PlanOptions, costs: Costs, *, depth: int, attn_layer: Any, **block: Any
    ) -> PlanBlock | LinearBlock:
        """timm's block_fn for layer ``depth``; the patch embedding is already built."""
        _refuse_small(self.patch_embed.img_size, self.patch_embed.patch_size)
        if attn_layer not in (TimmAttention, "", "attn"):
            raise ValueError(f"attn_layer={attn_layer!r} cannot be given: the plan decides what the layers are.")
        config = AttentionConfig(
            plan=plan,
            layer=depth,
            grid=self.patch_embed.grid_size,
            num_prefix_tokens=self.num_prefix_tokens + self.num_class_rows - 1,  # timm adds the second one later
            costs=costs,
            options=options,
            **{name: block.pop(name) for name in BLOCK_KEYWORDS},
        )
        if config.spec.word == "linear":
            return LinearBlock(config, block["drop_path"])
        return PlanBlock(config, **block)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises the weights as timm does, and the layerwise projection where modules do not start initialised."""
        super().init_weights(mode=mode, needs_reset=needs_reset)
        if needs_reset and self.key_proj is not None:
            init_projection(self.key_proj, self.plan_options.lowrank_projection, self.plan_options.lowrank_init)

    def fix_init_weight(self) -> None:
        """Makes what layer i adds to the tokens smaller by sqrt(2 (i + 1)), as timm does, in the halves that it has."""
        blocks: Any = self.blocks
        with torch.no_grad():
            for layer, block in enumerate(blocks):
                writers = [block.attn.proj] if block.has_attention else []
                for writer in [*writers, block.mlp.fc2] if block.has_mlp else writers:
                    writer.weight /= math.sqrt(2 * (layer + 1))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's method, which takes a plain ViT's state dict too: see vitreuse.load_checkpoint, which says more."""
        return super().load_state_dict(in_plan_for_timm(state_dict, self), strict, assign)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Loads a NumPy archive of the first ViTs, as timm does, by way of timm's own model as this one is now; what
        the archive lacks stays as it is."""
        plain = self._make_plain()
        plain.set_input_size(self.patch_embed.img_size, self.patch_embed.patch_size)
        plain.reset_classifier(self.num_classes)
        shapes = {key: value.shape for key, value in plain.state_dict().items()}
        own = {key: value for key, value in self.state_dict().items() if shapes.get(key) == value.shape}
        plain.load_state_dict(own, strict=False)
        plain.load_pretrained(checkpoint_path, *([prefix] if prefix else []))
        self.load_state_dict(plain.state_dict())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, num_classes); under token pooling the last layer computes only the rows that are read."""
        num_queries = self.num_class_rows if self.reads_class_rows else None
        return self.forward_head(self.forward_tokens(x, num_queries, attn_mask, is_causal))

    @property
    def plan(self) -> Plan:
        """The plan of the layers that the model has, fewer than it was built with after prune_intermediate_layers."""
        blocks: Any = self.blocks
        return Plan(tuple(block.spec for block in blocks))

    @property
    def reads_class_rows(self) -> bool:
        """Whether the head reads only the class (and distillation) token, so that only these rows are needed."""
        return self.global_pool == "token" and self.attn_pool is None

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All tokens (B, N, C) after the final norm."""
        return self.forward_tokens(x, None, attn_mask, is_causal)

    def forward_tokens(self, x: Tensor, num_queries: int | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """The first ``num_queries`` tokens, all when None, after the final norm."""
        x, grid = self.embed(x)
        self._warn_if_cut(x.shape[1] - self.num_prefix_tokens)
        x = self.blocks(x, grid, num_queries, self.key_proj, attn_mask, is_causal, self.grad_checkpointing)
        return self.norm(x)

    def _warn_if_cut(self, num_patches: int) -> None:
        """Warns where tokens merge and so few patches are fewer than the plan was made for; see merge.warn_if_cut."""
        blocks: Any = self.blocks
        if any(block.spec.merged for block in blocks):  # a plan takes longer to make than a small layer
            merge.warn_if_cut(self.plan, num_patches)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """Tokens (B, N, C) of images, and their grid where it may differ from the built one."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        return self.norm_pre(self.patch_drop(self._pos_embed(x))), grid

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's method: prefix tokens and position embedding added to patches (B, N, C) or (B, rows, columns, C).

        Written out, since a symbolic trace leaves whole only the functions that the file of the root's forward names.
        """
        pos_embed = self.pos_embed
        if self.dynamic_img_size and pos_embed is not None:
            num_prefix_tokens = 0 if self.no_embed_class else self.num_prefix_tokens
            size, old_size = [x.shape[1], x.shape[2]], self.patch_embed.grid_size
            pos_embed = resample_abs_pos_embed(pos_embed, size, old_size, num_prefix_tokens)
        x = x.flatten(1, -2)
        if pos_embed is None:
            return self._with_prefix_tokens(x)
        if self.no_embed_class:
            return self.pos_drop(self._with_prefix_tokens(x + pos_embed))
        return self.pos_drop(self._with_prefix_tokens(x) + pos_embed)

    def _with_prefix_tokens(self, x: Tensor) -> Tensor:
        """Prefix tokens before the patches; without any the patches as they are, since a copy changes the rounding."""
        prefix = self.prefix_tokens(x.shape[0])
        return torch.cat([*prefix, x], dim=1) if prefix else x

    def prefix_tokens(self, batch_size: int) -> list[Tensor]:
        """The class token and the registers, where the model has them, for every image: (B, 1, C) and (B, R, C)."""
        tokens = (self.cls_token, self.reg_token)
        return [token.expand(batch_size, -1, -1) for token in tokens if token is not None]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Tokens after chosen layers; arguments and results are those of timm's method."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not one of NCHW, NLC.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x, grid = self.embed(x)
        self._warn_if_cut(x.shape[1] - self.num_prefix_tokens)
        blocks: Any = self.blocks[: max_index + 1] if stop_early else self.blocks
        x, taken = blocks.collect(
            x, take_indices, grid, None, self.key_proj, attn_mask, is_causal, self.grad_checkpointing
        )
        if norm:
            taken = [self.norm(y) for y in taken]
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        patches = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            size = self.patch_embed.dynamic_feat_size((height, width))
            patches = [y.transpose(1, 2).unflatten(2, size).contiguous() for y in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                found["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                found["image_features"] = self.norm(x)
            return found
        intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Makes another image or patch size the built one: position embedding, token projections and span tiles."""
        old_grid = self.patch_embed.grid_size
        _refuse_small(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        grid = self.patch_embed.grid_size
        blocks: Any = self.blocks
        for block in blocks:
            block.attn.set_grid(grid)
        if grid != old_grid:
            warn_if_idle(self.plan, grid, self.num_prefix_tokens + self.patch_embed.num_patches)
            self._warn_if_cut(self.patch_embed.num_patches)
            update_model_args(self, plan=str(merge.cut_plan(self.plan, self.patch_embed.num_patches)))  # no preset
        if self.key_proj is not None and grid != old_grid:
            kind = self.plan_options.lowrank_projection
            resampled = at_grid(self.key_proj, kind, old_grid, grid, self.num_prefix_tokens, self.layerwise_dim)
            self.key_proj = resampled_parameter(self.key_proj, resampled)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the layers after the last of ``indices``, as timm does; the last one left hands nothing on."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        blocks: Any = self.blocks
        for layer, block in enumerate(blocks):
            block.attn.place(self.plan, layer)
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay; the layerwise projection is part of the stem."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": f"{groups['stem']}|key_proj"}


class PlanVisionTransformerDistilled(PlanVisionTransformer, deit.VisionTransformerDistilled):
    """timm's distilled DeiT with a plan: a second class token and a second head."""

    num_class_rows = 2
    plain_class = deit.VisionTransformerDistilled

    def __init__(self, *args: Any, reg_tokens: int = 0, **kwargs: Any) -> None:
        """Builds the model; see PlanVisionTransformer.

        Raises:
            ValueError: As there; or registers are asked for, which timm's distilled model leaves out.
        """
        if reg_tokens:
            raise ValueError(f"reg_tokens={reg_tokens} has no effect on a distilled model: leave it out.")
        super().__init__(*args, **kwargs)

    def prefix_tokens(self, batch_size: int) -> list[Tensor]:
        """The class token and the distillation token for every image, (B, 1, C) each."""
        assert self.cls_token is not None
        return [self.cls_token.expand(batch_size, -1, -1), self.dist_token.expand(batch_size, -1, -1)]


def _refuse_small(img_size: Any, patch_size: Any) -> None:
    """Raises ValueError for images of no patch."""
    size, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if any(px < side for px, side in zip(size, patch, strict=True)):
        raise ValueError(f"images of {size} px are smaller than a patch of {patch} px: use a larger img_size.")
