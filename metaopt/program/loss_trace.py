"""Trace the text of a loss, which may use statistics of the batch and has no matrices."""

from __future__ import annotations

from typing import Any

from metaopt.program.ops import MATRIX_OPS
from metaopt.program.program import Program
from metaopt.program.trace import Symbol, TraceError, Tracer, renamed, without_dead

STATISTICS = ("mean", "std", "sum", "var")
"""Of the examples of a batch; ``std`` and ``var`` are the unbiased ones, NaN for one example, as in torch."""


class LossTracer(Tracer):
    """A tracer to whom all tensors together are the batch, so that sums over it are ``global_sum``."""

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        """A torch function or tensor method, by name."""
        if name in MATRIX_OPS:
            raise TraceError(f"{name} is of matrices, and a loss has one number per example")
        if name not in STATISTICS or name == "mean":
            return super().call(name, args, kwargs)
        if len(args) != 1 or kwargs:
            raise TraceError(f"{name} of a loss is of the whole batch: write x.{name}()")
        (x,) = args
        if name == "sum":
            return self.emit("global_sum", x)
        deviation = self.emit("sub", x, self.emit("mean", x))
        examples = self.emit("global_sum", self.emit("pow", x, 0.0))
        squares = self.emit("global_sum", self.emit("mul", deviation, deviation))
        variance = self.emit("div", squares, self.emit("sub", examples, 1.0))
        return variance if name == "var" else self.emit("sqrt", variance)


def loss_program(
    tracer: LossTracer, tensors: tuple[str, ...], scalars: tuple[str, ...], value: Any, names: dict[str, str]
) -> Program:
    """The program of a traced loss.

    Args:
        tracer: what has its statements.
        tensors: names of what the loss is of.
        scalars: names of its numbers.
        value: the loss.
        names: statements -> what its author calls them.

    Raises:
        ValueError: the loss is no value per example, or a statistic is of what is none.
    """
    program = Program(scalars, tensors, tuple(tracer.statements), (tracer.arg(value),))
    if program.outputs[0] not in program.element_names:
        raise ValueError("the loss is one number for the whole batch; return one per example, before mean() or sum()")
    return renamed(without_dead(program), names)
