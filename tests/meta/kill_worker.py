"""What `test_kill_and_resume` starts: meta-training that kills one of its processes once, and is started again.

Run as ``torchrun --max-restarts 2 ... kill_worker.py DIRECTORY VICTIM STEP STEP``: the process of rank VICTIM kills itself in
the first run soon after the first step given, after a restart in the second run after the other; then come unbroken runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from metaopt.meta.distributed import process_group
from metaopt.meta.trainer import METRICS_FILE, MetaTrainConfig, meta_train

STEPS = 30
ESTIMATORS = {"pes": {"pairs": 3, "window": 5}, "truncated_unroll": {"copies": 3, "window": 5, "segment": 5}}


def config(estimator: str) -> MetaTrainConfig:
    """A few seconds of meta-training with everything on that a checkpoint has to hold."""
    return MetaTrainConfig(
        tasks=[{"name": "quadratic", "options": {"dim": 4}}], learned_options={"hidden": 4, "step_scale": 0.01}, horizon=13,
        estimator=estimator, estimator_options=ESTIMATORS[estimator], outer_steps=STEPS, outer_lr=0.01, warmup=3,
        checkpoint_every=4, ema_decay=0.9, evaluate_every=15, evaluate_on=["quadratic"],
    )  # fmt: skip


def kill_soon_after(step: int, metrics: Path) -> None:
    """Whatever this process is doing when that step was logged."""
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def main(directory: Path, victim: int, steps: list[int]) -> None:
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with process_group() as shard:
        for i, estimator in enumerate(ESTIMATORS):
            if restarts == i and shard.rank == victim:
                log = directory / f"{estimator}_killed" / METRICS_FILE
                threading.Thread(target=kill_soon_after, args=(steps[i], log), daemon=True).start()
            meta_train(config(estimator), directory / f"{estimator}_killed", progress=False, shard=shard)
        for estimator in ESTIMATORS:
            meta_train(config(estimator), directory / f"{estimator}_unbroken", progress=False, shard=shard)
    left = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), f"threads that may abort the exit: {left}"
    if shard.rank == 0:
        (directory / "restarts").write_text(str(restarts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(step) for step in sys.argv[3:]])
