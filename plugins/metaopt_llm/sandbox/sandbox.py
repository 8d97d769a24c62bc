"""The trusted side: starts confined candidates, asks them for numbers, believes nothing else and ends them on time."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metaopt_llm.sandbox.frames import EVALUATION, HEADER, LONGEST_ERROR, Frame, Kind
from metaopt_llm.sandbox.limits import Level, Limits

_SERVER_SECONDS = 120.0
"""To import torch on a busy machine."""
_CHILD_SECONDS = 30.0
"""To fork and confine a child, and to end one."""


class SandboxError(RuntimeError):
    """There is no sandbox, or none that is safe enough; the message says what would help."""


class CandidateError(ValueError):
    """A candidate failed: it raised, gave no losses, took too long or died. Its own words are in the message, as text."""


class Sandbox:
    """Runs losses in free Python, each in a fresh process that ends with it.

    One candidate runs at a time; several sandboxes may be used side by side, also by threads. Starting one takes as long as
    importing torch, a candidate some 0.1 s. Close it, or use it with ``with``.

    Args:
        limits: for each candidate.
        least: the level that a candidate must be confined to (`Level`), or it is not run.

    Raises:
        SandboxError: not on Linux, or the server did not start.
    """

    _START: ClassVar = (
        "import sys; sys.path[:] = {path!r}; from metaopt_llm.sandbox.server import serve; serve({fd}, {empty!r})"
    )

    def __init__(self, limits: Limits | None = None, least: Level = Level.NAMESPACES) -> None:
        if sys.platform != "linux":
            raise SandboxError(
                f"free Python runs on Linux only, not on {sys.platform}; write losses in the language instead"
            )
        self.limits = limits or Limits()
        self.least = least
        self._files = tempfile.TemporaryDirectory(prefix="metaopt-sandbox-")
        self._empty = Path(self._files.name, "empty")
        self._busy = False
        os.chmod(self._files.name, 0o711)  # for the server, which may be nobody
        self._empty.mkdir(mode=0o555)
        try:
            self._start_server()
        except BaseException:
            self._files.cleanup()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and whatever runs in it."""
        self._stop_server()
        self._files.cleanup()

    @contextmanager
    def candidate(self, source: str, tensors: Sequence[str], scalars: Mapping[str, float]) -> Iterator[Candidate]:
        """The loss of a Python text, in a process of its own until the context ends.

        Args:
            source: Python that defines one function last. Its arguments are some of ``tensors`` and ``scalars`` by name, and
                perhaps ``self``, which has the scalars as attributes; ``torch``, ``F`` and ``math`` are there.
            tensors: names of what the loss is of.
            scalars: values of its numbers by name.

        Raises:
            CandidateError: the text is no such function.
            SandboxError: the process cannot be confined well enough, or this sandbox runs another candidate.
        """
        if self._busy:
            raise SandboxError(
                "a sandbox runs one candidate at a time; leave the other's context first, or make a second one"
            )
        self._busy = True
        candidate = None
        try:
            candidate = self._start_candidate(tuple(tensors))
            if candidate.level < self.least:
                raise SandboxError(
                    f"candidates can be confined to level {str(candidate.level)!r} here, and {str(self.least)!r} is asked for; "
                    "install metaopt[sandbox] and allow user namespaces, or lower `least`"
                )
            candidate.define({"source": source, "tensors": [*tensors], "scalars": dict(scalars)})
            yield candidate
        finally:
            self._busy = False
            if candidate is not None:
                candidate.close()
                self._ask_server(b"end", [])

    def _start_candidate(self, tensors: tuple[str, ...]) -> Candidate:
        ours, theirs = [], []
        for k in range(2):  # requests, replies
            ends = os.pipe2(os.O_CLOEXEC)
            ours.append(ends[1 - k])
            theirs.append(ends[k])
        try:
            self._ask_server(json.dumps(asdict(self.limits)).encode(), theirs)
            return Candidate(ours[0], ours[1], self.limits, tensors)
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)

    # -- the server ----------------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        start = self._START.format(path=[*map(os.path.abspath, sys.path)], fd=theirs.fileno(), empty=str(self._empty))
        errors = Path(self._files.name, "errors")
        with theirs, errors.open("wb") as stderr:
            self._server = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", start],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                env=_environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control.settimeout(_SERVER_SECONDS)
        if not self._answered():
            self._stop_server()
            raise SandboxError(
                f"the sandbox's server did not start: {errors.read_text(errors='replace').strip()[-1000:]}"
            )

    def _answered(self) -> bool:
        try:
            return bool(self._control.recv(64))
        except OSError:
            return False

    def _stop_server(self) -> None:
        self._control.close()
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _ask_server(self, message: bytes, descriptors: list[int]) -> None:
        """One that does not answer, because a candidate could harm it, is replaced."""
        for _ in range(2):
            self._control.settimeout(_CHILD_SECONDS)
            with suppress(OSError):
                socket.send_fds(self._control, [message], descriptors)
                if self._answered():
                    return
            self._stop_server()
            self._start_server()
        raise SandboxError("the sandbox's server ended twice in a row; see whether the machine is out of memory")


