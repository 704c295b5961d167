"""Where scenarios play: data in uneven shards, a recipe that uses everything, and the runs that nothing disturbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pictures import write_pictures
from processes import Run

SEED = 20  # of the moments at which runs are killed
NUM_TRAIN, NUM_VAL = 43, 13
CHECKPOINT_STEPS = 7

# No random numbers but those of the order: 6 steps an epoch, the last of 3 images. Without Adam, which makes whole
# steps of the rounding in a gradient of zero, such as that of the keys' biases.
PLAIN = """\
model:
  name: vit_reuse_tiny_patch16_224
  plan: exact reuse exact
  keywords: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 3, embed_dim: 16, depth: 3, num_heads: 2}}
data: {{root: {root}, num_workers: 2, shuffle_window: 17}}
train:
  epochs: 10
  global_batch_size: 8
  accumulation_steps: 2
  device: cpu
  num_threads: 1
  optimizer: {{name: sgd, lr: 1e-2}}
  schedule: {{warmup_epochs: 1}}
  checkpoint: {{every_epochs: 10, every_steps: {every_steps}, keep_last: 3}}
  max_skipped_steps: 3
  log_every_steps: 1
  ledger: true
eval: {{crop_pct: 1.0, every_epochs: 5}}
"""
# Whatever draws random numbers or keeps state between steps: 5 steps an epoch, since mixup needs even batches.
EVERYTHING = """\
base: plain.yaml
model: {keywords: {proj_drop_rate: 0.1, attn_drop_rate: 0.1, drop_path_rate: 0.1}}
train:
  epochs: 40
  optimizer: {name: adamw, lr: 1e-2}
  repeats: 3
  loss: {smoothing: 0.1}
  crop: {scale: [0.3, 1.0], auto_augment: rand-m9-n2, erase_prob: 0.25}
  mixup: {mixup: 0.8, cutmix: 1.0}
  ema: {decay: 0.9}
  clip: {limit: 1.0}
eval: {every_epochs: 10}
"""
SHORTER = "train.epochs=20"  # on two ranks a step takes longer: the four workers share the cores with them
SHARDED = "train.strategy=fsdp2"


@dataclass
class Stage:
    """A scratch folder with data and configs, and every run that was made in it."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self):
        write_pictures(self.folder / "data", NUM_TRAIN, NUM_VAL, per_shard=10)
        (self.folder / "plain.yaml").write_text(PLAIN.format(root=self.folder / "data", every_steps=CHECKPOINT_STEPS))
        (self.folder / "everything.yaml").write_text(EVERYTHING)
        self.whole, self.plain = self.run("whole"), self.run("plain", "plain")
        self.whole_on_two = self.run("whole-on-two", "everything", SHORTER)
        self.sharded = self.run("sharded", "everything", SHORTER, SHARDED)

    def run(self, name: str, recipe: str = "everything", *overrides: str) -> Run:
        """A run folder with a config of the stage; nothing is started yet."""
        self.runs.append(Run(self.folder / name, (str(self.folder / f"{recipe}.yaml"), *overrides)))
        return self.runs[-1]

    def describe(self) -> str:
        """What runs at this moment."""
        running = [run for run in self.runs if run.starts and run.starts[-1].process.poll() is None]
        return "; ".join(f"{run.name}: start {len(run.starts)}, step {run.last_step}" for run in running)

    def clear(self) -> None:
        """Ends every process that was started here; none is started any more."""
        for run in self.runs:
            run.is_closed = True
            for start in run.starts:
                start.kill()


def one_rank_alone(stage: Stage) -> str:
    """What runs on one rank are compared with."""
    stage.whole.complete()
    return f"{stage.whole.last_step} steps without disturbance"


def two_ranks_alone(stage: Stage) -> str:
    """What runs on two ranks are compared with."""
    stage.whole_on_two.complete(ranks=2)
    return f"{stage.whole_on_two.last_step} steps without disturbance"


def two_ranks_of_half_a_model_alone(stage: Stage) -> str:
    """What runs on two ranks are compared with that share out the model."""
    stage.sharded.complete(ranks=2)
    return f"{stage.sharded.last_step} steps without disturbance"


def the_plain_recipe_alone(stage: Stage) -> str:
    """What runs that change their number of ranks are compared with."""
    stage.plain.complete()
    return f"{stage.plain.last_step} steps without disturbance"


UNDISTURBED = (one_rank_alone, two_ranks_alone, two_ranks_of_half_a_model_alone, the_plain_recipe_alone)
