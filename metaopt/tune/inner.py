"""The inner problem of a bilevel one: a training run as a function of its hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.func import grad_and_value

from metaopt import tree
from metaopt.random import sample_indices, step_keys
from metaopt.resolve import resolve_rule
from metaopt.rule import Context, HyperValues, ParamInfo, Params, PerParameter, State, UpdateRule, infer_info
from metaopt.task import Batch, Task
from metaopt.tune.derivatives import MissingGradient, depends

Hypers = dict[str, Tensor]
"""Outer variables, of any shapes; floating point."""

RuleHypers = Callable[[Hypers, int], Mapping[str, Any]]
"""``(hypers, t) -> {"lr": ...}``: what a rule's hyperparameters are at step t."""

_COUNTS = 1000
"""Step counts kept as tensors: making one takes as long as an addition."""


@dataclass(frozen=True)
class Inner:
    """A training run: ``state_0 = start(hypers)``, ``state_{t+1} = step(state_t, hypers, t)`` for t < ``steps``.

    All functions are pure, and made of torch operations that differentiate; the optimizer's own tensors belong to the state.

    Attributes:
        start: the state before the first step, a nested dict of tensors; it may depend on the hypers, as in MAML.
        step: one inner step.
        steps: how many; 0 is allowed.
        params: what of the state the outer objective sees.
        loss: ``loss(params, hypers) -> scalar``, of all inner data, whose stationary point implicit methods differentiate.
        gradients: ``gradients(state, hypers, t)``: the gradients of the inner loss that step t takes.
        update: ``update(grads, state, hypers, t)``: the rest of step t. Where both are given, ``step`` is one after the
            other: methods that tilt the inner loss or differentiate the update alone ask for them.
        vjp: ``vjp(state, hypers, t, cotangent) -> (state, hypers)``: the adjoint of step t by hand or by a kernel, for steps
            that autograd cannot differentiate. ``cotangent`` and what is returned hold the floating-point leaves only.
    """

    start: Callable[[Hypers], State]
    step: Callable[[State, Hypers, int], State]
    steps: int
    params: Callable[[State], Params]
    loss: Callable[[Params, Hypers], Tensor] | None = None
    gradients: Callable[[State, Hypers, int], Params] | None = None
    update: Callable[[Params, State, Hypers, int], State] | None = None
    vjp: Callable[[State, Hypers, int, State], tuple[State, Hypers]] | None = None

    def __post_init__(self) -> None:
        _require_count(self.steps)

    def advance(self, state: State, hypers: Hypers, first: int, last: int) -> State:
        """The state before step ``last`` of a run that is in ``state`` before step ``first``."""
        for t in range(first, last):
            state = self.step(state, hypers, t)
        return state

    @classmethod
    def of_rule(
        cls,
        loss: Callable[[Params, Hypers, Any], Tensor],
        rule: str | UpdateRule,
        params: Params | Callable[[Hypers], Params],
        steps: int,
        *,
        batches: Callable[[int], Any] | None = None,
        full_batch: Any = None,
        hp: RuleHypers | Sequence[str] = (),
    ) -> Inner:
        """Training of ``params`` by ``rule``.

        Args:
            loss: ``loss(params, hypers, batch) -> scalar``; differentiable twice, unless a method says otherwise.
            rule: what `metaopt.resolve.resolve_rule` takes: a rule, or a registered name.
            params: initial parameters, or a function of the hypers that gives them.
            steps: how many.
            batches: ``batches(t)``, the batch of step t, the same whenever it is asked for; None: ``full_batch`` always.
            full_batch: what ``loss`` is given for the loss of all inner data, which implicit methods need.
            hp: which hyperparameters of the rule are hypers: their names, where ``hypers[name]`` is one number or one per step
                [steps]; or a function ``(hypers, t) -> {"lr": ...}``, which may give `metaopt.rule.PerParameter`.

        Raises:
            TypeError: a name that is none of the rule's hyperparameters.
        """

        def training_loss(p: Params, buffers: Params, hypers: Hypers, t: int) -> tuple[Tensor, Params]:
            return loss(p, hypers, full_batch if batches is None else batches(t)), buffers

        whole = None if batches is not None and full_batch is None else lambda p, hypers: loss(p, hypers, full_batch)
        # detached: a model's own would have whole runs recorded
        start = params if callable(params) else lambda hypers: tree.detach(params)
        return _of_rule(training_loss, resolve_rule(rule), start, lambda: {}, None, steps, hp, whole)

    @classmethod
    def of_task(
        cls, task: Task, rule: str | UpdateRule, seed: int, steps: int, *, hp: RuleHypers | Sequence[str] = ()
    ) -> Inner:
        """Run number ``seed`` of ``rule`` on a task, with the initial parameters and batches that ``seed`` gives in an unroll.

        Hypers that are named like an entry of ``task.config`` stand in for it. Implicit methods differentiate the loss on all
        training examples by which the task judges.

        Args:
            task: what to train.
            rule: as in `of_rule`.
            seed: of initial parameters, batches and random numbers.
            steps: how many.
            hp: as in `of_rule`.
        """
        from metaopt.unroll import fresh_params

        seeds = torch.tensor([seed], dtype=torch.int64)
        initial = tree.index(fresh_params([task], seeds), 0)

        def batch_of(hypers: Hypers, batch: Batch) -> Batch:
            return batch | {name: hypers.get(name, value) for name, value in task.config.items()}

        def training_loss(p: Params, buffers: Params, hypers: Hypers, t: int) -> tuple[Tensor, Params]:
            count = torch.tensor([t], dtype=torch.int64)
            indices = sample_indices(seeds, count, task.batch_size, len(task.train))[0]
            batch = batch_of(hypers, task.train.take(indices.to(task.device)))
            if task.stochastic:
                batch["random"] = step_keys(seeds, count)[0].to(task.device)
            return task.training_loss(p, buffers, batch)

        def whole(p: Params, hypers: Hypers) -> Tensor:
            return task.loss(p, batch_of(hypers, task.train.tensors))

        return _of_rule(
            training_loss, resolve_rule(rule), lambda hypers: initial, task.buffers, task.info(), steps, hp,
            None if task.stochastic or task.buffers() else whole,
        )  # fmt: skip


