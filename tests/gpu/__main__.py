"""What only a GPU can show, in at most eight minutes and without a network: make gpu

    PYTHONPATH=tests python -m tests.gpu [-o FOLDER] [--parts PART ...]

Each part is a process of its own and leaves its rows; FOLDER/gpu.json and FOLDER/README.md are written after every one,
so that what is known is there whatever happens later. A part that fails, or that its time is up for, says so in its
place; the exit code is 1 then. Needed are torch, timm and what the project needs at run time; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tests.gpu import correctness, page, training
from vitreuse.cost.measure import describe_machine
from vitreuse.io.durable import write_durably
from vitreuse.io.process import choose_device

ROOT = Path(__file__).resolve().parents[2]
Part = Callable[["Setting"], Iterable[dict[str, Any]]]
BUDGET_S = 480.0
SPEED_PLANS = {  # by image size: r merges about as large a share of the tokens at each
    224: ("exact*12", "exact reuse*6 exact*5", "exact-8*12", "exact-13*12"),
    384: ("exact*12", "(span:7*2 exact)*4", "lowrank:64*12", "exact-24*12", "exact-40*12"),
    512: ("exact*12", "(span:7*2 exact)*4", "lowrank:64*12", "exact-45*12", "exact-73*12"),
}


class Setting:
    """What all parts are given: a device, a folder for what they leave between each other, and when to be done.

    Attributes:
        is_small: Of sizes that a CPU can do in seconds, as the tests have it.
    """

    def __init__(self, device: str, scratch: Path, seconds: float, is_small: bool):
        self.device, self.scratch, self.is_small = device, scratch, is_small
        self.end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until the whole command should be done."""
        return self.end - time.monotonic()

    def call(self, *arguments: object) -> str:
        """What a Python command on this device prints; its time is what is left of the whole.

        Raises:
            RuntimeError: It ended otherwise than well; its last lines.
        """
        command = [sys.executable, *map(str, arguments)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(self.seconds_left, 1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no time was left for {' '.join(command[1:4])}") from None
        if done.returncode:
            raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-3:]))
        return done.stdout


def tune(setting: Setting) -> list[dict[str, Any]]:
    """The costs of attention on this device, by which models and search decide."""
    more = ("--keys", 17, "--repeats", 2, "--dtype", "float32") if setting.is_small else ()
    costs = setting.scratch / "costs.json"
    setting.call("-m", "vitreuse", "tune", "--device", setting.device, "--output", costs, *more)
    return [{"costs": json.loads(costs.read_text())}]


def speed(setting: Setting) -> Iterator[dict[str, Any]]:
    """Images a second against the best of timm's four, fused and unfused, eager and compiled: all plans eager first."""
    arguments = ["-m", "eval", "throughput", "--device", setting.device, "--json"]
    if setting.is_small:
        small = ["vit_tiny_patch16_224", "--plan", "exact-1 exact*11", "--image-size", 32, "--repeats", 2]
        yield from json.loads(setting.call(*arguments, *small))["rows"]
        return
    for compiled, (size_px, plans) in product(((), ("--compile",)), SPEED_PLANS.items()):
        shape = ["--image-size", size_px, "--batch-size", 256 * 224**2 // size_px**2, "--dtype", "bfloat16"]
        for plan in plans:
            how = ["--plan", plan, "--repeats", 20, *compiled]
            yield from json.loads(setting.call(*arguments, "deit_small_patch16_224", *shape, *how))["rows"]


PARTS: dict[str, Part] = {
    "correctness": correctness.check,
    "tune": tune,
    "training": training.train,
    "resume": training.resume,
    "speed": speed,
}


def main(arguments: list[str]) -> int:
    """Does the parts and writes the page; 0 if each did what it should."""
    parser = argparse.ArgumentParser("make gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "gpu", metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args(arguments)
    try:
        device = choose_device(args.device)
    except ValueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe_machine(device), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        setting = Setting(args.device, Path(scratch), BUDGET_S, args.small)
        for name in args.parts:
            found["parts"][name] = _done(name, setting)
            write_durably(args.output / "gpu.json", (json.dumps(found, indent=1) + "\n").encode())
            write_durably(args.output / "README.md", page.written(found).encode())
            print(f"{name}: {page.summary(found['parts'][name])}", flush=True)
    return int(any(part["error"] is not None for part in found["parts"].values()))


def _done(name: str, setting: Setting) -> dict[str, Any]:
    """The rows of a part, its seconds, and what went wrong with it."""
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    error = None
    try:
        for row in PARTS[name](setting):
            rows.append(row)
        wrong = [row["wrong"] for row in rows if row.get("wrong")]
        error = "; ".join(wrong[:3]) or None
    except Exception as caught:  # whatever a GPU leads to: the other parts are still worth their time
        error = f"{type(caught).__name__}: {' '.join(str(caught).split())}"
    return {"rows": rows, "seconds": round(time.monotonic() - start, 1), "error": error}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
