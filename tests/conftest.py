"""Shared settings: few threads (the suite runs in parallel), reproducible hypothesis runs, and where kernels run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # golden_vectors

KERNEL_DEVICE = os.environ.get("METAOPT_KERNEL_DEVICE", "cpu")
if KERNEL_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported, which torch does sooner or later

torch.set_num_threads(1)
settings.register_profile(
    "metaopt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("metaopt")


@pytest.fixture(scope="session", autouse=True)
def compiled_steps_of_this_run_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A C++ step that an earlier run left in the user's cache would hide a broken build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cpp")))
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: on the CPU, in Triton's interpreter, or where ``METAOPT_KERNEL_DEVICE`` says."""
    return torch.device(KERNEL_DEVICE)
