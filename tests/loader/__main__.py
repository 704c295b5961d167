"""Proves that images come fast and that memory stays flat: python -m tests.loader [BAR ...]

BARs choose among speed, colour and memory. Each is measured through a Trainer, as training gets its batches.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.loader.memory import stays_flat
from tests.loader.speed import is_faster, is_relieved

BARS = {"speed": is_faster, "colour": is_relieved, "memory": stays_flat}


def main(names: list[str]) -> int:
    """Measures the bars, all without a name; 0 if all hold, 1 if not, 2 for an unknown one."""
    if not {*names} <= {*BARS}:
        print(f"no bar {' or '.join({*names} - {*BARS})}: choose among {', '.join(BARS)}.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    failed = 0
    for name in names or BARS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
            holds, text = BARS[name](Path(scratch))
        print(f"{'ok  ' if holds else 'FAIL'} {time.monotonic() - start:4.0f} s  {name}: {text}", flush=True)
        failed += not holds
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
