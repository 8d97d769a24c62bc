"""The contract of a workload: initial parameters, a pure loss, and device-resident data sampled by index."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.func import grad_and_value
from torch.utils.flop_counter import FlopCounterMode

from metaopt import tree
from metaopt.dense.network import DenseNetwork
from metaopt.rule import ParamInfo, Params, infer_info

Batch = dict[str, Tensor]

FLOPS_THAT_FILL_A_CPU, PARAMETERS_THAT_FILL_A_CACHE = 2e7, 5e4
"""Of one copy's forward pass; of one copy. Beyond either, vmap saves nothing and spoils caches (benchmarks/tasks.py)."""


@dataclass(frozen=True)
class Split:
    """Examples that live on the device: named tensors [N, ...] of one length; empty for tasks without data."""

    tensors: Batch = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lengths = {name: len(tensor) for name, tensor in self.tensors.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the tensors of a split must have one length, got {lengths}; index them alike")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 1

    def take(self, indices: Tensor) -> Batch:
        """Examples at ``indices`` [...]: each tensor becomes [..., *example]."""
        return {name: tensor[indices] for name, tensor in self.tensors.items()}

    def to(self, device: Any) -> Self:
        """The same examples on ``device``."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(eq=False)
class Task(ABC):
    """One training problem.

    Attributes:
        name: how reports call it.
        train, valid, test: its data.
        batch_size: examples per inner step.
        horizon: how many steps a training run usually has.
        config: numbers that vary between members of a family (0-d or any shape, no copy dimension); ``loss`` finds
            them in its batch under their names, and uses the task's own where the batch has none (evaluation).

    A class with ``stochastic = True`` has losses that draw random numbers, from the key ``batch["random"]`` (0-d int64; see
    `metaopt.random`).
    """

    stochastic: ClassVar[bool] = False

    name: str
    train: Split
    valid: Split
    test: Split
    batch_size: int = 64
    horizon: int = 200
    config: Batch = field(default_factory=dict, repr=False)

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Fresh float32 parameters (on the CPU; the unroll moves them), determined by the generator."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """What a run is judged by: a scalar mean over the batch.

        Pure and vmap-safe: no ``.item()``, no branch on values, no in-place on fresh tensors. At evaluation the batch
        holds the run's `buffers` too, under their names.
        """

    def buffers(self) -> Params:
        """What training carries along besides parameters (running statistics); no copy dimension. None by default."""
        return {}

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """What an inner step differentiates, and the new buffers; by default `loss` and the same buffers.

        Overridden where training differs from judging: dropout, batch statistics, augmentation, games, returns.
        """
        return self.loss(params, batch), buffers

    def loss_and_gradients(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params, Params]:
        """`training_loss`, its gradients and the new buffers; differentiable again.

        Overridden where the gradients are those of no single loss (games). Unrolls that record nothing differentiate
        `training_loss` by plain autograd, which must then find the same gradients (by ``detach``).
        """
        gradients, (loss, new_buffers) = grad_and_value(self.training_loss, has_aux=True)(params, buffers, batch)
        return loss, gradients, new_buffers

    @property
    def dense(self) -> DenseNetwork | None:
        """The training loss as a dense network, where it is one: kernels then take it. None by default."""
        return None

    def normalize(self, loss: Tensor) -> Tensor:
        """A finite, bounded loss that is comparable between tasks; NaN counts as the worst."""
        return torch.nan_to_num(loss, nan=1e6, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)

    def info(self) -> dict[str, ParamInfo]:
        """Facts of each parameter; override where names do not tell the roles."""
        return infer_info(self.init(torch.Generator().manual_seed(0)))

    def forward_flops(self) -> int:
        """Floating-point operations in the matrix products and convolutions of one training loss, two per multiply-add."""
        if self.dense is not None:  # known without torch's counter, whose first use takes a second
            info = self.info()
            return sum(2 * self.batch_size * math.prod(info[weight].shape) for weight, _ in self.dense.layers)
        batch = self.train.take(torch.zeros(self.batch_size, dtype=torch.int64, device=self.device))
        batch |= {"random": torch.zeros((), dtype=torch.int64, device=self.device)} if self.stochastic else {}
        params = {name: p.to(self.device) for name, p in self.init(Generator().manual_seed(0)).items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.training_loss(params, self.buffers(), batch)
        return counter.get_total_flops()

    @cached_property
    def compute_bound(self) -> bool:
        """Whether one copy's step fills a CPU or its cache, so that copies there are best run one after the other."""
        parameters = sum(math.prod(info.shape) for info in self.info().values())
        return parameters > PARAMETERS_THAT_FILL_A_CACHE or self.forward_flops() > FLOPS_THAT_FILL_A_CPU

    @property
    def device(self) -> torch.device:
        """Where the data live."""
        for tensor in [*self.train.tensors.values(), *self.config.values()]:
            return tensor.device
        return torch.device("cpu")

    def to(self, device: Any) -> Self:
        """The same task with its data on ``device``; this object stays as it is."""
        new = copy.copy(self)  # not dataclasses.replace, which would ask a subclass's own __init__ for these arguments
        if torch.device(device) != self.device:
            new.train, new.valid, new.test = (split.to(device) for split in (self.train, self.valid, self.test))
            new.config = {name: value.to(device) for name, value in self.config.items()}
            derive = getattr(new, "__post_init__", None)
            if derive is not None:  # what a task derives from its data (a module's buffers) follows them
                derive()
        return new

    @staticmethod
    def from_module(
        module: nn.Module | Callable[[], nn.Module],
        loss: Callable[[Any, Tensor], Tensor],
        data: Mapping[str, tuple[Tensor, Tensor]],
        *,
        roles: Mapping[str, str] | None = None,
        name: str = "module",
        batch_size: int = 64,
        horizon: int = 200,
    ) -> Task:
        """A task from any ``nn.Module`` that a user already has, as it is: see `metaopt.module_task.ModuleTask`.

        Args:
            module: maps a batch of inputs to predictions. Give a function that builds it (``lambda: MyModel(width=64)``)
                if its constructor sets initial values of its own; a finished module is re-initialised layer by layer,
                with each layer's defaults.
            loss: ``loss(prediction, target) -> scalar``; normalised by that of a fresh module.
            data: ``{"train": (inputs, targets), "valid": ..., "test": ...}``; missing splits fall back to train.
            roles: parameter name -> role (see `ParamInfo`), where the names do not tell.
            name: how reports call it.
            batch_size: examples per inner step.
            horizon: how many steps a training run usually has.
        """
        from metaopt.module_task import ModuleTask, reinitialised

        if "train" not in data:
            raise ValueError(f"data must hold a 'train' split, got {sorted(data)}; pass {{'train': (inputs, targets)}}")
        splits = {key: Split({"input": pair[0], "target": pair[1]}) for key, pair in data.items()}
        train = splits["train"]
        build = partial(reinitialised, module) if isinstance(module, nn.Module) else module
        return ModuleTask(
            name, train, splits.get("valid", train), splits.get("test", train), batch_size, horizon,
            build=build, criterion=loss, roles=roles or {},
        )  # fmt: skip


class TaskFamily(ABC):
    """A distribution over tasks.

    Where all members share data, names and shapes, and differ in ``config`` only, they stack: K of them run as one. Such a
    family says ``stacks = True``.
    """

    stacks: ClassVar[bool] = False

    name: str

    @abstractmethod
    def sample(self, generator: Generator) -> Task:
        """One member, determined by the generator."""


def stack_configs(tasks: Sequence[Task]) -> Batch:
    """The configs of K members of one family as tensors [K, ...]."""
    return tree.stack([task.config for task in tasks])
