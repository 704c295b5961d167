"""One pre-norm transformer layer of a plan, and the stack that threads the carry through the layers.

Shapes: B images, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from vitreuse.attention import ATTENTION, EMPTY_CARRY, AttentionConfig, Carry
from vitreuse.attention.maps import overwrites
from vitreuse.attention.submodules import are_all_watched, is_watched
from vitreuse.model import merge  # functions that a symbolic trace leaves whole are named by their file
from vitreuse.plan import Spec
from vitreuse.plan.language import num_mergeable


class PlanBlock(nn.Module):
    """timm's pre-norm block, with its submodule names, around the attention that the plan asks for.

    A ``none`` layer has no norm1, attn, ls1 and drop_path1: it is the MLP half alone. One of no hidden units has no
    norm2, mlp, ls2 and drop_path2, and a ``skip`` layer neither half.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        mlp_ratio: float = 4.0,
        scale_mlp_norm: bool = False,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        mlp_layer: type[nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        dim = attention.dim
        factory: dict[str, Any] = {"device": attention.device, "dtype": attention.dtype}
        self.spec = attention.spec
        self.has_attention = self.spec.has_attention
        hidden = int(dim * mlp_ratio) if self.spec.hidden is None else _checked_hidden(self.spec, mlp_layer)
        self.has_mlp = hidden > 0 and self.spec.word != "skip"
        self.norm1 = attention.norm_layer(dim, **factory) if self.has_attention else nn.Identity()
        self.attn = ATTENTION[attention.spec.word](attention)
        scales = bool(init_values and self.has_attention)
        self.ls1 = LayerScale(dim, init_values=init_values or 0.0, **factory) if scales else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 and self.has_attention else nn.Identity()
        self.merge = merge.TokenMerging(self.spec.merged, attention.num_prefix_tokens) if self.spec.merged else None

        self.norm2, self.mlp, self.ls2, self.drop_path2 = (nn.Identity() for _ in range(4))
        if self.has_mlp:
            self.norm2 = attention.norm_layer(dim, **factory)
            self.mlp = _make_mlp(attention, hidden, act_layer, mlp_layer, scale_mlp_norm)
            self.ls2 = LayerScale(dim, init_values=init_values, **factory) if init_values else nn.Identity()
            self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        grid: tuple[int, int] | None = None,
        num_queries: int | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Tokens (B, num_queries, C), all when None, and the carry for the next layer where one was given.

        Without a carry, as code written for timm's block calls it, tokens alone.

        Raises:
            ValueError: The layer needs what an earlier one hands on or merges tokens, and no carry was given; or it was
                given something else, such as timm's second argument, a mask.
        """
        refuse_other_carry(carry)
        if carry is None and self.merge is not None:
            raise ValueError(
                f"'{self.spec}' merges tokens, whose sizes the next layer needs: call the whole model or model.blocks, "
                "or give the layer a carry and take the one that it returns."
            )
        handed = EMPTY_CARRY if carry is None else carry
        rows = x if num_queries is None else x[:, :num_queries]
        if self.has_attention:
            y, handed = self.attn(self.norm1(x), handed, grid, num_queries, attn_mask, is_causal)
            rows = rows + self.drop_path1(self.ls1(y))
        if self.merge is not None and num_queries is None:
            rows, sizes, places = self.merge(rows, handed.likeness, handed.sizes, handed.places, handed.wants_places)
            handed = handed._replace(likeness=None, sizes=sizes, places=places, span_bias=None)
        if self.has_mlp:
            rows = rows + self.drop_path2(self.ls2(self.mlp(self.norm2(rows))))
        return rows if carry is None else (rows, handed)

    def macs(self, grid: tuple[int, int], num_queries: int | None, theoretical: bool) -> dict[str, int]:
        """MACs of one image by part for the first rows, all when None; see Attention.macs."""
        num_rows = self.attn.tokens_of(grid) if num_queries is None else num_queries
        parts = {f"attn.{part}": macs for part, macs in self.attn.macs(grid, num_rows, theoretical).items()}
        if self.merge is not None and num_queries is None:
            num_patches = self.attn.patches_of(grid)
            parts["merge"] = self.merge.macs(num_patches, self.attn.head_dim)
            num_rows -= num_mergeable(self.spec.merged, num_patches)
        if not self.has_mlp:
            return parts
        for name, part in self.mlp.named_modules():
            if isinstance(part, nn.Linear):  # fc1, of a gated MLP perhaps two of them, and fc2
                parts[f"mlp.{name}"] = num_rows * part.in_features * part.out_features
        return parts


def refuse_other_carry(carry: object) -> None:
    """Raises ValueError for what is given for a carry and is none."""
    if carry is not None and not isinstance(carry, Carry):
        raise ValueError(f"carry is a {type(carry).__name__} and must be a Carry or None: give attn_mask by name.")


def _checked_hidden(spec: Spec, mlp_layer: Any) -> int:
    """The hidden units that a spec gives its layer.

    Raises:
        ValueError: The MLP may be gated.
    """
    if mlp_layer is not Mlp:
        kind = getattr(mlp_layer, "func", mlp_layer).__name__  # SwiGLUPacked is a partial
        raise ValueError(
            f"'{spec}' sets the hidden units of a layer, and those of mlp_layer={kind} may be gated: use timm's Mlp, "
            f"or leave out '/{spec.hidden}'."
        )
    return spec.hidden or 0


def _make_mlp(
    attention: AttentionConfig, hidden: int, act_layer: type[nn.Module], mlp_layer: type[Any], has_norm: bool
) -> nn.Module:
    """timm's MLP of so many hidden units."""
    mlp_class: Any = InplaceMlp if mlp_layer is Mlp else mlp_layer
    return mlp_class(
        in_features=attention.dim,
        hidden_features=hidden,
        act_layer=act_layer,
        norm_layer=attention.norm_layer if has_norm else None,
        bias=attention.proj_bias,
        drop=attention.proj_drop,
        device=attention.device,
        dtype=attention.dtype,
    )


class LinearBlock(nn.Module):
    """A whole layer as one affine map of each token, x + A x + b, which begins at zero: then it does nothing.

    It has the layer's drop path and no LayerScale; the carry passes it by.
    """

    has_attention = has_mlp = False

    def __init__(self, attention: AttentionConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.spec = attention.spec
        self.attn = ATTENTION["none"](attention)
        self.linear = nn.Linear(attention.dim, attention.dim, device=attention.device, dtype=attention.dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Makes the layer one that does nothing; timm calls it after its own initialisation of the linear layer."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def reset_parameters(self) -> None:
        """The same: what timm calls of every module after weight_init='skip'."""
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        carry: Carry | None = None,
        grid: tuple[int, int] | None = None,
        num_queries: int | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Tokens (B, num_queries, C), all when None, and the carry as it came where one was given; masks mask nothing.

        Raises:
            ValueError: The carry is something else, such as timm's second argument, a mask.
        """
        refuse_other_carry(carry)
        rows = x if num_queries is None else x[:, :num_queries]
        rows = rows + self.drop_path(self.linear(rows))
        return rows if carry is None else (rows, carry)

    def macs(self, grid: tuple[int, int], num_queries: int | None, theoretical: bool) -> dict[str, int]:
        """MACs of one image by part for the first rows, all when None."""
        num_rows = self.attn.tokens_of(grid) if num_queries is None else num_queries
        return {"linear": num_rows * self.linear.in_features * self.linear.out_features}


class PlanBlocks(nn.Sequential):
    """The layers of a model in a row; a slice of it is one too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (B, num_queries, C), all when None, after the last layer; arguments are those of ``collect`` after the
        indices."""
        return self.collect(x, [], *args, **kwargs)[0]

    def collect(
        self,
        x: Tensor,
        indices: list[int],
        grid: tuple[int, int] | None = None,
        num_queries: int | None = None,
        layerwise_proj: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        checkpointing: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, num_queries, C) after the last layer, and all of them after each layer of ``indices``.

        All tokens are those of the first layer, each with the value of the one that it was merged into.
        """
        carry = Carry(layerwise_proj=layerwise_proj, wants_places=num_queries is None or len(indices) > 0)
        collected: list[Tensor] = []
        for i, block in enumerate(self):
            rows = num_queries if i == len(self) - 1 else None
            if checkpointing:  # the other, re-entrant kind loses the gradients of what is handed on
                x, carry = checkpoint(block, x, carry, grid, rows, attn_mask, is_causal, use_reentrant=False)
            else:
                x, carry = block(x, carry, grid, rows, attn_mask, is_causal)
            if i in indices:
                collected.append(all_tokens(x, carry))
        return (x if num_queries is not None else all_tokens(x, carry)), collected


def all_tokens(x: Tensor, carry: Carry) -> Tensor:
    """The tokens (B, N0, C) of the first layer, of those (B, N, C) that are left."""
    return x if carry.places is None else merge.unmerge(x, carry.places)


class InplaceMlp(Mlp):
    """timm's Mlp with its submodules and its numbers; GELU overwrites the hidden units where nobody else sees them.

    The hidden units are a layer's largest tensors, and on a CPU fresh memory costs more than GELU: over the layers of a
    ViT-S/16 at 224 px in float32, batch 8, the page faults of the MLP fall from 196 to 46 MiB a forward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        x = self.fc1(x)
        x = torch.ops.aten.gelu_(x) if self._owns_hidden(x) else self.act(x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def _owns_hidden(self, hidden: Tensor) -> bool:
        """Whether nobody else sees the hidden units: in an eager call of submodules that nobody watches or replaced."""
        if not (isinstance(hidden, Tensor) and overwrites(hidden)):  # FX traces proxies
            return False
        is_plain = type(self.fc1) is nn.Linear and type(self.act) is nn.GELU and self.act.approximate == "none"
        return is_plain and not (is_watched(self.fc1) or is_watched(self.act) or are_all_watched())
