"""Which submodules of an attention may be computed without being called.

A submodule is called, so that adapters, hooks, pruning, quantisation and offloading work as on timm's models. Two
short cuts remain, and only where nobody could tell: output rows of a linear layer's weight where not all of them are
needed, and the rate of a dropout that a fused kernel draws.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OF_ALL_MODULES = tuple(f"_global{name}" for name in HOOKS)  # hooks that torch keeps beside those of each
SCOPE_HOOKS = "fvcore.nn.jit_analysis"  # fvcore's hooks name the scope of what it traces and change nothing


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: it has hooks, or a forward of its own."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return "forward" in module.__dict__ or any(type(hook).__module__ != SCOPE_HOOKS for hook in hooks)


def are_all_watched() -> bool:
    """Whether hooks are set that the calls of all modules run."""
    return any(getattr(torch.nn.modules.module, name) for name in OF_ALL_MODULES)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer and nothing else: not replaced, watched, pruned, reparametrised, or
    with a weight of a tensor class of its own, as quantised and sharded ones have."""
    return (
        type(module) is nn.Linear
        and module._parameters.keys() == {"weight", "bias"}
        and not hasattr(module._parameters["weight"], "__tensor_flatten__")
        and not is_watched(module)
    )


@torch.fx.wrap
@register_notrace_function
def rows_of(parameter: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Rows ``start:stop`` of a layer's weight or bias, or the heads of a projection."""
    return None if parameter is None else parameter[start:stop]


def linear_rows(linear: nn.Linear, x: Tensor, start: int, stop: int) -> Tensor:
    """Output channels ``start:stop`` of a plain linear layer."""
    return F.linear(x, linear.weight[start:stop], rows_of(linear.bias, start, stop))


def dropout_rate(module: nn.Module) -> float | None:
    """The rate at which a dropout drops in its mode; None where it must be called."""
    if is_watched(module) or type(module) not in (nn.Dropout, nn.Identity):
        return None
    return float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0
