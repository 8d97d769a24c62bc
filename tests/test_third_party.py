"""A stranger's package, installed by pip, is found, created from and trained with, and no file of ours changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "third_party"

TRAIN = """
import sys
from metaopt import registry

report = next(report for report in registry.plugins() if report.name == "example")
assert report.error is None, report.error
assert (report.distribution, report.version) == ("metaopt-example", "0.1.0")
assert report.counts == {"optimizer": 1, "task": 1}
assert "soft_sign" in registry.specs("optimizer")
assert "torch" not in sys.modules

import metaopt, torch

task = registry.create("task", "least_squares", device="cpu", size=4)
params = {name: p.requires_grad_() for name, p in task.init(torch.Generator().manual_seed(0)).items()}
optimizer = metaopt.optimizer("soft_sign", params.values(), lr=0.05)
losses = []
for step in range(100):
    loss = task.loss(params, task.train.take(torch.arange(step, step + task.batch_size) % len(task.train)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.01 * losses[0], (losses[0], losses[-1])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where pip put the example, as an environment for subprocesses; built from a copy, without a network."""
    root = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(EXAMPLE, root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, *offline, "--target", root / "site", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(root / "site")}


def test_installed_plugin_is_listed_by_the_command(environment):
    command = [sys.executable, "-m", "metaopt", "list", "tasks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "least_squares" in done.stdout and "example" in done.stdout


def test_installed_plugin_trains(environment):
    done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_example_stays_short_enough_to_copy():
    lines = [
        line
        for path in (EXAMPLE / "metaopt_example").glob("*.py")
        for line in path.read_text().splitlines()
        if line.strip() and not line.lstrip().startswith(("#", '"""', "import", "from"))
    ]
    assert len(lines) < 45
