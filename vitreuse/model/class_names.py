"""Names of classes, written and read beside a model's weights: labels and heads are matched by them.

In memory a model's are ``pretrained_cfg["label_names"]``, timm's place for them. On disk they are with the weights:
metadata of a model.safetensors, an entry of a checkpoint; of a folder that timm wrote, in the config.json beside them.
Shards that nobody gave names to have their numbers as names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN

from vitreuse.io.checkpoint_file import read_metadata

LABEL_NAMES = "label_names"  # as timm calls them
CLIP_DIMS = (512, 640, 768, 1024, 1280)  # of the embeddings that timm's towers project to
Names = tuple[str, ...]


def names_of(model: Any) -> Names | None:
    """The names of a model's classes; None where they are not known."""
    names = _as_names((getattr(model, "pretrained_cfg", None) or {}).get(LABEL_NAMES))
    return names if names is not None and len(names) == model.num_classes else None


def has_classes(model: Any) -> bool:
    """Whether a model's answers are logits of classes: not so without a head, or where the head is the projection of a
    CLIP tower, which the numbers of its embedding and of its images tell, as long as nobody has named classes."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    is_tower = model.num_classes in CLIP_DIMS and tuple(cfg.get("mean") or ()) == OPENAI_CLIP_MEAN
    return model.num_classes > 0 and not (is_tower and names_of(model) is None)


def pack_names(names: Sequence[str]) -> str:
    """Names as they stand beside weights, in JSON, which has an escape for what is no text."""
    return json.dumps(list(names))


def name_classes(model: Any, names: Sequence[str] | None) -> None:
    """Tells a model what its classes are called."""
    model.pretrained_cfg[LABEL_NAMES] = None if names is None else list(names)


def read_names(path: Path) -> Names | None:
    """The names of the classes that the weights in a file tell apart; None where they are not known."""
    try:
        return _as_names(_read_header(path) if path.suffix == ".safetensors" else _read_checkpoint(path))
    except Exception:  # whatever a file that is no such one leads to; who reads its weights says so
        return None


def _read_header(path: Path) -> Any:
    metadata = read_metadata(path)
    if LABEL_NAMES in metadata:
        return json.loads(metadata[LABEL_NAMES])
    config = json.loads(path.with_name("config.json").read_bytes())  # timm's
    return config.get(LABEL_NAMES) or config.get("pretrained_cfg", {}).get(LABEL_NAMES)


def _read_checkpoint(path: Path) -> Any:
    return json.loads(torch.load(path, map_location="cpu", mmap=True, weights_only=True)[LABEL_NAMES])


def _as_names(found: Any) -> Names | None:
    if isinstance(found, dict):  # timm's form for numbers with gaps, of which a whole one has none
        found = [found.get(str(number), found.get(number)) for number in range(len(found))]
    if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
        return tuple(found)
    return None
