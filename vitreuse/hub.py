"""A trained model as one folder in the form of timm's hub: config.json beside model.safetensors, the plan in both.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the model back, plan and weights, once vitreuse is
imported; pushed to a hub, "hf-hub:OWNER/NAME" does.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save
from timm.models._hub import load_model_config_from_path, save_config_for_hf

from vitreuse.config import ModelConfig
from vitreuse.durable import write_durably
from vitreuse.inputs import image_settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of an image, beside its size


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder has the two files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def save_hub_folder(model: Any, folder: Path, crop_pct: float | None = None) -> None:
    """Writes a model's configuration and weights, the weights first; each file is whole or not there.

    Args:
        model: One of timm's or ours, made by timm.create_model.
        folder: For the two files; made where it is missing.
        crop_pct: Share of the resized image that evaluation crops, where it is not the model's own.

    Raises:
        ValueError: A keyword that the model was built with cannot be written as JSON.
        OSError: The folder cannot be written.
    """
    plan = {"plan": str(model.plan)} if hasattr(model, "plan") else {}
    images = image_settings(model)
    settings = {key: images[key] for key in ("input_size", *PREPROCESSING)}
    with TemporaryDirectory() as temporary:  # timm's function takes a path alone
        path = Path(temporary, CONFIG)
        if crop_pct is not None:
            settings["crop_pct"] = crop_pct
        save_config_for_hf(model, str(path), model_args=plan, data_config=settings)
        config = path.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    write_durably(folder / WEIGHTS, save(tensors, {"format": "pt", **plan}))
    write_durably(folder / CONFIG, config)


def read_hub_folder(folder: Path) -> ModelConfig:
    """What builds the model of a folder, without its weights.

    Raises:
        ValueError: config.json is not that of a model.
    """
    try:
        images, name, keywords = load_model_config_from_path(folder)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no model's configuration ({error}): export the model again.") from error
    overlay = {key: images[key] for key in PREPROCESSING if key in images}
    keywords = {**keywords, "pretrained_cfg_overlay": overlay}
    return ModelConfig(name=name, plan=keywords.pop("plan", None), keywords=json.loads(json.dumps(keywords)))
