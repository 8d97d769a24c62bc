"""A rule as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from metaopt.program import trace
from metaopt.program.cpp import compile_cpp, compiler
from metaopt.program.inplace import compile_in_place
from metaopt.program.program import Program
from metaopt.rule import (
    Chain,
    Context,
    ElementwiseRule,
    Params,
    PerParameter,
    UpdateRule,
    compute_dtype,
    flat_hp,
    infer_info,
)
from metaopt.resolve import resolve_rule
from metaopt.space import Option, validate_all

Execution = Literal["auto", "cpp", "foreach", "loop", "plain"]
EXECUTIONS: tuple[Execution, ...] = ("auto", "cpp", "foreach", "loop", "plain")

# A generated C++ step costs 2 s to build once; below this many elements it cannot earn them back soon.
_CPP_MIN_ELEMENTS = 32_768
# On a CPU, list ops stream every tensor through the cache once per op; only small tensors gain from them.
_FOREACH_MAX_MEAN_ELEMENTS = 4_096


def optimizer(
    rule: str | UpdateRule,
    params: nn.Module | Iterable[Any],
    *,
    execution: Execution = "auto",
    horizon: int | None = None,
    **hyperparameters: Any,
) -> RuleOptimizer:
    """A ``torch.optim.Optimizer`` that runs ``rule``.

    Args:
        rule: an `UpdateRule`, or what `metaopt.resolve.resolve_rule` takes: a registered name (``metaopt list
            optimizers``), ``file.py:Rule``, or a directory or file of trained meta-parameters.
        params: as for torch: tensors, ``model.named_parameters()`` or group dicts (which may set hyperparameters and
            ``role``); or a module, from which the roles of parameters (hidden, embedding, output, ...) are read.
        execution: how elementwise rules run; "auto" chooses by size and machine.
        horizon: planned number of steps, for rules that need it.
        **hyperparameters: override the rule's.

    Raises:
        ValueError, TypeError: an unknown name, or a hyperparameter outside its domain.
    """
    if not isinstance(rule, str):
        validate_all(rule.declared(), hyperparameters, type(rule).__name__)
    rule = resolve_rule(rule, **hyperparameters)
    return RuleOptimizer(rule, _module_groups(params) if isinstance(params, nn.Module) else params, execution, horizon)


class RuleOptimizer(torch.optim.Optimizer):
    """Any `UpdateRule` behind torch's calling convention; updates in place and never writes ``p.grad``.

    ``state[p]`` holds an int ``step`` and the rule's tensors under the rule's own names. Parameters of bf16 or fp16
    keep float32 state and are rounded once per step. Rules that need a closure (SAM) call it again at other
    parameters, which are restored before the update.
    """

    def __init__(
        self, rule: UpdateRule, params: Iterable[Any], execution: Execution = "auto", horizon: int | None = None
    ) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if "horizon" in rule.requirements() and horizon is None:
            raise ValueError(f"{type(rule).__name__} needs the planned number of steps; pass horizon=...")
        self.rule = rule
        self.execution = execution
        self.horizon = horizon
        super().__init__(params, rule.values())

    # --- torch's protocol -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyperparameters of the group are validated.

        Raises:
            ValueError: a value outside its domain, an unknown role, or complex parameters.
        """
        declared = self.rule.declared()
        given = {name: value for name, value in param_group.items() if name in declared}
        param_group |= validate_all(declared, given, type(self.rule).__name__)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(p.is_complex() for p in group["params"]):
            self.param_groups.pop()
            raise ValueError("complex parameters are not supported; give torch.view_as_real(p) its own parameter")
        if "role" in group:
            infer_info({"p": torch.empty(1, 1)}, {"p": group["role"]})

    def __getstate__(self) -> dict[str, Any]:
        kept = {"rule": self.rule, "execution": self.execution, "horizon": self.horizon}
        return {**super().__getstate__(), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state tensor keeps its dtype (torch would round float32 state of bf16 parameters)."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(saved_ids, self._all_params(), strict=True):
            for slot, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dim() == 0 and slot == "step":
                    self.state[param][slot] = int(value)
                elif isinstance(value, Tensor):
                    self.state[param][slot] = value.detach().to(param.device, copy=True)

    @overload
    def step(self, closure: None = None, *, loss: Any = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, loss: Any = None) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model, calls backward and returns the loss.
            loss: the loss at the current parameters, for rules that need it and are stepped without a closure.

        Raises:
            ValueError: the rule needs a closure or a loss and got none, or a gradient is sparse.
        """
        needed = self.rule.requirements()
        if "closure" in needed and closure is None:
            raise ValueError(f"{type(self.rule).__name__} evaluates the loss again; call step(closure)")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "loss" in needed and loss is None:
            raise ValueError(f"{type(self.rule).__name__} needs the loss; call step(closure) or step(loss=loss)")
        for options, groups in self._groups_by_options():
            rule = self.rule.replaced(**options) if options else self.rule
            self._step_groups(rule, groups, closure, loss)
        return loss if closure is not None else None

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step_groups(
        self, rule: UpdateRule, groups: list[dict[str, Any]], closure: Callable[[], Any] | None, loss: Any
    ) -> None:
        if isinstance(rule, ElementwiseRule) and self.execution != "plain":
            for group in groups:
                params = [p for p in group["params"] if p.grad is not None]
                self._step_elementwise(rule, group, params, [p.grad for p in params])
            return
        owners = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        if not owners:
            return
        names = {id(p): name for name, p in self._named()}
        params = {names[id(p)]: p for p, _ in owners}
        grads: Params = {name: _dense(p.grad) for name, p in params.items()}
        by_param = {names[id(p)]: self._hp(group) for p, group in owners}
        hp = PerParameter(by_param) if len(groups) > 1 else next(iter(by_param.values()))
        info = infer_info(params, {names[id(p)]: group["role"] for p, group in owners if "role" in group})
        wide = {name: p.detach().to(compute_dtype(p.dtype)) for name, p in params.items()}
        grads = {name: g.to(wide[name].dtype) for name, g in grads.items()}
        ctx = Context(
            info,
            loss=None if loss is None else torch.as_tensor(loss).detach(),
            horizon=self.horizon,
            closure=None if closure is None else self._closure_at(params, wide, closure),
        )
        while isinstance(rule, Chain) and isinstance(rule.rule, (Chain, ElementwiseRule)):
            # the transforms are pure; what remains may have a fast execution
            for transform in rule.transforms:
                state = {name: self.state[p] for name, p in params.items()}
                if any(not slots for slots in state.values()):
                    fresh = transform.init(wide, info)
                    state = {name: {**fresh[name], **slots} for name, slots in state.items()}
                grads, slots = transform.transform(grads, state, wide, hp, ctx)
                for name, new in slots.items():
                    self.state[params[name]].update(new)
            rule = rule.rule
        if isinstance(rule, ElementwiseRule) and self.execution != "plain":
            for group in groups:
                chosen = [names[id(p)] for p in group["params"] if id(p) in names and names[id(p)] in grads]
                self._step_elementwise(rule, group, [params[n] for n in chosen], [grads[n] for n in chosen])
            return
        self._step_plain(rule, params, wide, grads, hp, ctx)

    def _step_plain(
        self, rule: UpdateRule, params: Params, wide: Params, grads: Params, hp: Any, ctx: Context
    ) -> None:
        """The rule as it is written: out of place, copied back."""
        state = {}
        for name, p in params.items():
            if "step" not in self.state[p]:
                fresh = rule.init({name: wide[name]}, ctx.info)[name]
                self.state[p].update({**fresh, "step": 0, **self.state[p]})
            state[name] = {**self.state[p], "step": torch.tensor(self.state[p]["step"])}
        new_params, new_state = rule.update(grads, state, wide, hp, ctx)
        for name, p in params.items():
            p.copy_(new_params[name])
            kept = self.state[p]
            kept["step"] += 1
            for slot, value in new_state[name].items():
                if slot == "step":
                    continue
                if kept[slot].shape == value.shape:
                    kept[slot].copy_(value)
                else:
                    kept[slot] = value.clone()

    def _step_elementwise(
        self, rule: ElementwiseRule, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> None:
        """In place, bucket by bucket: one bucket per (step count, device, dtypes)."""
        buckets: dict[tuple[Any, ...], list[int]] = {}
        states = []
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            state = self.state[p]
            if "step" not in state:
                wide = p.detach().to(compute_dtype(p.dtype))
                state["step"] = 0
                state.update({slot: rule.init_slot(slot, wide) for slot in rule.slots})
            state["step"] += 1
            states.append(state)
            buckets.setdefault((state["step"], p.device, p.dtype, grad.dtype, grad.layout), []).append(i)
        program = trace(rule)
        hp = flat_hp(self._hp(group))
        for (t, device, _, _, layout), members in buckets.items():
            if layout != torch.strided:
                _dense(grads[members[0]])
            whole = len(members) == len(params)
            columns = [params if whole else [params[i] for i in members], grads if whole else [grads[i] for i in members]]
            columns += [[states[i][slot] for i in members] for slot in rule.slots]
            self._run(program, columns, program.scalar_values({**hp, "t": t}), device)

    def _run(
        self, program: Program, columns: list[list[Tensor]], coefficients: dict[str, float], device: torch.device
    ) -> None:
        how = self.execution
        if how in ("auto", "cpp") and device.type == "cpu":
            elements = sum(p.numel() for p in columns[0])
            if how == "cpp" or (elements >= _CPP_MIN_ELEMENTS and compiler() is not None):
                dtypes = [column[0].dtype for column in columns]
                slot_dtype = dtypes[2] if len(dtypes) > 2 else compute_dtype(dtypes[0])
                kernel = compile_cpp(program, dtypes[0], dtypes[1], slot_dtype)
                if kernel is not None and all(t.is_contiguous() for column in columns for t in column):
                    return kernel(columns, coefficients)
            if how == "auto":
                how = "foreach" if elements <= _FOREACH_MAX_MEAN_ELEMENTS * len(columns[0]) else "loop"
        if how == "loop" or (how == "cpp" and device.type != "meta"):
            run = compile_in_place(program, lists=False)
            for tensors in zip(*columns, strict=True):
                run(tensors, coefficients)
        else:
            compile_in_place(program, lists=True)(columns, coefficients)

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        count = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                yield (group["param_names"][i] if "param_names" in group else f"parameter_{count}"), p
                count += 1

    def _hp(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: _number(group[name]) for name in self.rule.hp}

    def _groups_by_options(self) -> Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]:
        names = [name for name, declared in self.rule.declared().items() if isinstance(declared, Option)]
        if not names:
            return [({}, self.param_groups)]
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            found.setdefault(tuple(group[name] for name in names), []).append(group)
        return [(dict(zip(names, values, strict=True)), groups) for values, groups in found.items()]

    def _closure_at(self, params: Params, wide: Params, closure: Callable[[], Any]) -> Callable[[Params], Any]:
        def evaluate(elsewhere: Params) -> tuple[Tensor, Params]:
            saved = {name: p.detach().clone() for name, p in params.items()}
            try:
                for name, p in params.items():
                    p.copy_(elsewhere[name])
                with torch.enable_grad():
                    loss = closure()
                found = {
                    name: torch.zeros_like(wide[name]) if p.grad is None else _dense(p.grad).to(wide[name].dtype, copy=True)
                    for name, p in params.items()
                }
            finally:
                for name, p in params.items():
                    p.copy_(saved[name])
            return torch.as_tensor(loss).detach(), found

        return evaluate


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_number(entry) for entry in value)
    return float(value)


def _dense(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise ValueError(f"gradients must be dense, got {grad.layout}; use nn.Embedding(..., sparse=False)")
    return grad


def _module_groups(module: nn.Module) -> list[dict[str, Any]]:
    """One group per role, read from module types; names are kept."""
    roles: dict[str, str] = {}
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for prefix, part in module.named_modules():
        for name, p in part.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                roles[full] = "embedding"
            elif isinstance(part, norms):
                roles[full] = "norm"
            elif linear and prefix == linear[-1] and p.dim() > 1:
                roles[full] = "output"
            else:
                roles[full] = infer_info({full: p})[full].role
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in module.named_parameters():
        groups.setdefault(roles.get(name, "hidden"), []).append((name, p))
    return [{"params": named, "role": role} for role, named in groups.items()]
