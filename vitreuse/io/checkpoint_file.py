"""Weights as people keep them: files of torch.save and safetensors, and what training wraps around a state dict.

Knows files, prefixes and what others call the parts of a ViT, and no model. Nothing in a file is run: of classes only
argparse.Namespace is read, by which DeiT, MAE and timm keep their arguments.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from vitreuse.io.file_names import printable
from vitreuse.io.transformers_names import MARKER as TRANSFORMERS_MARKER
from vitreuse.io.transformers_names import renamed
from vitreuse.io.urls import refuse_url

# What holds a state dict, the one to take before the others; moving averages come first, as in timm.
CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "weights", "params"),
    *("teacher", "student", "online_network", "encoder", "backbone", "target_encoder", "target_network"),
)
# DDP, torch.compile, FSDP and checkpointing: the first two around the model in any order, all but the first anywhere
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = ("module.", "model.", "net.", "network.", "backbone.", "encoder.")  # around a whole model
MARKERS = ("patch_embed.proj.weight", TRANSFORMERS_MARKER)  # what every ViT has once
UNCHUNKED = re.compile(r"^(blocks\.)\d+\.(\d+\.)")  # DINOv2 is trained in chunks of layers: blocks.CHUNK.LAYER
OF_TIMM = "visual."  # the prefix of CLIP, which timm converts itself
PREFERRED, SECOND, LAST = {"ema", "teacher"}, {"student"}, {"momentum", "target", "k", "predictor", "decoder"}
HEADS = {  # beside a backbone, and timm's name for them
    **dict.fromkeys(("head", "classifier", "cls_classifier"), "head"),
    **dict.fromkeys(("head_dist", "distillation_classifier"), "head_dist"),
}
OTHER_FILES = (  # how they begin, and what they are
    (b"version https://git-lfs", "it is a pointer of git-lfs, not the file that it stands for: fetch that one"),
    (b"\x93NUMPY", "it is a NumPy array"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes"),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it"),
)


class Weights(NamedTuple):
    """Weights by timm's names, without what a file or a training put around them.

    Attributes:
        state: Tensors by name.
        left_out: Names, as in the file, of what is beside the model: other heads, decoders, a student.
        img_size: (rows, columns) in pixels that the file says it was trained at; None where it does not.
    """

    state: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    img_size: tuple[int, int] | None = None


def read_weights(path: str | Path) -> Weights:
    """The weights in a file of safetensors or torch.save, of a moving average where there is one.

    Raises:
        ValueError: There are none, or the file is damaged, or reading it would run code.
    """
    refuse_url("the checkpoint", str(path))
    path = Path(path).expanduser()
    try:
        return _unwrapped(*_read(path))
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error).rstrip(".")
    raise ValueError(f"{path} cannot be read as weights: {reason}.")


def as_weights(checkpoint: Mapping[str, Any] | Weights) -> Weights:
    """The weights in what a file held: a state dict, or what wraps one.

    Raises:
        ValueError: It holds no weights.
    """
    if isinstance(checkpoint, Weights):
        return checkpoint
    try:
        return _unwrapped(checkpoint, {})
    except ValueError as error:
        raise ValueError(f"the checkpoint cannot be read as weights: {error}.") from error


def _unwrapped(content: Any, metadata: Mapping[str, str]) -> Weights:
    """The weights in anything that a file held, with what the file says beside it."""
    found = _state_dict(content)
    tensors = {WRAPPERS.sub("", key): value.detach() for key, value in found.items() if isinstance(value, Tensor)}
    tensors.pop("n_averaged", None)  # of torch's AveragedModel
    state, outside = _without_prefix(tensors)
    state, more = renamed(state)
    return Weights(state, (*outside, *more), _image_size(content, metadata))


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file of weights holds, and its metadata; any other file is a ValueError that says what it is."""
    if path.is_dir():
        raise ValueError("it is a folder: give a file in it")
    if path.exists() and not path.is_file():
        raise ValueError("it is no file but a pipe or a device")
    with open(path, "rb") as file:
        start = file.read(512)
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return _read_safetensors(path)
    if reason := _other_kind(path, start):
        raise ValueError(reason)
    return _read_torch(path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        is_text = printable(str(path)) == str(path)
        state = load_file(path) if is_text else load(path.read_bytes())  # the library opens no other path
        return state, read_metadata(path)
    except SafetensorError as error:
        raise ValueError(f"it is a damaged or incomplete file of safetensors ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a file of safetensors says beside its tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})


def _other_kind(path: Path, start: bytes) -> str | None:
    """What a file is that is no checkpoint; None of what torch.load should try."""
    if not start:
        return "it is empty"
    for magic, kind in OTHER_FILES:
        if start.startswith(magic):
            return kind
    if re.match(rb"\s*(<!doctype html|<html)", start, re.IGNORECASE):
        return "it is a web page, not the file that the page offers: download that one"
    if start.startswith(b"PK\x03\x04"):
        return _other_archive(path)
    if path.suffix == ".onnx" or start.startswith(b"\x08"):
        return "it is an ONNX model, whose graph has no names of a ViT's weights: give the checkpoint it was made of"
    if start.startswith(b"\x80"):  # a pickle, as torch.save wrote until 1.5
        return None
    is_text = not re.search(rb"[^\t\n\r\f\x20-\x7e\x80-\xff]", start)
    if path.suffix == ".safetensors":
        return "it is a damaged file of safetensors"
    return f"it is {'text' if is_text else 'of no format of weights'}: give a file of safetensors or torch.save"


def _other_archive(path: Path) -> str | None:
    """What a zip archive is that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "it is damaged or incomplete"
    inner = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inner:
        return "it is a TorchScript archive, a program: save the model's state_dict() where it was made"
    if "archive_format" in inner:
        return "it is a program of torch.export: save the model's state_dict() where it was made"
    if all(name.endswith(".npy") for name in names):
        return "it is a NumPy archive, which timm's load_pretrained alone reads"
    return None if "data.pkl" in inner else "it is a zip archive: unpack it"


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", str(error))
        if foreign is None:
            raise ValueError("it is damaged, or holds more than weights and plain settings") from error
        what = f"it holds a pickled {foreign[1] or foreign[2]}, and nothing that could run code is read"
        raise ValueError(f"{what}: save the model's state_dict() alone") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load raises whatever a damaged file leads to
        raise ValueError("it is damaged, incomplete, or no file of torch.save") from error


def _state_dict(content: Any) -> Mapping[str, Any]:
    """The state dict in what a file held; a ValueError says what there is instead of one."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__} and no weights by name")
    for key in CONTAINERS:
        if _holds_tensors(content.get(key)):
            return _state_dict(content[key])
    if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return {str(key): value for key, value in content.items()}
    inner = [key for key, value in content.items() if "optim" not in str(key) and _holds_tensors(value)]
    if len(inner) == 1:
        return _state_dict(content[inner[0]])
    held = ", ".join(str(key) for key in content) or "nothing"
    what = f"several ({', '.join(map(str, inner))}), of which none is called model" if inner else "no model's weights"
    raise ValueError(f"it holds {what if inner else f'{what} ({held})'}: save the model's state_dict() alone")


def _holds_tensors(value: Any) -> bool:
    """Whether something is a state dict, or wraps one."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    has_tensors = any(isinstance(part, Tensor) for part in value.values())
    return has_tensors or any(_holds_tensors(value.get(key)) for key in CONTAINERS)


def _without_prefix(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """What is behind the prefix of the one ViT that is meant, and the keys of all else."""
    found = {key[: -len(marker)]: key for key in state for marker in MARKERS if re.search(rf"(^|\.){marker}$", key)}
    prefixes = [prefix for prefix in found if OF_TIMM not in prefix]
    if not prefixes:
        prefix = _outer_prefix(state)
        return {key.removeprefix(prefix): value for key, value in state.items()}, []
    prefix = min(prefixes, key=_rank)
    inside = {key: UNCHUNKED.sub(r"\1\2", key[len(prefix) :]) for key in state if key.startswith(prefix)}
    heads = _heads_beside(state, prefix, len(state[found[prefix]])) if prefix else {}
    names = {**{key: name for key, name in heads.items() if name not in inside.values()}, **inside}
    return {name: state[key] for key, name in names.items()}, [key for key in state if key not in names]


def _rank(prefix: str) -> tuple[int, int]:
    """The rank of a prefix, least for the ViT that is meant.

    A moving average is taken before what it follows, except where training only compares with it, as MoCo and BYOL do
    with their momentum and target encoders.
    """
    words = {*re.split(r"[._]", prefix)}
    order = 3 if words & LAST else 0 if words & PREFERRED else 2 if words & SECOND else 1
    return order, len(prefix)


def _outer_prefix(state: Mapping[str, Tensor]) -> str:
    """What stands before every key of a model that is no ViT, or one that timm converts."""
    prefix = ""
    while outer := next((word for word in OUTER if all(key.startswith(prefix + word) for key in state)), None):
        prefix += outer
    return prefix


def _heads_beside(state: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, str]:
    """timm's names for the keys of classifiers that stand beside a backbone, such as head.weight by backbone.*."""
    parent = re.sub(r"[^.]+\.$", "", prefix)
    heads = {}
    for name, own in HEADS.items():
        if (weight := f"{parent}{name}.weight") in state and state[weight].shape[1:] == (width,):
            parts = [part for part in ("weight", "bias") if f"{parent}{name}.{part}" in state]
            heads |= {f"{parent}{name}.{part}": f"{own}.{part}" for part in parts}
    return heads


def _image_size(content: Any, metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """The size of images that a file says its weights were trained at: ours as a keyword, others among arguments."""
    try:
        said = json.loads(metadata.get("keywords", "{}")).get("img_size")
    except (ValueError, AttributeError):
        return None
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if said is None and isinstance(arguments, Mapping):
        said = arguments.get("img_size") or arguments.get("input_size")
    if isinstance(said, int):
        return said, said
    if isinstance(said, Sequence) and len(said) in (2, 3) and all(isinstance(side, int) for side in said):
        return said[-2], said[-1]
    return None
