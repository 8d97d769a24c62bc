"""A task around any ``nn.Module``: fresh parameters by seed, K copies of its buffers, dropout that can be replayed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from metaopt.replayable import Replayable
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Task

_OWN_KEYS = ("input", "target", "random")


@dataclass(eq=False)
class ModuleTask(Task):
    """A task around an ``nn.Module``; see `Task.from_module`.

    Training runs the module in train mode and carries along the buffers that this changes (batch norm's running
    statistics); judging runs it in eval mode with the buffers of the run. Dropout draws from the step's key, so antithetic
    and resumed runs see the same masks (see `metaopt.replayable`). What ``vmap`` cannot take for other reasons (branches
    on values, spectral norm) runs with ``backend="loop"``.

    Attributes:
        build: makes a module with fresh parameters from torch's global CPU generator.
        criterion: ``(prediction, target) -> scalar``.
        roles: parameter name -> role, where the names do not tell.
    """

    stochastic: ClassVar[bool] = True

    build: Callable[[], nn.Module] = nn.Identity
    criterion: Callable[[Any, Tensor], Tensor] = F.mse_loss
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._training = self._fresh(0).to(self.device).train()
        taken = [name for name, _ in self._training.named_buffers() if name in _OWN_KEYS]
        if taken:
            raise ValueError(f"a buffer must not be called {taken[0]!r}, which names a part of the batch; rename it")
        frozen = [name for name, p in self._training.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"every parameter is trained, but {frozen[0]!r} asks for no gradient; make it a buffer")
        unknown = set(self.roles) - {name for name, _ in self._training.named_parameters()}
        if unknown:
            raise ValueError(
                f"roles name {min(unknown)!r}, which is no parameter of the module; see named_parameters()"
            )
        self._judging = copy.deepcopy(self._training).eval()
        self._carried = self._changed_by_training()

    def init(self, generator: Generator) -> Params:
        """The parameters of a module built under a seed drawn from ``generator``."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return {name: p.detach().clone() for name, p in self._fresh(seed).named_parameters()}

    def buffers(self) -> Params:
        """Those of the module's buffers that training changes; the others (masks, tables) stay in the module."""
        own = dict(self._training.named_buffers())
        return {name: own[name].detach().clone() for name in self._carried}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The criterion of the module's output in eval mode, with the buffers in ``batch`` or else the initial ones."""
        carried = {name: batch[name] for name in self._carried if name in batch}
        return self._run(self._judging, params, carried, batch)[0]

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The criterion of the module's output in train mode, and its buffers after that."""
        copies = {name: buffer.clone() for name, buffer in buffers.items()}  # the module may change them in place
        loss, updated = self._run(self._training, params, copies, batch)
        return loss, {name: buffer.detach() for name, buffer in updated.items()}

    @cached_property
    def _fresh_loss(self) -> float:
        """The judged loss of the module as built, on at most 256 training examples."""
        batch = self.train.take(torch.arange(min(256, len(self.train)), device=self.device))
        return float(self.loss({name: p.detach() for name, p in self._judging.named_parameters()}, batch))

    def normalize(self, loss: Tensor) -> Tensor:
        """The loss over that of a fresh module, in [-1.5, 1.5]: 1 is untrained; NaN counts as 1.5."""
        scale = abs(self._fresh_loss)
        scale = scale if math.isfinite(scale) and scale > 0 else 1.0
        return torch.nan_to_num(loss / scale, nan=1.5).clamp(-1.5, 1.5)

    def info(self) -> dict[str, ParamInfo]:
        """As `Task.info`, with ``roles``."""
        return infer_info(dict(self._training.named_parameters()), self.roles)

    def _run(self, module: nn.Module, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        tensors = {**buffers, **params}
        with Replayable(batch.get("random")):
            output = torch.func.functional_call(module, tensors, (batch["input"],))
            loss = self.criterion(output, batch["target"])
        return loss, {name: tensors[name] for name in buffers}  # where functional_call puts a buffer that was assigned

    @torch.no_grad()
    def _changed_by_training(self) -> list[str]:
        """Names of the buffers that a step on the first examples changes."""
        batch = self.train.take(torch.arange(min(self.batch_size, len(self.train)), device=self.device))
        batch["random"] = torch.zeros((), dtype=torch.int64, device=self.device)
        before = dict(self._training.named_buffers())
        copies = {name: buffer.clone() for name, buffer in before.items()}
        _, after = self._run(self._training, dict(self._training.named_parameters()), copies, batch)
        # versions alone do not do: batch norm changes its statistics without counting
        return [name for name, new in after.items() if new._version > 0 or not torch.equal(new, before[name])]

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed CUDA for good
            return self.build().cpu()


def reinitialised(module: nn.Module) -> nn.Module:
    """A copy on the CPU after each layer's ``reset_parameters``; parameters that no layer resets keep their values."""
    module = copy.deepcopy(module).cpu()
    for part in reversed(list(module.modules())):  # children first: a parent may set its children's values
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
    return module
