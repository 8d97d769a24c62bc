"""Compile generated C++ with the compiler at hand, and load it: plain C through ctypes, so that a build takes a second.

The code uses the OpenMP threads that torch has already started. Nothing here is required: where there is no compiler, or
a build fails, `load_library` returns None and the caller runs torch operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

CPP_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}
"""How generated code stores what."""

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_OPENMP = "-fopenmp"

PRELUDE = """\
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// glibc has vector forms of these (to 4 ulp) but tells the compiler only under -ffast-math.
#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__clang__)
#define VECTORISED(name) \\
    extern "C" __attribute__((__simd__("notinbranch"))) double name(double) noexcept; \\
    extern "C" __attribute__((__simd__("notinbranch"))) float name##f(float) noexcept;
VECTORISED(exp)
VECTORISED(log)
VECTORISED(sin)
VECTORISED(cos)
extern "C" __attribute__((__simd__("notinbranch"))) double pow(double, double) noexcept;
extern "C" __attribute__((__simd__("notinbranch"))) float powf(float, float) noexcept;
#if __GLIBC_PREREQ(2, 35)
VECTORISED(tanh)
VECTORISED(atan)
#endif
#endif

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
#endif
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
"""
"""What all generated code begins with."""


def compiler() -> str | None:
    """The command of the C++ compiler to use, or None.

    ``METAOPT_CXX`` decides where it is set (empty: none), then ``CXX``; otherwise the first of g++, c++ and clang++.
    """
    if os.name == "nt":
        return None
    return _find_compiler(os.environ.get("METAOPT_CXX"), os.environ.get("CXX"), os.environ.get("PATH"))


@functools.lru_cache(maxsize=16)
def _find_compiler(chosen: str | None, cxx: str | None, path: str | None) -> str | None:
    candidates = [chosen] if chosen is not None else [cxx or "", "g++", "c++", "clang++"]
    for command in candidates:
        words = shlex.split(command)
        if words and shutil.which(words[0], path=path):
            return command
    return None


def cache_directory() -> Path:
    """Where generated code is kept: ``$METAOPT_CACHE_DIR``, default ``~/.cache/metaopt``."""
    chosen = os.environ.get("METAOPT_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.path.expanduser("~")) / ".cache" / "metaopt"


def load_library(source: str) -> ctypes.CDLL | None:
    """The library that ``source`` compiles to, or None where it cannot be had.

    It is kept in ``$METAOPT_CACHE_DIR`` (default: ``~/.cache/metaopt``) under a key of source, flags, compiler and CPU. No
    compiler: None, silently. A build, a load or a cache directory that fails: None, with one warning per process.
    """
    command = compiler()
    return None if command is None else _library(source, command, cache_directory())


@functools.lru_cache(maxsize=1024)
def _library(source: str, command: str, directory: Path) -> ctypes.CDLL | None:
    problem: Exception | None = None
    for openmp in (True, False):  # without: where torch has loaded no OpenMP that this compiler's code can use
        try:
            return _load(source, command, directory, openmp)
        except (OSError, subprocess.SubprocessError) as error:
            problem = error
    _warn(f"{type(problem).__name__}: {problem}")
    return None


_warned = False


def _warn(problem: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"no C++ step: {problem.strip()[:2000]}\nmetaopt falls back to torch operations, which are slower; set "
        "METAOPT_CXX to a working compiler, METAOPT_CACHE_DIR to a writable directory, or METAOPT_CXX='' for silence",
        RuntimeWarning,
        stacklevel=4,
    )


def _load(source: str, command: str, directory: Path, openmp: bool) -> ctypes.CDLL:
    """Build unless the cache has it, and load; a cached library that does not load is built anew, once."""
    flags = (*_FLAGS, _OPENMP) if openmp else _FLAGS
    key = hashlib.sha256("\0".join((source, *flags, command, _version(command), _cpu())).encode()).hexdigest()[:32]
    library = directory / f"step-{key}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            library.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    _build(source, shlex.split(command), flags, library)
    return ctypes.CDLL(str(library))


def _build(source: str, command: list[str], flags: Sequence[str], library: Path) -> None:
    """Compile to a temporary file beside ``library`` and move it there, so that no process sees half a library."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        text, unit, shared = (str(Path(scratch) / name) for name in ("step.cpp", "step.o", "step.so"))
        Path(text).write_text(source)
        # linked without -fopenmp: its symbols resolve to the OpenMP runtime, and so the threads, that torch has loaded
        _run([*command, *flags, "-c", text, "-o", unit])
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        _run([*command, "-shared", *undefined, unit, "-o", shared])
        os.replace(shared, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed:\n{done.stderr}")


@functools.lru_cache(maxsize=16)
def _version(command: str) -> str:
    done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60)
    return done.stdout


@functools.cache
def _cpu() -> str:
    """Model and instruction sets: code built with -march=native for one CPU may be illegal on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join((platform.platform(), platform.machine(), platform.processor()))
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return " ".join((platform.machine(), *(facts.get(name, "") for name in wanted)))
