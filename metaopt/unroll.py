"""K training runs in lock-step: any task times any rule.

Theta, hyperparameters, seeds and task configs may each differ between copies. Everything that varies is an argument of
one pure function of one copy, which ``torch.vmap`` runs over all of them; a back-end decides how that function runs.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from metaopt import registry, tree
from metaopt.learned import BoundRule, Theta
from metaopt.rule import Context, Declared, Params, State, UpdateRule
from metaopt.task import Batch, Task, hash64, sample_indices


@dataclass
class Carry:
    """K training runs at some point of their lives.

    Attributes:
        params, state: of the rule, every leaf [K, ...].
        seeds: int64 [K]; initial parameters and data order derive from it.
        step: int64 [K], updates made.
        alive: bool [K]; a copy whose loss or parameters became non-finite is frozen where it was last finite.
        config: the task's numbers per copy, [K, ...] each; empty for most tasks.
    """

    params: Params
    state: State
    seeds: Tensor
    step: Tensor
    alive: Tensor
    config: Batch

    def tree(self) -> dict[str, Any]:
        """As a nested dict of tensors, to save or to index."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_tree(saved: dict[str, Any]) -> Carry:
        """Inverse of `tree`."""
        return Carry(**saved)


def start(task: Task, rule: UpdateRule, seeds: Tensor | list[int], *, config: Batch | None = None) -> Carry:
    """Fresh runs, one per seed, on the task's device.

    Args:
        task: what to train.
        rule: with what; a learned rule may be bound to one theta per copy (``stacked``).
        seeds: int64 [K].
        config: per-copy task configs [K, ...] (`metaopt.task.stack_configs`); default: the task's own for all.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.int64)
    if seeds.dim() != 1 or not len(seeds):
        raise ValueError(f"seeds must be a non-empty vector of integers, got shape {tuple(seeds.shape)}")
    device = task.device
    params = tree.stack([task.init(torch.Generator().manual_seed(int(seed))) for seed in hash64(seeds)])
    params = tree.map_tree(lambda p: p.to(device), params)
    info = task.info()
    _refuse_stacked_parts(rule)
    if isinstance(rule, BoundRule):
        learned = rule.learned
        init = torch.vmap(lambda p, theta: learned.init(p, info, theta), in_dims=(0, 0 if rule.stacked else None))
        state = init(params, rule.theta)
    else:
        state = torch.vmap(lambda p: rule.init(p, info))(params)
    k = len(seeds)
    return Carry(
        params=params,
        state=tree.map_tree(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state),
        seeds=seeds.to(device),
        step=torch.zeros(k, dtype=torch.int64, device=device),
        alive=torch.ones(k, dtype=torch.bool, device=device),
        config=config if config is not None else tree.map_tree(lambda c: c.expand(k, *c.shape), dict(task.config)),
    )


def unroll(
    task: Task,
    rule: UpdateRule,
    carry: Carry,
    steps: int,
    *,
    hp: Mapping[str, Any] | None = None,
    horizon: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Carry]:
    """Advance K runs by ``steps`` updates.

    Under ``torch.no_grad()`` nothing is recorded; otherwise losses and carry are differentiable in theta, ``hp`` and
    the carry. The carry that was given stays valid.

    Args:
        task: supplies loss and training data; copy k draws batch number ``carry.step[k]`` of stream ``carry.seeds[k]``.
        rule: what updates.
        carry: from `start` or an earlier `unroll`.
        steps: how many updates; at least 1.
        hp: hyperparameters that differ from ``rule.hp``: floats, 0-d tensors, or [K] tensors for one value per copy.
        horizon: planned length of each run, int or int64 [K]; default the task's.
        backend: a registered one (``eager``, ``compile``), or "auto", which is ``eager``: compiling costs tens of seconds.

    Returns:
        losses [K, steps], each at the parameters before its update, NaN once a copy has diverged; and the new carry.

    Raises:
        ValueError: ``steps`` < 1, or a hyperparameter outside its domain.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    k = len(carry.seeds)
    values = _hyperparameters(rule, hp, k)
    dims = tree.map_tree(lambda v: _dims(v, k), dict(values))
    theta: Theta = rule.theta if isinstance(rule, BoundRule) else {}
    stacked = isinstance(rule, BoundRule) and rule.stacked
    planned = torch.as_tensor(task.horizon if horizon is None else horizon, device=task.device).expand(k)
    step = _vectorized(task, rule, stacked, dims, "eager" if backend == "auto" else backend)

    offsets = torch.arange(steps, device=carry.step.device)
    indices = sample_indices(
        carry.seeds.repeat_interleave(steps),
        (carry.step[:, None] + offsets).reshape(-1),
        task.batch_size,
        len(task.train),
    ).reshape(k, steps, task.batch_size)
    params, state, count, alive = carry.params, carry.state, carry.step, carry.alive
    losses = []
    for t in range(steps):
        batch = task.train.take(indices[:, t]) | carry.config
        loss, new_params, new_state, finite = step(theta, values, params, state, batch, count, planned)
        survives = alive & finite
        if bool(survives.all()):
            params, state = new_params, new_state
        else:
            params, state = tree.select(survives, new_params, params), tree.select(survives, new_state, state)
        losses.append(torch.where(alive & torch.isfinite(loss), loss, torch.full_like(loss, torch.nan)))
        count = count + survives
        alive = survives
    return torch.stack(losses, 1), Carry(params, state, carry.seeds, count, alive, carry.config)


