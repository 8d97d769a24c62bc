"""A process is killed in the middle of meta-training, torchrun starts all of them again, and nobody can tell afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import equal
from kill_worker import ESTIMATORS, STEPS
from torchrun import torchrun

from metaopt.meta.checkpoint import load_checkpoint
from metaopt.meta.trainer import CHECKPOINT_FILE, METRICS_FILE
from metaopt.resolve import THETA_FILE

PROCESSES = (1, 2)


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of `kill_worker`'s runs, by number of processes."""
    directories = {}
    for processes in PROCESSES:
        directory = directories[processes] = tmp_path_factory.mktemp("killed")
        victim, steps = random.randrange(processes), [random.randrange(1, STEPS) for _ in ESTIMATORS]
        worker = Path(__file__).with_name("kill_worker.py")
        done = torchrun(worker, directory, victim, *steps, processes=processes, restarts=2)
        assert done.returncode == 0, f"rank {victim} killed at {steps}:\n{done.stdout}"
        assert (directory / "restarts").read_text() == "2", f"no kill of rank {victim} at {steps}"
    return directories


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics, but for times."""
    return [{**json.loads(line), "seconds": 0} for line in (run / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_killed_run_ends_with_the_bits_of_the_unbroken_one(
    killed_twice: dict[int, Path], estimator: str, processes: int
) -> None:
    killed, unbroken = (killed_twice[processes] / f"{estimator}_{how}" for how in ("killed", "unbroken"))
    assert (killed / THETA_FILE).read_bytes() == (unbroken / THETA_FILE).read_bytes()
    assert lines(killed) == lines(unbroken)
    one, other = (load_checkpoint(run / CHECKPOINT_FILE) for run in (killed, unbroken))
    assert one is not None
    assert other is not None
    assert equal(one["theta"], other["theta"])
    assert equal(one["tasks"]["quadratic"]["carry"], other["tasks"]["quadratic"]["carry"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_number_of_processes_changes_nothing_but_rounding(killed_twice: dict[int, Path], estimator: str) -> None:
    one, two = (load_checkpoint(killed_twice[n] / f"{estimator}_unbroken" / CHECKPOINT_FILE) for n in PROCESSES)
    assert one is not None
    assert two is not None
    for name, value in one["theta"].items():
        # Adam divides by the gradient's size, which lifts float32's 1e-7 where a gradient is small: 30 steps of 0.01
        torch.testing.assert_close(two["theta"][name], value, rtol=1e-3, atol=1e-3)
