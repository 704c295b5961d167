"""A Trainer for its batches alone: plain crop and flip, and a model that nobody runs."""

from pathlib import Path
from typing import Any

from eval.distributed import Ranks
from train.augmentation import train_decoder
from train.trainer import Trainer
from vitreuse.config import load_config
from vitreuse.data import open_split
from vitreuse.model.preprocessing import image_settings

CONFIG = """\
model: {{name: vit_tiny_patch16_224, keywords: {{img_size: {side_px}, depth: 1, num_classes: {num_classes}}}}}
data: {{root: {root}, num_workers: {num_workers}}}
train: {{epochs: 100, global_batch_size: {batch_size}, device: cpu, optimizer: {{lr: 1e-3}}, crop: {{}}}}
"""


def create_trainer(
    root: Path, side_px: int, num_classes: int, num_workers: int, batch_size: int, *overrides: str
) -> Trainer:
    """The trainer of a model for images of side_px, with the samples of ROOT/train."""
    path = root / "recipe.yaml"
    path.write_text(CONFIG.format(**locals()))
    config = load_config(path, overrides)
    model: Any = config.model.create()
    samples = open_split(root, "train", "RGB", train_decoder(config))
    return Trainer(config, model, samples, image_settings(model), Ranks())
