"""What a command is pointed at: a model name, a config, a run folder or a hub folder, each a network to be built."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from vitreuse.config import LOCAL_DIR, Config, ConfigError, ModelConfig, load_config
from vitreuse.files.hub import CONFIG, WEIGHTS, is_hub_folder, read_hub_folder
from vitreuse.io.checkout import of_checkout
from vitreuse.io.checkpoint_file import Weights, read_weights
from vitreuse.io.errors import nearest, nearest_path
from vitreuse.io.process import print_note
from vitreuse.model.checkpoint import LoadReport, load_checkpoint
from vitreuse.model.class_names import name_classes, read_names
from vitreuse.model.registry import GATED_MLPS, default_cfgs, plain_name
from vitreuse.plan import parse_plan
from vitreuse.plan.options import PLAN_KEYWORDS

STEP_FOLDERS = "step-" + 9 * "[0-9]"  # of checkpoints, by which no copy that somebody keeps is taken for one
OWN_KEYWORDS = (*PLAN_KEYWORDS, "norm_eps")  # that timm's own models do not have


@dataclass(frozen=True)
class Target:
    """A network and its label in tables, with its experiment and the folder of its weights where there are any."""

    label: str
    model: ModelConfig
    config: Config | None = None
    run_dir: Path | None = None
    hub_dir: Path | None = None

    @property
    def is_name(self) -> bool:
        """Whether it is the name of a model alone, without an experiment or a folder that would know its weights."""
        return self.config is None and self.hub_dir is None

    def at(self, image_size_px: int | None) -> Target:
        """The same network built for another image size; itself where none is given."""
        return self if image_size_px is None else replace(self, model=resized(self.model, image_size_px))

    def load(self, checkpoint: Path | None = None) -> nn.Module:
        """The model with the weights of a file; by default those a run left, its newest checkpoint, or a hub folder's.

        It is told the names of its classes, where the file has them, and how its run crops images to evaluate it.

        Raises:
            ValueError: There are no weights, or they are another model's.
        """
        path = checkpoint or self.own_weights()
        weights = read_weights(path)
        model: Any = (self.model if checkpoint is None else self._with_classes_of(weights)).create()
        try:
            report = load_checkpoint(model, weights)
            _refuse_plain(report)
        except ValueError as error:
            raise ValueError(f"{path} does not fit {self.model.name}: {error}") from error
        name_classes(model, read_names(path))
        if self.config is not None and self.config.eval.crop_pct is not None:
            model.pretrained_cfg["crop_pct"] = self.config.eval.crop_pct
        if said := [*report.said(model), *([self.unfinished] if checkpoint is None and self.unfinished else ())]:
            print_note(f"{path}: {'; '.join(said)}.")
        return model

    @property
    def unfinished(self) -> str | None:
        """What is to be known of weights whose run is not completed, exported ones too; None where there is nothing."""
        if self.hub_dir is not None:
            said = _json_object(self.hub_dir / CONFIG).get("training")
            return said if isinstance(said, str) else None
        if self.run_dir is None or self.config is None:
            return None
        path, record = self.own_weights(), _json_object(self.run_dir / "run.json")
        is_final = path.name == WEIGHTS
        status = record.get("status", "completed" if is_final else "without a whole run.json")
        if status == "completed" and is_final:
            return None
        what = "moving average" if self.config.train.ema else "weights"
        reason = f", {str(record['error']).rstrip('.')}" if record.get("error") else ""
        at = "as it left them" if is_final else f"at step {int(path.parent.name.removeprefix('step-'))}"
        epochs = f"{self.config.train.epochs} epochs were to be trained"
        return f"the run is not completed but {status}{reason}: its {what} {at}, {epochs}"

    def _with_classes_of(self, weights: Weights) -> ModelConfig:
        """The model, of a name with as many classes as weights have, none for those that were trained without."""
        if not (self.is_name and isinstance(self.model.create("meta"), VisionTransformer)):
            return self.model
        head = weights.state.get("head.weight")
        num_classes = 0 if head is None else len(head)
        return replace(self.model, keywords={**self.model.keywords, "num_classes": num_classes})

    def settings_of(self, model: Any) -> ModelConfig:
        """What builds a model that load gave: of a name the classes are those of the weights."""
        built: Any = self.model.create("meta")
        if not self.is_name or built.num_classes == model.num_classes:
            return self.model
        return replace(self.model, keywords={**self.model.keywords, "num_classes": model.num_classes})

    def load_pretrained(self) -> nn.Module:
        """The model with the weights that timm publishes under its name, resampled to its image size.

        Raises:
            ValueError: As pretrained_weights does; or its plan leaves some of them out, or adds to them.
        """
        if not self.is_name:
            raise ValueError(f"{self.label} is no model name, and --pretrained means timm's weights: leave it out.")
        weights, model = pretrained_weights(self.model.name), self.model.create()
        report = load_checkpoint(model, weights)
        _refuse_plain(report)
        if said := report.said(model):
            print_note(f"{self.model.name}: {'; '.join(said)}.")
        return model

    def own_weights(self) -> Path:
        """The weights that a run left, its newest checkpoint, or a hub folder's; raises ValueError without."""
        if self.hub_dir is not None:
            return self.hub_dir / WEIGHTS
        if self.run_dir is None:
            raise ValueError(f"{self.label} has no weights: give the run folder of its training, or --checkpoint FILE.")
        markers = sorted(self.run_dir.glob(f"checkpoints/{STEP_FOLDERS}/complete.json"))
        paths = [self.run_dir / "model.safetensors", *(marker.with_name("state.pt") for marker in reversed(markers))]
        for path in paths:
            if path.exists():
                return path
        raise ValueError(f"{self.run_dir} has no weights yet: go on with python -m train{of_checkout()}.")


