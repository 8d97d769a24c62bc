"""A rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, distributed, nn

from metaopt.eight_bit import EightBitState
from metaopt.execution import (
    EXECUTIONS,
    EightBitExecutor,
    Execution,
    Executor,
    NetworkExecutor,
    Tree,
    Work,
    count_step,
    fresh_state,
    matrix_kernels,
    say_unfused,
    step_plain,
    transformed,
)
from metaopt.learned import BoundRule
from metaopt.perparameter.rule import PerParameterRule
from metaopt.replacing import replacing
from metaopt.resolve import resolve_rule
from metaopt.roles import module_groups
from metaopt.rule import ROLES, Chain, Declared, ElementwiseRule, GradientTransform, UpdateRule
from metaopt.space import Hyper, Option, validate_all

LossGroup = Literal["world"] | distributed.ProcessGroup | None


def optimizer(
    rule: str | UpdateRule,
    params: nn.Module | Iterable[Any],
    *,
    execution: Execution = "auto",
    horizon: int | None = None,
    loss_group: LossGroup = "world",
    **hyperparameters: Any,
) -> RuleOptimizer:
    """A ``torch.optim.Optimizer`` that runs ``rule``.

    Args:
        rule: an `UpdateRule`, or what `metaopt.resolve.resolve_rule` takes: a registered name (``metaopt list
            optimizers``), ``file.py:Rule``, or a directory or file of trained meta-parameters.
        params: as for torch: tensors, ``model.named_parameters()`` or group dicts (which may set hyperparameters,
            options and ``role``); or a module, from which the roles of parameters (hidden, embedding, ...) are read.
        execution: how steps are made; all give the same numbers within rounding.

            - "auto": on a CPU "fused" from 32,768 elements on, where a compiler is found; else "foreach" on GPUs and for
              small tensors, and "loop".
            - "fused": kernels (`metaopt.kernels`): one pass over all tensors, in C++ on CPUs and in Triton on NVIDIA GPUs.
              They take elementwise rules without norms and means, and learned rules with a network per parameter; of other
              rules (LAMB, Muon, Adafactor) matrix functions at most. What none takes runs as torch operations, which the
              logger ``metaopt`` says once, at level INFO.
            - "foreach": ``torch._foreach_*`` operations in place, on all tensors at once; networks by chunks.
            - "loop": torch operations in place, tensor after tensor; networks by chunks.
            - "plain": the rule's ``update`` as it is written, out of place: the reference for the others.

            Rules of other kinds, with norms or means, or in wrappers but `Chain` and `EightBitState` run as "plain"
            whatever is chosen.
        horizon: planned number of steps, for rules that need it; not in the state dict.
        loss_group: the processes over which the loss is averaged for rules that need it: all ("world"), those of a
            ``torch.distributed`` group, or None for this process alone.
        **hyperparameters: override the rule's.

    Raises:
        ValueError, TypeError: an unknown name, or a hyperparameter outside its domain.
    """
    if isinstance(rule, UpdateRule):
        validate_all(rule.declared(), hyperparameters, title(rule))
    rule = resolve_rule(rule, **hyperparameters)
    params = module_groups(params) if isinstance(params, nn.Module) else params
    return RuleOptimizer(rule, params, execution, horizon, loss_group)


class _Variant(NamedTuple):
    """The rule with one choice of options.

    Attributes:
        whole: all of it; makes the state.
        inner: what is left of it inside its chains.
        executor: the fast way to step ``inner``, where there is one.
    """

    whole: UpdateRule
    inner: UpdateRule
    executor: Executor | EightBitExecutor | NetworkExecutor | None

    @property
    def is_direct(self) -> bool:
        """Whether a step runs an `Executor`, which asks for no names, and nothing else."""
        return isinstance(self.executor, Executor) and self.inner is self.whole


class RuleOptimizer(torch.optim.Optimizer):
    """Any `UpdateRule` behind torch's calling convention; updates in place and never writes ``p.grad``.

    ``state[p]`` holds an int ``step`` and the rule's tensors under the rule's own names. Parameters of bf16 or fp16
    keep float32 state and are rounded once per step. Rules that need a closure (SAM) call it again at other
    parameters, which are restored before the update. Groups whose options differ are stepped apart.

    Attributes:
        loss: the loss at the current parameters, for rules that need it and training loops that call ``step()``: set it
            before each step, which forgets it. `step` takes it as an argument, too, or from a closure.
    """

    def __init__(
        self,
        rule: UpdateRule,
        params: Iterable[Any],
        execution: Execution = "auto",
        horizon: int | None = None,
        loss_group: LossGroup = "world",
    ) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if "horizon" in rule.requirements() and horizon is None:
            raise ValueError(f"{title(rule)} needs the planned number of steps; pass horizon=...")
        if horizon is not None and (not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1):
            raise ValueError(
                f"horizon must be an integer of at least 1, got {horizon!r}; it is the planned number of steps"
            )
        if not (loss_group is None or loss_group == "world" or isinstance(loss_group, distributed.ProcessGroup)):
            raise ValueError(
                f"loss_group must be 'world', a torch.distributed process group or None, got {loss_group!r}"
            )
        inner = _innermost(rule)
        if isinstance(inner, BoundRule) and inner.stacked:
            raise ValueError(
                f"theta of {title(rule)} holds several copies; bind one of them: bind(tree.index(theta, k))"
            )
        self.rule = rule
        self.execution = execution
        self.horizon = horizon
        self.loss_group = loss_group
        self._prepare()
        super().__init__(params, rule.values())
        if "roles" in self._needed and any(map(_lacks_roles, self.param_groups)):
            warnings.warn(
                f"{title(rule)} treats embeddings and outputs apart from hidden weights, but these parameters have neither "
                "names nor roles, so all of their matrices count as hidden; pass the module, model.named_parameters() or "
                "groups with role=...",
                stacklevel=3,
            )

    def _prepare(self) -> None:
        """What follows from the rule, and the loss of the next step; not saved."""
        self.loss: Any = None
        declared = self.rule.declared()
        self._hyper = {name: d for name, d in declared.items() if isinstance(d, Hyper)}
        self._options = _options(self.rule)
        self._shared_options = _shared_options(self.rule)
        self._needed = self.rule.requirements()
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        self._latest: tuple[tuple[Any, ...], dict[str, Any]] = ((None,), {})

    # --- torch's protocol -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; what the group sets is validated, and a group that is refused changes nothing.

        Raises:
            ValueError: a value outside its domain, an unknown role, or complex parameters.
            TypeError: a key that can only be a misspelt hyperparameter.
        """
        if isinstance(param_group, dict):
            param_group = {**param_group, **self._validated(param_group)}
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("complex parameters are not supported; give torch.view_as_real(p) its own parameter")

    def _validated(self, group: Mapping[str, Any]) -> dict[str, Any]:
        declared, owner = self.rule.declared(), title(self.rule)
        for key in group.keys() - declared.keys():  # other keys are the user's own, as in torch
            for name in difflib.get_close_matches(key, declared, 1, 0.85):
                raise TypeError(f"{owner} has no hyperparameter {key!r}; did you mean {name!r}?")
        if group.get("role", ROLES[0]) not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {group['role']!r}")
        return validate_all(declared, {name: group[name] for name in declared if name in group}, owner)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle.

        Raises:
            TypeError: ``loss_group`` is a process group, which only its processes know.
        """
        if isinstance(self.loss_group, distributed.ProcessGroup):
            raise TypeError(
                "an optimizer whose loss_group is a process group cannot be pickled; save its state_dict(), or set "
                "loss_group to 'world' or None first"
            )
        return self._everything()

    def __deepcopy__(self, memo: dict[int, Any]) -> RuleOptimizer:
        """A copy that shares the process group, of which there are no copies."""
        memo[id(self.loss_group)] = self.loss_group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self._everything(), memo))
        return made

    def _everything(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("rule", "execution", "horizon", "loss_group")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()
        for group in self.param_groups:  # it may have been saved before the rule had some hyperparameter
            for name, value in self.rule.values().items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps the rule's own dtypes: torch would round float32 state of bf16 parameters.

        Raises:
            ValueError: other groups, or the state of another rule; nothing is changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def take(_: Any, given: dict[str, Any]) -> None:  # the last pre-hook: it sees what the others made of the dict
            saved = [(key, group, i) for group in given["param_groups"] for i, key in enumerate(group["params"])]
            for (key, group, i), (name, p) in zip(saved, [*self._named()], strict=False):  # torch refuses other numbers
                if given["state"].get(key):
                    name = group["param_names"][i] if "param_names" in group else name
                    loaded[p] = self._adopted(name, p, group, given["state"][key])

        def put(_: Any) -> None:
            self.state.update(loaded)

        with self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(put, prepend=True):
            super().load_state_dict(state_dict)

    def _adopted(self, name: str, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of saved slots on the device and in the dtypes and layouts that the rule gives its state."""
        rule = self.rule.replaced(**{option: group[option] for option in self._options if option in group})
        fresh = fresh_state(rule, {name: p}, group.get("role"))[name]
        shapes = {slot: tuple(value.shape) for slot, value in fresh.items() if slot != "step"}
        given = {slot: tuple(torch.as_tensor(value).shape) for slot, value in saved.items() if slot != "step"}
        if shapes != given or "step" not in saved:
            missing = "" if "step" in saved else " and no step"
            raise ValueError(
                f"the saved state of {name!r} is not that of {title(self.rule)}: "
                f"it holds {given}{missing}, expected {shapes} and a step"
            )
        slots = {slot: torch.empty_like(fresh[slot]).copy_(saved[slot]) for slot in shapes}
        return {"step": int(saved["step"]), **slots}

    @overload
    def step(self, closure: Tensor | float | None = None, *, loss: Any = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, loss: Any = None) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model, calls backward and returns the loss; or the loss itself.
            loss: the loss at the current parameters, for rules that need it and are stepped without a closure: a number or
                a tensor of one element. The attribute ``loss`` may be set instead.

        Raises:
            ValueError: the rule needs a closure or a loss and got none, a gradient is sparse, or a hyperparameter was
                set to a value outside its domain; no parameter is changed then.
            TypeError: the loss is no number, or was given twice.
        """
        kept, self.loss = self.loss, None
        if closure is not None and not callable(closure):
            if loss is not None:
                raise TypeError("the loss was given twice; call step(loss)")
            closure, loss = None, closure
        if closure is not None and loss is not None:
            raise TypeError("step takes a closure or a loss, not both; the closure returns the loss")
        if "closure" in self._needed and closure is None:
            raise ValueError(f"{title(self.rule)} evaluates the loss again; call step(closure)")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif loss is None:
            loss = kept
        if "loss" in self._needed and loss is None:
            if self._only_asks_for_state():
                self._work()
                return None
            raise ValueError(f"{title(self.rule)} needs the loss; call step(loss) or step(closure)")
        seen = self._seen(loss)
        work = self._work()
        foreign: set[str] = set()
        rule = self._variant(work[0].group).whole if work else self.rule
        while isinstance(rule, Chain):
            for transform in rule.transforms if work else ():
                work, slots = transformed(transform, work, self.horizon)
                foreign |= slots
            rule = rule.rule
        alike: dict[tuple[Any, ...], list[Work]] = {}
        for one in work:
            alike.setdefault(tuple([one.group[name] for name in self._options]), []).append(one)
        with replacing(matrix_kernels(self.execution, work)):
            for same in alike.values():
                self._step_alike(same, foreign, closure if "closure" in self._needed else None, seen)
        return loss if closure is not None else None

    def _only_asks_for_state(self) -> bool:
        """``torch.distributed.checkpoint`` makes state by a step without loss, at lr = 0 and gradients of zero."""
        return not self.state and all(_number(group.get("lr", 1.0)) == 0 for group in self.param_groups)

    def _seen(self, loss: Any) -> Tensor | None:
        """The loss as rules see it, 0-d: of all processes one, since replicas that see different ones drift apart."""
        needed = "loss" in self._needed
        # arrays have __float__, whatever their size
        number = math.prod(loss.shape) == 1 if hasattr(loss, "shape") else hasattr(loss, "__float__")
        if not number:
            if needed:
                raise TypeError(f"the loss must be a number or a tensor of one element, got {_described(loss)}")
            return None
        seen = torch.as_tensor(loss).detach().reshape(())
        if not needed or self.loss_group is None or not (distributed.is_available() and distributed.is_initialized()):
            return seen
        group = None if self.loss_group == "world" else self.loss_group
        # where the parameters are, because NCCL sums only there; not in place: the loss is the user's
        total = seen.to(self.param_groups[0]["params"][0].device, torch.float64, copy=True)
        distributed.all_reduce(total, group=group)
        return total / distributed.get_world_size(group)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _work(self) -> list[Work]:
        """All groups that have gradients, with states; everything that may be refused is refused here."""
        for name in self._shared_options:
            if len({group[name] for group in self.param_groups}) > 1:
                raise ValueError(f"{name} acts on all parameters together, so its param groups must agree")
        work = []
        for group in self.param_groups:
            hp = self._accepted(tuple([_number(group[name]) for name in self._hyper]))
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for grad in grads:
                if grad.layout != torch.strided:
                    raise ValueError(f"gradients must be dense, got {grad.layout}; use nn.Embedding(..., sparse=False)")
            self._variant(group)  # refuses a bad option
            if params:
                work.append(Work(group, hp, [], params, grads, [self.state[p] for p in params]))
        devices = {p.device for one in work for p in one.params}
        if len(devices) > 1 and isinstance(_innermost(self.rule), BoundRule):
            raise ValueError(
                f"{title(self.rule)} runs on one device, where its theta is, but parameters are on "
                f"{', '.join(sorted(map(str, devices)))}; use an optimizer for each device"
            )
        missing = not all(["step" in state for one in work for state in one.states])
        if missing or not all([self._variant(one.group).is_direct for one in work]):
            names = {id(p): name for name, p in self._named()}
            work = [one._replace(names=[names[id(p)] for p in one.params]) for one in work]
        for one in work if missing else ():
            new = {n: p for n, p, slots in zip(one.names, one.params, one.states, strict=True) if "step" not in slots}
            state = fresh_state(self._variant(one.group).whole, new, one.group.get("role")) if new else {}
            for name, slots in state.items():
                self.state[new[name]].update(slots)
        return work

    def _accepted(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Hyperparameters by name, checked against their domains; the latest ones are not checked again."""
        if values != self._latest[0]:
            checked = {n: h.validate(n, value) for (n, h), value in zip(self._hyper.items(), values, strict=True)}
            self._latest = (values, checked)
        return self._latest[1]

    def _variant(self, group: Mapping[str, Any]) -> _Variant:
        values = tuple([group[name] for name in self._options])
        if values not in self._variants:
            whole = self.rule.replaced(**dict(zip(self._options, values, strict=True)))
            inner = _innermost(whole)
            self._variants[values] = _Variant(whole, inner, self._executor(inner))
        return self._variants[values]

    def _executor(self, rule: UpdateRule) -> Executor | EightBitExecutor | NetworkExecutor | None:
        made = None if self.execution == "plain" else self._in_place(rule)
        if made is None and self.execution == "fused":
            say_unfused(f"no kernel takes a step of {rule.label()}")
        return made

    def _in_place(self, rule: UpdateRule) -> Executor | EightBitExecutor | NetworkExecutor | None:
        if isinstance(rule, BoundRule) and isinstance(rule.learned, PerParameterRule):
            return NetworkExecutor(rule, self.execution)
        inner = rule.rule if isinstance(rule, EightBitState) else rule
        if not isinstance(inner, ElementwiseRule) or inner.program.reach != "element":
            return None
        if isinstance(rule, EightBitState):
            return EightBitExecutor(rule, self.execution)
        return Executor(inner.program, self.execution)

    def _step_alike(self, work: list[Work], foreign: set[str], closure: Callable[[], Any] | None, loss: Any) -> None:
        """Step groups that share their options."""
        _, rule, executor = self._variant(work[0].group)
        if isinstance(executor, NetworkExecutor):
            executor.step(work, foreign, loss, self.horizon)
        elif executor is not None:
            for one in work:
                executor.step(one)
        else:
            step_plain(rule, Tree.of(work, loss, self.horizon), foreign, closure)
            count_step(work)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter under a name of its own."""
        taken: set[str] = set()
        count = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                name = group["param_names"][i] if "param_names" in group else f"parameter_{count}"
                name = f"{count}.{name}" if name in taken else name
                taken.add(name)
                count += 1
                yield name, p


def _lacks_roles(group: Mapping[str, Any]) -> bool:
    """Whether its matrices cannot be told from one another."""
    return "role" not in group and "param_names" not in group and any(p.dim() > 1 for p in group["params"])


def _options(rule: Declared) -> tuple[str, ...]:
    return tuple(name for name, declared in rule.declared().items() if isinstance(declared, Option))


def _shared_options(rule: UpdateRule) -> tuple[str, ...]:
    """Options of what couples all parameters, in which groups cannot differ."""
    everything, shared = _options(rule), set()
    couples = "closure" in rule.requirements()
    while isinstance(rule, Chain):
        shared |= {name for transform in rule.transforms for name in _options(transform)}
        rule = rule.rule
    return everything if couples or _has_transform(rule) else tuple(shared)


def _has_transform(rule: Declared) -> bool:
    return any(isinstance(part, GradientTransform) or _has_transform(part) for part in rule.parts().values())


def title(rule: UpdateRule) -> str:
    """What error messages call a rule: the name of its class, or of the learned rule's."""
    inner = _innermost(rule)
    return type(inner.learned if isinstance(inner, BoundRule) else inner).__name__


def _innermost(rule: UpdateRule) -> UpdateRule:
    """What is left of a rule inside its chains."""
    while isinstance(rule, Chain):
        rule = rule.rule
    return rule


def _described(value: Any) -> str:
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_number(entry) for entry in value)
    return value.item() if isinstance(value, Tensor) else value
