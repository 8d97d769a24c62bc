"""K training runs in lock-step: any task times any rule.

Theta, hyperparameters, seeds and task configs may each differ between copies. Everything that varies is an argument of
one pure function of one copy, which ``torch.vmap`` runs over all of them; a back-end decides how that function runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from metaopt import registry, tree
from metaopt.inner_step import InnerStep
from metaopt.kernels import kernels_of
from metaopt.learned import BoundRule, Theta
from metaopt.random import hash64, sample_indices, step_keys
from metaopt.rule import Declared, ElementwiseRule, Params, State, UpdateRule
from metaopt.task import Batch, Task

_COPIES_WORTH_VMAP = 8
"""On a CPU, fewer copies of an elementwise rule's runs are faster one after the other: vmap has a price per operation."""


@dataclass
class Carry:
    """K training runs at some point of their lives.

    Attributes:
        params, state: of the rule, every leaf [K, ...].
        seeds: int64 [K]; initial parameters and data order derive from it.
        step: int64 [K], updates made.
        alive: bool [K]; a copy whose loss or parameters became non-finite is frozen where it was last finite.
        config: the task's numbers per copy, [K, ...] each; empty for most tasks.
        buffers: what training carries along besides parameters (running statistics), [K, ...] each.
    """

    params: Params
    state: State
    seeds: Tensor
    step: Tensor
    alive: Tensor
    config: Batch
    buffers: Params = field(default_factory=dict)

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
        config: per-copy task configs [K, ...] (`metaopt.task.stack_configs`); default: the task's own for all. Each copy
            begins as the member with its config does.
    """
    _refuse_inference_mode()
    seeds = torch.as_tensor(seeds, dtype=torch.int64)
    if seeds.dim() != 1 or not len(seeds):
        raise ValueError(f"seeds must be a non-empty vector of integers, got shape {tuple(seeds.shape)}")
    device = task.device
    members = [task if config is None else _member(task, tree.index(config, k)) for k in range(len(seeds))]
    params = fresh_params(members, seeds)
    info = task.info()
    _refuse_stacked_parts(rule)
    if isinstance(rule, BoundRule):
        learned = rule.learned
        init = torch.vmap(lambda p, theta: learned.init(p, info, theta), in_dims=(0, 0 if rule.stacked else None))
        state = init(params, rule.theta)
    else:
        state = torch.vmap(lambda p: rule.init(p, info))(params)
    k = len(seeds)

    def every_copy(value: Tensor) -> Tensor:
        return value.to(device).expand(k, *value.shape)

    return Carry(
        params=params,
        state=tree.map_tree(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state),
        seeds=seeds.to(device),
        step=torch.zeros(k, dtype=torch.int64, device=device),
        alive=torch.ones(k, dtype=torch.bool, device=device),
        config=config if config is not None else tree.map_tree(every_copy, dict(task.config)),
        buffers=tree.map_tree(lambda b: every_copy(b).clone(), task.buffers()),
    )


def fresh_params(members: Sequence[Task], seeds: Tensor) -> Params:
    """Initial parameters [K, ...] of K tasks that stack, each from its seed, on the device of the first."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in hash64(seeds)]
    params = tree.stack([member.init(generator) for member, generator in zip(members, generators, strict=True)])
    return tree.map_tree(lambda p: p.to(members[0].device), params)


