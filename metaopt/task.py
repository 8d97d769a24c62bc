"""The contract of a workload: initial parameters, a pure loss, and device-resident data sampled by index."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from metaopt import tree
from metaopt.rule import ParamInfo, Params, infer_info

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Examples that live on the device: named tensors [N, ...] of one length; empty for tasks without data."""

    tensors: Batch = field(default_factory=dict)

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
    """

    name: str
    train: Split
    valid: Split
    test: Split
    batch_size: int = 64
    horizon: int = 200
    config: Batch = field(default_factory=dict)

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Fresh float32 parameters (on the CPU; the unroll moves them), determined by the generator."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Scalar mean loss; pure and vmap-safe (no ``.item()``, no branch on values, no in-place on fresh tensors)."""

    def normalize(self, loss: Tensor) -> Tensor:
        """A finite, bounded loss that is comparable between tasks; NaN counts as the worst."""
        return torch.nan_to_num(loss, nan=1e6, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)

    def info(self) -> dict[str, ParamInfo]:
        """Facts of each parameter; override where names do not tell the roles."""
        return infer_info(self.init(torch.Generator().manual_seed(0)))

    @property
    def device(self) -> torch.device:
        """Where the data live."""
        for tensor in [*self.train.tensors.values(), *self.config.values()]:
            return tensor.device
        return torch.device("cpu")

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
    ) -> ModuleTask:
        """A task from any ``nn.Module`` that a user already has.

        Args:
            module: maps a batch of inputs to predictions; buffers are constants (no running statistics). Give a
                function that builds it (``lambda: MyModel(width=64)``) if its constructor sets initial values of its
                own; a finished module is re-initialised layer by layer, with each layer's defaults.
            loss: ``loss(prediction, target) -> scalar``.
            data: ``{"train": (inputs, targets), "valid": ..., "test": ...}``; missing splits fall back to train.
            roles: parameter name -> role (see `ParamInfo`), where the names do not tell.
            name: how reports call it.
            batch_size: examples per inner step.
            horizon: how many steps a training run usually has.
        """
        if "train" not in data:
            raise ValueError(f"data must hold a 'train' split, got {sorted(data)}; pass {{'train': (inputs, targets)}}")
        splits = {key: Split({"input": pair[0], "target": pair[1]}) for key, pair in data.items()}
        train = splits["train"]
        build = partial(_reinitialised, module) if isinstance(module, nn.Module) else module
        return ModuleTask(
            name, train, splits.get("valid", train), splits.get("test", train), batch_size, horizon,
            build=build, criterion=loss, roles=roles or {},
        )  # fmt: skip


@dataclass(eq=False)
class ModuleTask(Task):
    """A task around an ``nn.Module``; see `Task.from_module`.

    Attributes:
        build: makes a module with fresh parameters from torch's global CPU generator.
        criterion: ``(prediction, target) -> scalar``.
        roles: parameter name -> role, where the names do not tell.
    """

    build: Callable[[], nn.Module] = nn.Identity
    criterion: Callable[[Any, Tensor], Tensor] = nn.functional.mse_loss
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._module = self._fresh(0).to(self.device)

    def init(self, generator: Generator) -> Params:
        """The parameters of a module built under a seed drawn from ``generator``."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return {name: p.detach().clone() for name, p in self._fresh(seed).named_parameters()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The criterion of the module's output."""
        buffers = dict(self._module.named_buffers())
        output = torch.func.functional_call(self._module, {**buffers, **params}, (batch["input"],))
        return self.criterion(output, batch["target"])

    def info(self) -> dict[str, ParamInfo]:
        """As `Task.info`, with ``roles``."""
        return infer_info(dict(self._module.named_parameters()), self.roles)

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed CUDA for good
            return self.build().cpu()


def _reinitialised(module: nn.Module) -> nn.Module:
    """A copy on the CPU after each layer's ``reset_parameters``; parameters that no layer resets keep their values."""
    module = copy.deepcopy(module).cpu()
    for part in reversed(list(module.modules())):  # children first: a parent may set its children's values
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
    return module


class TaskFamily(ABC):
    """A distribution over tasks of one architecture; members differ in ``config`` and seed, so they stack."""

    name: str

    @abstractmethod
    def sample(self, generator: Generator) -> Task:
        """One member. All members have parameters of the same names and shapes."""


def stack_configs(tasks: Sequence[Task]) -> Batch:
    """The configs of K members of one family as tensors [K, ...]."""
    return tree.stack([task.config for task in tasks])


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of splitmix64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def hash64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors, element by element: a stateless source of random bits."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift; torch's ``>>`` on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_indices(seeds: Tensor, steps: Tensor, batch_size: int, size: int) -> Tensor:
    """Example indices [K, batch_size], uniform with replacement, a pure function of (seed, step).

    Being stateless, they let antithetic runs, resumed runs and re-ordered copies see the same batches on any device.

    Args:
        seeds: int64 [K], one data stream per copy.
        steps: int64 [K], how many batches each copy has drawn already.
        batch_size: examples per batch.
        size: number of examples; at most 2^31.
    """
    stream = hash64(hash64(seeds) + steps).unsqueeze(-1)
    lane = torch.arange(batch_size, dtype=torch.int64, device=seeds.device)
    return _shift_right(hash64(stream + lane), 33) % size