def _refuse_plain(report: LoadReport) -> None:
    """Raises ValueError where weights leave a part of a model untrained, or are of layers that it has changed."""
    if report.new:
        raise ValueError(f"the checkpoint has no {report.new[0]}: give the model that it was trained as.")
    of_plan = [key for key in report.dropped if key.startswith("blocks.")]
    if of_plan:
        raise ValueError(
            f"the checkpoint is of a plain model and the plan has no use for its {of_plan[0]}: give the model that it "
            "was trained as, or make one of the plan with vitreuse convert."
        )


def _json_object(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def resolve_targets(
    texts: Sequence[str], plans: Sequence[str] = (), image_sizes_px: Sequence[int | None] = (None,)
) -> list[Target]:
    """One target per text, labelled by its last part, or in full where that is taken twice.

    With plans, one per text and plan instead of its own, labelled by the plan too, which suits images of each size.

    Raises:
        ValueError: A text is no target, a plan is none of the target's depth or patches, or one of them stands twice.
    """
    for text, count in Counter((*texts, *plans)).items():
        if count > 1:
            raise ValueError(f"{text} is given {count} times: name it once.")
    targets = [_resolve(text) for text in texts]
    counts = Counter(target.label for target in targets)
    labelled = [
        target if counts[target.label] == 1 else replace(target, label=text)
        for target, text in zip(targets, texts, strict=True)
    ]
    return [_planned(target, plan, image_sizes_px) for target in labelled for plan in plans] if plans else labelled


def _planned(target: Target, plan: str, image_sizes_px: Sequence[int | None]) -> Target:
    """The same network and its weights under another plan."""
    model = replace(target.model, plan=plan)
    for size_px in image_sizes_px:
        resized(model, size_px).create("meta")  # refuses a wrong plan before any work is done
    return replace(target, label=f"{target.label}, {plan}", model=model)


def _resolve(text: str) -> Target:
    path = Path(os.path.expanduser(text.removeprefix(LOCAL_DIR)))
    if path.is_dir():
        if is_hub_folder(path):
            return Target(path.resolve().name, read_hub_folder(path), hub_dir=path)
        if not (path / "config.yaml").exists():
            raise ValueError(
                f"{text} is neither a run folder nor a hub folder, it has no config.yaml and no config.json with "
                f"model.safetensors: give one that vitreuse export wrote, or python -m train{of_checkout()}."
            )
        config = load_config(path / "config.yaml")
        return Target(path.resolve().name, config.model, config, path)
    if path.suffix in (".yaml", ".yml"):
        config = load_experiment(path)
        return Target(path.stem, config.model, config)
    if path.exists() or len(path.parts) > 1:
        hint = nearest_path(path) or ": give one, or a name of timm.list_models()."
        raise ValueError(f"{text} is neither a run folder nor a config{hint}")
    model = ModelConfig(name=text, plan=None, keywords={})
    model.create("meta")  # refuses an unknown name before any work is done
    return Target(text, model)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The experiment of a YAML file, with what a folder says of a model in place of its name local-dir:DIR.

    Raises:
        ConfigError: As load_config; or a folder holds no trained model.
    """
    config = load_config(path, overrides)
    config = replace(config, model=_of_folder(config.model, "model"))
    distill = config.train.distill
    if distill is None:
        return config
    teacher = _of_folder(distill.teacher, "train.distill.teacher")
    return replace(config, train=replace(config.train, distill=replace(distill, teacher=teacher)))


def _of_folder(model: ModelConfig, key: str) -> ModelConfig:
    """A model named local-dir:DIR by the name, plan, keywords and weights of the folder; any other as it is."""
    if not model.is_folder:
        return model
    folder = Path(os.path.expanduser(model.name.removeprefix(LOCAL_DIR)))
    try:
        if not folder.is_dir():
            hint = nearest_path(folder) or ": give a run folder, or one that vitreuse convert or export wrote."
            raise ValueError(f"{folder} is no folder{hint}")
        own = _resolve(str(folder)).model
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} has no {WEIGHTS} yet: go on with its training.")
    except ValueError as error:
        raise ConfigError(f"{key}.name {model.name!r}: {error}") from error
    keywords = {**own.keywords, **model.keywords}
    drop_path = own.drop_path if model.drop_path == ModelConfig.drop_path else model.drop_path
    plan, weights = model.plan or own.plan, str(folder / WEIGHTS)
    return ModelConfig(name=own.name, plan=plan, keywords=keywords, weights=weights, drop_path=drop_path)


def plain_model(model: ModelConfig) -> ModelConfig:
    """timm's own model of the same size and keywords, which ours is measured against."""
    name = plain_name(model.name) if model.name in default_cfgs else model.name
    keywords = {key: value for key, value in model.keywords.items() if key not in OWN_KEYWORDS}
    if (mlp_layer := keywords.get("mlp_layer")) in GATED_MLPS:
        keywords["mlp_layer"] = GATED_MLPS[mlp_layer]
    return replace(model, name=name, plan=None, keywords=keywords)


def exact_model(model: ModelConfig, depth: int) -> ModelConfig:
    """The same model with exact attention in every layer."""
    keywords = {key: value for key, value in model.keywords.items() if key not in PLAN_KEYWORDS}
    return replace(model, plan=str(parse_plan(f"exact*{depth}")), keywords=keywords)


def resized(model: ModelConfig, image_size_px: int | None) -> ModelConfig:
    """The model built for another image size; itself where none is given."""
    if image_size_px is None:
        return model
    return replace(model, keywords={**model.keywords, "img_size": image_size_px})


def pretrained_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights that timm publishes under a name, from its hub or from what was fetched before.

    Raises:
        ValueError: There are none of that name, or they cannot be fetched.
    """
    if not timm.is_model_pretrained(name):
        known = ", timm.list_pretrained() has the names."
        hint = nearest(name, timm.list_pretrained()) or nearest_path(name) or known
        raise ValueError(f"weights {name!r} are neither a file nor pretrained weights of timm{hint}")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever a network or a hub leads to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"weights {name!r} cannot be fetched ({reason}): give them as a file.") from error
