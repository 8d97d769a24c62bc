"""One function for all hypergradients: how the outer objective changes with what the inner training run depends on.

The outer objective of hypers l is ``F(l) = outer(params(s_T), l)`` with ``s_0 = start(l)``, ``s_{t+1} = step(s_t, l, t)``.
Methods differ in what they take the derivative of (the run, its last steps, the optimum that it approaches), and in memory and
time.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaopt import registry, tree
from metaopt.rule import Declared, Params, State
from metaopt.tune.derivatives import norm
from metaopt.tune.inner import Hypers, Inner, value_and_gradients

Outer = Callable[[Params, Hypers], Tensor]
"""``outer(params, hypers) -> scalar``: what the hypers are judged by."""


class Diagnostics(Mapping[str, Any]):
    """By name; what takes a pass over all data is computed when it is first read.

    Args:
        known: values.
        later: functions that give more of them.
    """

    def __init__(self, known: Mapping[str, Any], later: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self._known, self._later = dict(known), dict(later or {})

    def __getitem__(self, name: str) -> Any:
        if name in self._later:
            self._known[name] = self._later[name]()
            del self._later[name]
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._known, *self._later])

    def __len__(self) -> int:
        return len(self._known) + len(self._later)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Diagnostics, (dict(self),)  # values alone: what computes them holds the inner problem


@dataclass(frozen=True)
class Hypergradient:
    """What a method found.

    Attributes:
        value: the outer objective, 0-d.
        grads: its derivative with respect to each hyper, detached.
        params: what the inner run ended with, detached.
        state: all of that, to go on from (a warm start).
        diagnostics: what a method can say of its own quality (see `Diagnostics`); tensors where computed.

            - ``method``: its name; ``why``: why "auto" chose it.
            - ``moved`` of "fixed_point": how far one more step goes, which it needs small.
            - ``stationarity``: norm of the gradient of the inner loss at ``params``; implicit methods need it small.
            - ``residual``: of the linear system, relative to its right-hand side.
            - ``adjoint_norms``: norms of dF/ds_t from t = T down to 0, between graphs; growth says that the run is chaotic.
    """

    value: Tensor
    grads: Hypers
    params: Params
    state: State
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What costs depend on.

    Attributes:
        steps: T.
        state_bytes, params_bytes, hypers_bytes: of s, of what the outer objective sees, of the hypers.
        step_bytes: of what autograd keeps of one step.
        hypers: how many numbers they are.
        parameters: how many numbers the params are.
    """

    steps: int
    state_bytes: int
    params_bytes: int
    hypers_bytes: int
    step_bytes: int
    hypers: int
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one hypergradient, the training run included.

    Attributes:
        time: in inner steps without any recording.
        bytes: at the peak, above data, hypers and one state.
    """

    time: float
    bytes: float


class Method(Declared, ABC):
    """A way to compute hypergradients; its options are declared fields.

    Class attributes:
        needs: of steps: ``second`` derivatives, ``forward`` derivatives, ``first`` ones (gradients only) or ``values``. Of the
            inner problem: ``loss``, ``split`` (`Inner.gradients` and `Inner.update`).
        implicit: whether it differentiates the optimum and not the run.
    """

    needs: ClassVar[tuple[str, ...]] = ("second",)
    implicit: ClassVar[bool] = False

    @abstractmethod
    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """The hypergradient; ``hypers`` are detached."""

    @abstractmethod
    def cost(self, facts: Facts) -> Cost:
        """Predicted time and memory."""


class _Methods(Mapping[str, type[Method]]):
    """Every registered method by name; a class is imported when asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        return registry.load("hypergradient", name)

    def __iter__(self) -> Iterator[str]:
        return iter(registry.specs("hypergradient"))

    def __len__(self) -> int:
        return len(registry.specs("hypergradient"))


METHODS: Mapping[str, type[Method]] = _Methods()
"""Registered methods, name -> class; plugins add theirs by the hook ``metaopt_hypergradients``."""


