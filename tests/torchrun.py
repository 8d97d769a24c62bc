"""Starting a test's processes with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(script: Path, *arguments: object, processes: int, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on a free port in ``processes`` processes of one thread each, and wait for all of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", script, *arguments]  # fmt: skip
    agent = subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = agent.communicate(timeout=300)
    finally:
        agent.terminate()  # of an agent that still runs: it ends its workers
        agent.wait()
    return subprocess.CompletedProcess(command, agent.returncode, output)
