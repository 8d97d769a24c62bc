"""One inner step (loss, gradient, update) of one copy, and of all copies: what the back-ends run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from metaopt import tree
from metaopt.kernels import ElementwiseStep, Kernels
from metaopt.learned import BoundRule, Theta
from metaopt.perparameter import PerParameterRule
from metaopt.replacing import replacing
from metaopt.rule import Context, ElementwiseRule, Params, State, UpdateRule, flat_hp
from metaopt.task import Batch, Task


class InnerStep:
    """Loss, gradient and update: of one copy, and of all of them.

    Those methods that make a whole step take ``(theta, hp, params, state, buffers, batch, step, horizon)`` and return
    ``(loss, params, state, buffers)``; those for all copies add ``finite`` [K]: whether loss and parameters are.

    Attributes:
        kernels: which make parts of a step where nothing is recorded; None: torch operations make all of it.
        dims: for each argument, the dimension of its copies (0), or None where all copies share it; a tree of such for hp.
    """

    def __init__(self, task: Task, rule: UpdateRule, stacked: bool, hp_dims: Any, kernels: Kernels | None) -> None:
        self._task, self.rule, self.info = weakref.ref(task), rule, task.info()  # a cache keyed by the task keeps this
        self.kernels = kernels
        self.learned = rule.learned if isinstance(rule, BoundRule) else None
        self.dims = (0 if stacked else None, hp_dims, 0, 0, 0, 0, 0, 0)
        self._update_all = torch.vmap(self._update, in_dims=(0, 0, *self.dims))
        self._all = torch.vmap(self.one, in_dims=self.dims)

    @property
    def task(self) -> Task:
        """Whose losses these are; whoever steps a task holds it."""
        task = self._task()
        assert task is not None
        return task

    def one(
        self, theta: Theta, hp: Any, params: Params, state: State, buffers: Params, batch: Batch, *time: Tensor
    ) -> tuple[Tensor, Params, State, Params]:
        """One copy; nothing has a copy dimension. Pure, vmap-safe, differentiable."""
        loss, grads, new_buffers = self.task.loss_and_gradients(params, buffers, batch)
        return loss, *self._update(grads, loss, theta, hp, params, state, buffers, batch, *time), new_buffers

    def all(self, *arguments: Any) -> tuple[Tensor, Params, State, Params, Tensor]:
        """``one`` under vmap: one pure function, which can be compiled and differentiated."""
        return with_finite(*self._all(*arguments))

    def gradients(
        self, params: Params, buffers: Params, batch: Batch, vmapped: bool = True
    ) -> tuple[Tensor, Params, Params]:
        """Losses [K], gradients and new buffers of all copies, by plain autograd: fast, and not differentiable further.

        ``vmapped``: all copies at once, differentiated through the sum of their losses; else one copy after the other.
        """
        if vmapped:
            by_kernel = self._dense_gradients(params, batch)
            if by_kernel is not None:
                return *by_kernel, buffers
            return gradients(torch.vmap(self.task.training_loss), params, buffers, batch)
        copies = range(len(next(iter(params.values()))))
        one_by_one = [
            gradients(self.task.training_loss, *(tree.index(part, k) for part in (params, buffers, batch)))
            for k in copies
        ]
        return tuple(tree.stack(part) for part in zip(*one_by_one, strict=True))

    def _dense_gradients(self, params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """Losses and gradients by a kernel, where the task is a dense network."""
        dense = self.task.dense
        if dense is None or self.kernels is None:
            return None
        return self.kernels.dense_gradients(dense, params, *dense.examples(batch, 2))

    def pure_gradients(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params, Params]:
        """As `gradients`, by function transforms: slower as it is, but open to ``torch.compile``."""
        loss, grads, new_buffers = torch.vmap(self.task.loss_and_gradients)(params, buffers, batch)
        for name, p in params.items():  # a task may compute its own; C++ is handed addresses
            if grads[name].shape != p.shape or grads[name].dtype != p.dtype:
                raise ValueError(f"the gradient of {name!r} must have its parameter's shape and dtype {p.dtype}")
        return loss, grads, new_buffers

    def finish(
        self, loss: Tensor, grads: Params, new_buffers: Params, theta: Theta, hp: Any, params: Params, state: State,
        buffers: Params, batch: Batch, *time: Tensor,
    ) -> tuple[Tensor, Params, State, Params, Tensor]:  # fmt: skip
        """The rest of a step of all copies after `gradients`."""
        with replacing({} if self.kernels is None else self.kernels.of_matrices):
            new = self._fused_update(grads, loss, theta, hp, params, state, *time)
            if new is None:
                new = self._update_all(grads, loss, theta, hp, params, state, buffers, batch, *time)
        return with_finite(loss, *new, new_buffers)

    def fused(self, params: Params, state: State, in_place: bool = False) -> ElementwiseStep | None:
        """The rule's update as one pass over memory, where rule, tensors and machine allow it."""
        rule = self.rule
        if self.kernels is None or not is_program(rule):
            return None
        first = next(iter(params.values()))
        for name, p in params.items():
            slots = [state[name][slot] for slot in rule.slots]
            if p.dtype != first.dtype or any(s.dtype != first.dtype or s.shape != p.shape for s in slots):
                return None
        return self.kernels.elementwise(rule.program, (first.dtype,) * 3, out_of_place=not in_place)

    def can_fuse(self, params: Params, state: State) -> bool:
        """Whether all copies can be updated by a kernel."""
        if isinstance(self.learned, PerParameterRule):
            return self.kernels is not None and self.learned.fuses(self.kernels, params, self.info)
        return self.fused(params, state) is not None

    def _fused_update(
        self, grads: Params, loss: Tensor, theta: Theta, hp: Any, params: Params, state: State, step: Tensor,
        horizon: Tensor,
    ) -> tuple[Params, State] | None:  # fmt: skip
        """An update by a kernel, where rule, tensors and machine allow it."""
        rule = self.rule
        if isinstance(self.learned, PerParameterRule):
            if self.kernels is None:
                return None
            ctx = Context(self.info, step=step, loss=loss, horizon=horizon)
            return self.learned.update_copies(self.kernels, theta, grads, state, params, hp, ctx, self.dims[:2])
        kernel = self.fused(params, state)
        if kernel is None or not is_program(rule):
            return None
        columns = [params, grads, *({name: state[name][slot] for name in params} for slot in rule.slots)]
        numbers = coefficients(rule, flat_hp(hp), step)
        new = kernel.copies([[column[name].contiguous() for name in params] for column in columns], numbers)
        new_params, *slots = (dict(zip(params, column, strict=True)) for column in new)
        return new_params, {
            name: {"step": state[name]["step"] + 1}
            | {slot: values[name] for slot, values in zip(rule.slots, slots, strict=True)}
            for name in params
        }

    def _update(
        self, grads: Params, loss: Tensor, theta: Theta, hp: Any, params: Params, state: State,
        buffers: Params, batch: Batch, step: Tensor, horizon: Tensor,
    ) -> tuple[Params, State]:  # fmt: skip
        def closure(elsewhere: Params) -> tuple[Tensor, Params]:
            value, there, _ = self.task.loss_and_gradients(elsewhere, buffers, batch)
            return value, there

        ctx = Context(self.info, step=step, loss=loss, horizon=horizon, closure=closure)
        if self.learned is not None:
            return self.learned.update(theta, grads, state, params, hp, ctx)
        return self.rule.update(grads, state, params, hp, ctx)


