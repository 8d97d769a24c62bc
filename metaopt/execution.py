"""One step of a rule on torch parameters: in place by generated code, or as the rule is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.constants import Constants
from metaopt.eight_bit import Blockwise, EightBitState
from metaopt.kernels import BlockwiseStep, Columns, Dtypes, ElementwiseStep, Kernels, kernels_of
from metaopt.learned import BoundRule, Theta
from metaopt.perparameter.in_place import step_in_place
from metaopt.perparameter.rule import PerParameterRule
from metaopt.program.inplace import compile_in_place
from metaopt.program.program import Program
from metaopt.replacing import Replacement
from metaopt.rule import (
    Context,
    GradientTransform,
    HyperValues,
    ParamInfo,
    Params,
    PerParameter,
    State,
    UpdateRule,
    compute_dtype,
    flat_hp,
    infer_info,
)
from metaopt.tree import map_tree

Execution = Literal["auto", "fused", "foreach", "loop", "plain"]
EXECUTIONS: tuple[Execution, ...] = ("auto", "fused", "foreach", "loop", "plain")

# A generated kernel takes a fraction of a second to build, once; below this size it cannot earn that back soon.
_FUSED_MIN_ELEMENTS = 32_768
# On a CPU, operations on many tensors at once stream all of them through the cache again and again: only where they are
# this small on average does the saving in calls outweigh that.
_SMALL_MEAN_ELEMENTS = 4_096


@cache
def say_unfused(reason: str) -> None:
    """One logged line per process and reason: "fused" was asked for, and torch operations run."""
    logging.getLogger("metaopt").info("execution 'fused': %s, so torch operations run", reason)


class Work(NamedTuple):
    """What a step does in one param group.

    Attributes:
        group: the param group.
        hp: its hyperparameters as floats.
        names: of each parameter that has a gradient; empty where only the executor will look.
        params, grads, states: of the same parameters; a state has an int ``step`` and slots.
    """

    group: dict[str, Any]
    hp: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]

    def of(self, names: Container[str]) -> Work:
        """What of it concerns these parameters."""
        return self.at([i for i, name in enumerate(self.names) if name in names])

    def at(self, own: Sequence[int]) -> Work:
        """What of it concerns the parameters at these positions."""
        return self._replace(
            names=[self.names[i] for i in own if self.names],
            params=[self.params[i] for i in own],
            grads=[self.grads[i] for i in own],
            states=[self.states[i] for i in own],
        )


# --- elementwise rules, in place --------------------------------------------------------------------------------------


class Executor:
    """In-place steps of one program, each by the way that suits its tensors.

    Args:
        program: what to run.
        execution: "fused" (`metaopt.kernels`), "foreach" or "loop" where the tensors allow it; "auto" chooses by
            size and device.
    """

    def __init__(self, program: Program, execution: Execution) -> None:
        self.program = program
        self.execution = execution
        self._kernels: dict[tuple[str, Dtypes], ElementwiseStep | None] = {}

    def step(self, work: Work) -> None:
        """Step every parameter of ``work``, those of one step count, type, device and dtypes together."""
        buckets: dict[tuple[Any, ...], list[int]] = {}
        for i, (p, grad, state) in enumerate(zip(work.params, work.grads, work.states, strict=True)):
            buckets.setdefault((state["step"], type(p), p.device, p.dtype, grad.dtype), []).append(i)
        hp = flat_hp(work.hp)
        for (step, *_), members in buckets.items():
            states = [work.states[i] for i in members]
            columns = [[work.params[i] for i in members], [work.grads[i] for i in members]]
            columns += [[state[slot] for state in states] for slot in self.program.tensors[2:]]
            self._run(columns, self.program.scalar_values({**hp, "t": step + 1}))
            for state in states:
                state["step"] = step + 1

    def _run(self, columns: Columns, coefficients: Mapping[str, float]) -> None:
        elements = sum(map(Tensor.numel, columns[0]))
        on_cpu = columns[0][0].is_cpu
        kernels = _kernels(self.execution, columns[0])
        if kernels is not None:
            kernel = self._kernel(kernels, columns)
            if kernel is not None:
                columns = _run_kernel(kernel, columns, coefficients)
                if not columns[0]:
                    return
        if self.execution == "fused":
            p = columns[0][0]
            say_unfused(f"no kernel on {p.device.type} takes a step of {p.dtype} parameters")
        small = elements <= _SMALL_MEAN_ELEMENTS * len(columns[0])
        if self.execution == "foreach" or (self.execution != "loop" and (small or not on_cpu)):
            compile_in_place(self.program, lists=True)(columns, coefficients)
            return
        run = compile_in_place(self.program, lists=False)
        for tensors in zip(*columns, strict=True):
            run(tensors, coefficients)

    def _kernel(self, kernels: Kernels, columns: Columns) -> ElementwiseStep | None:
        param, grad, *slots = (column[0].dtype for column in columns)
        dtypes = (param, grad, slots[0] if slots else compute_dtype(param))
        key = columns[0][0].device.type, dtypes
        if key not in self._kernels:
            self._kernels[key] = kernels.elementwise(self.program, dtypes)
        return self._kernels[key]


def _kernels(execution: Execution, params: Sequence[Tensor]) -> Kernels | None:
    """The kernels to step these with, all on one device, if any."""
    if not _plain(params) or execution not in ("auto", "fused"):
        return None
    device = params[0].device.type
    # elsewhere no run has shown yet that kernels win: there they are for those who ask for them
    earns = device == "cpu" and sum(map(Tensor.numel, params)) >= _FUSED_MIN_ELEMENTS
    return kernels_of(device) if execution == "fused" or earns else None


def _run_kernel(kernel: ElementwiseStep, columns: Columns, coefficients: Mapping[str, float]) -> Columns:
    """Step those parameters that the kernel can take; returns the columns of the others."""
    if kernel.fits(columns):
        kernel(columns, coefficients)
        return [[] for _ in columns]
    taken: list[tuple[Tensor, ...]] = []
    left: list[tuple[Tensor, ...]] = []
    for param, grad, *slots in zip(*columns, strict=True):
        if grad.stride() != param.stride():  # a transposed gradient, say: copied into the parameter's layout
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        tensors = (param, grad, *slots)
        (taken if kernel.fits([[tensor] for tensor in tensors]) else left).append(tensors)
    if taken:
        kernel([*zip(*taken, strict=True)], coefficients)
    return [*zip(*left, strict=True)] if left else [[] for _ in columns]


def matrix_kernels(execution: Execution, work: Sequence[Work]) -> Mapping[str, Replacement]:
    """What replaces functions of matrices in a step of ``work``."""
    params = [p for one in work for p in one.params]
    found = _kernels(execution, params) if len({p.device for p in params}) == 1 else None
    return {} if found is None else found.of_matrices


def _plain(params: Iterable[Tensor]) -> bool:
    """Whether the elements are where ``data_ptr`` points; a subclass (DTensor, a fake tensor) may keep them elsewhere."""
    return {*map(type, params)} <= {Tensor, nn.Parameter}


# --- elementwise rules whose state is kept in 8 bits, in place --------------------------------------------------------


class EightBitExecutor:
    """In-place steps of an `EightBitState`: by a kernel, or parameter by parameter between reading and writing 8 bits.

    Args:
        rule: whose steps.
        execution: as for `Executor`, which steps what has no codes, and what the codes stand for.
    """

    def __init__(self, rule: EightBitState, execution: Execution) -> None:
        self.rule, self.execution = rule, execution
        self._program = rule.rule.program
        self._wide = Executor(self._program, execution)
        self._kernels: dict[tuple[Any, ...], BlockwiseStep | None] = {}

    def step(self, work: Work) -> None:
        """Step every parameter of ``work``; those with codes that share step count, device and dtypes together."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, (p, grad, state) in enumerate(zip(work.params, work.grads, work.states, strict=True)):
            coded = any(f"{slot}_absmax" in state for slot in self.rule.rule.slots)
            key = (state["step"], p.device, p.dtype, grad.dtype) if coded else ()
            alike.setdefault(key, []).append(i)
        for key, members in alike.items():
            some = work.at(members)
            if key and not self._step_by_kernel(some, key[0]):
                if self.execution == "fused":
                    say_unfused(f"no kernel on {key[1].type} reads and writes state in 8 bits")
                for i in range(len(members)):
                    self._step_wide(some.at([i]))
            elif not key:
                self._wide.step(some)

    def _step_by_kernel(self, work: Work, step: int) -> bool:
        """Whether a kernel took all of it."""
        kernels = _kernels(self.execution, work.params)
        if kernels is None:
            return False
        p, grad = work.params[0], work.grads[0]
        key = p.device.type, p.dtype, grad.dtype
        if key not in self._kernels:
            signed = [self.rule.is_signed(slot) for slot in self.rule.rule.slots]
            self._kernels[key] = kernels.blockwise(self._program, signed, key[1:])
        kernel = self._kernels[key]
        slots = [
            [Blockwise(state[slot], state[f"{slot}_absmax"]) for state in work.states] for slot in self.rule.rule.slots
        ]
        if kernel is None or not kernel.fits(work.params, work.grads, slots):
            return False
        kernel(work.params, work.grads, slots, self._program.scalar_values({**flat_hp(work.hp), "t": step + 1}))
        count_step([work])
        return True

    def _step_wide(self, work: Work) -> None:
        """One parameter."""
        (param,), (state,) = work.params, work.states
        wide = self.rule.read(state, compute_dtype(param.dtype))
        self._wide.step(work._replace(states=[wide]))
        new = self.rule.stored(wide)
        state["step"] = new.pop("step")
        for slot, value in new.items():
            state[slot].copy_(value)