def _of_rule(
    training_loss: Callable[[Params, Params, Hypers, int], tuple[Tensor, Params]],
    rule: UpdateRule,
    initial: Callable[[Hypers], Params],
    buffers: Callable[[], Params],
    info: Mapping[str, ParamInfo] | None,
    steps: int,
    hp: RuleHypers | Sequence[str],
    whole: Callable[[Params, Hypers], Tensor] | None,
) -> Inner:
    _require_count(steps)
    values = _rule_hypers(rule, hp, steps)
    facts, needs = dict(info or {}), rule.requirements()
    counts = torch.arange(min(steps, _COUNTS)).unbind()

    def facts_of(params: Params) -> Mapping[str, ParamInfo]:
        if not facts:  # known when there are parameters; each step would find the same
            facts.update(infer_info(params))
        return facts

    def start(hypers: Hypers) -> State:
        params = initial(hypers)
        for name, param in params.items():
            if not param.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be a floating-point tensor, got {param.dtype}; what is not trained belongs into "
                    f"closures"
                )
        return {"params": params, "rule": rule.init(params, facts_of(params)), "buffers": buffers()}

    def evaluate(params: Params, state: State, hypers: Hypers, t: int) -> tuple[Tensor, Params, Params]:
        return value_and_gradients(training_loss, params, state["buffers"], hypers, t)

    def updated(loss: Tensor | None, grads: Params, new_buffers: Params, state: State, hypers: Hypers, t: int) -> State:
        params = state["params"]
        closure = (lambda elsewhere: evaluate(elsewhere, state, hypers, t)[:2]) if "closure" in needs else None
        done = counts[t] if t < len(counts) else torch.full((), t)
        ctx = Context(facts or facts_of(params), step=done, loss=loss, horizon=steps, closure=closure)
        new_params, new_rule = rule.update(grads, state["rule"], params, values(hypers, t), ctx)
        return {"params": new_params, "rule": new_rule, "buffers": new_buffers}

    def step(state: State, hypers: Hypers, t: int) -> State:
        return updated(
            *value_and_gradients(training_loss, state["params"], state["buffers"], hypers, t), state, hypers, t
        )

    def gradients(state: State, hypers: Hypers, t: int) -> Params:
        return evaluate(state["params"], state, hypers, t)[1]

    def update(grads: Params, state: State, hypers: Hypers, t: int) -> State:
        return updated(None, grads, state["buffers"], state, hypers, t)

    splits = not needs & {"loss", "closure"} and not buffers()
    return Inner(
        start, step, steps, lambda state: state["params"], whole,
        gradients=gradients if splits else None, update=update if splits else None,
    )  # fmt: skip


