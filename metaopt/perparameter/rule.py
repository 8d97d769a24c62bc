"""The contract of a learned rule with a per-parameter network: you write what the network gets, you get its executions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from metaopt import tree
from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter.features import Decays, Features, Slots, accumulate, clip, inputs, zero_slots
from metaopt.perparameter.prepared import Layers, Prepared, Step
from metaopt.rule import Context, ElementwiseRule, HyperValues, ParamInfo, Params, State, compute_dtype

if TYPE_CHECKING:  # the contract of kernels speaks of these rules
    from metaopt.kernels import Kernels

Value = TypeVar("Value")
Result = TypeVar("Result")


class PerParameterRule(LearnedRule):
    r"""A learned rule whose step is that of a small network, applied to the features of each parameter by itself.

    .. math:: p \leftarrow keep\, p - scale\, d\, e^{c s}, \qquad (d, s, \dots) = \mathrm{MLP}(\text{features of } p)

    with c = ``magnitude`` (None: no s). Write `features`, `prepare` and `init_theta`; `finish` where the step is another
    function of the network's outputs; `takes` and `other` where some parameters are not the network's. Executions: the plain
    pure one below; in place by chunks (`chunked`), and kernels for all copies (`metaopt.kernels`). State per
    parameter: ``step``, the accumulators (see `features.Slots`) and the memory; float32 or better.

    Class attributes: ``prepare_reads``: the slots that `prepare` reads besides ``step``. It is handed no others: under vmap
    every tensor costs time. ``prepares_ahead``: whether all that `prepare` reads is theta, hyperparameters, step and horizon,
    and of parameters their shapes and dtypes. Kernels then run whole windows, for which it is called but once, with parameters
    on torch's meta device: reading their values is an error.
    """

    prepare_reads: ClassVar[tuple[str, ...]] = ()
    prepares_ahead: ClassVar[bool] = False

    @property
    @abstractmethod
    def features(self) -> Features:
        """What the network sees."""

    @property
    def magnitude(self) -> float | None:
        """The constant c of the exponent."""
        return None

    @property
    def direction_eps(self) -> float | None:
        r"""The epsilon of a `finish` that normalises the direction u of the class, and else does nothing; None: another finish.

        .. math:: p \leftarrow keep\, p - scale\, u / \sqrt{\mathrm{mean}(u^2) + \epsilon}

        with the mean over `metaopt.perparameter.norm_axes`. Kernels that run whole windows then make that step themselves.
        """
        return None

    @abstractmethod
    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        """One step's decays, networks, scales and memory, for one copy: pure, vmap-safe, differentiable; tensors only.

        Args:
            theta: of one copy.
            state: before the step; of each parameter ``step`` and those of its slots that are in ``prepare_reads``.
            params: of any floating-point dtype; what is made of them is to be of `compute_dtype`.
            hp: hyperparameters.
            ctx: as for `update`.
        """

    def finish(self, outputs: Tensor, param: Tensor, slots: Slots, scale: Tensor, keep: Tensor) -> Tensor:
        """The new parameter from the network's ``outputs`` [outputs, *shape]; ``slots`` are the updated accumulators."""
        return keep * param - scale * self.direction(outputs)

    def direction(self, outputs: Tensor) -> Tensor:
        """d e^(c s)."""
        return outputs[0] if self.magnitude is None else outputs[0] * torch.exp(self.magnitude * outputs[1])

    def takes(self, info: ParamInfo) -> bool:
        """Whether the network steps this parameter; `other` steps the rest. By default it steps all."""
        return True

    @property
    def other(self) -> ElementwiseRule:
        """The rule of the parameters that `takes` refuses; its hyperparameters go by the names that they have in this rule.

        Raises:
            TypeError: `takes` refuses some, and there is no other rule.
        """
        raise TypeError(f"{type(self).__name__} must define other: the rule of the parameters that it does not take")

    def init_memory(self, theta: Theta, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """Slots per parameter besides the accumulators, before the first step; none by default."""
        return {name: {} for name in params}

    @cached_property
    def has_own_finish(self) -> bool:
        """Whether a step is another function of the outputs than that of the class."""
        return type(self).finish is not PerParameterRule.finish

    @cached_property
    def kernel_step(self) -> Step:
        """What kernels depend on."""
        return Step(self.features, self.magnitude, self.has_own_finish, self.direction_eps)

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """See the class."""
        mine, rest = self.shares(params, info)
        state = self.other.init(rest, info) if rest else {}
        memory = self.init_memory(theta, mine, info)
        for name, param in mine.items():
            state[name] = {
                "step": torch.zeros((), dtype=torch.int64, device=param.device),
                **zero_slots(self.features, param.to(compute_dtype(param.dtype))),
                **memory[name],
            }
        return {name: state[name] for name in params}

    def fuses(self, kernels: Kernels, params: Params, info: Mapping[str, ParamInfo]) -> bool:
        """Whether `update_copies` can update copies of ``params`` [K, *shape], some by a kernel at least."""
        mine, _ = self.shares(params, info)
        return any(kernels.reaches(self.features, param.shape[1:], param) for param in mine.values())

    def prepares_all_ahead(self, info: Mapping[str, ParamInfo]) -> bool:
        """Whether the network steps every parameter, and all steps of a window can be prepared before the first."""
        return self.prepares_ahead and all(map(self.takes, info.values()))

    def read_by_prepare(self, state: State, names: Iterable[str]) -> State:
        """What `prepare` sees of the state of these parameters."""
        slots = {"step", *self.prepare_reads}
        return {name: {slot: value for slot, value in state[name].items() if slot in slots} for name in names}

    def shares(self, params: Params, info: Mapping[str, ParamInfo]) -> tuple[Params, Params]:
        """The parameters that the network steps, and those that `other` steps."""
        mine = {name: param for name, param in params.items() if self.takes(info[name])}
        return mine, {name: param for name, param in params.items() if name not in mine}

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        mine, rest = self.shares(params, ctx.info)
        new_params, new_state = self.other.update(grads, state, rest, hp, ctx) if rest else ({}, {})
        wide = {name: param.to(compute_dtype(param.dtype)) for name, param in mine.items()}
        prepared = self.prepare(theta, self.read_by_prepare(state, wide), wide, hp, ctx)
        for name, param in wide.items():
            t = ctx.updates_of(state[name]) + 1
            moved, slots = self._step(*prepared.of(name), grads[name], param, state[name], t)
            new_params[name] = moved.to(params[name].dtype)
            new_state[name] = {"step": state[name]["step"] + 1, **slots, **prepared.memory.get(name, {})}
        return {name: new_params[name] for name in params}, {name: new_state[name] for name in params}

    def _step(
        self,
        decays: Decays,
        layers: Layers,
        scale: Tensor,
        keep: Tensor,
        grad: Tensor,
        param: Tensor,
        slots: Slots,
        t: Tensor,
    ) -> tuple[Tensor, Slots]:
        """One parameter and its accumulators after one step."""
        grad = clip(self.features, grad.to(param.dtype))
        new = accumulate(self.features, decays, grad, slots)
        outputs = run_layers(layers, inputs(self.features, param, grad, new, decays, t))
        return self.finish(outputs, param, new, scale, keep), new

    def update_copies(
        self,
        kernels: Kernels,
        theta: Theta,
        grads: Params,
        state: State,
        params: Params,
        hp: HyperValues,
        ctx: Context,
        dims: tuple[Any, Any],
    ) -> tuple[Params, State] | None:
        """`update` of K copies by a kernel, with nothing recorded; None where that cannot be, and the caller maps `update`.

        Args:
            kernels: of the device.
            theta: with a leading dimension K if ``dims`` says so.
            grads: [K, *shape] each.
            state: every leaf [K, ...].
            params: [K, *shape] each.
            hp: with [K] where ``dims`` says so.
            ctx: its step, loss and horizon are [K].
            dims: 0 or None (shared) for theta, and a tree of such for hp.
        """
        mine, rest = self.shares(params, ctx.info)
        wide = {name: param.to(compute_dtype(param.dtype)) for name, param in mine.items()}
        reached = {
            name: param for name, param in wide.items() if kernels.reaches(self.features, param.shape[1:], param)
        }
        if not reached:
            return None
        prepared = self._prepare_copies(theta, self.read_by_prepare(state, wide), wide, hp, ctx, dims)
        done = kernels.network_step(self.kernel_step, prepared, grads, reached, state)
        if done is None:
            return None
        moved, slots = done
        if self.has_own_finish:
            finish = torch.vmap(self.finish)
            for name, outputs in moved.items():
                moved[name] = finish(outputs, wide[name], slots[name], prepared.scale[name], prepared.keep[name])
        for name in wide.keys() - reached.keys():
            given: tuple[Any, ...] = (*prepared.of(name), grads[name], wide[name], state[name], _time(ctx)[0] + 1)
            moved[name], slots[name] = torch.vmap(self._step)(*given)
        moved = {name: value.to(params[name].dtype) for name, value in moved.items()}
        new_state = {
            name: {"step": state[name]["step"] + 1, **slots[name], **prepared.memory.get(name, {})} for name in mine
        }
        if rest:

            def update(
                hp: HyperValues, grads: Params, state: State, params: Params, *time: Tensor
            ) -> tuple[Params, State]:
                return self.other.update(grads, state, params, hp, _at(ctx, time))

            of_rest: list[Any] = [hp, *({name: part[name] for name in rest} for part in (grads, state, params))]
            more = torch.vmap(update, (dims[1], *(0,) * 6))(*of_rest, *_time(ctx))
            moved, new_state = moved | more[0], new_state | more[1]
        return {name: moved[name] for name in params}, {name: new_state[name] for name in params}

    def _prepare_copies(
        self,
        theta: Theta,
        state: State,
        params: Params,
        hp: HyperValues,
        ctx: Context,
        dims: tuple[Any, Any],
    ) -> Prepared:
        """`prepare` under vmap, which is handed a flat list of tensors and hands back each object once.

        vmap spends more time on nested containers, and on every tensor, than `prepare` on its arithmetic.
        """
        stacked = {"state": state, "params": params} | ({} if dims[0] is None else {"theta": theta})
        leaves = [*tree.leaves(stacked), *_time(ctx)]
        varying = {name: dim for name, dim in dims[1].items() if dim is not None}

        def prepare(own_hp: HyperValues, *leaves: Tensor) -> Prepared:
            rest = iter(leaves)
            own = {"theta": theta} | tree.map_tree(lambda _: next(rest), stacked)
            return self.prepare(**own, hp={**hp, **own_hp}, ctx=_at(ctx, tuple(rest)))

        in_dims: Any = (varying, *(0,) * len(leaves)) if varying else 0  # one number is quicker to read
        return _mapped(prepare, in_dims, {name: hp[name] for name in varying}, *leaves)

    def prepare_window(
        self, theta: Theta, params: Params, hp: HyperValues, ctx: Context, dims: tuple[Any, Any], steps: int
    ) -> Prepared:
        """What `prepare` makes of ``steps`` steps of K copies: every tensor [T, K, ...], expanded where it stays the same.

        Args:
            theta: as for `update_copies`; of a rule with ``prepares_ahead``.
            params: [K, *shape] each.
            hp: as for `update_copies`.
            ctx: its step, of the first update, and horizon are [K].
            dims: as for `update_copies`.
            steps: T.
        """
        assert ctx.step is not None
        counts = ctx.step + torch.arange(steps, device=ctx.step.device)[:, None]
        unread = {
            name: torch.empty_like(param, dtype=compute_dtype(param.dtype), device="meta")
            for name, param in params.items()
        }
        ctx = replace(ctx, loss=torch.empty(ctx.step.shape, device="meta"))

        def prepare(step: Tensor) -> Prepared:
            state: State = {name: {"step": step} for name in params}
            return self._prepare_copies(theta, state, unread, hp, replace(ctx, step=step), dims)

        return _mapped(prepare, 0, counts)


def _mapped(prepare: Callable[..., Prepared], in_dims: Any, *arguments: Any) -> Prepared:
    """``prepare`` under vmap, which hands back each object once."""
    found: list[Prepared] = []

    def distinct(*arguments: Any) -> tuple[Tensor, ...]:
        found.append(prepare(*arguments))
        return tuple(found[0].distinct().values())

    values = torch.vmap(distinct, in_dims)(*arguments)
    of_all = dict(zip(found[0].distinct(), values, strict=True))
    return found[0].map(lambda value: of_all[id(value)])


def _time(ctx: Context) -> tuple[Any, Any, Any]:
    return ctx.step, ctx.loss, ctx.horizon


def _at(ctx: Context, time: tuple[Tensor, ...]) -> Context:
    step, loss, horizon = time
    return replace(ctx, step=step, loss=loss, horizon=horizon)


def run_layers(layers: Layers, planes: Tensor) -> Tensor:
    """The network on ``planes`` [in, *shape], element by element: [out, *shape]."""
    hidden = planes.reshape(planes.shape[0], -1)
    for i, (weight, bias) in enumerate(layers):
        weight, bias = weight.to(planes.dtype), bias.to(planes.dtype)
        hidden = weight.mT @ (hidden if i == 0 else torch.relu(hidden)) + bias.unsqueeze(-1)
    return hidden.reshape(len(hidden), *planes.shape[1:])


def random_layers(sizes: Sequence[int], generator: Generator) -> Layers:
    """Fresh layers: truncated normal weights of variance 1 / fan-in, zero biases; float32 on the CPU."""
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        weight = torch.empty(fan_in, fan_out)
        torch.nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0, generator=generator)
        # a normal cut at two standard deviations has a deviation of 0.8796
        layers.append((weight / (0.87962566103423978 * math.sqrt(fan_in)), torch.zeros(fan_out)))
    return tuple(layers)


TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


def layers_with_time(layers: Layers, state: State, params: Params, ctx: Context) -> dict[str, Layers]:
    """The network of each parameter, from one that takes time features after those of the parameter.

    These are tanh(t / tau - 1) for tau in `TIME_SCALES`, with t updates made already. All elements share them, so what the
    last 11 rows of the first weight make of them goes into the first bias.
    """
    (weight, bias), *rest = layers
    features = weight.shape[0] - len(TIME_SCALES)
    scales = torch.tensor(TIME_SCALES, dtype=weight.dtype, device=weight.device)

    def at(t: Tensor) -> Layers:
        late = torch.tanh(t.to(weight.dtype) / scales - 1) @ weight[features:]
        return ((weight[:features], bias + late), *rest)

    return once(at, {name: ctx.updates_of(state[name]) for name in params})


def once(function: Callable[[Value], Result], values: Mapping[str, Value]) -> dict[str, Result]:
    """``function`` of every value, called once for those that are the same object.

    Parameters share the tensor that counts their steps, and those of a param group their hyperparameters.
    """
    distinct = {id(value): value for value in values.values()}
    found = {key: function(value) for key, value in distinct.items()}
    return {name: found[id(value)] for name, value in values.items()}