# --- learned rules with a per-parameter network, in place -------------------------------------------------------------


class NetworkExecutor:
    """In-place steps of a learned rule with a per-parameter network.

    Args:
        rule: binds a `PerParameterRule`.
        execution: "fused": kernels where they can be had; "auto": the same where the tensors earn back their build;
            "foreach" and "loop": chunk by chunk in plain torch, as is whatever kernels cannot reach.
    """

    def __init__(self, rule: BoundRule, execution: Execution) -> None:
        assert isinstance(rule.learned, PerParameterRule)
        self.rule, self.learned, self.execution = rule, rule.learned, execution
        self._other: Executor | None = None
        self._theta: dict[torch.device, Theta] = {}
        self._constants = Constants()

    def step(self, work: Sequence[Work], foreign: set[str], loss: Any, horizon: int | None) -> None:
        """Step every parameter of ``work``; ``foreign`` are slots that are not the rule's."""
        tree = Tree.of(work, loss, horizon)
        if not _plain(tree.params.values()):  # what chunks need of a sharded tensor is not on this process
            step_plain(self.rule, tree, foreign, None)
            count_step(work)
            return
        params = {name: p.detach() for name, p in tree.params.items()}
        mine, rest = self.learned.shares(params, tree.ctx.info)
        if mine:
            kernels = _kernels(self.execution, [*mine.values()])
            device = next(iter(mine.values())).device
            if kernels is None and self.execution == "fused":
                say_unfused(f"no kernel on {device.type} takes a step of {self.rule.label()}")
            if device not in self._theta:
                self._theta[device] = self.rule.to(device).theta
            # a copy from the host, of theta or of a rule's numbers, would wait for all that is queued on a GPU
            with nullcontext() if device.type == "cpu" else self._constants:
                step_in_place(
                    self.learned, self._theta[device], tree.grads, tree.state, mine, tree.hp, tree.ctx, kernels=kernels
                )
            count_step([one.of(mine) for one in work])
        if rest:
            self._other = self._other or Executor(self.learned.other.program, self.execution)
            for one in work:
                self._other.step(one.of(rest))


