"""What each method would cost, and which one to take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import registry, tree
from metaopt.rule import State
from metaopt.tune.derivatives import MissingGradient, filled, floating, norm, transformed, vjp
from metaopt.tune.first_order import loss_by_hypers
from metaopt.tune.hypergradient import METHODS, Cost, Facts, Method, Outer, inner_gradients, require
from metaopt.tune.inner import Hypers, Inner
from metaopt.tune.inverse import optimizer_hypers, start_hypers

DEFAULT_MEMORY = 2.0**31
"""Bytes for "auto" and `plan`; the same everywhere, so that a choice does not depend on the machine."""
_STATIONARY = 1e-4
"""Norm of the inner gradient, relative to that at the start, below which an inner problem counts as solved."""
_CG_ITERATIONS = 50


@dataclass(frozen=True)
class Plan:
    """What one method would take.

    Attributes:
        method: its name.
        seconds: of processor time, from one measured step.
        bytes: at the peak, above data, hypers and one state.
        fits: whether that is within the memory allowed.
        exact: whether it is the derivative of the run, to rounding.
        obstacle: why it cannot be used; empty if it can.
    """

    method: str
    seconds: float
    bytes: float
    fits: bool
    exact: bool
    obstacle: str = ""


def plan(inner: Inner, outer: Outer, hypers: Hypers, memory: float = DEFAULT_MEMORY) -> list[Plan]:
    """Predicted time and memory of every method with its default options, quickest first.

    Two steps are run. Times are good to a factor of two; memory to some tens of percent.

    Args:
        inner: the training run.
        outer: its objective.
        hypers: where.
        memory: bytes that may be used.
    """
    with torch.no_grad():
        hypers = tree.detach(hypers)
        facts, seconds = _measured(inner, hypers)
        obstacle, forward = _second_order_obstacle(inner, hypers), _forward_obstacle(inner, hypers)
    rows = []
    for name in METHODS:
        method: Method = registry.create("hypergradient", name)
        cost = method.cost(facts)
        why_not = _lack(inner, name, method) or (
            obstacle if "second" in method.needs and not _by_hand(inner, name) else ""
        )
        if "forward" in method.needs:
            why_not = why_not or forward
        exact = "exact" in registry.get("hypergradient", name).tags
        rows.append(Plan(name, cost.time * seconds, cost.bytes, cost.bytes <= memory, exact, why_not))
    return sorted(rows, key=lambda row: row.seconds)


@dataclass(frozen=True)
class Choice:
    """What "auto" settled on.

    Attributes:
        method, options: to be run.
        inner: on this problem; one that has been trained already has no steps left.
        why: one sentence.
    """

    method: str
    inner: Inner
    why: str
    options: dict[str, Any]


def choose(inner: Inner, outer: Outer, hypers: Hypers, memory: float | None) -> Choice:
    """The method that "auto" takes; under ``torch.no_grad``.

    The exact ones first: the quickest that fits. Where no graph of the run does, a problem that training has solved is
    differentiated at its optimum. Where the steps have no second derivatives, by gradients or values alone.
    """
    if transformed():
        return Choice("replay", inner, "inside a transform nothing can be measured; replay is exact and lean", {})
    if inner.vjp is not None:
        return Choice("replay", inner, "the steps bring their own adjoint, which replay uses", {})
    memory = DEFAULT_MEMORY if memory is None else memory
    obstacle = _second_order_obstacle(inner, hypers)
    if obstacle:
        first = "penalty" if inner.update is not None and _all_in_loss(inner, hypers) else "es"
        return Choice(first, inner, f"{obstacle}; {first} needs none", {})
    facts, _ = _measured(inner, hypers)
    graph = registry.create("hypergradient", "unroll").cost(facts).bytes
    if graph <= memory:
        return Choice("unroll", inner, f"exact and quickest; its graph of {_size(graph)} fits {_size(memory)}", {})
    too_large = f"a graph of all {facts.steps} steps would take {_size(graph)} of {_size(memory)}"
    solved = _solved(inner, hypers)
    if solved is not None:
        iterations = min(facts.parameters, _CG_ITERATIONS)
        why = f"{too_large}; training solves the inner problem, so its optimum can be differentiated instead"
        return Choice("cg", solved, why, {"iterations": iterations})
    exact: list[tuple[str, dict[str, Any], Cost]] = [
        (name, options, registry.create("hypergradient", name, **options).cost(facts))
        for name, options in (("checkpoint", {}), ("replay", {}), ("replay", {"graph": 1}), ("forward", {}))
    ]
    fitting = [
        choice for choice in exact
        if choice[2].bytes <= memory and (choice[0] != "forward" or not _forward_obstacle(inner, hypers))
    ]  # fmt: skip
    if not fitting:  # forward mode may be leaner, but is slower with every hyper
        name, options, cost = min(
            (choice for choice in exact if choice[0] == "replay"), key=lambda choice: choice[2].bytes
        )
        closest = f"{too_large}; no exact method fits, and replay comes closest ({_size(cost.bytes)})"
        return Choice(name, inner, closest, options)
    name, options, _ = min(fitting, key=lambda choice: choice[2].time)
    return Choice(name, inner, f"{too_large}; {name} is the quickest exact method that fits", options)


def _size(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _lack(inner: Inner, name: str, method: Method) -> str:
    try:
        require(inner, name, method.needs)
    except ValueError as error:
        return str(error)
    return ""


def _by_hand(inner: Inner, name: str) -> bool:
    return name == "replay" and inner.vjp is not None


def _second_order_obstacle(inner: Inner, hypers: Hypers) -> str:
    """Why a step cannot be differentiated; empty if it can."""
    if not inner.steps:
        return ""
    state = inner.start(hypers)
    try:
        new, pull = vjp(lambda s, h: inner.step(s, h, 0), state, hypers, names=["state", "hypers"])
        pull(floating(new))
    except MissingGradient as error:
        return str(error)
    except RuntimeError as error:  # what torch says of operations without second derivatives
        return f"the step has no second derivatives ({str(error).splitlines()[0]})"
    return ""


def _forward_obstacle(inner: Inner, hypers: Hypers) -> str:
    """Why a step cannot be differentiated in forward mode; empty if it can."""
    if not inner.steps:
        return ""
    state = inner.start(hypers)
    point = (floating(state), hypers)

    def slope(scale: Tensor) -> Any:
        tangents = tree.map_tree(lambda leaf: scale * leaf, {"state": point[0], "hypers": point[1]})
        step = torch.func.jvp(
            lambda s, h: floating(inner.step(filled(state, s), h, 0)), point, (tangents["state"], tangents["hypers"])
        )
        return step[1]

    try:
        with torch.enable_grad():
            torch.vmap(slope)(torch.ones(1))
    except RuntimeError as error:  # what torch says of operations without them
        return f"the step has no forward derivatives ({str(error).splitlines()[0]})"
    return ""


def _all_in_loss(inner: Inner, hypers: Hypers) -> bool:
    """Whether the inner loss is stated and no hyper acts on the start or the steps alone, as a learning rate does."""
    if inner.loss is None:
        return False
    state, unused = inner.start(hypers), set[str]()
    loss_by_hypers(inner, inner.params(state), hypers, unused)
    return not (start_hypers(inner, hypers, unused) or optimizer_hypers(inner, state, hypers, unused))


def _solved(inner: Inner, hypers: Hypers) -> Inner | None:
    """The problem after training, if that made its loss stationary and all hypers act through the loss."""
    loss = inner.loss
    if loss is None:
        return None
    state = inner.start(hypers)
    before = norm(inner_gradients(inner, inner.params(state), hypers))
    state = inner.advance(state, hypers, 0, inner.steps)
    params = inner.params(state)
    unused: set[str] = set()
    gradients, pull = vjp(lambda h: inner_gradients(inner, params, h), hypers, names=["hypers"], proven=unused)
    pull(gradients)
    if bool(norm(gradients) > _STATIONARY * before):
        return None
    if start_hypers(inner, hypers, unused) or optimizer_hypers(inner, state, hypers, unused):
        return None
    return replace(inner, start=lambda _: state, steps=0)


def _measured(inner: Inner, hypers: Hypers) -> tuple[Facts, float]:
    """What costs depend on, and the processor seconds of one step without recording."""
    state = inner.start(hypers)
    params = inner.params(state)
    seconds, step_bytes = 0.0, 0
    if inner.steps:
        begin = time.process_time()
        inner.step(state, hypers, 0)
        begin, seconds = time.process_time(), time.process_time() - begin
        with torch.enable_grad():
            leaves = tree.map_tree(lambda leaf: leaf.detach().requires_grad_(), hypers)
            before = inner.step(state, leaves, 0)
            state = before if inner.steps == 1 else inner.step(before, leaves, 1)
        first = _kept(before)  # data and hypers are among them
        step_bytes = sum(size for at, size in _kept(state).items() if at not in first)
    parameters = sum(leaf.numel() for leaf in tree.leaves(params))
    facts = Facts(
        steps=inner.steps,
        state_bytes=_bytes(state),
        params_bytes=_bytes(params),
        hypers_bytes=_bytes(hypers),
        step_bytes=step_bytes,
        hypers=sum(leaf.numel() for leaf in tree.leaves(hypers)),
        parameters=parameters,
    )
    return facts, seconds


def _kept(state: State) -> dict[int, int]:
    """Address and bytes of each storage that the graph of ``state`` keeps.

    What nodes show of themselves is looked at: hooks for saved tensors are refused by steps that use `torch.func`.
    """
    found: dict[int, int] = {}
    waiting = [leaf.grad_fn for leaf in tree.leaves(state) if leaf.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                saved = getattr(node, name)
                for tensor in saved if isinstance(saved, (tuple, list)) else (saved,):
                    if isinstance(tensor, Tensor):
                        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        fresh = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= fresh
        waiting += fresh
    return found


def _bytes(of: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(of))
