"""What a measurement was made on."""

import platform
from datetime import date
from typing import Any

import timm
import torch

from vitreuse.measure import device_name


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and date, for the caption of every table of measurements."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": date.today().isoformat(),
    }
