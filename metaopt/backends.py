"""Ways to run the inner steps of all copies; an unroll chooses one by name."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.inner_step import InnerStep, copy_of, is_elementwise, with_finite
from metaopt.kernels import ElementwiseStep
from metaopt.learned import Theta
from metaopt.perparameter import PerParameterRule
from metaopt.random import step_keys
from metaopt.rule import Context, ElementwiseRule, Params, State, flat_hp
from metaopt.task import Batch
from metaopt.unroll import Advance, Carry, lockstep


def eager(step: InnerStep) -> Advance:
    """All copies as one vmapped step, op by op."""

    def step_all(*arguments: Any) -> Any:
        return step.all(*arguments) if torch.is_grad_enabled() else unrecorded(step, True, *arguments)

    return lockstep(step, step_all)


def loop(step: InnerStep) -> Advance:
    """One copy after the other, without vmap: for arithmetic that fills the processor, and for code that vmap cannot take."""

    def step_all(*arguments: Any) -> Any:
        if not torch.is_grad_enabled() and "closure" not in step.rule.requirements():  # a closure would be vmapped
            return unrecorded(step, False, *arguments)
        copies = [copy_of(k, arguments, step.dims) for k in range(len(arguments[-1]))]
        return with_finite(*(tree.stack(part) for part in zip(*(step.one(*copy) for copy in copies), strict=True)))

    together = lockstep(step, step_all)

    def advance(
        theta: Theta, hp: dict[str, Any], carry: Carry, indices: Tensor, horizon: Tensor
    ) -> tuple[Tensor, Carry]:
        kernel = None if torch.is_grad_enabled() else step.fused(carry.params, carry.state, in_place=True)
        if kernel is None:
            return together(theta, hp, carry, indices, horizon)
        losses, runs = [], []
        for k in range(len(indices)):
            run = tree.index(carry.tree(), slice(k, k + 1))
            own = {name: _numbers(value) for name, value in copy_of(k, hp, step.dims[1]).items()}
            done = _alone(step, kernel, own, tree.index(run, 0), indices[k])
            if done is None:  # it diverged: once more, with a look at every step
                loss, end = together(theta, own, Carry.from_tree(run), indices[k : k + 1], horizon[k : k + 1])
                done = loss[0], tree.index(end.tree(), 0)
            losses.append(done[0])
            runs.append(done[1])
        return torch.stack(losses), Carry.from_tree(tree.stack(runs))

    return advance


def _alone(
    step: InnerStep, kernel: ElementwiseStep, hp: dict[str, Any], run: dict[str, Any], indices: Tensor
) -> tuple[Tensor, dict[str, Any]] | None:
    """All steps of one copy, updated in place like any torch loop: losses [T] and the new run; None if it diverges."""
    task, rule, names = step.task, step.rule, list(run["params"])
    assert isinstance(rule, ElementwiseRule)
    scalars = flat_hp(hp)
    params = {
        name: p.clone(memory_format=torch.contiguous_format).requires_grad_() for name, p in run["params"].items()
    }
    slots = [
        [run["state"][name][slot].clone(memory_format=torch.contiguous_format) for name in names] for slot in rule.slots
    ]
    leaves, buffers, count, losses = list(params.values()), run["buffers"], int(run["step"]), []
    keys = step_keys(run["seeds"], count + torch.arange(len(indices))) if task.stochastic else indices
    alive = bool(run["alive"])
    for at, key in zip(indices, keys, strict=True):
        batch = task.train.take(at) | run["config"]
        if task.stochastic:
            batch["random"] = key
        with torch.enable_grad():
            loss, buffers = task.training_loss(params, buffers, batch)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        alive = alive and math.isfinite(loss)
        if not alive:
            return None
        losses.append(loss.detach())
        buffers = tree.map_tree(lambda b: b.detach().clone(), buffers)  # they may be parameters, which change in place
        count += 1
        kernel([leaves, [g.contiguous() for g in grads], *slots], rule.program.scalar_values({**scalars, "t": count}))
    if not all(bool(torch.isfinite(leaf.detach().sum())) for leaf in leaves):
        return None
    state = {
        name: {"step": run["state"][name]["step"] + len(losses)}
        | {slot: slots[j][i] for j, slot in enumerate(rule.slots)}
        for i, name in enumerate(names)
    }
    return torch.stack(losses), {
        **run, "params": tree.detach(params), "state": state, "buffers": buffers,
        "step": run["step"] + len(losses),
    }  # fmt: skip


def fused(step: InnerStep) -> Advance:
    """The device's kernels (`metaopt.kernels`): for whole windows where one takes the task and the rule, else as ``eager``."""
    together = eager(step)

    def advance(
        theta: Theta, hp: dict[str, Any], carry: Carry, indices: Tensor, horizon: Tensor
    ) -> tuple[Tensor, Carry]:
        done = None if torch.is_grad_enabled() else _whole_window(step, theta, hp, carry, indices, horizon)
        if done is None:
            return together(theta, hp, carry, indices, horizon)
        losses, new, finite = done
        stays = carry.alive & finite
        losses = torch.where(stays[:, None], losses, torch.nan)
        after = tree.select(stays, new.tree(), carry.tree())
        diverged = (carry.alive & ~finite).nonzero().squeeze(1)
        if len(diverged):  # once more, with a look at every step
            own_theta = theta if step.dims[0] is None else tree.index(theta, diverged)
            own_hp = {name: _rows(value, step.dims[1][name], diverged) for name, value in hp.items()}
            before = tree.index(carry.tree(), diverged)
            own_losses, end = together(own_theta, own_hp, Carry.from_tree(before), indices[diverged], horizon[diverged])
            losses[diverged] = own_losses
            after = tree.map_tree(lambda leaf, part: leaf.index_copy(0, diverged, part), after, end.tree())
        return losses, Carry.from_tree(after)

    return advance


