"""Objectives as targets: what a closed form must match is the slope of the loss, through which alone it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metaopt.objective import DIFFERENTIATED, LOG_PROBABILITIES, Objective
from metaopt.program.program import Program, evaluate
from metaopt_symbolic.distill.fit import number_name, small_formulas
from metaopt_symbolic.genome import LOSS, Assign, Genome
from metaopt_symbolic.losses.mutator import numbered

Inputs = Mapping[str, Tensor]

RANGES = {"rho": 30.0, "log_probability": 60.0, "value": 5.0, "log_ratio": 1.0, "advantage": 3.0}
"""Largest sizes of inputs that a fit sees: rho and log-probabilities in nats, predictions and targets, log pi / pi_old, and
advantages in standard deviations."""

IN_BATCH = 64
"""Examples that are drawn together, for objectives whose examples depend on each other."""

SMALLEST_RATIO = 1e-8
"""Below it, a ratio counts as this in logarithms."""

DRIFT_FEATURES = ("u", "v", "ua", "va", "advantage")
"""What drifts are written with, as LPO's network: u = r - 1, v = log r, u A, v A, and A; all but A are 0 at r = 1."""


@dataclass(frozen=True)
class Piece:
    """A part of the inputs with a formula of its own.

    Attributes:
        name: for people.
        holds: which examples belong to it.
    """

    name: str
    holds: Callable[[Inputs], Tensor]


WHOLE = Piece("all inputs", lambda inputs: torch.ones_like(next(iter(inputs.values())), dtype=torch.bool))
BY_ADVANTAGE = (
    Piece("advantage >= 0", lambda inputs: inputs["advantage"] >= 0),
    Piece("advantage < 0", lambda inputs: inputs["advantage"] < 0),
)
"""Drifts are read separately for good and for bad actions, as their authors did (Lu et al., 2022, arXiv:2210.05639)."""


def pieces(objective: Objective) -> tuple[Piece, ...]:
    """The parts that are fitted one by one.

    Raises:
        ValueError: an objective that has no elementwise closed form, or none with a slope.
    """
    if objective.kind in ("classification", "reweighting"):
        raise ValueError(
            f"a closed form is a function of one example's numbers whose slope trains; {objective.label()} is of kind "
            f"{objective.kind}, give an objective of kind preference, regression or rl"
        )
    return BY_ADVANTAGE if objective.kind == "rl" else (WHOLE,)


def differentiated(objective: Objective) -> list[str]:
    """The inputs by which slopes are compared."""
    return [name for name in objective.inputs if name in (*DIFFERENTIATED[objective.kind], "rho")]


