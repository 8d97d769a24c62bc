"""How far the layers' outputs move in the first steps of training, against width: flat where a parametrisation scales.

The coordinate check of Yang et al., 2022 (https://arxiv.org/abs/2203.03466), appendix D.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metaopt import tree
from metaopt.rule import Params, UpdateRule
from metaopt.task import Batch, Task
from metaopt.unroll import Carry, start, unroll

_LAYERS = {
    F.linear,
    F.embedding,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
}


@dataclass(frozen=True)
class CoordinateCheck:
    """The table.

    Attributes:
        widths: of the models.
        moved: weight -> mean absolute change since initialisation of one coordinate of what that weight's layer gives
            out, [width][step]; the mean is over seeds, examples and coordinates. NaN where a run diverged.
    """

    widths: list[int]
    moved: dict[str, list[list[float]]]

    def slopes(self) -> dict[str, float]:
        """Per layer the power of the width with which the last step's change grows: least squares in the logarithms."""
        x = np.log(self.widths) - np.mean(np.log(self.widths))
        with np.errstate(divide="ignore", invalid="ignore"):  # a layer that stood still has no slope
            return {name: float(x @ np.log([row[-1] for row in rows]) / (x @ x)) for name, rows in self.moved.items()}


@torch.no_grad()
def coordinate_check(
    task_of_width: Callable[[int], Task],
    rule: UpdateRule,
    widths: Sequence[int],
    *,
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2, 3),
    hp: Mapping[str, Any] | None = None,
) -> CoordinateCheck:
    """Train at every width and see how far the outputs of every layer move; nothing is asked of the tasks.

    A layer is a weight that the loss hands to a linear map, a convolution or a look-up; of one that is used several times
    all outputs count. Under muP no layer's change depends on width, but for fluctuations; under others some grow or vanish.

    Args:
        task_of_width: makes the same model at a width.
        rule: what trains it, such as ``MuP(AdamW(lr=0.01), base=task_of_width(16).info())``.
        widths: at least two.
        steps: after each of which the outputs are compared with those before training, on one fixed batch.
        seeds: of the runs that are averaged.
        hp: hyperparameters other than the rule's.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must be at least two, as (16, 64, 256), got {list(widths)}")
    moved: dict[str, list[list[float]]] = {}
    for width in widths:
        task = task_of_width(width)
        carry = start(task, rule, list(seeds))
        before = _outputs_of_copies(task, carry)
        rows: dict[str, list[float]] = {layer: [] for layer in before[0]}
        for _ in range(steps):
            carry = unroll(task, rule, carry, 1, hp=hp)[1]
            after = _outputs_of_copies(task, carry)
            for layer, row in rows.items():
                changes = [(new[layer] - old[layer]).abs().mean() for new, old in zip(after, before, strict=True)]
                row.append(float(torch.stack(changes).where(carry.alive, torch.nan).mean()))
        for layer, row in rows.items():
            moved.setdefault(layer, []).append(row)
    return CoordinateCheck(list(widths), moved)


def _outputs_of_copies(task: Task, carry: Carry) -> list[dict[str, Tensor]]:
    probe = task.train.take(torch.arange(min(task.batch_size, len(task.train)), device=task.device)) | dict(task.config)
    if task.stochastic:
        probe["random"] = torch.zeros((), dtype=torch.int64, device=task.device)
    runs = [(tree.index(carry.params, k), tree.index(carry.buffers, k)) for k in range(len(carry.seeds))]
    return [layer_outputs(task, params, probe | buffers) for params, buffers in runs]


def layer_outputs(task: Task, params: Params, batch: Batch) -> dict[str, Tensor]:
    """Weight -> all that its layer gives out [-1] while the task's loss is computed, in order of use."""
    with _Recorder(params) as recorder:
        task.loss(params, batch)
    return {name: torch.cat(outputs) for name, outputs in recorder.outputs.items()}


class _Recorder(TorchFunctionMode):
    """Keeps the results of layers, which it knows by the very tensors that are their weights."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in params.items() if p.dim() > 1}
        self.outputs: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LAYERS:
            for given in (*args, *(kwargs or {}).values()):
                if id(given) in self.names:
                    self.outputs.setdefault(self.names[id(given)], []).append(result.detach().flatten())
        return result