def _whole_window(
    step: InnerStep, theta: Theta, hp: dict[str, Any], carry: Carry, indices: Tensor, horizon: Tensor
) -> tuple[Tensor, Carry, Tensor] | None:
    """All steps of all copies in one kernel: losses [K, T], the new carry, and which copies it holds for [K]."""
    dense, kernels = step.task.dense, step.kernels
    if dense is None or kernels is None:
        return None
    examples, steps = (*dense.examples(step.task.train.tensors, 1), indices), indices.shape[1]
    done: tuple[Tensor, Params, Mapping[str, Mapping[str, Tensor]], Tensor] | None = None
    if is_elementwise(step.rule):
        numbers = _coefficients(step.rule, hp, carry.step, steps)
        slots = {name: {slot: own[slot] for slot in step.rule.slots} for name, own in carry.state.items()}
        done = kernels.dense_unroll(dense, step.rule.program, numbers, carry.params, slots, *examples)
    elif isinstance(step.learned, PerParameterRule) and step.learned.prepares_all_ahead(step.info):
        ctx = Context(step.info, step=carry.step, horizon=horizon)
        prepare = partial(step.learned.prepare_window, theta, carry.params, hp, ctx, step.dims[:2], steps)
        done = kernels.network_unroll(dense, step.learned.kernel_step, prepare, carry.params, carry.state, *examples)
    if done is None:
        return None
    losses, params, new_slots, finite = done
    state = {name: {"step": own["step"] + steps, **new_slots[name]} for name, own in carry.state.items()}
    new = Carry(params, state, carry.seeds, carry.step + steps, carry.alive, carry.config, carry.buffers)
    return losses, new, finite


def _coefficients(rule: ElementwiseRule, hp: dict[str, Any], made: Tensor, steps: int) -> dict[str, Tensor]:
    """Of this many steps after those ``made`` [K]: float64 [K, T] each."""
    count = made[:, None] + torch.arange(1, steps + 1, device=made.device)
    scalars = {name: v[:, None] if isinstance(v, Tensor) and v.dim() else v for name, v in flat_hp(hp).items()}
    numbers = rule.program.scalar_values({**scalars, "t": count.to(torch.float64)})
    return {
        name: torch.as_tensor(value, dtype=torch.float64, device=made.device).expand(count.shape)
        for name, value in numbers.items()
    }


def _rows(value: Any, dims: Any, rows: Tensor) -> Any:
    """The values of these copies."""
    if isinstance(value, tuple):
        return tuple(_rows(entry, dim, rows) for entry, dim in zip(value, dims, strict=True))
    return value if dims is None else value[rows]


def unrecorded(
    step: InnerStep, vmapped: bool, theta: Theta, hp: Any, params: Params, state: State, buffers: Params, batch: Batch,
    *time: Tensor,
) -> Any:  # fmt: skip
    """A step of all copies with kernels where they reach; as `InnerStep.finish`."""
    done = step.gradients(params, buffers, batch, vmapped)
    return step.finish(*done, theta, hp, params, state, buffers, batch, *time)


def compiled(step: InnerStep) -> Advance:
    """``torch.compile``, once per layout of the arguments: seconds to a minute, then faster steps. Needs a compiler.

    Where the update is C++ already, and nothing is recorded, losses and gradients are compiled; else the whole step.
    What cannot be one graph is an error, never a silent return to eager.
    """
    graphs: dict[Any, Callable[..., Any]] = {}
    guarded: set[Any] = set()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        tensors, first = [*flat_tensors(arguments)], dict[int, int]()
        same = tuple(first.setdefault(id(t), i) for i, t in enumerate(tensors))  # torch makes one input of two
        looks = ((t.dtype, t.shape, t.stride(), t.requires_grad) for t in tensors)
        layout = (function, torch.is_grad_enabled(), same, *looks)
        if layout not in graphs:
            function(*arguments)  # traces the rule's program, and lets plain errors be plain
            graphs[layout] = torch.compile(_own_code(lambda *a: function(*a)), dynamic=False, fullgraph=True)
        if layout not in guarded:  # once per window torch looks at the rest: attributes of the task, autocast, threads
            guarded.add(layout)
            return graphs[layout](*arguments)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):  # safe: within a window only tensors change
            return graphs[layout](*arguments)

    def step_all(theta: Theta, hp: dict[str, Any], params: Params, state: State, *rest: Any) -> Any:
        if not torch.is_grad_enabled() and step.can_fuse(params, state):
            buffers, batch, *_ = rest
            loss, grads, new_buffers = call(step.pure_gradients, params, buffers, batch)
            return step.finish(loss, grads, new_buffers, theta, hp, params, state, *rest)
        # as tensors, so that another value needs no new graph
        return call(step.all, theta, tree.map_tree(lambda v: as_tensors(v, rest[-1].device), hp), params, state, *rest)

    together = lockstep(step, step_all)

    def advance(*window: Any) -> tuple[Tensor, Carry]:
        guarded.clear()
        return together(*window)

    return advance


def _numbers(value: Any) -> Any:
    return tuple(_numbers(entry) for entry in value) if isinstance(value, tuple) else float(value)


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts and sequences, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from flat_tensors(entry)


def _own_code(function: Any) -> Any:
    """The same function over a code object of its own: torch limits recompilations by code object, and all steps share one."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def as_tensors(value: Any, device: torch.device) -> Any:
    """A hyperparameter as float64 tensors: another value then needs no new graph."""
    if isinstance(value, tuple):
        return tuple(as_tensors(entry, device) for entry in value)
    return torch.as_tensor(value, dtype=torch.float64, device=device)
