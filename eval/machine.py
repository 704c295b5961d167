"""What a measurement was made on."""

import platform
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and date, for the caption of every table of measurements."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    """The processor's model name, which only Linux and macOS tell in different places."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