def _refuse_stacked_parts(rule: Declared) -> None:
    for part in rule.parts().values():
        if isinstance(part, BoundRule) and part.stacked:
            raise ValueError(
                f"{type(rule).__name__} holds a learned rule bound to one theta per copy; bind it to one theta"
            )
        _refuse_stacked_parts(part)


def _hyperparameters(rule: UpdateRule, given: Mapping[str, Any] | None, k: int) -> dict[str, Any]:
    declared = rule.declared()
    values = dict(rule.hp)
    for name, value in (given or {}).items():
        if name not in values:
            raise TypeError(f"{type(rule).__name__} has no hyperparameter {name!r}; it has {', '.join(values)}")
        values[name] = declared[name].validate(name, value)
    for name, value in values.items():
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, Tensor) and entry.dim() and entry.shape != (k,):
                raise ValueError(f"{name} must be one number or one per copy [{k}], got shape {tuple(entry.shape)}")
    return values


def _dims(value: Any, k: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_dims(entry, k) for entry in value)
    return 0 if isinstance(value, Tensor) and value.dim() else None


_STEPS: weakref.WeakKeyDictionary[Task, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _vectorized(task: Task, rule: UpdateRule, stacked: bool, dims: Any, backend: str) -> Callable[..., Any]:
    """The step of all copies; cached, so that a compiled one is compiled once."""
    core = rule.learned if isinstance(rule, BoundRule) else rule
    key = (core.structure(), stacked, tuple(sorted(dims.items())), backend)
    cache = _STEPS.setdefault(task, {})
    if key not in cache:
        cache[key] = registry.create(
            "unroll_backend", backend, step=_step_all(weakref.proxy(task), rule, stacked, dims)
        )
    return cache[key]


def _step_all(task: Task, rule: UpdateRule, stacked: bool, hp_dims: Any) -> Callable[..., Any]:
    info = task.info()
    loss_and_grad = grad_and_value(task.loss)
    learned = rule.learned if isinstance(rule, BoundRule) else None

    def step_one(
        theta: Theta, hp: dict[str, Any], params: Params, state: State, batch: Batch, step: Tensor, horizon: Tensor
    ) -> tuple[Tensor, Params, State]:
        grads, loss = loss_and_grad(params, batch)

        def closure(elsewhere: Params) -> tuple[Tensor, Params]:
            there, value = loss_and_grad(elsewhere, batch)
            return value, there

        ctx = Context(info, step=step, loss=loss, horizon=horizon, closure=closure)
        if learned is not None:
            return loss, *learned.update(theta, grads, state, params, hp, ctx)
        return loss, *rule.update(grads, state, params, hp, ctx)

    vectorized = torch.vmap(step_one, in_dims=(0 if stacked else None, hp_dims, 0, 0, 0, 0, 0))

    def step_all(*arguments: Any) -> tuple[Tensor, Params, State, Tensor]:
        loss, params, state = vectorized(*arguments)
        # one sum per copy: a NaN or infinity anywhere shows in it
        total = torch.stack([leaf.detach().flatten(1).sum(1) for leaf in tree.leaves(params)]).sum(0)
        return loss, params, state, torch.isfinite(loss.detach()) & torch.isfinite(total)

    return step_all


def eager(step: Callable[..., Any]) -> Callable[..., Any]:
    """The reference back-end: op by op."""
    return step


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """One ``torch.compile`` graph per (task, rule, K): seconds to a minute once, then faster steps. Needs a compiler.

    What cannot be one graph is an error, never a silent return to eager.
    """
    graphs: dict[int, Callable[..., Any]] = {}

    def run(theta: Theta, hp: dict[str, Any], *rest: Any) -> Any:
        planned = rest[-1]
        # as tensors, so that another value needs no new graph
        arguments = (theta, tree.map_tree(lambda v: _tensors(v, planned.device), hp), *rest)
        if len(planned) not in graphs:
            step(*arguments)  # traces the rule's program, and lets plain errors be plain
            graphs[len(planned)] = torch.compile(_own_code(step), dynamic=False, fullgraph=True)
        return graphs[len(planned)](*arguments)

    return run


def _own_code(function: Any) -> Any:
    """The same function over a code object of its own: torch limits recompilations by code object, and all steps share one."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def _tensors(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_tensors(entry, device) for entry in value)
    return torch.as_tensor(value, dtype=torch.float64, device=device)
