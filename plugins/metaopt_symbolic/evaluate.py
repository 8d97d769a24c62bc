"""Scores of candidate programs: real tasks trained in lock-step, programs x learning-rate multipliers x seeds at once.

`train` makes the runs; `metaopt_symbolic.cascade` makes scores of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.evaluate import split_losses
from metaopt.inner_step import gradients
from metaopt.kernels import RunsStep, kernels_of
from metaopt.program.population import Population, PopulationStep
from metaopt.random import sample_indices, step_keys
from metaopt.rule import Params
from metaopt.task import Task
from metaopt.unroll import fresh_params

WINDOW = 25
"""Steps between two looks at which runs have diverged."""

EXPLODED = 1e10
"""A run whose training loss passes so many times that of its first step, or of 1, has diverged. One outlier can cost 1e6."""

IN_CACHE, ON_DEVICE = 2**23, 2**31
"""Bytes of the runs that step together, about: on a CPU more of them would leave the cache, other devices want to be filled."""


@dataclass(frozen=True)
class Runs:
    """What became of N programs, each with M multipliers and S seeds.

    Attributes:
        losses: float64 [N, M, S, C], normalised validation losses at C checkpoints, the last of them at the end.
        train: float64 [N, M, S], mean of the normalised training losses.
        diverged: int64 [N, M, S], updates that a run had made when its loss or parameters were no numbers any more, or when
            its loss exploded; -1 for runs that came to the end. Losses from there on count as the worst.
    """

    losses: Tensor
    train: Tensor
    diverged: Tensor


def schedule(horizon: int) -> Tensor:
    """What programs get as ``lr``, float64 [horizon] in (0, 1]: linear warm-up over a twentieth, then cosine decay."""
    step = torch.arange(horizon, dtype=torch.float64)
    warm_up = math.ceil(horizon / 20)
    decay = 0.5 * (1 + torch.cos(math.pi * (step - warm_up) / max(1, horizon - warm_up)))
    return torch.where(step < warm_up, (step + 1) / warm_up, decay)


@torch.no_grad()
def train(
    task: Task,
    population: Population,
    *,
    horizon: int,
    seeds: Sequence[int],
    multipliers: Sequence[float] = (1.0,),
    checkpoints: int = 1,
) -> Runs:
    """Train with every program, multiplier and seed: ``param, *slots <- program(param, grad, *slots; lr, t)``.

    Slots start at 0, ``t`` counts from 1, and ``lr`` is a multiplier times `schedule`. Initial parameters and batches of a seed
    are those of `metaopt.unroll.start` and `metaopt.unroll.unroll`, whatever the program. What a run becomes does not depend on
    its neighbours: to the last bit where C++ takes the gradients (`Task.dense`, and a compiler is found), else within rounding.

    Args:
        task: any, on the CPU or on another device; tasks with ``dense`` are fastest.
        population: `metaopt.program.population.encode` of N programs over the scalars ``lr`` and ``t``.
        horizon: updates of each run, at least 1.
        seeds: S of them.
        multipliers: M factors of the learning rate.
        checkpoints: C equidistant looks at the valid split, the last at the end.

    Raises:
        ValueError: no seed, no multiplier, a horizon below 1, checkpoints outside [1, horizon], or programs over other scalars.
    """
    if not seeds or not multipliers:
        raise ValueError("a run needs a seed and a multiplier, got none; 1.0 leaves learning rates as they are")
    if not 1 <= checkpoints <= horizon:
        raise ValueError(f"checkpoints must be in [1, horizon = {horizon}], got {checkpoints}")
    shape = (len(population.kernel.lengths), len(multipliers), len(seeds))
    count = math.prod(shape)
    program, multiplier, seed = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    factors = torch.tensor(multipliers, dtype=torch.float64)[multiplier]
    course = _Course(task, population, horizon, torch.tensor(seeds, dtype=torch.int64), checkpoints)
    parts = [course.run(program[at], factors[at], seed[at]) for at in torch.arange(count).split(course.together)]
    losses, curve, diverged = (torch.cat(part) for part in zip(*parts, strict=True))
    return Runs(losses.reshape(*shape, checkpoints), curve.reshape(shape), diverged.reshape(shape))


class _Course:
    """The task, initial parameters and batches of S seeds, and the looks, which all runs share."""

    def __init__(self, task: Task, population: Population, horizon: int, seeds: Tensor, checkpoints: int) -> None:
        self.task, self.population, self.horizon = task, population, horizon
        self.device = task.device
        self.seeds = seeds.to(self.device)
        self.looks = [round(horizon * (k + 1) / checkpoints) for k in range(checkpoints)]
        self.ends = sorted({*range(WINDOW, horizon, WINDOW), *self.looks})
        first = fresh_params([task] * len(seeds), seeds)
        self.shapes = {name: p.shape[1:] for name, p in first.items()}
        self.sizes = [p[0].numel() for p in first.values()]
        self.first = torch.cat([p.flatten(1) for p in first.values()], 1)
        self.slots = population.kernel.inputs - 2
        batch = sum(t[0].numel() * t.element_size() for t in task.train.tensors.values()) * task.batch_size
        memory = IN_CACHE if self.device.type == "cpu" else ON_DEVICE
        self.together = max(1, memory // (4 * (4 + self.slots) * sum(self.sizes) + 2 * batch))
        self.kernels = kernels_of(self.device.type)
        self.gradients = self._by_kernel() or self._by_torch

    def run(self, program: Tensor, factors: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """R runs: losses [R, C], means of the training curves [R], and where they diverged [R]."""
        task, count = self.task, len(program)
        worst = float(task.normalize(torch.tensor(math.nan)))
        losses = torch.full((count, len(self.looks)), worst, dtype=torch.float64)
        curve = torch.full((count,), worst * self.horizon, dtype=torch.float64)
        diverged = torch.full((count,), -1)
        program, factors, seed = program.to(self.device), factors.to(self.device), seed.to(self.device)
        params = self.first[seed]
        slots = params.new_zeros(self.slots, *params.shape)
        grads = torch.empty_like(params)
        buffers = tree.map_tree(lambda b: b.expand(count, *b.shape).clone(), self.task.buffers())
        limit = params.new_zeros(count)
        alive, rates, begin = torch.arange(count), schedule(self.horizon).to(self.device), 0
        step = self._step(program)
        for end in self.ends:
            at = torch.arange(begin, end, device=self.device)
            numbers = self.population.numbers(program, {"lr": factors[:, None] * rates[at], "t": (at + 1.0)[None]})
            numbers = numbers.expand(len(at), -1, -1)  # where no program reads the time, all steps are one
            indices = self._indices(at)
            made = params.new_empty(len(at), len(program))
            for k in range(len(at)):
                made[k], buffers = self.gradients(params, buffers, grads, indices[:, k], seed, begin + k)
                step(params, grads, slots, numbers[k])
            if begin == 0:
                limit = EXPLODED * made[0].abs().clamp_min(1.0)
            fine = (torch.isfinite(made) & (made.abs() <= limit)).int().cummin(0).values.bool()
            curve[alive] += (task.normalize(torch.where(fine, made, torch.nan)).double().cpu() - worst).sum(0)
            whole = fine.all(0) & torch.isfinite(params.sum(1))
            if not bool(whole.all()):
                lost = ~whole
                diverged[alive[lost.cpu()]] = begin + fine[:, lost].sum(0).cpu()
                keep = whole.nonzero().squeeze(1)
                alive, program, factors, seed, limit = (
                    part[keep.to(part.device)] for part in (alive, program, factors, seed, limit)
                )
                params, grads, slots = params[keep], grads[keep], slots[:, keep]
                buffers = tree.index(buffers, keep)
                if not len(alive):
                    break
                step = self._step(program)
            if end in self.looks:
                losses[alive, self.looks.index(end)] = self._judged(params, buffers)
            begin = end
        return losses, curve / self.horizon, diverged

    def _step(self, program: Tensor) -> RunsStep:
        shapes = [*self.shapes.values()]
        found = None if self.kernels is None else self.kernels.population(self.population, program, shapes)
        return found or PopulationStep(self.population, program, shapes)

    def _indices(self, at: Tensor) -> Tensor:
        """The examples [S, T, B] of these T steps: those of the unroll."""
        seeds, steps = self.seeds.repeat_interleave(len(at)), at.repeat(len(self.seeds))
        drawn = sample_indices(seeds, steps, self.task.batch_size, len(self.task.train))
        return drawn.reshape(len(self.seeds), len(at), self.task.batch_size)

    def _judged(self, params: Tensor, buffers: Params) -> Tensor:
        """Normalised validation losses, float64 [R] on the CPU."""
        task, count = self.task, len(params)
        config = tree.map_tree(lambda v: v.expand(count, *v.shape), task.config) | buffers
        # copies of a dense network one by one: the products of stacked ones round as their number wants
        stacked = task.dense is None
        return task.normalize(
            split_losses(task, self._named(params), task.valid, config, chunk=1024, vmapped=stacked)
        ).cpu()

    def _named(self, params: Tensor) -> Params:
        parts = zip(self.shapes.items(), params.split(self.sizes, dim=1), strict=True)
        return {name: part.reshape(len(params), *shape) for (name, shape), part in parts}

    def _by_torch(
        self, params: Tensor, buffers: Params, grads: Tensor, indices: Tensor, seed: Tensor, at: int
    ) -> tuple[Tensor, Params]:
        """Training losses [R] and new buffers; gradients [R, P] go to ``grads``. ``indices`` are [S, B]."""
        task = self.task
        batch = task.train.take(indices[seed]) | tree.map_tree(lambda v: v.expand(len(seed), *v.shape), task.config)
        if task.stochastic:
            batch["random"] = step_keys(self.seeds[seed], torch.full_like(seed, at))
        loss, found, buffers = gradients(torch.vmap(task.training_loss), self._named(params), buffers, batch)
        torch.cat([g.flatten(1) for g in found.values()], 1, out=grads)
        return loss, buffers

    def _by_kernel(self) -> Callable[..., tuple[Tensor, Params]] | None:
        """The same by the kernels of dense networks; None where they do not take the task."""
        dense, kernels = self.task.dense, self.kernels
        if dense is None or kernels is None:
            return None
        inputs, target = (self.task.train.tensors[key] for key in (dense.inputs, dense.target))
        inputs = inputs.flatten(1)

        def found(
            params: Tensor, buffers: Params, grads: Tensor, indices: Tensor, seed: Tensor, at: int
        ) -> tuple[Tensor, Params]:
            batch = [part[indices].index_select(0, seed) for part in (inputs, target)]
            made = kernels.dense_gradients(dense, self._named(params), *batch)
            if made is None:
                return self._by_torch(params, buffers, grads, indices, seed, at)
            torch.cat([made[1][name].flatten(1) for name in self.shapes], 1, out=grads)
            return made[0], buffers

        return found