# --- any rule, as it is written ---------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """The work of some groups as rules see it.

    Attributes:
        params: the parameters themselves.
        grads: in whatever dtype.
        state, hp, ctx: what `UpdateRule.update` takes; the state shares its tensors with the work.
    """

    params: Params
    grads: Params
    state: State
    hp: HyperValues
    ctx: Context

    @classmethod
    def of(cls, work: Sequence[Work], loss: Any, horizon: int | None) -> Tree:
        """The tree over all of ``work``."""
        clock: dict[tuple[int, torch.device], Tensor] = {}
        tree = cls({}, {}, {}, {}, Context({}))
        by_param, infos = {}, {}
        for one in work:
            for name, p, grad, slots in zip(one.names, one.params, one.grads, one.states, strict=True):
                now = (slots["step"], p.device)
                if now not in clock:
                    clock[now] = torch.full((), slots["step"], dtype=torch.int64, device=p.device)
                tree.params[name], by_param[name] = p, one.hp
                tree.grads[name] = grad.detach()
                tree.state[name] = {**slots, "step": clock[now]}
                infos[name] = _info(name, p.shape, one.group.get("role"))
        # a shared count lets elementwise rules inside wrappers run as one flat tensor, which pays for small ones
        small = sum(map(Tensor.numel, tree.params.values())) <= _SMALL_MEAN_ELEMENTS * len(tree.params)
        step = next(iter(clock.values())) if small and len(clock) == 1 and _plain(tree.params.values()) else None
        at = None if loss is None else torch.as_tensor(loss).detach()
        hp = PerParameter(by_param) if len(work) > 1 else work[0].hp
        return tree._replace(hp=hp, ctx=Context(infos, step, at, horizon))

    def wide(self) -> tuple[Params, Params]:
        """Parameters and gradients in the dtype to compute in."""
        dtypes = {name: compute_dtype(p.dtype) for name, p in self.params.items()}
        params = {name: p.detach().to(dtypes[name]) for name, p in self.params.items()}
        return params, {name: grad.to(dtypes[name]) for name, grad in self.grads.items()}


def fresh_state(rule: UpdateRule, params: Params, role: str | None) -> State:
    """The rule's initial state in tensors of its own, with an int ``step``."""
    wide = {name: p.detach().to(compute_dtype(p.dtype)) for name, p in params.items()}
    state = rule.init(wide, {name: _info(name, p.shape, role) for name, p in params.items()})
    taken = {_storage(p) for p in wide.values()}
    for slots in state.values():
        slots |= {slot: value.clone() for slot, value in slots.items() if _storage(value) in taken}
        slots |= {slot: _summed(value) for slot, value in slots.items() if _is_sharded(value)}
        slots["step"] = 0
    return state


