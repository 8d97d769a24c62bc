"""The kernels' tests on the GPU, then the benchmarks beside this file, within nine minutes: ``make gpu``.

    python benchmarks/gpu/run.py [--only STAGE ...] [--device cuda] [--small] [--out DIRECTORY]

Needs no network and no installation of metaopt, only its dependencies and pytest. Every stage is a process of its own with a
limit of time; one that fails or is cut short is recorded as that, with the rows that it had printed, and the others go on. The
result is one JSON file, ``gpu_<device>_<date>.json`` (``cpu_...`` on a CPU), written anew after each stage. The exit status
says whether the tests passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = [ROOT, *(ROOT / name for name in ("plugins", "tasks", "kernels", "zoo")), ROOT / "benchmarks"]
NO_GPU_NEEDED = [f"--ignore=tests/kernels/test_{name}.py" for name in ("ahead_of_time", "gpu_benchmarks")]
TESTS = ["tests/kernels", "tests/test_graph_backend.py", *NO_GPU_NEEDED]
TEST_SECONDS = 170.0
BENCHMARKS = {
    "ceilings": 20.0,
    "optimizer_steps": 60.0,
    "inner_steps": 140.0,
    "outer_steps": 90.0,
    "population_steps": 30.0,
    "search_runs": 60.0,
}
"""Stage -> most seconds."""


class Outcome(NamedTuple):
    """Of a process: its exit status (None: cut short), what it printed, and how long it ran."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


def run(command: list[str], limit: float, environment: dict[str, str]) -> Outcome:
    """Run a command from the repository's root; at its limit, end it with all that it has started."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return Outcome(status, *texts, seconds)


def uninstalled(directory: Path) -> dict[str, str]:
    """An environment in which metaopt's entry points and version are found although nothing is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {module}" for name, module in project["entry-points"]["metaopt"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[metaopt]", *points]) + "\n")
    paths = [directory, *SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "METAOPT_CACHE_DIR": str(directory / "generated"),
        "TRITON_CACHE_DIR": str(directory / "triton"),
    }


def tests(device: str, environment: dict[str, str], directory: Path) -> dict[str, Any]:
    """Run the kernels' tests on the device: how many there were and which failed."""
    report = directory / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", "4"]  # most of the time goes into compiling
    environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    done = run(command, TEST_SECONDS, environment | {"METAOPT_KERNEL_DEVICE": device})
    found: dict[str, Any] = {"status": done.status, "seconds": round(done.seconds, 1)}
    if report.exists():
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        found |= {"tests": len(cases), "skipped": sum(case.find("skipped") is not None for case in cases)}
        found["failed"] = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    if done.status != 0:
        found["output"] = (done.stdout + done.stderr)[-8000:]
    return found


def benchmark(name: str, device: str, small: bool, environment: dict[str, str]) -> dict[str, Any]:
    """The rows of one script."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--device", device, *(["--small"] if small else [])]
    limit = BENCHMARKS[name] * (10 if small else 1)  # small: does it run at all, on whatever machine, however busy
    done = run(command, limit, environment)
    rows = []
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short within a line
            rows.append(json.loads(line))
    found = {"status": done.status, "seconds": round(done.seconds, 1), "rows": rows}
    return found if done.status == 0 else found | {"output": done.stderr[-4000:]}


def machine(device: str) -> dict[str, Any]:
    """Where this ran."""
    from report import machine

    with contextlib.suppress(ImportError):
        import triton

        return machine(device) | {"triton": triton.__version__, "cuda": torch.version.cuda}
    return machine(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("tests", *BENCHMARKS), default=("tests", *BENCHMARKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of no interest, to try the program")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"torch {torch.__version__} sees no GPU; run this where it does, or try it with --device cpu --small"
        )
    with tempfile.TemporaryDirectory() as directory:
        environment = uninstalled(Path(directory))
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        content: dict[str, Any] = {"machine": machine(given.device)}
        device = re.sub(r"\W+", "-", content["machine"]["device"]).lower()
        kind = "gpu" if given.device.startswith("cuda") else given.device
        out = given.out / f"{kind}_{device}_{content['machine']['date']}.json"
        given.out.mkdir(parents=True, exist_ok=True)
        for stage in given.only:
            if stage == "tests":
                content[stage] = tests(given.device, environment, Path(directory))
            else:
                content[stage] = benchmark(stage, given.device, given.small, environment)
            out.write_text(json.dumps(content, indent=2) + "\n")
            shown = {name: value for name, value in content[stage].items() if name != "rows"}
            print(
                f"{stage}: {json.dumps(shown)}",
                *map(json.dumps, content[stage].get("rows", [])),
                sep="\n  ",
                flush=True,
            )
        print(f"written: {out}")
    return content.get("tests", {}).get("status", 0) != 0


if __name__ == "__main__":
    sys.exit(main())
