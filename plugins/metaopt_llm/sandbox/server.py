"""The fork server: a process that has imported torch and forks one confined child per candidate.

It is started by `metaopt_llm.sandbox.sandbox` with a clean environment and a socket, over which it is told to start a candidate
(with the two pipes that the child keeps) and to end it. It never sees what a candidate writes.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import signal
import socket
import types
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from metaopt_llm.sandbox.confinement import (
    NEW_PROCESS_NUMBERS,
    become_nobody,
    confine,
    die_with_parent,
    enter_namespaces,
    libc,
)
from metaopt_llm.sandbox.frames import EVALUATION, HEADER, LONGEST_ERROR, Frame, Kind
from metaopt_llm.sandbox.limits import Limits

_REQUESTS, _REPLIES = 3, 4  # file descriptors of a child


def serve(control_fd: int, empty: str) -> None:
    """Start and end candidates as told, until the other side closes the socket.

    Args:
        control_fd: file descriptor of the socket.
        empty: a directory with nothing in it.
    """
    torch.set_num_threads(1)
    Candidate(json.dumps({"source": _WARM_UP, "tensors": ["x"], "scalars": {"beta": 1.0}})).answer(
        EVALUATION.pack(8, 2, True) + bytes(32)
    )
    become_nobody()
    own_numbers = None
    if enter_namespaces():
        keeper = os.fork()  # process numbers begin anew with the child
        if keeper:
            os.close(control_fd)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) & 0xFF)
        die_with_parent()
        own_numbers = os.open("/proc/self/ns/pid", os.O_RDONLY)
    control = socket.socket(fileno=control_fd)
    control.send(b"started")
    pid = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 2)
        if not message:
            break
        if pid:
            _end(pid)
            pid = 0
        if descriptors:
            limits = Limits(**json.loads(message))
            pid = _start(descriptors, limits, own_numbers, empty)
            for fd in descriptors:
                os.close(fd)
        control.send(b"done")
    if pid:
        _end(pid)


_WARM_UP = "def loss(x, beta):\n    return torch.where(x > 0, -F.logsigmoid(beta * x), torch.exp(x)) + x.std()\n"


def _start(descriptors: list[int], limits: Limits, own_numbers: int | None, empty: str) -> int:
    if own_numbers is not None and libc.unshare(NEW_PROCESS_NUMBERS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    pid = os.fork()
    if pid == 0:
        try:
            _run(descriptors, limits, None if own_numbers is None else empty)
        finally:
            os._exit(0)
    if own_numbers is not None and libc.setns(own_numbers, NEW_PROCESS_NUMBERS) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    return pid


def _end(pid: int) -> None:
    """Not before this is the child waited for, so that its number, and its group's, are still its own."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):  # it had no time to become a group
            kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# -- in the child --------------------------------------------------------------------------------------------------------


def _run(descriptors: list[int], limits: Limits, empty: str | None) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    # first to numbers above all that will be taken
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (null, null, null, *descriptors)]
    for fd, source in enumerate(kept):
        os.dup2(source, fd)
    os.closerange(len(kept), os.sysconf("SC_OPEN_MAX"))
    try:
        level = confine(limits, empty)
    except OSError as error:
        _send(_failure(0, error))
        return
    _send(Frame(Kind.READY, 0, bytes([level])))
    candidate = None
    while True:
        kind, number, length = HEADER.unpack(_receive(HEADER.size))
        payload = _receive(length)
        try:
            if kind == Kind.SOURCE:
                candidate, reply = Candidate(payload), b""
            else:
                assert candidate is not None
                reply = candidate.answer(payload)
            _send(Frame(Kind.VALUES, number, reply))
        except BaseException as error:
            _send(_failure(number, error))


def _failure(number: int, error: BaseException) -> Frame:
    return Frame(Kind.ERROR, number, f"{type(error).__name__}: {error}".encode("ascii", "replace")[:LONGEST_ERROR])


def _receive(length: int) -> bytes:
    parts = []
    while length:
        part = os.read(_REQUESTS, min(length, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _send(frame: Frame) -> None:
    data = memoryview(frame.encode())
    while data:
        data = data[os.write(_REPLIES, data) :]


class Candidate:
    """A loss in Python, of which nothing is trusted: this runs in the child.

    Args:
        request: JSON: ``source``, names of ``tensors``, values of ``scalars`` by name.
    """

    def __init__(self, request: bytes | str) -> None:
        asked = json.loads(request)
        names: dict[str, Any] = {"torch": torch, "F": F, "math": math}
        exec(compile(asked["source"], "candidate", "exec", dont_inherit=True), names)
        functions = [
            value for value in names.values()
            if isinstance(value, types.FunctionType) and value.__code__.co_filename == "candidate"
        ]  # fmt: skip
        if not functions:
            raise ValueError("the text defines no function")
        self._function = functions[-1]
        self._tensors: list[str] = asked["tensors"]
        self._others = {**asked["scalars"], "self": types.SimpleNamespace(**asked["scalars"])}
        code = self._function.__code__
        self._arguments = code.co_varnames[: code.co_argcount]

    def answer(self, request: bytes) -> bytes:
        """The losses of the examples in ``request``, and weighted gradients where it has weights; see `Kind`."""
        size, examples, weighted = EVALUATION.unpack_from(request)
        dtype = torch.float32 if size == 4 else torch.float64
        numbers = torch.frombuffer(bytearray(request[EVALUATION.size :]), dtype=dtype).view(-1, examples)
        inputs = [row.clone().requires_grad_(weighted) for row in numbers[: len(self._tensors)]]
        known = {**self._others, **dict(zip(self._tensors, inputs, strict=True))}
        loss = self._function(*(known[name] for name in self._arguments))
        if not isinstance(loss, torch.Tensor) or loss.shape != (examples,):
            shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"a loss has one value per example, shape [{examples}]; got {shape}")
        rows = [loss.detach()]
        if weighted:
            grads: Any = [None] * len(inputs)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, inputs, numbers[-1].to(loss.dtype), allow_unused=True)
            rows += [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
        return torch.stack([row.to(dtype) for row in rows]).numpy().tobytes()
