"""A naive reference of a model with a plan: one image, one head, one query at a time, written from the papers.

It reads a state dict and keywords and runs none of the model's code.
Shapes: N tokens, prefix tokens first; M keys; C channels; H heads; D = C / H.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreuse import Spec

Projection = Callable[[Tensor], Tensor]  # (N, D) to (M, D)


class Head(NamedTuple):
    """What a layer hands on of one head: its map (N, M), and what took the tokens to the map's M columns."""

    weights: Tensor
    project_keys: Projection
    project_values: Projection


class Carry(NamedTuple):
    """What a layer hands on: the spec its map was computed by, and its heads, new ones first."""

    spec: Spec
    heads: list[Head]


ATTENTIONS = ("exact", "reuse", "lowrank", "span")
WORDS = (*ATTENTIONS, "none", "linear", "skip")  # of the plan language, that are written here


@dataclass(frozen=True)
class Reference:
    """The function that a state dict, a plan and a model's keywords stand for."""

    state: Mapping[str, Tensor]
    plan: list[Spec]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    num_heads: int
    num_prefix_tokens: int
    global_pool: str = "token"
    lowrank_sharing: str = "key_value"
    lowrank_projection: str = "linear"

    def logits(self, image: Tensor) -> Tensor:
        """Logits of one image (channels, rows, columns)."""
        return self.head(self.tokens(image))

    def head(self, tokens: Tensor) -> Tensor:
        """Logits of the final tokens (N, C)."""
        if self.global_pool == "avg":
            return self.linear(self.norm(tokens[self.num_prefix_tokens :].mean(0), "fc_norm"), "head")
        logits = self.linear(tokens[0], "head")
        if "head_dist.weight" in self.state:
            return (logits + self.linear(tokens[1], "head_dist")) / 2
        return logits

    def tokens(self, image: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """All tokens (N, C) after the final norm; for one that merged, the token that it became part of."""
        x, carry = self.embedded(image), None
        sizes, places = [1] * len(x), list(range(len(x)))
        for layer, spec in enumerate(self.plan):
            block = f"blocks.{layer}"
            if spec.word in ATTENTIONS:
                given = self.norm(x, f"{block}.norm1")
                y, carry, traits = self.attention(given, layer, carry, sizes, attn_mask, is_causal)
                x = x + y * self.state.get(f"{block}.ls1.gamma", 1)
                x, sizes, moved = self.merged(x, sizes, traits, spec.merged)
                places = [moved[place] for place in places]
            if spec.word == "linear":
                x = x + self.linear(x, f"{block}.linear")
            elif spec.word != "skip" and spec.hidden != 0:
                x = x + self.mlp(self.norm(x, f"{block}.norm2"), block)
        return self.norm(x[places], "norm")

    def mlp(self, x: Tensor, block: str) -> Tensor:
        """What a layer's MLP adds to each token (N, C)."""
        hidden = F.gelu(self.linear(x, f"{block}.mlp.fc1"))
        y = self.linear(self.norm(hidden, f"{block}.mlp.norm"), f"{block}.mlp.fc2")
        return y * self.state.get(f"{block}.ls2.gamma", 1)

    def embedded(self, image: Tensor) -> Tensor:
        """Class, distillation and register tokens, then one token per patch row by row, with their positions."""
        height, width = self.patch_size
        kernel = self.state["patch_embed.proj.weight"].flatten(1)
        patches = [
            kernel @ image[:, y : y + height, x : x + width].flatten() + self.state["patch_embed.proj.bias"]
            for y in range(0, self.grid[0] * height, height)
            for x in range(0, self.grid[1] * width, width)
        ]
        prefix = [self.state[f"{name}_token"][0] for name in ("cls", "dist", "reg") if f"{name}_token" in self.state]
        positions = self.state["pos_embed"][0]
        if len(positions) == len(patches):
            return torch.cat([*prefix, torch.stack(patches) + positions])
        return torch.cat([*prefix, torch.stack(patches)]) + positions

    def attention(
        self,
        x: Tensor,
        layer: int,
        carry: Carry | None,
        sizes: list[int],
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Carry, list[Tensor]]:
        """One layer's attention of tokens (N, C): the first K maps are those handed on, the others its own.

        The tokens stand for so many of the image each. What they are alike by, (N, D) of each head, is returned last:
        the keys, and the values where a layer reuses.
        """
        spec, name = self.plan[layer], f"blocks.{layer}.attn"
        dim = x.shape[1] // self.num_heads
        if spec.word == "reuse":
            assert carry is not None
            num_reused = self.num_heads if spec.number is None else spec.number
            spec, maps = carry.spec, carry.heads[:num_reused]
            projections = [(head.project_keys, head.project_values) for head in carry.heads]
            v_name, v_start = f"{name}.v", 0
            qk_name, k_start = f"{name}.qk", (self.num_heads - num_reused) * dim
        else:
            num_reused, maps = 0, []
            projections = [self.projections(spec, name, head, len(x)) for head in range(self.num_heads)]
            v_name, v_start = f"{name}.qkv", 2 * len(x[0])
            qk_name, k_start = f"{name}.qkv", len(x[0])

        seen = None
        if spec.word != "lowrank":
            seen = [self.seen(i, len(x), spec, attn_mask, is_causal) for i in range(len(x))]
        own, keys = [], []
        for head in range(num_reused, self.num_heads):
            row = (head - num_reused) * dim
            project_keys, project_values = projections[head]
            q = self.norm(self.linear(x, qk_name, row, dim), f"{name}.q_norm")
            k = self.norm(project_keys(self.linear(x, qk_name, k_start + row, dim)), f"{name}.k_norm")
            own.append(Head(softmax_map(q, k, seen, attn_mask, sizes), project_keys, project_values))
            keys.append(k)

        values = [self.linear(x, v_name, v_start + head * dim, dim) for head in range(self.num_heads)]
        mixed = [head.weights @ head.project_values(v) for head, v in zip(maps + own, values, strict=True)]
        y = self.linear(self.norm(torch.cat(mixed, dim=1), f"{name}.norm"), f"{name}.proj")
        return y, Carry(spec, own + maps), values if self.plan[layer].word == "reuse" else keys

    def merged(
        self, x: Tensor, sizes: list[int], traits: list[Tensor], num_merged: int
    ) -> tuple[Tensor, list[int], list[int]]:
        """Tokens (N - r, C) after a merge, for how many of the image each stands, and the new place of each before."""
        goes = self.strongest_ties(traits, num_merged) if num_merged else {}
        stays = [i for i in range(len(x)) if i not in goes]
        parts = [[i, *(a for a, b in goes.items() if b == i)] for i in stays]
        sums = [sum(sizes[j] for j in part) for part in parts]
        means = [sum(x[j] * (sizes[j] / total) for j in part) for part, total in zip(parts, sums, strict=True)]
        return torch.stack(means), sums, [stays.index(goes.get(i, i)) for i in range(len(x))]

    def strongest_ties(self, traits: list[Tensor], num_merged: int) -> dict[int, int]:
        """The tokens of A that merge, each with the one of B that it merges into.

        A and B are every other patch token from the first and from the second; traits are (N, D) of each head.
        """
        directions = F.normalize(torch.stack(traits).detach().float().mean(0), dim=-1)
        num_tokens = len(directions)
        of_a, of_b = (range(self.num_prefix_tokens + start, num_tokens, 2) for start in (0, 1))
        ties = []
        for a in of_a:
            cosines = [float(directions[a] @ directions[b]) for b in of_b]
            ties.append((max(cosines), a, of_b[cosines.index(max(cosines))]))
        ties.sort(key=lambda tie: tie[0], reverse=True)  # which leaves equal ones in their order
        most = (num_tokens - self.num_prefix_tokens) // 2
        return {a: b for _, a, b in ties[: min(num_merged, most)]}

    def seen(self, i: int, num_tokens: int, spec: Spec, attn_mask: Tensor | None, is_causal: bool) -> list[int]:
        """The keys that query i sees: under a span prefix tokens see and are seen by all, patches by near ones."""
        seen = [j for j in range(num_tokens) if spec.word != "span" or self.is_near(i, j, spec.number or 0)]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            seen = [j for j in seen if attn_mask[i, j]]
        return [j for j in seen if j <= i or not is_causal]

    def is_near(self, i: int, j: int, width: int) -> bool:
        """Whether one of two tokens is a prefix token, or both are patches within half a width of each other."""
        if min(i, j) < self.num_prefix_tokens:
            return True
        (row, column), (other_row, other_column) = (divmod(t - self.num_prefix_tokens, self.grid[1]) for t in (i, j))
        return max(abs(row - other_row), abs(column - other_column)) <= width // 2

    def projections(self, spec: Spec, name: str, head: int, num_tokens: int) -> tuple[Projection, Projection]:
        """What takes one head's keys and its values from N tokens to M."""
        if spec.word != "lowrank":
            return (lambda x: x), (lambda x: x)
        assert spec.number is not None
        kind, k = self.lowrank_projection, spec.number
        bins = [range(j * num_tokens // k, -(-(j + 1) * num_tokens // k)) for j in range(k)]
        if kind in ("mean", "max"):
            reduce = torch.mean if kind == "mean" else torch.amax

            def pool(x):
                return torch.stack([reduce(x[list(tokens)], 0) for tokens in bins])

            return pool, pool
        keys = self.state["key_proj" if self.lowrank_sharing == "layerwise" else f"{name}.key_proj"]
        one = self.lowrank_sharing in ("key_value", "layerwise")
        values = keys if one else self.state[f"{name}.value_proj"]
        if self.lowrank_sharing == "none":
            keys, values = keys[head], values[head]
        if kind == "conv":
            keys, values = strided(keys, num_tokens), strided(values, num_tokens)
        return (lambda x: keys @ x), (lambda x: values @ x)

    def linear(self, x: Tensor, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Output rows ``start`` to ``start + length`` of a linear layer."""
        rows = slice(start, None if length is None else start + length)
        y = x @ self.state[f"{name}.weight"][rows].T
        return y + self.state[f"{name}.bias"][rows] if f"{name}.bias" in self.state else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm over channels, the identity where the model has none of this name."""
        if f"{name}.weight" not in self.state:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]


def softmax_map(
    q: Tensor, k: Tensor, seen: list[list[int]] | None, attn_mask: Tensor | None, sizes: list[int]
) -> Tensor:
    """Softmax map (N, M) of one head, row by row over the keys that each query sees.

    All keys when None, of which each is then no token; a key that is one counts as often as its size says.
    """
    rows = []
    for i in range(len(q)):
        columns = list(range(len(k))) if seen is None else seen[i]
        logits = k[columns] @ q[i] / q.shape[1] ** 0.5
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            logits = logits + attn_mask[i, columns]
        if seen is not None:
            logits = logits + q.new_tensor([sizes[j] for j in columns]).log()
        weights = logits.exp() / logits.exp().sum()
        rows.append(q.new_zeros(len(k)).index_put((torch.tensor(columns),), weights))
    return torch.stack(rows)


def strided(kernel: Tensor, num_tokens: int) -> Tensor:
    """The matrix (M, N) of a convolution along the tokens whose stride is its length; the last window may be cut."""
    size = len(kernel)
    rows = []
    for start in range(0, num_tokens, size):
        window = range(start, min(start + size, num_tokens))
        rows.append(kernel.new_zeros(num_tokens).index_put((torch.tensor(window),), kernel[: len(window)]))
    return torch.stack(rows)


def bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (rows, columns) at a larger size, pixel by pixel, borders held."""
    enlarged = torch.zeros(size, dtype=image.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * image.shape[0] / size[0] - 0.5, 0), image.shape[0] - 1)
            x = min(max((j + 0.5) * image.shape[1] / size[1] - 0.5, 0), image.shape[1] - 1)
            for row in range(image.shape[0]):
                for column in range(image.shape[1]):
                    near = max(0.0, 1 - abs(row - y)) * max(0.0, 1 - abs(column - x))
                    enlarged[i, j] += near * image[row, column]
    return enlarged
