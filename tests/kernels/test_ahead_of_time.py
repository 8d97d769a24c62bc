"""Every kernel compiles for sm_90, and takes no more of a multiprocessor than the committed table of this Triton says.

More registers than before halve the programs that run at once, and a spill is traffic to memory in the innermost loop: neither
shows in any other test. A release of Triton may move both, so each has its own table; `ahead_of_time.py --write` makes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TABLE = HERE / "resources" / f"{triton.__version__}.json"


def compiled(*modules: str) -> dict:
    """`ahead_of_time.report`, by a process in which Triton is not the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "ahead_of_time.py"), *modules], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_fits_where_it_fitted_before():
    if not TABLE.exists():
        pytest.skip(f"no table of triton {triton.__version__}; ahead_of_time.py --write makes one")
    table, found = json.loads(TABLE.read_text()), compiled()
    assert found.keys() == table.keys(), "run ahead_of_time.py --write, and look at what it changes"
    grown = [
        f"{name}: {what} {found[name][what]}, was {before[what]}"
        for name, before in table.items()
        for what in ("registers", "spill_bytes", "shared_bytes")
        if found[name][what] > before[what]
    ]
    assert not grown, "\n".join(grown)
    lost = [name for name, before in table.items() if before["wgmma"] and not found[name]["wgmma"]]
    assert not lost, f"no longer on the matrix units: {lost}"


def test_no_kernel_asks_for_more_shared_memory_than_a_multiprocessor_has():
    for table in HERE.glob("resources/*.json"):
        for name, takes in json.loads(table.read_text()).items():
            assert takes["shared_bytes"] <= 227 * 1024, f"{table.name}: {name}"


def test_spills_and_matrix_instructions_are_seen():
    found = compiled("probe_kernels")
    add, starved, product = found["add"], found["starved"], found["product"]
    assert add["spill_bytes"] == 0 and add["shared_bytes"] == 0 and not add["wgmma"]
    assert 16 <= add["registers"] <= 64  # 2 x 8 numbers of 8 elements per thread, and addresses
    assert starved["registers"] <= 32 and starved["spill_bytes"] > 0  # 256 elements per thread
    assert product["wgmma"] and product["shared_bytes"] >= 2 * 64 * 64 * 4  # both factors lie in shared memory
