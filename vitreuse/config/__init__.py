"""The schema of an experiment: what a YAML file may say, what each key means and which values it takes.

A configuration is a complete experiment. The dataclasses in this package are the schema, a YAML file is an instance,
`base:` names the file that it differs from, and `section.key=value` on the command line lies over both.
"""

from vitreuse.config.augmentation import CropConfig, ResolutionConfig
from vitreuse.config.experiment import Config, DataConfig, EvalConfig, changed_settings, load_config
from vitreuse.config.network import LOCAL_DIR, ModelConfig
from vitreuse.config.optimization import OptimizerConfig, ScheduleConfig
from vitreuse.config.recipe import DistillConfig, HealConfig, ProfileConfig, ReferenceConfig, TrainConfig
from vitreuse.config.strict_yaml import to_yaml
from vitreuse.io.errors import ConfigError

__all__ = [
    "LOCAL_DIR",
    "Config",
    "ConfigError",
    "CropConfig",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "HealConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "ReferenceConfig",
    "ResolutionConfig",
    "ScheduleConfig",
    "TrainConfig",
    "changed_settings",
    "load_config",
    "to_yaml",
]
