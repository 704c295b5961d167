"""MACs and FLOPs of any model, by two counters that know nothing of each other or of the closed form in macs.py.

Counted are matrix products and convolutions, forward, per image. Norms, softmax, activations, additions, pooling and
resizing are not. Both counters follow one forward pass, so a masked product counts dense.

A training step is counted by torch's counter alone, and so is what timm's tables count beside the products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# What a trace may hold beside products: element-wise, reducing, pooling, resizing and reshaping operations. fvcore
# passes over some more (copies, views, integers). An operation that neither knows is refused, never counted as 0.
WITHOUT_PRODUCTS = """
    __or__ abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add add_ alias amax
    any avg_pool1d avg_pool2d batch_norm bernoulli_ clamp clamp_min clone cumsum div div_ exp expand_as fill_ gelu
    group_norm index_add_ index_select layer_norm le lift_fresh linalg_vector_norm log logical_and logical_not
    logical_or lt max_pool1d max_pool2d maximum mean minimum movedim mul mul_ ne neg new_ones ones_like pad pow
    repeat rms_norm rsqrt rsub scatter_ scatter_add_ sigmoid silu softmax sort sqrt sub sub_ sum tanh unflatten
    unfold upsample_bicubic2d upsample_bilinear2d view_as where
"""


def fvcore_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs per image of every submodule that makes products, children included, by fvcore; the whole model is "".

    Products made by a module's own forward count for that module, those of a submodule that is called for both.

    Args:
        example: (B, channels, rows, columns), real: timm's size assertion cannot be traced on the meta device.

    Raises:
        ValueError: The model runs an operation without a rule, which fvcore would count as 0.
    """
    with warnings.catch_warnings():  # fvcore scripts a function at import, which torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        from fvcore.nn import jit_handles
        from fvcore.nn.jit_analysis import JitModelAnalysis

    analysis = JitModelAnalysis(model, (example,)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(
        **{
            "aten::_convolution": jit_handles.conv_flop_jit,
            "aten::linear": jit_handles.linear_flop_jit,
            "aten::addmm": jit_handles.addmm_flop_jit,
            "aten::mm": _matmul_macs,
            "aten::bmm": _matmul_macs,
            "aten::baddbmm": _baddbmm_macs,
            "aten::matmul": _matmul_macs,
            "aten::scaled_dot_product_attention": _attention_macs,
        }
    )
    with torch.no_grad():
        counts = analysis.by_module()
    unknown = set(analysis.unsupported_ops()) - {f"aten::{name}" for name in WITHOUT_PRODUCTS.split()}
    if unknown:
        raise ValueError(
            f"{type(model).__name__} runs {', '.join(sorted(unknown))}, which no counting rule covers: give "
            "fvcore_macs a handle, or name it in WITHOUT_PRODUCTS if it holds no matrix product."
        )
    return _per_image(counts, example)


def torch_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """FLOPs (2 * MACs) per image of the same submodules by torch's counter; the whole model is "".

    Runs on the meta device, where no kernel hides a product: on the CPU torch counts its own fused attention as 0.
    The model is not copied and not changed.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _call_on_meta(model, example)
    root = type(model).__name__
    totals = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    counts = {name.removeprefix(f"{root}."): flops for name, flops in totals.items() if name not in ("Global", root)}
    return _per_image({"": totals.get("Global", 0), **counts}, example)


def training_flops(model: nn.Module, example: Tensor) -> int:
    """FLOPs per image of a training step's forward and backward pass, by torch's counter on the meta device.

    Autograd answers a product by one more for each factor that needs a gradient: two for a layer's weights and inputs,
    one for the patch embedding, since images need none, and none for what is frozen. Counted are the products of the
    mode that the model is in; not counted are the loss, the optimizer, and what a fused kernel or checkpointing
    multiplies a second time to save memory.
    """
    with FlopCounterMode(display=False) as counter:
        _call_on_meta(model, example).sum().backward()
    return _per_image({"": counter.get_total_flops()}, example)[""]


def norm_operations(model: nn.Module, example: Tensor) -> int:
    """What fvcore counts for the LayerNorms of a forward pass, per image: 5 a number, 4 without weight and bias.

    timm's tables have it from there, added to MACs of products: 4.608 GMACs for DeiT-S, whose products make 4.599.
    """
    rule = {torch.ops.aten.native_layer_norm: _norm_operations}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=rule) as counter:
        _call_on_meta(model, example)
    counts = counter.get_flop_counts().get("Global", {})
    return _per_image({"": counts.get(torch.ops.aten.native_layer_norm, 0)}, example)[""]


def _norm_operations(
    shape: Sequence[int], normalized: Sequence[int], weight: Sequence[int] | None, *_: Any, **__: Any
) -> int:
    return (4 if weight is None else 5) * math.prod(shape)


def _call_on_meta(model: nn.Module, example: Tensor) -> Any:
    """The model's output for its own weights and the example, all of them on the meta device."""
    tensors = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad and torch.is_grad_enabled())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return torch.func.functional_call(model, tensors, (example.to("meta"),))


def _per_image(counts: dict[str, int], example: Tensor) -> dict[str, int]:
    """Counts of one forward divided by the batch; a product that the whole batch shares has no share per image."""
    num_images = len(example)
    for name, count in counts.items():
        if count % num_images:
            part = name or "the model"
            raise ValueError(f"{part} makes products that {num_images} images share: count with a batch of 1.")
    return {name: int(count) // num_images for name, count in counts.items() if count or not name}


def _shape(value: torch._C.Value) -> list[int]:
    return value.type().sizes()  # pyright: ignore[reportAttributeAccessIssue]


def _matmul_macs(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """Rows x columns x inner dimension. fvcore's own rule misses a batch that only the second factor has."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _baddbmm_macs(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """A batched product that is added to something."""
    return _matmul_macs(inputs[1:], outputs)


def _attention_macs(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """q k^T and map v of fused attention, for which fvcore has no rule: B*H * N * M * (d_qk + d_v)."""
    *batch, num_tokens, value_dim = _shape(outputs[0])
    query_dim, num_keys = _shape(inputs[0])[-1], _shape(inputs[1])[-2]
    return math.prod(batch) * num_tokens * num_keys * (query_dim + value_dim)