def transformed(transform: GradientTransform, work: Sequence[Work], horizon: int | None) -> tuple[list[Work], set[str]]:
    """``work`` with the gradients that ``transform`` makes of its own, and the names of the transform's slots."""
    tree = Tree.of(work, None, horizon)
    params, grads = tree.wide()
    grads, new_state = transform.transform(grads, tree.state, params, tree.hp, tree.ctx)
    _assign([(tree.state[name][slot], value) for name, slots in new_state.items() for slot, value in slots.items()])
    return [one._replace(grads=[grads[name] for name in one.names]) for one in work], set().union(*new_state.values())


def step_plain(rule: UpdateRule, tree: Tree, without: set[str], closure: Callable[[], Any] | None) -> None:
    """The rule's update, out of place, then assigned; the caller counts the step.

    Args:
        rule: what to run.
        tree: on what.
        without: slots that are not the rule's.
        closure: evaluates the model, for rules that need it elsewhere.
    """
    params, _, state, hp, ctx = tree
    wide, grads = tree.wide()
    if closure is not None:
        grads = {name: grad.clone() for name, grad in grads.items()}  # the closure writes p.grad
        ctx = replace(ctx, closure=_closure_at(params, closure))
    own = {name: {slot: v for slot, v in slots.items() if slot not in without} for name, slots in state.items()}
    if isinstance(rule, BoundRule):
        wide, grads, own = (map_tree(_flattenable, part) for part in (wide, grads, own))
    with _replicated() if any(map(_is_sharded, params.values())) else nullcontext():
        new_params, new_state = rule.update(grads, own, wide, hp, ctx)
    moves = [(p, new_params[name]) for name, p in params.items()]
    moves += [(state[n][slot], v) for n, slots in new_state.items() for slot, v in slots.items() if slot != "step"]
    _assign(moves)


def count_step(work: Sequence[Work]) -> None:
    """Every parameter of ``work`` has had one more update."""
    for one in work:
        for state in one.states:
            state["step"] += 1


def _closure_at(params: Params, closure: Callable[[], Any]) -> Callable[[Params], tuple[Tensor, Params]]:
    def evaluate(elsewhere: Params) -> tuple[Tensor, Params]:
        saved = {name: p.detach().clone() for name, p in params.items()}
        try:
            for name, p in params.items():
                p.copy_(elsewhere[name])
            with torch.enable_grad():
                loss = closure()
            grads = {}
            for name, p in params.items():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                grads[name] = grad.to(compute_dtype(p.dtype), copy=True)
        finally:
            for name, p in params.items():
                p.copy_(saved[name])
        return torch.as_tensor(loss).detach(), grads

    return evaluate


def _assign(moves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Every first becomes its second, all at once: a rule may hand old tensors back in new places."""
    old = {_storage(destination) for destination, _ in moves}
    values = [value.clone() if _storage(value) in old else value for _, value in moves]
    for (destination, _), value in zip(moves, values, strict=True):
        destination.copy_(_placed(value, destination) if _is_sharded(value) else value)


def _placed(value: Any, like: Any) -> Tensor:
    """A DTensor with the placements of ``like``, whole if that is none."""
    return value.redistribute(like.device_mesh, like.placements) if _is_sharded(like) else value.full_tensor()


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes a second to import."""
    return hasattr(tensor, "to_local")


def _summed(tensor: Any) -> Tensor:
    """A DTensor without sums that are still to be made: rows of a sharded matrix start as such, and cannot be assigned to."""
    from torch.distributed.tensor import Replicate

    places = [Replicate() if place.is_partial() else place for place in tensor.placements]
    return tensor.redistribute(placements=places)


def _flattenable(tensor: Any) -> Any:
    """A DTensor that DTensor can reshape: networks walk tensors flat, which it refuses where shards differ in size."""
    if not _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh
    shards = [(place.dim, mesh.size(i)) for i, place in enumerate(tensor.placements) if place.is_shard()]
    even = all(tensor.shape[dim] % count == 0 for dim, count in shards)
    return tensor if even else tensor.redistribute(placements=[Replicate()] * mesh.ndim)


def _replicated() -> AbstractContextManager[None]:
    """What a rule brings along itself (theta, the loss) counts as a DTensor that every process has whole."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _storage(tensor: Tensor) -> int:
    """What two tensors have in common if one may be a view of the other."""
    local = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local.untyped_storage()._cdata  # not the address, which meta and empty tensors share


@lru_cache(maxsize=65536)
def _info(name: str, shape: torch.Size, role: str | None) -> ParamInfo:
    return infer_info({name: torch.empty(shape, device="meta")}, {name: role} if role else None)[name]
