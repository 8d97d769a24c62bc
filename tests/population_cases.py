"""What both machines of a population are tested with: programs, runs of them, and what these must become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from random_programs import SCALARS, every_form
from rule_strategies import ELEMENTWISE
from torch import Tensor

from metaopt.program import REDUCTIONS, Program, Statement, evaluate, evaluate_tree
from metaopt.program.population import Population, encode
from metaopt.rule import ElementwiseRule, flat_hp
from metaopt.space import hyper, learning_rate

Machine = Callable[
    [Population, Tensor, Sequence[int] | None], Callable[[Tensor, Tensor, Tensor, Tensor], None]
]  # fmt: skip
Tensors = Sequence[Tensor]
"""Of a run: parameter [P], gradient [P] and the slots of its program."""

UNTOUCHED = 7.0
"""In the slots that a run's program lacks."""


class RMSprop(ElementwiseRule):
    """``v = rho v + (1 - rho) g^2``, ``p = p - lr g / (sqrt(v) + eps)`` (Hinton 2012, lecture 6e)."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))
    rho: float = hyper(0.9, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.99))
    slots = ("square",)

    def elementwise(self, param: Any, grad: Any, square: Any, lr: Any, rho: Any) -> Any:  # type: ignore[override]
        square = rho * square + (1 - rho) * grad * grad
        return param - lr * grad / (torch.sqrt(square) + 1e-8), square


RULES: dict[str, ElementwiseRule] = {
    "rmsprop": RMSprop(),
    **{name: ELEMENTWISE[name] for name in ("adamw", "lion", "momentum", "nesterov", "amsgrad", "whole_language")},
}


def every_statement() -> list[Program]:
    """Each operation on each kind of argument, as a program that gives its value to the parameter."""
    whole = every_form()
    number = Statement("on_a_number", "where", ("param", "grad", 2.0))
    statements = (*whole.statements, number)
    return [Program(whole.scalars, ("param", "grad"), statements, (s.target,)) for s in statements]


def after(
    machine: Machine,
    programs: Sequence[Program],
    before: Sequence[Tensors],
    device: torch.device,
    sizes: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """New parameter and slots of one run of each program, at `random_programs.SCALARS`; ``sizes`` are those of tensors."""
    population = encode(programs)
    runs = torch.arange(len(programs), device=device)
    params, grads, slots = stacked(population, before, device)
    (numbers,) = population.numbers(runs, SCALARS, params.dtype)
    machine(population, runs, sizes)(params, grads, slots, numbers)
    own = [len(program.tensors) - 2 for program in programs]
    assert all((slots[count:, k] == UNTOUCHED).all() for k, count in enumerate(own))
    return [[params[k].cpu(), *slots[:count, k].cpu()] for k, count in enumerate(own)]


@torch.no_grad()
def expected(
    programs: Sequence[Program], before: Sequence[Tensors], sizes: Sequence[int] | None = None
) -> list[list[Tensor]]:
    """The same by `evaluate_tree`."""
    found = []
    for program, tensors in zip(programs, before, strict=True):
        leaves = zip(*(tensor.split(list(sizes or [len(tensor)])) for tensor in tensors), strict=True)
        tree = [dict(zip(program.tensors, leaf, strict=True)) for leaf in leaves]
        found.append([torch.cat(parts) for parts in zip(*evaluate_tree(program, tree, SCALARS), strict=True)])
    return found


def every_reduction() -> list[Program]:
    """Each reduction, then what a number of a tensor can be: a divisor, an output, an operand of another one's operand."""
    alone = [
        Program((), ("param", "grad", "first"), (Statement("r", op, ("grad",)),), ("r", "param")) for op in REDUCTIONS
    ]
    statements = (
        Statement("whole", "global_norm", ("grad",)),
        Statement("direction", "div", ("grad", "whole")),
        Statement("size", "norm", ("direction",)),
        Statement("other", "mean", ("param",)),
        Statement("ratio", "div", ("other", "size")),
        Statement("moved", "mul", ("ratio", "direction")),
        Statement("first_all", "global_sum", ("moved",)),
        Statement("new", "sub", ("first", "first_all")),
        Statement("compared", "gt", ("param", "other")),
        Statement("chosen", "where", ("compared", "new", "grad")),
        Statement("share", "mean", ("compared",)),
    )
    deep = Program((), ("param", "grad", "first", "second"), statements, ("chosen", "size", "share"))
    return [*alone, deep]


def stacked(population: Population, before: Sequence[Tensors], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters [R, P], gradients [R, P] and slots [S, R, P] of runs."""
    params, grads = (torch.stack([tensors[k] for tensors in before]).to(device) for k in range(2))
    slots = torch.full((population.kernel.inputs - 2, *params.shape), UNTOUCHED, dtype=params.dtype, device=device)
    for k, tensors in enumerate(before):
        for slot, tensor in enumerate(tensors[2:]):
            slots[slot, k] = tensor
    return params, grads, slots


def trained(
    machine: Machine, runs: Sequence[tuple[str, float]], dtype: torch.dtype, steps: int, size: int, device: torch.device
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Parameter and slots of runs of `RULES` after some steps: of the machine, and by `evaluate`.

    Args:
        machine: what to test.
        runs: the rule and the learning rate of each.
        dtype: of all tensors.
        steps: with a gradient of their own.
        size: parameters of a run.
        device: of the machine.
    """
    generator = torch.Generator().manual_seed(0)
    names = list(RULES)
    population = encode([rule.program for rule in RULES.values()])
    programs = torch.tensor([names.index(name) for name, _ in runs], device=device)
    gradients = torch.randn(steps, len(runs), size, generator=generator, dtype=dtype)
    before = [
        [torch.randn(size, generator=generator, dtype=dtype), gradients[0, k], *_first_slots(RULES[name], size, dtype)]
        for k, (name, _) in enumerate(runs)
    ]
    params, _, slots = stacked(population, before, device)
    scalars = _scalars(runs, population.scalars, steps)
    step = machine(population, programs, None)
    for grads, numbers in zip(gradients, population.numbers(programs, scalars, dtype), strict=True):
        step(params, grads.to(device), slots, numbers)
    found, wanted = [], []
    for k, (name, lr) in enumerate(runs):
        program, (param, _, *state) = RULES[name].program, before[k]
        now = [param, *state]
        for t in range(steps):
            inputs = dict(zip(program.tensors, [now[0], gradients[t, k], *now[1:]], strict=True))
            with torch.no_grad():
                now = evaluate(program, inputs, {**flat_hp(RULES[name].hp), "lr": lr, "t": t + 1.0})
        found.append([params[k].cpu(), *slots[: len(state), k].cpu()])
        wanted.append(now)
    return found, wanted


def _first_slots(rule: ElementwiseRule, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [rule.init_slot(slot, torch.zeros(size, dtype=dtype)) for slot in rule.slots]


def _scalars(runs: Sequence[tuple[str, float]], names: Sequence[str], steps: int) -> Mapping[str, float | Tensor]:
    """Every run's own hyperparameters, [R, 1] each; those of other rules are NaN. ``t`` counts the steps, [1, T]."""
    own = [{**flat_hp(RULES[name].hp), "lr": lr} for name, lr in runs]
    made = {name: torch.tensor([[hp.get(name, torch.nan)] for hp in own], dtype=torch.float64) for name in names}
    return {**made, "t": torch.arange(1, steps + 1, dtype=torch.float64)[None]}
