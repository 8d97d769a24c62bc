"""A candidate loss: read from what a proposer wrote, checked, and printed as Python."""

from __future__ import annotations

from typing import ClassVar

import torch

from metaopt.objective import faults
from metaopt.program import ProgramObjective, read_loss
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.genome import Genome, GenomeError, from_loss, parse
from metaopt_symbolic.losses.judge import Score
from metaopt_symbolic.proposals.candidate import Behaviour, CandidateValidator, behaviour_of

INPUTS, BETA = ("rho",), 0.05
"""What candidates are of, and their one number beside it."""


def read(source: str) -> Genome:
    """A candidate as a genome, without what does nothing.

    Args:
        source: a program of the search language, or what `metaopt.program.read_loss` takes, of rho and beta.

    Raises:
        ValueError: neither.
    """
    try:
        genome = parse(source)
    except GenomeError:
        genome = from_loss(read_loss(source, INPUTS, ("beta",)), {"beta": BETA})
    if genome.outputs != ("loss",) or genome.tensors != INPUTS or genome.scalars:
        raise ValueError("a candidate is a function of rho, and perhaps beta, that returns one loss per pair")
    return without_redundant(genome)


def objective(genome: Genome) -> ProgramObjective:
    """What a candidate trains with."""
    return ProgramObjective(genome.program())


class LossValidator(CandidateValidator[Score]):
    """Losses of rho as candidates."""

    study: ClassVar[str] = "discover-loss"
    measure: ClassVar[str] = "loss of a policy"
    language: ClassVar[str] = "preference_loss"
    score = Score

    def read(self, source: str) -> Genome:
        """See `read`."""
        return read(source)

    def behaviour(self, genome: Genome) -> Behaviour:
        """What a loss does, if it can be trained with.

        Raises:
            ValueError: not finite on the probes of `metaopt.objective.probes` in float32 or in float64, or without a slope.
        """
        found = faults(objective(genome), (torch.float32,))
        if found:
            raise ValueError(found[0])
        return behaviour_of(
            genome.program(),
            not_finite="the loss or its derivative is no finite number for some rho between -30 and 30",
            inert="the derivative by rho is 0 everywhere, so nothing would be learnt",
        )

    def python(self, genome: Genome) -> str:
        """See `python`."""
        return python(genome)

    def trained(self, genome: Genome) -> ProgramObjective:
        """See `objective`."""
        return objective(genome)


_PYTHON = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "exact_div": "{} / {}", "div": "{} / ({} + 1e-08)",
    "negative": "-{}", "copy": "{}", "log": "torch.log(torch.abs({}))", "sqrt": "torch.sqrt(torch.abs({}))",
    "log1p": "torch.log(torch.abs(1.0 + {}))", "expm1": "torch.exp({}) - 1.0", "exact_log": "torch.log({})",
    "exact_sqrt": "torch.sqrt({})", "logsigmoid": "F.logsigmoid({})", "max": "torch.maximum({}, {})",
    "min": "torch.minimum({}, {})", "power": "torch.pow({}, {})", "arctan": "torch.atan({})",
    "where": "torch.where({}, {}, {})", "interpolate": "(1 - {2}) * {0} + {2} * {1}", "reciprocal": "1.0 / {}",
    "cube": "{0} * {0} * {0}", "global_sum": "{}.sum()", "mean": "{}.mean()",
    **{name: f"torch.{name}({{}})" for name in (
        "abs", "exp", "tanh", "sigmoid", "relu", "square", "sign", "sin", "cos",
    )},
    **{name: f"{{}} {sign} {{}}" for name, sign in (("gt", ">"), ("lt", "<"), ("ge", ">="), ("le", "<="))},
}  # fmt: skip
_BOUNDED = {"max": "torch.clamp({}, min={})", "min": "torch.clamp({}, max={})"}
"""Of a number, which torch.maximum does not take."""

FUNCTIONS = tuple(sorted(_PYTHON))
"""Of the search language, those that candidates are printed with."""


def python(genome: Genome) -> str:
    """A candidate as Python that `read` takes.

    Raises:
        ValueError: a function that is not in `FUNCTIONS`.
    """
    lines = [f"def loss({', '.join([*genome.tensors, *genome.scalars])}):"]
    for target, function, args in genome.body:
        if function not in _PYTHON:
            raise ValueError(f"candidates are of the functions {', '.join(FUNCTIONS)}, got {function}")
        template = _PYTHON[function]
        if function in _BOUNDED and isinstance(args[1], float):
            template = _BOUNDED[function]
        lines.append(f"    {target} = {template.format(*map(str, args))}")
    return "\n".join([*lines, "    return loss", ""])
