"""Compile kernels for sm_90 on any machine, and report what each takes of a multiprocessor, as JSON.

    python tests/kernels/ahead_of_time.py [--write] [MODULE ...]

Without modules: all of `metaopt_kernels`. ``--write`` makes the report the table of the installed Triton version, which
`test_ahead_of_time.py` holds later reports against. Not for a process with ``TRITON_INTERPRET`` set: there Triton's own
functions are the interpreter's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import metaopt_kernels
from metaopt_kernels.aot import AotCase

TABLE = Path(__file__).parent / "resources" / f"{triton.__version__}.json"
PROCESSES = 2


def modules() -> list[str]:
    """All kernel modules, by their full names."""
    return [f"metaopt_kernels.{found.name}" for found in pkgutil.iter_modules(metaopt_kernels.__path__)]


@functools.cache
def cases(names: tuple[str, ...]) -> dict[str, AotCase]:
    """What these modules offer, by name."""
    offers = [getattr(importlib.import_module(name), "aot_cases", list) for name in names]
    found = [case for offer in offers for case in offer()]
    by_name = {case.name: case for case in found}
    assert len(by_name) == len(found), f"two cases of one name among {sorted(case.name for case in found)}"
    return by_name


def resources(case: AotCase) -> dict[str, Any]:
    """Of one kernel on sm_90.

    Returns:
        ``registers`` of a thread, ``spill_bytes`` that a thread stores and loads because these do not suffice,
        ``shared_bytes`` of a program, and whether Hopper's asynchronous matrix instructions (``wgmma``) are used.
    """
    names = case.function.arg_names
    source = ASTSource(
        fn=case.function,
        signature={name: "constexpr" if name in case.constants else case.signature[name] for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    with contextlib.redirect_stdout(io.StringIO()) as log:  # where TRITON_DUMP_PTXAS_LOG goes
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case.num_warps, **case.options}
        )
    (registers,) = _counts(r"Used (\d+) registers", log.getvalue())
    return {
        "registers": registers,
        "spill_bytes": sum(_counts(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
    }


def _counts(pattern: str, log: str) -> list[int]:
    """Of the kernel, and of functions that it calls (a sine of large arguments)."""
    found = re.findall(pattern, log)
    assert found, f"ptxas said {log!r}"
    return [int(count) for count in found]


def report(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`resources` of every case of these modules, by its name."""
    found = cases(names)
    context = multiprocessing.get_context("fork")  # workers inherit the cases, which do not pickle
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        measured = [pool.submit(_resources_of, names, name) for name in found]
        return {name: future.result() for name, future in zip(found, measured, strict=True)}


def _resources_of(names: tuple[str, ...], name: str) -> dict[str, Any]:
    began = sum(os.times()[:4])
    try:
        found = resources(cases(names)[name])
    except Exception as error:
        raise RuntimeError(f"{name} does not compile: {error}") from error
    print(f"{name}: compiled in {sum(os.times()[:4]) - began:.1f} s of CPU time", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("modules", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:  # a cached kernel has no log
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        found = report(tuple(given.modules or modules()))
    text = json.dumps(found, indent=2) + "\n"
    if given.write:
        TABLE.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
