"""Optimizers as targets: what a closed form must match are the updates along recorded runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaopt import tree
from metaopt.program.program import Program
from metaopt.random import sample_indices
from metaopt.rule import Context, ElementwiseRule, UpdateRule, flat_hp
from metaopt.task import Task
from metaopt.unroll import start
from metaopt_symbolic.distill.fit import number_name
from metaopt_symbolic.genome import SEEDS, Assign, Genome, parse
from metaopt_symbolic.planted import updates_along

ADAM = """\
def train(w, g, m, v, lr, t):
    m = interpolate(g, m, 0.9)
    g2 = square(g)
    v = interpolate(g2, v, 0.999)
    kept = power(0.9, t)
    filled = sub(1.0, kept)
    first = div(m, filled)
    kept = power(0.999, t)
    filled = sub(1.0, kept)
    second = div(v, filled)
    root = sqrt(second)
    update = div(first, root)
    lr = mul(lr, 0.001)
    update = mul(update, lr)
    return update, m, v
"""
"""With its bias correction, and an epsilon of 1e-8."""

STARTS = (SEEDS["momentum"], SEEDS["rmsprop"], SEEDS["lion"], ADAM)

SLOTS = ("m", "v")
"""The state that closed forms may have."""

ELEMENTS = 32
"""Parameters that are recorded of each task, drawn among those that move."""


@dataclass(frozen=True)
class Recorded:
    """Runs of an optimizer, one of each of P tasks, at T steps and some of the parameters; all float64 [T, P, elements].

    Attributes:
        params: before each update.
        grads: there.
        updates: what was subtracted, in units of each parameter's root mean square update.
        units: these, [P, elements].
    """

    params: Tensor
    grads: Tensor
    updates: Tensor
    units: Tensor

    def of(self, program: Program, scalars: Mapping[str, Tensor], copies: int = 1) -> Tensor:
        """What programs subtract at the same places, in the same units: [T, copies, P, elements].

        Args:
            program: an optimizer's.
            scalars: its numbers but for ``t``, as `updates_along` takes them.
            copies: of the program, which may differ in their scalars.
        """
        steps, count, elements = self.params.shape
        runs = torch.zeros(copies * count, dtype=torch.int64)
        times = {**scalars, "t": torch.arange(1.0, steps + 1, dtype=torch.float64)[None]}
        found = updates_along([program], runs, self.params, self.grads, times, (elements,))
        return found.unflatten(1, (copies, count)) / self.units


def record(rule: UpdateRule, tasks: Mapping[str, Task], *, steps: int, seed: int) -> Recorded:
    """Train each task once and write down what the optimizer sees and does.

    Args:
        rule: any, a bound learned one for example.
        tasks: without random numbers in their losses.
        steps: of a run, which is also the horizon that the rule is told.
        seed: of initial parameters, batches, and which parameters are recorded.

    Raises:
        ValueError: a task whose loss draws random numbers, a run that diverges, or one in which nothing moves.
    """
    columns = [_run(rule, name, task, steps, seed) for name, task in tasks.items()]
    params, grads, updates = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    units = updates.square().mean(0).sqrt()
    return Recorded(params, grads, updates / units, units)


def _run(rule: UpdateRule, name: str, task: Task, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if task.stochastic:
        raise ValueError(f"{name} draws random numbers in its loss; record runs of tasks that do not")
    carry = start(task, rule, [seed])
    params, state, buffers = (tree.index(part, 0) for part in (carry.params, carry.state, carry.buffers))
    indices = sample_indices(
        torch.full((steps,), seed), torch.arange(steps), task.batch_size, len(task.train)
    )  # those of `metaopt.unroll.unroll`
    seen = []
    for k in range(steps):
        batch = task.train.take(indices[k]) | dict(task.config)
        loss, grads, buffers = task.loss_and_gradients(params, buffers, batch)
        ctx = Context(task.info(), step=torch.tensor(k), loss=loss.detach(), horizon=steps)
        with torch.no_grad():
            new, state = rule.update(grads, state, params, rule.hp, ctx)
        update = {key: params[key].double() - new[key].double() for key in params}
        seen.append([_flat(part) for part in (params, grads, update)])
        params = {key: p.detach() for key, p in new.items()}
    columns = [torch.stack(column) for column in zip(*seen, strict=True)]
    if not torch.isfinite(columns[2]).all():
        raise ValueError(f"the run on {name} diverges, so its updates are no target; choose other tasks or parameters")
    moving = torch.nonzero(columns[2].square().mean(0) > 0)[:, 0]
    if len(moving) < ELEMENTS:
        raise ValueError(f"only {len(moving)} parameters of {name} move, {ELEMENTS} are needed; choose other tasks")
    chosen = moving[torch.randperm(len(moving), generator=torch.Generator().manual_seed(seed))[:ELEMENTS]]
    first, second, third = (column[:, chosen] for column in columns)
    return first, second, third


def _flat(params: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in params.values()])


class OptimizerTarget:
    """The updates of recorded runs: a `metaopt_symbolic.distill.fit.Target`. The learning rate's schedule is 1."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self.sizes: Mapping[str, float] = {}
        self.wanted: NDArray[np.float64] = recorded.updates.flatten().numpy()

    def outputs(self, program: Program, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Target.outputs`."""
        count = self._recorded.params.shape[1]
        values = torch.from_numpy(numbers.T.copy())
        scalars = {number_name(k): x.repeat_interleave(count)[:, None] for k, x in enumerate(values)}
        scalars["lr"] = torch.ones((), dtype=torch.float64)
        return self._recorded.of(program, scalars, len(numbers)).transpose(0, 1).flatten(1).numpy()


def updates_of(rule: ElementwiseRule, recorded: Recorded) -> Tensor:
    """What a rule subtracts with its own hyperparameters, [T, P, elements]."""
    scalars = {name: torch.tensor(float(x), dtype=torch.float64) for name, x in flat_hp(rule.hp).items()}
    return recorded.of(rule.program, scalars)[:, 0]


def starts() -> list[Genome]:
    """Programs to start from, all with the same slots."""
    bodies = [parse(text).body for text in STARTS]
    return [Genome(("w", "g", *SLOTS), ("lr", "t"), ("update", *SLOTS), body) for body in bodies]


def with_rate(genome: Genome) -> Genome:
    """The same with a learning rate: recorded runs have one schedule, 1, so that a fit may do without ``lr``."""
    if any("lr" in a.args for a in genome.body):
        return genome
    *before, last = genome.body
    number = last.args[1] if last.function == "mul" and last.target == "update" else None
    if isinstance(number, float):
        rate, changed = Assign("rate", "mul", ("lr", number)), [*before, last._replace(args=(last.args[0], "rate"))]
    else:
        rate, changed = Assign("rate", "mul", ("lr", 1.0)), [*genome.body, Assign("update", "mul", ("update", "rate"))]
    return replace(genome, body=(rate, *changed))
