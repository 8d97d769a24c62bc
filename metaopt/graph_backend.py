"""The unroll window as one CUDA graph: all steps of all copies, recorded once and then replayed without Python.

A graph reads and writes fixed addresses. So what a window is given is copied to buffers that stay, and what it made is
copied out; hyperparameters are buffers too, and another value needs no new graph.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.backends import as_tensors, eager, flat_tensors, unrecorded
from metaopt.constants import Constants
from metaopt.inner_step import InnerStep
from metaopt.learned import Theta
from metaopt.random import step_keys
from metaopt.unroll import Advance, Carry

STEPS_PER_GRAPH = 128
"""Longer windows are replayed in pieces: a graph takes memory, and time to record, for every operation of every step."""

Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Records what a function does to memory: what it returned, and a function that makes the same tensors anew from what its
inputs hold by then. RuntimeError where it cannot be recorded."""


def graph(step: InnerStep) -> Advance:
    """A CUDA graph per layout of the arguments and number of steps; bit for bit what ``eager`` makes of the same kernels.

    Where autograd records, and for tasks and rules that read tensors on the host (``.item()``, a boolean mask as an index),
    it runs ``eager`` and logs one line. Autocast and the precision of matrix products are those of the first call.

    Raises:
        ValueError: the task is on no CUDA device.
    """
    device = step.task.device
    if device.type != "cuda":
        raise ValueError(
            f"backend 'graph' needs a task on a CUDA device, got one on {str(device)!r}; move it there with "
            "task.to('cuda'), or choose backend='eager'"
        )
    return replayed(step, functools.partial(cuda_graph, device))


def cuda_graph(device: torch.device, window: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """`Record` by ``torch.cuda.CUDAGraph``; the warm-up is a run on a side stream, as torch's manual asks."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), _error_on_synchronisation():
            window()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            made = window()
    return made, recorded.replay


def replayed(step: InnerStep, record: Record) -> Advance:
    """A back-end that records each window of a new layout by ``record``, and then replays it."""
    together = eager(step)
    recordings: dict[Any, _Recording | None] = {}

    def advance(
        theta: Theta, hp: dict[str, Any], carry: Carry, indices: Tensor, horizon: Tensor
    ) -> tuple[Tensor, Carry]:
        if torch.is_grad_enabled():
            _log_eager("a graph records no gradients; unroll under torch.no_grad()")
            return together(theta, hp, carry, indices, horizon)
        numbers = {name: as_tensors(value, indices.device) for name, value in hp.items()}
        losses = []
        for piece in indices.split(STEPS_PER_GRAPH, 1):
            given = (theta, numbers, carry.tree(), piece, horizon)
            layout = tuple((leaf.shape, leaf.dtype) for leaf in flat_tensors(given))
            if layout not in recordings:
                recordings[layout] = _recording(step, record, given)
            recording = recordings[layout]
            loss, carry = (
                together(theta, hp, carry, piece, horizon) if recording is None else recording.run(given, carry)
            )
            losses.append(loss)
        return torch.cat(losses, 1), carry

    return advance


class _Recording(NamedTuple):
    """A window on fixed memory.

    Attributes:
        inputs: the tensors that it reads.
        constants: tensors that it reads too, and that must live as long.
        made: losses [K, T], params, state, buffers, step and alive, which `replay` makes anew.
    """

    inputs: list[Tensor]
    constants: Constants
    made: dict[str, Any]
    replay: Callable[[], None]

    def run(self, given: Any, carry: Carry) -> tuple[Tensor, Carry]:
        torch._foreach_copy_(self.inputs, [*flat_tensors(given)])
        self.replay()
        new = tree.map_tree(torch.clone, self.made)
        return new.pop("losses"), Carry(**new, seeds=carry.seeds, config=carry.config)


def _recording(step: InnerStep, record: Record, given: Any) -> _Recording | None:
    """The window of `given`'s layout, recorded; None, and one logged line, where it cannot be."""
    fixed = _map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), given)
    constants = Constants()

    def run() -> dict[str, Any]:
        with constants:
            return window(step, *fixed)

    run()  # makes the constants, traces the rule's program, and lets plain errors be plain
    try:
        made, replay = record(run)
    except RuntimeError as error:
        _log_eager(str(error).partition("\n")[0])
        return None
    return _Recording([*flat_tensors(fixed)], constants, made, replay)


def window(
    step: InnerStep, theta: Theta, hp: Mapping[str, Any], carry: Mapping[str, Any], indices: Tensor, horizon: Tensor
) -> dict[str, Any]:
    """`metaopt.unroll.lockstep` without a look at the host: every step selects, whether or not a copy diverged.

    Returns:
        ``losses`` [K, T], and the entries of the new carry that change.
    """
    params, state, buffers, count, alive = (carry[name] for name in ("params", "state", "buffers", "step", "alive"))
    losses = []
    for at in indices.unbind(1):
        batch = step.task.train.take(at) | carry["config"]
        if step.task.stochastic:
            batch["random"] = step_keys(carry["seeds"], count)
        loss, *new, finite = unrecorded(step, True, theta, hp, params, state, buffers, batch, count, horizon)
        survives = alive & finite
        losses.append(torch.where(alive & torch.isfinite(loss), loss, torch.nan))
        old = (params, state, buffers)
        params, state, buffers = (tree.select(survives, *pair) for pair in zip(new, old, strict=True))
        count, alive = count + survives, survives
    return {
        "losses": torch.stack(losses, 1), "params": params, "state": state, "buffers": buffers, "step": count,
        "alive": alive,
    }  # fmt: skip


@contextmanager
def _error_on_synchronisation() -> Iterator[None]:
    """RuntimeError where the host waits for the device: found before a capture, which such a wait would break, and with it,
    up to torch 2.11, the allocator of the process (https://github.com/pytorch/pytorch/pull/180395)."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`tree.map_tree` that enters tuples too: of the betas of a rule, of the arguments of a window."""
    if isinstance(value, tuple):
        return tuple(_map(function, entry) for entry in value)
    if isinstance(value, dict):
        return {name: _map(function, entry) for name, entry in value.items()}
    return function(value)


@functools.cache  # once per process
def _log_eager(reason: str) -> None:
    logging.getLogger("metaopt").warning("backend 'graph' runs eagerly: %s", reason)