def scalar(value: Any, what: str = "the outer objective") -> Tensor:
    """The value of an objective, refused if it is no scalar."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor of one number, got {type(value).__name__} {value!r}")
    if value.dim():
        raise ValueError(f"{what} must be a scalar, got shape {tuple(value.shape)}; take its mean or sum")
    return value


def _require_count(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")


def value_and_gradients(
    loss: Callable[..., tuple[Tensor, Params]], params: Params, *args: Any
) -> tuple[Tensor, Params, Params]:
    """``loss(params, *args) -> (value, buffers)``, and its gradients: differentiable again where gradients are recorded.

    By plain autograd, whose unrolls take three quarters of the time and a quarter of the memory of `torch.func`'s; by the
    latter inside its transforms, where nothing else works.

    Raises:
        ValueError: the loss is no scalar, or has no gradient.
        TypeError: it is no tensor.
        MissingGradient: where gradients are recorded, they depend on the parameters and have no derivatives.
    """
    if torch._C._are_functorch_transforms_active():
        value, grads, buffers, constant = _by_transform(loss, params, args)
    elif not torch.is_grad_enabled():
        with torch.enable_grad():
            value, grads, buffers, _ = _by_autograd(loss, params, args, again=False)
        return value.detach(), grads, tree.detach(buffers) if buffers else {}
    else:
        value, grads, buffers, constant = _by_autograd(loss, params, args, again=True)
    if constant:  # or cut off from what it is made of
        used = depends(lambda p: value_and_gradients(loss, p, *args)[1], [tree.detach(params)], ["params"])
        if used:
            raise MissingGradient(min(used))
    return value, grads, buffers


def _by_transform(
    loss: Callable[..., tuple[Tensor, Params]], params: Params, args: tuple[Any, ...]
) -> tuple[Tensor, Params, Params, bool]:
    """As `_by_autograd`; whether gradients are recorded shows in the parameters, which a transform has wrapped."""

    def recorded(inputs: Params) -> tuple[Tensor, Params]:
        value, buffers = loss(inputs, *args)
        if inputs:
            _require_gradient(value)
        return value, buffers

    grads, (value, buffers) = grad_and_value(recorded, has_aux=True)(params)
    again = [name for name, p in params.items() if torch._C._functorch.is_gradtrackingtensor(p) and p.requires_grad]
    constant = torch.is_grad_enabled() and not all(grads[name].requires_grad for name in again)
    return value, grads, buffers, constant


def _require_gradient(value: Any) -> None:
    if not scalar(value, "the inner loss").requires_grad:
        raise ValueError(
            "the inner loss has no gradient: it must depend on the parameters, by operations that are recorded (no detach(), "
            "item(), no_grad() or inference_mode() in between)"
        )


def _by_autograd(
    loss: Callable[..., tuple[Tensor, Params]], params: Params, args: tuple[Any, ...], again: bool
) -> tuple[Tensor, Params, Params, bool]:
    """And whether ``again`` was asked for in vain: a gradient is not recorded."""
    inputs = {name: p if again and p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
    value, buffers = loss(inputs, *args)
    if not inputs:
        return scalar(value, "the inner loss"), {}, buffers, False
    _require_gradient(value)
    # torch.autograd.grad without its look at the arguments, which takes 2 % of a step of half a millisecond
    found = _engine_run_backward(
        (value,), (torch.ones_like(value),), again, again, tuple(inputs.values()), True, accumulate_grad=False
    )
    grads, constant = {}, False
    for (name, leaf), grad in zip(inputs.items(), found, strict=True):
        if grad is None:
            grad = torch.zeros_like(leaf)
        elif again and not grad.requires_grad:
            constant = True
        grads[name] = grad
    return value, grads, buffers, constant


def _rule_hypers(rule: UpdateRule, hp: RuleHypers | Sequence[str], steps: int) -> Callable[[Hypers, int], HyperValues]:
    known = rule.hp

    def checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in given:
            if name not in known:
                raise TypeError(f"{rule.label()} has no hyperparameter {name!r}; it has {', '.join(known)}")
        return given

    if callable(hp):
        function = hp

        def values(hypers: Hypers, t: int) -> HyperValues:
            given = checked(function(hypers, t))
            if isinstance(given, PerParameter):
                return PerParameter({name: {**known, **own} for name, own in given.by_param.items()})
            return {**known, **given}

        return values
    names = (hp,) if isinstance(hp, str) else tuple(hp)
    checked(dict.fromkeys(names))
    if not names:
        return lambda hypers, t: known

    def named(hypers: Hypers, t: int) -> HyperValues:
        return {**known, **{name: _at(hypers, name, t, steps) for name in names}}

    return named


def _at(hypers: Hypers, name: str, t: int, steps: int) -> Tensor:
    """One number for all steps, or that of step t."""
    if name not in hypers:
        raise KeyError(f"hypers has no {name!r}, which hp names; it has {', '.join(hypers)}")
    value = hypers[name]
    if value.shape not in ((), (steps,)):
        raise ValueError(f"hypers[{name!r}] must be one number or one per step [{steps}], got {tuple(value.shape)}")
    return value[t] if value.dim() else value
