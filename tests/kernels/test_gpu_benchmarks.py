"""``make gpu`` would run: every benchmark gives its rows at small sizes on the CPU.

What breaks otherwise is found on the GPU, in the minutes that it is at hand.
"""

import json
import os
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("METAOPT_CXX", "")  # torch operations do here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of processes that scripts start
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    return lambda name: runpy.run_path(str(BENCHMARKS / "gpu" / f"{name}.py"))


@pytest.mark.parametrize(
    "name, column, expected",
    [
        ("ceilings", "ceiling", {"copy", "float32 product", "tf32 product"}),
        (
            "optimizer_steps", "optimizer",
            {"torch fused AdamW", "adamw", "adamw, 8-bit state", "lion", "small_fc_lopt, hidden 32", "celo2", "velo"},
        ),
        ("inner_steps", "rule", {"adamw", "small_fc_lopt, hidden 4"}),
        ("outer_steps", "rule", {"celo2_base"}),
        ("population_steps", "programs", {4}),
        ("search_runs", "task", {"digits_mlp", "mixtures_16d_mlp"}),
    ],
)  # fmt: skip
def test_every_row_is_measured(script, name, column, expected):
    found = list(script(name)["rows"](CPU, True))
    assert {row[column] for row in found} == expected
    assert not [row for row in found if "failed" in row]
    json.dumps(found)


def test_all_back_ends_but_the_loop_have_a_row(script):
    from metaopt import registry

    assert {*script("inner_steps")["BACKENDS"]} >= {*registry.specs("unroll_backend")} - {"loop"}


def test_launches_of_one_call_are_counted(script, monkeypatch):
    """Triton calls the hook with a kernel's name at every launch on a GPU; its interpreter does not."""
    from triton import knobs

    launch = SimpleNamespace(get=lambda: {"name": "step"})

    def twice():
        for _ in range(2):
            knobs.runtime.launch_enter_hook(launch)

    launches = script("measure")["launches"]
    assert launches(twice) == {"step": 2}
    assert launches(lambda: None) == {}


def test_what_a_process_printed_before_its_limit_is_kept(script):
    run = script("run")["run"]
    patient = run([sys.executable, "-c", "print(1)"], 60.0, dict(os.environ))
    assert (patient.status, patient.stdout) == (0, "1\n")
    cut = run([sys.executable, "-c", "import time; print(2, flush=True); time.sleep(600)"], 3.0, dict(os.environ))
    assert (cut.status, cut.stdout) == (None, "2\n")


def test_a_benchmark_that_fails_is_recorded(script):
    found = script("run")["benchmark"]("ceilings", "no such device", True, dict(os.environ))
    assert found["status"] == 1 and "no such device" in found["output"]


def test_the_machine_needs_no_installed_metaopt(script, tmp_path):
    paths = script("run")["uninstalled"](tmp_path)["PYTHONPATH"].split(os.pathsep)
    (there,) = metadata.distributions(name="torch-metaopt", path=paths[:1])
    assert {point.name for point in there.entry_points} >= {"engine", "kernels", "tasks"}
    assert all((point.load(), True)[1] for point in there.entry_points)
