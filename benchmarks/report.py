"""What every benchmark records about where it ran."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

import metaopt


def machine(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor, threads and date."""
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metaopt": metaopt.__version__,
    }