def _environment() -> dict[str, str]:
    """Nothing of this process's, where keys may be."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", **one}


class Candidate:
    """A running candidate; made by `Sandbox.candidate`.

    Attributes:
        tensors: names of what the loss is of.
        level: how well it is confined.
    """

    def __init__(self, requests: int, replies: int, limits: Limits, tensors: tuple[str, ...]) -> None:
        self.tensors = tensors
        self._requests, self._replies = requests, replies
        self._limits = limits
        self._number = 0
        self._failure = ""
        for fd in (requests, replies):
            os.set_blocking(fd, False)
        try:  # this comes before the child has anything of the candidate
            self.level = Level(self._read(Kind.READY, 1, time.monotonic() + _CHILD_SECONDS)[0])
        except CandidateError as error:
            raise SandboxError(f"a process for a candidate could not be started and confined: {error}") from None

    def define(self, request: Mapping[str, object]) -> None:
        """Hand the text over; see `Sandbox.candidate`."""
        self._call(Kind.SOURCE, json.dumps(request).encode(), 0)

    def evaluate(self, inputs: Sequence[Tensor], weights: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Losses, and gradients of their weighted sum.

        Args:
            inputs: [B] each, all float32 or all float64, on the CPU.
            weights: [B] of the same dtype; None: no gradients.

        Returns:
            The losses [B] and, with weights, a gradient [B] for each input; finite, and of the inputs' dtype.

        Raises:
            CandidateError: there are none, in time, of that form; this candidate can then be asked no more.
        """
        rows = [*inputs, *([] if weights is None else [weights])]
        array = np.stack([row.detach().numpy() for row in rows])
        size, examples = array.dtype.itemsize, array.shape[1]
        count = 1 if weights is None else 1 + len(self.tensors)
        request = EVALUATION.pack(size, examples, weights is not None) + array.tobytes()
        reply = self._call(Kind.EVALUATE, request, count * examples * size)
        values = np.frombuffer(reply, array.dtype).reshape(count, examples).copy()
        if not np.isfinite(values).all():
            self._failure = f"{'a gradient' if np.isfinite(values[0]).all() else 'the loss'} is not finite"
            raise CandidateError(self._failure)
        losses, *gradients = torch.from_numpy(values)
        return losses, gradients

    def close(self) -> None:
        """No more calls."""
        self._failure = self._failure or "it has ended; make a new one"
        for fd in (self._requests, self._replies):
            os.close(fd)

    def _call(self, kind: Kind, payload: bytes, expected: int) -> bytes:
        if self._failure:
            raise CandidateError(f"the candidate cannot be asked: {self._failure}")
        self._number += 1
        until = time.monotonic() + self._limits.seconds
        try:
            self._write(Frame(kind, self._number, payload).encode(), until)
            return self._read(Kind.VALUES, expected, until)
        except CandidateError as error:
            self._failure = str(error)
            raise

    def _write(self, data: bytes, until: float) -> None:
        left = memoryview(data)
        while left:
            self._wait(self._requests, select.POLLOUT, until)
            try:
                left = left[os.write(self._requests, left[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise CandidateError(_DIED) from None

    def _read(self, expected: Kind, length: int, until: float) -> bytes:
        """The payload of the next frame, which must be of this kind, number and length, or a candidate's error."""
        kind, number, size = HEADER.unpack(self._bytes(HEADER.size, until))
        if kind == Kind.ERROR and number == self._number and size <= LONGEST_ERROR:
            text = self._bytes(size, until).decode("ascii", "replace")
            raise CandidateError("".join(c if c.isprintable() else " " for c in text))
        if (kind, number, size) != (expected, self._number, length):
            raise CandidateError("it wrote something else than its losses to its pipe")
        return self._bytes(length, until)

    def _bytes(self, length: int, until: float) -> bytes:
        parts: list[bytes] = []
        while length:
            self._wait(self._replies, select.POLLIN, until)
            try:
                part = os.read(self._replies, min(length, 1 << 16))
            except BlockingIOError:
                continue
            if not part:
                raise CandidateError(_DIED)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(math.ceil(max(0.0, until - time.monotonic()) * 1000)) or time.monotonic() > until:
            raise CandidateError(f"it took longer than {self._limits.seconds:g} s")


_DIED = "its process ended: out of memory or CPU time, a crash, or its own doing"


def probe() -> Level:
    """The level that candidates are confined to on this machine.

    Raises:
        SandboxError: there is no sandbox here.
    """
    with Sandbox(least=Level.LIMITS) as sandbox, sandbox.candidate("def loss(): pass", [], {}) as candidate:
        return candidate.level