def sample(objective: Objective, count: int, seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Inputs of ``count`` examples, float64, drawn evenly from `RANGES`; all sizes times ``spread``."""
    rng = np.random.default_rng(seed)

    def even(name: str, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.from_numpy(spread * RANGES[name] * rng.uniform(low, high, count))

    made: dict[str, Tensor] = {}
    for name in objective.inputs:
        if name == "ratio":
            made[name] = torch.exp(even("log_ratio"))
        elif name == "advantage" or name == "rho":
            made[name] = even(name)
        elif name in ("prediction", "target"):
            made[name] = even("value")
        elif name in LOG_PROBABILITIES:
            made[name] = even("log_probability", -1.0, 0.0)
        elif name.endswith("lengths"):
            made[name] = torch.from_numpy(rng.integers(1, 65, count).astype(np.float64))
        else:  # scores, the chosen answer's higher
            made[name] = torch.from_numpy(rng.uniform(0, 1, count)) + (name == "chosen_scores")
    return made


def slopes(objective: Objective, inputs: Inputs) -> Tensor:
    """Of the loss by `differentiated` inputs, float64 [D, B]; of rl objectives that of the drift, loss + r A, by the ratio."""
    of_examples = []
    for k in range(0, len(next(iter(inputs.values()))), IN_BATCH):
        batch = {name: x[k : k + IN_BATCH].clone().requires_grad_() for name, x in inputs.items()}
        loss = objective(batch)
        of_examples.append(_by(loss, [batch[name] for name in differentiated(objective)]))
    found = torch.cat(of_examples, 1)
    return found + inputs["advantage"] if objective.kind == "rl" else found


def _by(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros(len(inputs), *loss.shape, dtype=torch.float64)
    found = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    return torch.stack(found).detach().double()


class ObjectiveTarget:
    """The slopes of an objective at points of one piece: a `metaopt_symbolic.distill.fit.Target`.

    Args:
        objective: whatever it is made of; only its slopes are seen.
        piece: of its inputs.
        count: points.
        seed: of them.

    Raises:
        ValueError: slopes that are not finite, or 0 everywhere.
    """

    def __init__(self, objective: Objective, piece: Piece, count: int = 256, seed: int = 0) -> None:
        drawn = sample(objective, 4 * count, seed)
        rows = torch.nonzero(piece.holds(drawn))[:count, 0]
        self._inputs = {name: x[rows] for name, x in drawn.items()}
        self._names, self._drift = differentiated(objective), objective.kind == "rl"
        read = features(self._inputs) if self._drift else self._inputs
        self.sizes: Mapping[str, float] = {name: float(x.square().mean().sqrt()) or 1.0 for name, x in read.items()}
        self.wanted: NDArray[np.float64] = slopes(objective, self._inputs).flatten().numpy()
        if not np.isfinite(self.wanted).all() or not self.wanted.any():
            what = "is no finite number somewhere" if self.wanted.any() else "is 0 everywhere"
            raise ValueError(f"the slope of {objective.label()} {what} for {piece.name}, so there is nothing to fit")

    def outputs(self, program: Program, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The slopes of a program, of a drift those of what is above 0: see `Target.outputs`."""
        shape = len(numbers), len(next(iter(self._inputs.values())))
        scalars = {number_name(k): x[:, None] for k, x in enumerate(torch.from_numpy(numbers.T.copy()))}
        inputs = {name: x.expand(shape) for name, x in self._inputs.items()}
        leaves = [inputs[name].clone().requires_grad_() for name in self._names]
        inputs.update(zip(self._names, leaves, strict=True))
        (loss,) = evaluate(program, features(inputs) if self._drift else inputs, scalars)
        loss = torch.relu(loss) if self._drift else loss
        found = torch.where(torch.isfinite(loss.detach())[:, None], _by(loss, leaves).transpose(0, 1), torch.nan)
        return found.flatten(1).numpy()


def features(inputs: Inputs) -> dict[str, Tensor]:
    """`DRIFT_FEATURES` of ratio and advantage."""
    a, ratio = inputs["advantage"], inputs["ratio"]
    u, v = ratio - 1, torch.log(torch.clamp(ratio, min=SMALLEST_RATIO))
    return dict(zip(DRIFT_FEATURES, (u, v, u * a, v * a, a), strict=True))


def starts(objective: Objective) -> list[Genome]:
    """Programs to start from, which say nothing of the target: small formulas, of the error where there is one."""
    if objective.kind != "regression":
        return [*small_formulas(DRIFT_FEATURES if objective.kind == "rl" else objective.inputs)]
    error = Assign("error", "sub", ("prediction", "target"))
    return [Genome(objective.inputs, (), (LOSS,), (error, *formula.body)) for formula in small_formulas(("error",))]


def assembled(objective: Objective, formulas: Sequence[Genome]) -> Genome:
    """The whole loss from the formulas of the pieces: of rl objectives max(0, drift) - r A, with the advantage's sign to
    choose by."""
    if objective.kind != "rl":
        (formula,) = formulas
        return formula
    good, bad = formulas
    used = {arg for formula in formulas for a in formula.body for arg in a.args}
    made = {
        "v": [Assign("safe", "max", ("ratio", SMALLEST_RATIO)), Assign("v", "exact_log", ("safe",))],
        "u": [Assign("u", "sub", ("ratio", 1.0))],
        "ua": [Assign("ua", "mul", ("u", "advantage"))],
        "va": [Assign("va", "mul", ("v", "advantage"))],
    }
    needed = used | {name[0] for name in ("ua", "va") if name in used}
    body = [a for name in made if name in needed for a in made[name]]
    first = numbered(good, 1)
    second = numbered(bad, 1 + len(first))
    body += [
        *first,
        *second,
        Assign("good", "ge", ("advantage", 0.0)),
        Assign("drift", "where", ("good", first[-1].target, second[-1].target)),
        Assign("drift", "relu", ("drift",)),
        Assign("gain", "mul", ("ratio", "advantage")),
        Assign(LOSS, "sub", ("drift", "gain")),
    ]
    return replace(good, tensors=("ratio", "advantage"), body=tuple(body))