def _member(task: Task, config: Batch) -> Task:
    member = copy.copy(task)
    member.config = config
    return member


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
        backend: a registered one (``metaopt list backends``), or "auto": on a CPU ``fused`` for dense
            networks, ``loop`` for a few copies and for compute-bound tasks, else ``eager`` (never ``compile``, which costs
            tens of seconds).

    Returns:
        losses [K, steps], each at the parameters before its update, NaN once a copy has diverged; and the new carry.

    Raises:
        ValueError: ``steps`` < 1, or a hyperparameter outside its domain.
        RuntimeError: under ``torch.inference_mode``.
    """
    _refuse_inference_mode()
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    k = len(carry.seeds)
    values = _hyperparameters(rule, hp, k)
    dims = tree.map_tree(lambda v: _dims(v, k), dict(values))
    theta: Theta = rule.theta if isinstance(rule, BoundRule) else {}
    stacked = isinstance(rule, BoundRule) and rule.stacked
    planned = torch.as_tensor(task.horizon if horizon is None else horizon, device=task.device).expand(k)
    if backend == "auto":
        backend = _automatic(task, rule, k)
    advance = _advance(task, rule, stacked, dims, backend)
    indices = sample_indices(
        carry.seeds.repeat_interleave(steps),
        (carry.step[:, None] + torch.arange(steps, device=carry.step.device)).reshape(-1),
        task.batch_size,
        len(task.train),
    ).reshape(k, steps, task.batch_size)
    return advance(theta, values, carry, indices, planned)


def lockstep(step: InnerStep, step_all: Callable[..., Any]) -> Advance:
    """A back-end that takes all copies through step after step.

    Args:
        step: the inner step.
        step_all: ``(theta, hp, params, state, buffers, batch, step, horizon) -> (loss, params, state, buffers, finite)``,
            each with a dimension of copies.
    """

    def advance(
        theta: Theta, hp: dict[str, Any], carry: Carry, indices: Tensor, horizon: Tensor
    ) -> tuple[Tensor, Carry]:
        params, state, buffers, count, alive = carry.params, carry.state, carry.buffers, carry.step, carry.alive
        losses = []
        for at in indices.unbind(1):
            batch = step.task.train.take(at) | carry.config
            if step.task.stochastic:
                batch["random"] = step_keys(carry.seeds, count)
            loss, *new, finite = step_all(theta, hp, params, state, buffers, batch, count, horizon)
            survives = alive & finite
            if bool(survives.all()):
                params, state, buffers = new
            else:
                old = (params, state, buffers)
                params, state, buffers = (tree.select(survives, *pair) for pair in zip(new, old, strict=True))
                loss = torch.where(alive & torch.isfinite(loss), loss, torch.full_like(loss, torch.nan))
            losses.append(loss)
            count = count + survives
            alive = survives
        return torch.stack(losses, 1), Carry(params, state, carry.seeds, count, alive, carry.config, buffers)

    return advance


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("training takes gradients, which torch.inference_mode() forbids; use torch.no_grad()")


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


def _automatic(task: Task, rule: UpdateRule, k: int) -> str:
    """The back-end for k copies: a function of these and of whether steps are recorded, so that resumed runs agree."""
    if task.device.type != "cpu":
        return "eager"
    quick = isinstance(rule, ElementwiseRule) and not torch.is_grad_enabled()
    if quick and task.dense is not None and not task.compute_bound:
        return "fused"
    return "loop" if task.compute_bound or (quick and k < _COPIES_WORTH_VMAP) else "eager"


Advance = Callable[[Theta, dict[str, Any], Carry, Tensor, Tensor], tuple[Tensor, Carry]]
"""What a back-end is: ``(theta, hp, carry, indices [K, T, batch_size], horizon [K]) -> losses [K, T], carry``."""

_ADVANCES: weakref.WeakKeyDictionary[Task, dict[Any, Advance]] = weakref.WeakKeyDictionary()


def _advance(task: Task, rule: UpdateRule, stacked: bool, dims: Any, backend: str) -> Advance:
    """The back-end's function for this task and rule; cached, so that a compiled one is compiled once."""
    core = rule.learned if isinstance(rule, BoundRule) else rule
    key = (core.structure(), stacked, tuple(sorted(dims.items())), backend)
    cache = _ADVANCES.setdefault(task, {})
    if key not in cache:
        # elsewhere no run has shown yet that kernels win: there they are for those who ask for them
        kernels = kernels_of(task.device.type) if task.device.type == "cpu" or backend == "fused" else None
        step = InnerStep(task, rule, stacked, dims, kernels)
        cache[key] = registry.create("unroll_backend", backend, step=step)
    return cache[key]
