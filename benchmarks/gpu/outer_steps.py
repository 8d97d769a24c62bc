"""Meta-training from end to end: ``metaopt meta-train`` of Celo2's base with PES on the fast suite, for a minute.

An outer step is a window of 20 inner steps of 2 N runs of each of the suite's tasks, the meta-gradient and the update of theta.
The first tenth of the run, in which kernels compile, is left out of its speed. `CELO2` inner steps are what Celo2's published
meta-training took (4.5 GPU-hours).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, attempt, print_rows

CELO2 = 3.2e8
SECONDS = 75.0


def meta_train(device: torch.device, task: str, pairs: int, steps: int, seconds: float, out: Path) -> list[Row]:
    """The lines of the run's log; it ends after ``steps`` outer steps or after ``seconds``."""
    command = [
        sys.executable,
        "-m",
        "metaopt",
        "meta-train",
        "celo2_base",
        "--task",
        "suite:fast",
        "--estimator",
        "pes",
    ]
    command += ["--set-estimator", f"pairs={pairs}", "--set-estimator", "window=20", "--steps", str(steps)]
    command += ["--device", str(device), "--backend", "fused", "--out", str(out)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
    whole, _, _ = (out / "metrics.jsonl").read_text().rpartition("\n")  # the last line may have been cut
    return [json.loads(line) for line in whole.splitlines()]


def summary(steps: list[Row]) -> Row:
    """Of a run; speeds of all but its first tenth."""
    tenth = max(1, len(steps) // 10)
    seconds = sum(step["seconds"] for step in steps[tenth:])
    rate = sum(step["inner_steps"] for step in steps[tenth:]) / seconds
    return {
        "outer_steps": len(steps), "outer_steps_per_second": (len(steps) - tenth) / seconds,
        "inner_steps_per_second": rate, "minutes_for_celo2": CELO2 / rate / 60,
        "meta_loss_first_tenth": statistics.fmean(step["meta_loss"] for step in steps[:tenth]),
        "meta_loss_last_tenth": statistics.fmean(step["meta_loss"] for step in steps[-tenth:]),
    }  # fmt: skip


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    task, pairs, steps, limit = ("digits_mlp", 1, 3, 600.0) if small else ("suite:fast", 512, 1_000_000, SECONDS)
    with tempfile.TemporaryDirectory() as directory:
        yield attempt(
            {"rule": "celo2_base", "tasks": task, "estimator": "pes", "pairs": pairs, "backend": "fused"},
            lambda: summary(meta_train(device, task, pairs, steps, limit, Path(directory) / "run")),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows)
