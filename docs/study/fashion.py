"""Fashion-MNIST in the study: its images, without root where apt is, and the choice of its recipe.

    python -m docs.study.fashion             # the images, unless all cards are there: the first step of `make study`
    python -m docs.study.fashion --choose    # several recipes of `exact*6`, measured on images kept out of training

The choice takes eight runs of one core each, two at a time, and goes on where it was broken off. It looks at a tenth of
the training images, never at those that the study measures on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from docs.study.debian import unpack_debian
from vitreuse.data import prepare_source
from vitreuse.data.sources import fashion_mnist

PROGRAM, WRONG_INPUT = "python -m docs.study.fashion", 2
CONFIGS, CARDS = Path("configs/study"), Path("docs/study/fashion/cards")
SHARDS, PACKAGES = Path("data/fashion_mnist"), Path("data/study")
PACKAGE = "dataset-fashion-mnist"
CHOICE = Path("runs/fashion_choice")
SEEDS = range(5)
RATES = ("1e-3", "2e-3", "5e-3", "1e-2")
CROPS = {"crops": (), "whole": ("train.crop=null",)}  # those of _fashion.yaml, or none


def get_images() -> None:
    """Writes the shards, from Debian's package where their files are in none of their places.

    Raises:
        ValueError: The files are nowhere, and apt cannot fetch them; why it cannot is said on standard error.
    """
    configs = CONFIGS.glob("fashion_*.yaml")
    if all((CARDS / f"{config.stem}-seed{seed}.json").exists() for config, seed in product(configs, SEEDS)):
        return
    origin = None
    if not any(folder.is_dir() for folder in (SHARDS / "val", *fashion_mnist.places(SHARDS))):
        try:
            origin = unpack_debian([PACKAGE], PACKAGES) / PACKAGE / fashion_mnist.DEBIAN.relative_to("/")
        except ValueError as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
    prepare_source("fashion_mnist", SHARDS, origin)


def choose() -> None:
    """Trains by each recipe and prints the top-1 of each on the images that it kept out, best first."""
    recipes = {
        f"lr{rate}-{crop}": (f"train.optimizer.lr={rate}", *overrides)
        for rate, (crop, overrides) in product(RATES, CROPS.items())
    }
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(_holdout_top1, recipes, recipes.values())
        for top1, name in sorted(zip(found, recipes, strict=True), reverse=True):
            print(f"{top1:.2f} %  {' '.join(recipes[name])}")


def _holdout_top1(name: str, overrides: tuple[str, ...]) -> float:
    arguments = [str(CONFIGS / "fashion_exact.yaml"), "data.holdout=0.1", *overrides, f"run_dir={CHOICE / name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "train", *arguments], env=environment)
    if done.returncode:
        raise ValueError(f"the run {CHOICE / name} ended with exit code {done.returncode}: the same command goes on.")
    records = map(json.loads, (CHOICE / name / "metrics.jsonl").read_text().splitlines())
    return next(record["holdout_top1"] for record in records if record["kind"] == "final")


def main() -> int:
    """Gets the images, and trains for the choice where it is asked for; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Fashion-MNIST in the study.")
    parser.add_argument("--choose", action="store_true", help="train exact*6 by several recipes and compare them")
    args = parser.parse_args()
    try:
        get_images()
        if args.choose:
            choose()
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
