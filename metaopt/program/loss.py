"""A `Program` as an objective: what a search over losses trains with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.objective import INPUTS, Kind, Objective
from metaopt.program.program import Program, evaluate


class ProgramObjective(Objective):
    """The loss that a program computes.

    Attributes:
        code: over inputs of the kind.
        of: the kind.
        numbers: the values of the program's scalars, as pairs.

    Raises:
        ValueError: an update rule, inputs that the kind has not, or a scalar without a value.
    """

    code: Program
    of: Kind = "preference"
    numbers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        foreign = [name for name in self.code.tensors if name not in INPUTS[self.of]]
        if foreign:
            raise ValueError(
                f"a {self.of} objective reads {', '.join(INPUTS[self.of])}, the program {foreign[0]!r} too"
            )
        missing = set(self.code.scalars) - dict(self.numbers).keys()
        if missing:
            raise ValueError(
                f"numbers must give every scalar of the program a value; they lack {', '.join(sorted(missing))}"
            )

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """`of`."""
        return self.of

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the program reads."""
        return self.code.tensors

    @property
    def batch_dependent(self) -> bool:  # type: ignore[override]
        """Whether the program has a mean, a norm or a sum."""
        return self.code.reach != "element"

    @property
    def program(self) -> Program:
        """`code`."""
        return self.code

    def loss(self, *inputs: Tensor, **numbers: Any) -> Tensor:
        """Run the program on plain tensors."""
        return evaluate(self.code, dict(zip(self.inputs, inputs, strict=True)), {**dict(self.numbers), **numbers})[0]
