"""Shared settings: few threads (the suite runs in parallel) and reproducible hypothesis runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # golden_vectors

torch.set_num_threads(1)
settings.register_profile(
    "metaopt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("metaopt")
