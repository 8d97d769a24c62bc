"""A candidate update rule: read from what a proposer wrote, checked, and printed as Python."""

from __future__ import annotations

from typing import ClassVar

from metaopt.program.parse import parse_program
from metaopt.program.source import function_source
from metaopt_symbolic.analysis import without_redundant
from metaopt_symbolic.genome import Genome, GenomeError, from_program, parse
from metaopt_symbolic.population import MOST_VARIABLES
from metaopt_symbolic.proposals.candidate import Behaviour, CandidateValidator, behaviour_of
from metaopt_symbolic.rule_file import learning_rate
from metaopt_symbolic.rules.judge import Score
from metaopt_symbolic.search import STUDY

SCALARS = ("lr", "t")
"""The numbers of a rule: its learning rate, tuned and with a schedule, and the step, from 1."""


def read(source: str) -> Genome:
    """A candidate as a genome, without what does nothing.

    Args:
        source: a program of the search language, or what `metaopt.program.parse.parse_program` takes, of ``lr`` and ``t``.

    Raises:
        ValueError: neither, other numbers, or a rule that is too long.
    """
    try:
        genome = parse(source)
    except GenomeError:
        program = parse_program(source)
        others = [name for name in program.scalars if name not in SCALARS]
        if others:
            raise ValueError(
                f"a rule's numbers are lr and t, got {others[0]!r}; write its value where it is used"
            ) from None
        genome = from_program(program)
    if genome.is_loss or len(genome.tensors) < 2 or not {*genome.scalars} <= {*SCALARS}:
        raise ValueError("a candidate is a function of parameter, gradient and state, lr and perhaps t")
    names = {*genome.tensors, *genome.scalars, *genome.outputs, *(a.target for a in genome.body)}
    if len(names) > MOST_VARIABLES:
        raise ValueError(
            f"a rule may have {MOST_VARIABLES} values, state and what every operation computes included, got {len(names)}; "
            "propose a shorter one"
        )
    return without_redundant(genome)


class RuleValidator(CandidateValidator[Score]):
    """Update rules as candidates."""

    study: ClassVar[str] = STUDY
    measure: ClassVar[str] = "validation loss"
    language: ClassVar[str] = "rule"
    score = Score

    def read(self, source: str) -> Genome:
        """See `read`."""
        return read(source)

    def behaviour(self, genome: Genome) -> Behaviour:
        """What a rule does; where one number multiplies ``lr``, at 1 in its place, since learning rates are tuned.

        Raises:
            ValueError: no program, updates that are no finite numbers, or that do not depend on the gradient.
        """
        rate = learning_rate(genome)
        at_one = genome if rate is None else genome.scaled(1 / rate)
        return behaviour_of(
            at_one.program(),
            not_finite="the update is no finite number for some gradients of sizes from 1e-4 to 1; mind divisions by 0, and "
            "roots and logarithms of what is not above 0",
            inert="the update does not depend on the gradient, so nothing would be learnt",
        )

    def python(self, genome: Genome) -> str:
        """A rule as Python that `read` takes."""
        return f"{function_source(genome.program(named=True), 'rule')}\n"

    def trained(self, genome: Genome) -> Genome:
        """The rule itself."""
        return genome
