"""A trained model as one folder in the form of timm's hub: config.json beside model.safetensors, the plan in both.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the model back, plan and weights, once vitreuse is
imported; pushed to a hub, "hf-hub:OWNER/NAME" does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save
from timm.models import get_model_args
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor

from vitreuse.config import ModelConfig
from vitreuse.io.durable import write_durably
from vitreuse.model.class_names import LABEL_NAMES, names_of, pack_names
from vitreuse.model.merge import cut_plan
from vitreuse.model.preprocessing import PREPROCESSING, image_settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder has the two files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def plan_text(model: Any) -> str | None:
    """The plan of a model for images of its size, its preset's too; None for a model without one."""
    return str(cut_plan(model.plan, model.patch_embed.num_patches)) if hasattr(model, "plan") else None


def save_hub_folder(model: Any, folder: Path, training: str | None = None) -> None:
    """Writes a model's configuration and weights, the weights first; each file is whole or not there.

    Args:
        model: One of timm's or ours, made by timm.create_model.
        folder: For the two files; made where it is missing.
        training: What is to be known of how far the model was trained, where that is not to its end.

    Raises:
        ValueError: A keyword that the model was built with cannot be written as JSON.
        OSError: The folder cannot be written.
    """
    plan = {"plan": text} if (text := plan_text(model)) is not None else {}
    labels = {LABEL_NAMES: names_of(model), "pretrained_cfg": {LABEL_NAMES: None}}  # once
    with TemporaryDirectory() as temporary:  # timm's function takes a path alone
        path = Path(temporary, CONFIG)
        save_config_for_hf(model, str(path), model_config=labels, model_args=plan, data_config=preprocessing(model))
        config = path.read_bytes()
    if training is not None:
        config = (json.dumps({**json.loads(config), "training": training}, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS, model_weights(model, training))
    write_durably(folder / CONFIG, config)


def preprocessing(model: Any) -> dict[str, Any]:
    """Size and statistics of a model's images and how evaluation crops them."""
    settings = image_settings(model)
    return {key: settings[key] for key in ("input_size", *PREPROCESSING)}


def model_weights(model: Any, training: str | None = None) -> bytes:
    """The content of a model's model.safetensors; arguments as for save_hub_folder."""
    keywords = {key: value for key, value in get_model_args(model).items() if key != "plan"}
    name = model.pretrained_cfg["architecture"]
    return pack_weights(model.state_dict(), name, plan_text(model), keywords, names_of(model), training)


def pack_weights(
    tensors: Mapping[str, Tensor],
    name: str,
    plan: str | None,
    keywords: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    training: str | None = None,
) -> bytes:
    """The content of a model.safetensors, a run's too: weights, and as metadata their model and its classes."""
    metadata = {"name": name, "plan": plan or "", "keywords": json.dumps(keywords), "format": "pt"}
    metadata |= {"training": training} if training is not None else {}
    metadata |= {LABEL_NAMES: pack_names(class_names)} if class_names is not None else {}
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)


def read_hub_folder(folder: Path) -> ModelConfig:
    """What builds the model of a folder, without its weights.

    Raises:
        ValueError: config.json is not that of a model.
    """
    try:
        images, name, keywords = load_model_config_from_path(folder)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no model's configuration ({error}): export the model again.") from error
    overlay = {key: images[key] for key in ("input_size", *PREPROCESSING) if key in images}
    keywords = {**keywords, "pretrained_cfg_overlay": overlay}
    return ModelConfig(name=name, plan=keywords.pop("plan", None), keywords=json.loads(json.dumps(keywords)))
