"""Which network: the section of an experiment that says what a model is built of, and builds it."""

import inspect
import re
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import nn

from vitreuse.config.strict_yaml import setting
from vitreuse.io.errors import ConfigError, nearest
from vitreuse.io.urls import refuse_url
from vitreuse.model.create import create_model
from vitreuse.model.initialisation import fill_with_sincos2d, set_drop_paths_alike, spread_qkv
from vitreuse.model.vit import PlanVisionTransformer

LOCAL_DIR = "local-dir:"  # as timm spells the name of a hub folder on disk


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network: a name of timm's registry, its attention plan, its constructor's keywords and its weights."""

    name: str = setting(
        "a model name that timm.list_models() knows, or local-dir:DIR, the model of a run folder or a hub folder with "
        "its plan, keywords and weights; plan and keywords given beside it lie over its own"
    )
    plan: str | None = setting("plan, one spec per layer, of any plain ViT of timm too; null for the model's own", None)
    keywords: dict = setting("further keywords of timm.create_model")
    weights: str | None = setting(
        "what training starts from: a file of weights, a run folder, a hub folder, or a name of "
        "timm.list_pretrained(); null for random ones",
        None,
        is_path=True,
    )
    pos_embed: str = setting(
        "what it starts from: random numbers to learn, or timm's sines and cosines, which train.freeze can keep",
        "learned",
        choices=("learned", "sincos2d"),
    )

    drop_path: str = setting(
        "in which layers keywords.drop_path_rate is: growing from 0 to it, as timm's models have it; uniform, in all",
        "growing",
        choices=("growing", "uniform"),
    )

    qkv_init: str = setting(
        "how query, key and value begin under keywords.weight_init jax: as one matrix, as in timm's models; apart, as "
        "in JAX, with 1.41 times the deviation",
        "whole",
        choices=("whole", "apart"),
    )

    @property
    def is_folder(self) -> bool:
        """Whether the name is that of a folder, in whose place files/networks.py puts what the folder says."""
        return self.name.startswith(LOCAL_DIR)

    def create(self, device: torch.device | str | None = None) -> nn.Module:
        """The model, randomly initialised from torch's global generator; train/weights.py fills in trained weights.

        Args:
            device: Where its parameters are made; 'meta' checks a configuration without memory.

        Raises:
            ConfigError: The name, the plan or a keyword is not one that timm or the model accepts.
        """
        if not timm.is_model(self.name):
            hint = nearest(self.name, timm.list_models()) or ", timm.list_models() has the names."
            raise ConfigError(f"model.name {self.name!r} is not a model of timm or vitreuse{hint}")
        make = timm.create_model if self.plan is None else partial(create_model, plan=self.plan)
        try:
            with torch.device(device or "cpu"):
                model = make(self.name, **self.keywords)
        except Exception as error:  # timm's answers to a bad keyword are of every kind, ZeroDivisionError among them
            first_line = str(error).strip().partition("\n")[0]
            reason = first_line or f"timm refuses one of its keywords, {', '.join(self.keywords)}."
            said = _unknown_keyword(self.name, error) or f"model {self.name!r} cannot be built: {reason}"
            raise ConfigError(said) from error
        if self.pos_embed == "sincos2d":
            fill_with_sincos2d(model)
        if self.drop_path == "uniform" and self.keywords["drop_path_rate"]:
            set_drop_paths_alike(model, self.keywords["drop_path_rate"])
        if self.qkv_init == "apart":
            spread_qkv(model)
        return model

    def __post_init__(self):
        refuse_url("weights", self.weights)
        for word, key in {"plan": "plan", "pretrained": "weights", "checkpoint_path": "weights"}.items():
            if word in self.keywords:
                raise ConfigError(f"keywords.{word} has a key of its own, {key} beside keywords.")
        begins_anew = self.pos_embed != "learned" or self.qkv_init != "whole"
        if self.is_folder and (self.weights is not None or begins_anew):
            left_out = "leave out weights, pos_embed and qkv_init"
            raise ConfigError(f"name {self.name!r} brings weights of its own: {left_out}.")
        if self.drop_path == "uniform" and "drop_path_rate" not in self.keywords:
            raise ConfigError("drop_path 'uniform' has no effect without a keywords.drop_path_rate: give both or none.")
        if self.qkv_init == "apart" and not str(self.keywords.get("weight_init", "")).startswith("jax"):
            raise ConfigError("qkv_init 'apart' has no effect without keywords.weight_init jax: give both or none.")
        if self.pos_embed != "learned" and self.weights is not None:
            effect = f"pos_embed {self.pos_embed!r} has no effect beside weights, which hold a position embedding"
            raise ConfigError(f"{effect}: leave one of the two out.")
        if self.qkv_init != "whole" and self.weights is not None:
            effect = f"qkv_init {self.qkv_init!r} has no effect beside weights, which hold query, key and value"
            raise ConfigError(f"{effect}: leave one of the two out.")


def _unknown_keyword(name: str, error: Exception) -> str | None:
    """The sentence for a keyword that the model's constructor does not take; None for any other error."""
    match = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return None
    classes = (timm.models.VisionTransformer, PlanVisionTransformer)
    known = {keyword for kind in classes for keyword in inspect.signature(kind).parameters} - {match[1]}
    hint = nearest(match[1], sorted(known)) or "; timm's VisionTransformer has the list."
    return f"model.keywords.{match[1]} is not a keyword of {name}{hint}"