def is_program(rule: UpdateRule) -> TypeGuard[ElementwiseRule]:
    """Whether all that a step does is in the rule's program."""
    return isinstance(rule, ElementwiseRule) and type(rule).update is ElementwiseRule.update


def is_elementwise(rule: UpdateRule) -> TypeGuard[ElementwiseRule]:
    """Whether it is, and that is elementwise throughout."""
    return is_program(rule) and rule.program.reach == "element"


def with_finite(loss: Tensor, params: Params, state: State, buffers: Params) -> Any:
    """The same with the finite mask [K]."""
    # one sum per copy: a NaN or infinity anywhere shows in it
    sums = [loss.detach(), *(leaf.detach().reshape(len(leaf), -1).sum(1) for leaf in tree.leaves(params))]
    return loss, params, state, buffers, torch.isfinite(sum(sums[1:], sums[0]))


def gradients(loss: Callable[..., Any], params: Params, *rest: Any) -> tuple[Tensor, Params, Params]:
    """Values, gradients and new buffers of ``loss(params, *rest) -> (values, buffers)``, by plain autograd on the sum."""
    with torch.enable_grad():
        leaves = tree.map_tree(lambda p: p.detach().requires_grad_(), params)
        value, buffers = loss(leaves, *rest)
        found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    # autograd may hand over transposed gradients, at which everything later would walk across memory
    grads = {name: grad.contiguous() for name, grad in zip(leaves, found, strict=True)}
    return value.detach(), grads, tree.detach(buffers)


def coefficients(rule: ElementwiseRule, scalars: dict[str, Any], step: Tensor) -> dict[str, Any]:
    """The kernel's coefficients: a number for all copies, or one per copy [K]."""
    if any(isinstance(value, Tensor) for value in scalars.values()):
        return rule.program.scalar_values({**scalars, "t": (step + 1).to(torch.float64)})
    # on floats the prelude is quick, and rounds as it does for a copy alone: one that is frozen changes no bit of others
    made = step.tolist()
    found = {count: rule.program.scalar_values({**scalars, "t": count + 1}) for count in {*made}}
    if len(found) == 1:
        return found[made[0]]
    return {name: torch.tensor([found[count][name] for count in made], dtype=torch.float64) for name in found[made[0]]}


def copy_of(k: int, value: Any, dims: Any) -> Any:
    """Copy k of arguments whose dimensions of copies are ``dims``."""
    if dims is None:
        return value
    if dims == 0:
        return tree.index(value, k)
    if isinstance(dims, dict):
        return {name: copy_of(k, value[name], dims[name]) for name in value}
    return tuple(copy_of(k, entry, dim) for entry, dim in zip(value, dims, strict=True))