def hypergradient(
    inner: Inner, outer: Outer, hypers: Hypers, method: str = "auto", *, memory: float | None = None, draw: int = 0,
    **options: Any,
) -> Hypergradient:  # fmt: skip
    """``outer(params after training, hypers)`` and its derivative with respect to the hypers.

    Works under ``torch.vmap`` (over problems), in any floating dtype, on any device.

    Args:
        inner: the training run.
        outer: the objective.
        hypers: dict of floating-point tensors, perhaps nested.
        method: one of `METHODS` (``metaopt list hypergradients``), or "auto": the cheapest exact one that fits, where there is
            one (see `metaopt.tune.planner.choose`); ``diagnostics["why"]`` gives the reason.
        memory: for "auto": bytes that may be used; None: 2 GiB.
        draw: its number: methods that use random numbers draw others at each outer step.
        **options: of the method, such as ``window=10`` for "truncated".

    Raises:
        ValueError: an unknown method, hypers that are no floating-point tensors or inside a gradient of `torch.func`, an outer
            value that is no scalar, an inner problem that lacks what the method needs, hypers that the method cannot see.
        TypeError: an option that the method lacks.
        MissingGradient: a function that depends on an input without having a derivative (see `metaopt.tune.derivatives.vjp`).
    """
    for leaf in tree.leaves(hypers):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"hypers must be a dict of floating-point tensors, got {kind}; what is not differentiated belongs into closures"
            )
        if torch._C._functorch.is_gradtrackingtensor(leaf):
            raise ValueError(
                "a hypergradient has no derivatives itself, so torch.func's grad, vjp and jvp cannot be taken of it; "
                "that of its value is what .grads holds"
            )
    hypers = tree.detach(hypers)
    why = {}
    with torch.no_grad():
        if method == "auto":
            from metaopt.tune.planner import choose  # which needs the methods, which need this module

            choice = choose(inner, outer, hypers, memory)
            method, inner, why["why"], options = choice.method, choice.inner, choice.why, {**choice.options, **options}
        chosen: Method = registry.create("hypergradient", method, **options)
        seed = getattr(chosen, "seed", None)
        if seed is not None:
            chosen = replace(chosen, **{"seed": seed + draw})
        require(inner, method, chosen.needs)
        found = chosen.run(inner, outer, hypers)
        facts, later = {"method": method, **why, **found.diagnostics}, {}
        if inner.loss is not None and "stationarity" not in facts and "values" not in chosen.needs:
            # copies: by the time it is read, an optimizer may have changed these in place
            at = tree.map_tree(torch.clone, found.params), tree.map_tree(torch.clone, hypers)
            later["stationarity"] = functools.partial(stationarity, inner, *at)
    return replace(found, diagnostics=Diagnostics(facts, later))


def require(inner: Inner, method: str, needs: tuple[str, ...]) -> None:
    """Refuse an inner problem that lacks what the method differentiates."""
    if "loss" in needs and inner.loss is None:
        raise ValueError(
            f"method {method!r} differentiates the inner loss of all data, which this problem does not state; give loss= "
            f"(full_batch= of Inner.of_rule), or choose a method that differentiates the run, such as 'replay'"
        )
    if "split" in needs and (inner.gradients is None or inner.update is None):
        raise ValueError(
            f"method {method!r} needs steps that are a gradient followed by an update; give gradients= and update= to Inner "
            f"(Inner.of_rule does, except for rules that look at the loss), or choose another method"
        )


def stationarity(inner: Inner, params: Params, hypers: Hypers) -> Tensor:
    """Norm of the gradient of the inner loss of all data, 0-d."""
    with torch.no_grad():
        return norm(inner_gradients(inner, params, hypers))


def inner_gradients(inner: Inner, params: Params, hypers: Hypers) -> Params:
    """The gradients of the inner loss of all data."""
    loss = inner.loss
    assert loss is not None
    return value_and_gradients(lambda p: (loss(p, hypers), {}), params)[1]
