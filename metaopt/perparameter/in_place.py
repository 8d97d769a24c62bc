"""One step of a per-parameter rule that overwrites parameters and state: by a kernel where it can, else by chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt.learned import Theta
from metaopt.perparameter.chunked import step_in_chunks
from metaopt.perparameter.features import ACCUMULATORS, Slots
from metaopt.perparameter.rule import PerParameterRule, Prepared
from metaopt.perparameter.table import is_kernel
from metaopt.rule import Context, HyperValues, Params, State, compute_dtype

if TYPE_CHECKING:  # the contract of kernels speaks of these rules
    from metaopt.kernels import Kernels

_BATCH = 1 << 20
"""Elements of which one call of a kernel may make copies, or outputs, at most unless one parameter has more."""


def step_in_place(
    rule: PerParameterRule,
    theta: Theta,
    grads: Params,
    state: State,
    params: Params,
    hp: HyperValues,
    ctx: Context,
    *,
    kernels: Kernels | None,
) -> None:
    """`PerParameterRule.update` of the parameters that the network steps, in place and with nothing recorded.

    Parameters and gradients may have any floating-point dtype and strides. What is allocated at once is as large as the
    features of a chunk; with kernels, or a rule with its own finish, as a million elements or the outputs of one parameter.

    Args:
        rule: whose step.
        theta: where the parameters are.
        grads: not clipped.
        state: its accumulators and memory are overwritten, ``step`` is not.
        params: overwritten.
        hp: hyperparameters.
        ctx: as for `update`.
        kernels: to use where they reach; None: chunks only.
    """
    prepared = rule.prepare(theta, rule.read_by_prepare(state, params), params, hp, ctx)
    left = [*params]
    if kernels is not None:
        reached = {name for name, param in params.items() if _in_reach(kernels, rule, param, state[name])}
        left = [name for name in params if name not in reached]
        mine = [name for name in params if name in reached]
        left += _step_by_kernel(kernels, rule, prepared, mine, grads, state, params)
    for name in left:
        share = prepared.layers[name], prepared.scale[name], prepared.keep[name]
        t = ctx.updates_of(state[name]) + 1
        step_in_chunks(rule, prepared.decays, *share, grads[name], params[name], _accumulators(state[name]), t)
    places = [(name, slot) for name, slots in prepared.memory.items() for slot in slots]
    if places:
        old = [state[name][slot] for name, slot in places]
        torch._foreach_copy_(old, [prepared.memory[name][slot] for name, slot in places])


def _in_reach(kernels: Kernels, rule: PerParameterRule, param: Tensor, slots: Slots) -> bool:
    """Whether a kernel can step this parameter, perhaps a copy of it."""
    dtype = compute_dtype(param.dtype)
    slots = _accumulators(slots)
    return kernels.reaches(rule.features, param.shape, param) and all(
        value.device == param.device and value.dtype == dtype and value.is_contiguous() for value in slots.values()
    )


def _step_by_kernel(
    kernels: Kernels,
    rule: PerParameterRule,
    prepared: Prepared,
    names: Sequence[str],
    grads: Params,
    state: State,
    params: Params,
) -> list[str]:
    """Step these parameters by a kernel; returns those that it refused."""
    of_one_copy = {key: value.unsqueeze(0) for key, value in prepared.distinct().items()}
    stacked = prepared.map(lambda value: of_one_copy[id(value)])
    refused: list[str] = []
    for batch in _batches(rule, names, grads, params):
        # as they are where possible, else copies to be written back
        wide = {n: params[n].detach().to(compute_dtype(params[n].dtype)).contiguous().unsqueeze(0) for n in batch}
        old = {n: {slot: value.unsqueeze(0) for slot, value in _accumulators(state[n]).items()} for n in batch}
        own = {n: grads[n].unsqueeze(0) for n in batch}
        done = kernels.network_step(rule.kernel_step, stacked, own, wide, old, in_place=True)
        if done is None:
            refused += batch
            continue
        for name, value in done[0].items():
            new = value[0]
            if rule.has_own_finish:
                slots = _accumulators(state[name])
                new = rule.finish(new, wide[name][0], slots, prepared.scale[name], prepared.keep[name])
            if new.data_ptr() != params[name].data_ptr():
                params[name].copy_(new)
        torch.autograd.graph.increment_version([params[name] for name in batch])
    return refused


def _batches(rule: PerParameterRule, names: Sequence[str], grads: Params, params: Params) -> Iterator[list[str]]:
    """The names in lists of one dtype to compute in."""
    dtypes: dict[torch.dtype, list[str]] = {}
    for name in names:
        dtypes.setdefault(compute_dtype(params[name].dtype), []).append(name)
    for alike in dtypes.values():
        batch: list[str] = []
        elements = 0
        for name in alike:
            param, grad = params[name], grads[name]
            as_it_is = param.dtype == compute_dtype(param.dtype) == grad.dtype
            as_it_is = as_it_is and param.is_contiguous() and grad.is_contiguous()
            split = is_kernel(rule.features, param.shape)
            made = param.numel() if rule.has_own_finish or split or not as_it_is else 0
            if batch and elements + made > _BATCH:
                yield batch
                batch, elements = [], 0
            batch.append(name)
            elements += made
        yield batch


def _accumulators(slots: Slots) -> Slots:
    return {slot: value for slot, value in slots.items() if slot in ACCUMULATORS}
