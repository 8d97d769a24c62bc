"""A Program: an update rule, or a loss, as straight-line statements over scalars and tensor elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt.program.ops import COMPARISONS, MATRIX_OPS, OPS, REDUCTIONS, Reduction

Arg = str | float
"""The name of an input or an earlier statement, or a constant."""


@dataclass(frozen=True)
class Statement:
    """``target = op(*args)``."""

    target: str
    op: str
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Program:
    """Statements in single-assignment form.

    Attributes:
        scalars: names of the hyperparameters (tuples flattened: ``beta1``), and of a rule ``t``.
        tensors: of a rule ``param``, ``grad``, then the state slots; of a loss its inputs, which have a value per example.
        statements: in order of execution, each target assigned once.
        outputs: of a rule what the parameter and each slot become, in the order ``param, *slots``; of a loss, the loss.

    Raises:
        ValueError: an unknown op, a wrong number of arguments, a name used before it is assigned, or a reduction or matrix
            operation of what is no tensor.
    """

    scalars: tuple[str, ...]
    tensors: tuple[str, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[Arg, ...]

    def __post_init__(self) -> None:
        known = set(self.scalars) | set(self.tensors)
        for s in self.statements:
            if s.op not in OPS and s.op not in REDUCTIONS and s.op not in MATRIX_OPS:
                names = ", ".join([*OPS, *REDUCTIONS, *MATRIX_OPS])
                raise ValueError(f"unknown operation {s.op!r}; the language has {names}")
            arity = OPS[s.op].arity if s.op in OPS else 1
            if len(s.args) != arity:
                raise ValueError(f"{s.op} takes {arity} arguments, got {len(s.args)} in {s.target}")
            if not s.target.isidentifier() or s.target in known:
                raise ValueError(f"{s.target!r} must be a new identifier; every statement assigns a name once")
            self._require(known, s.args)
            known.add(s.target)
        expected = len(self.tensors) - 1 if self.is_rule else 1
        if not self.tensors or len(self.outputs) != expected:
            raise ValueError(f"a program over {self.tensors} has {expected} outputs, got {len(self.outputs)}")
        self._require(known, self.outputs)
        for s in self.statements:
            if s.op not in OPS and s.args[0] not in self.element_names:
                raise ValueError(f"{s.op} in {s.target} is of {s.args[0]!r}, which has one value per tensor already")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Program, (self.scalars, self.tensors, self.statements, self.outputs))  # not what was cached

    @staticmethod
    def _require(known: set[str], args: tuple[Arg, ...]) -> None:
        for arg in args:
            if isinstance(arg, str) and arg not in known:
                raise ValueError(f"{arg!r} is used before it is assigned")

    @property
    def is_rule(self) -> bool:
        """Whether it is an update rule, or else a loss."""
        return self.tensors[:2] == ("param", "grad")

    @cached_property
    def scalar_names(self) -> frozenset[str]:
        """Everything that is one number for a whole tensor: computed once per step, outside every kernel."""
        names = set(self.scalars)
        for s in self.statements:
            if s.op in OPS and all(not isinstance(arg, str) or arg in names for arg in s.args):
                names.add(s.target)
        return frozenset(names)

    @cached_property
    def element_names(self) -> frozenset[str]:
        """Everything that has a value per element of a tensor; what is neither this nor scalar has one per tensor."""
        names = set(self.tensors)
        for s in self.statements:
            counts = s.op in MATRIX_OPS and MATRIX_OPS[s.op].counts
            if s.op not in REDUCTIONS and not counts and not names.isdisjoint(s.args):
                names.add(s.target)
        return frozenset(names)

    @cached_property
    def scalars_read(self) -> tuple[str, ...]:
        """Those of `scalars` that make a difference."""
        used = {arg for s in self.statements for arg in s.args} | set(self.outputs)
        return tuple(name for name in self.scalars if name in used)

    @cached_property
    def reach(self) -> Literal["element", "tensor", "matrix", "tree"]:
        """How far the new value of an element looks: at its own values, at all of its tensor, at its row and column, or at
        all tensors."""
        over = {reduction.over for reduction in self.reductions}
        if "tree" in over:
            return "tree"
        return "matrix" if self.matrix_ops else "tensor" if over else "element"

    @cached_property
    def reductions(self) -> tuple[Reduction, ...]:
        """The reductions among its statements, in order."""
        return tuple(REDUCTIONS[s.op] for s in self.statements if s.op in REDUCTIONS)

    @cached_property
    def matrix_ops(self) -> frozenset[str]:
        """The matrix operations among its statements: tensors need their shapes."""
        return frozenset(s.op for s in self.statements if s.op in MATRIX_OPS)

    @cached_property
    def prelude(self) -> tuple[Statement, ...]:
        """The scalar statements."""
        return tuple(s for s in self.statements if s.target in self.scalar_names)

    @cached_property
    def kernel(self) -> tuple[Statement, ...]:
        """The statements on tensors."""
        return tuple(s for s in self.statements if s.target not in self.scalar_names)

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """The scalars that the kernel reads: its arguments beside the tensors."""
        used = {arg for s in self.kernel for arg in s.args} | set(self.outputs)
        ordered = [*self.scalars, *(s.target for s in self.prelude)]
        return tuple(name for name in ordered if name in used)

    @cached_property
    def _prelude_on_floats(self) -> Callable[..., dict[str, float]]:
        """The prelude as one Python function of the scalars, for speed; its text holds numbered names only."""
        names = {name: f"x{i}" for i, name in enumerate((*self.scalars, *(s.target for s in self.prelude)))}
        functions: dict[str, Any] = {f"f_{name}": op.scalar for name, op in OPS.items()}
        lines = [f"def prelude({', '.join(names[name] for name in self.scalars_read)}):"]
        for s in self.prelude:
            arguments = ", ".join(names[a] if isinstance(a, str) else _literal(a) for a in s.args)
            lines.append(f"    {names[s.target]} = f_{s.op}({arguments})")
        lines.append(f"    return {{{', '.join(f'{name!r}: {names[name]}' for name in self.coefficients)}}}")
        exec("\n".join(lines), functions)
        return functions["prelude"]

    @cached_property
    def _kernel_on_tensors(self) -> Callable[..., Any]:
        """``run(dtype, *tensors, *coefficients)``: the kernel on one tensor; see `_written`."""
        return self._written((*self.tensors, *self.coefficients), self.kernel)

    @cached_property
    def _all_on_tensors(self) -> Callable[..., Any]:
        """``run(dtype, *tensors, *scalars)``: all statements on one tensor and floats; see `_written`."""
        return self._written((*self.tensors, *self.scalars_read), self.statements)

    def _written(self, inputs: tuple[str, ...], statements: tuple[Statement, ...]) -> Callable[..., Any]:
        """Statements as one Python function of ``dtype, *inputs``, for speed; its text holds numbered names only.

        With reductions it is a generator, which yields what each is of and is sent the number.
        """
        names = {name: f"x{i}" for i, name in enumerate((*inputs, *(s.target for s in statements)))}
        functions: dict[str, Any] = {"converted": _converted, "as_tensor": _as_tensor}
        conditions = {s.target for s in self.kernel if s.op in COMPARISONS}
        lines = [f"def run(dtype, {', '.join(names[name] for name in inputs)}):"]
        for s in statements:
            arguments = ", ".join(names[a] if isinstance(a, str) else _literal(a) for a in s.args)
            if s.op in REDUCTIONS:
                value = f"yield {arguments}"
            elif s.target in self.scalar_names:
                value, functions[f"s_{s.op}"] = f"s_{s.op}({arguments})", OPS[s.op].scalar
            elif s.op == "where" or not conditions.isdisjoint(s.args):
                value = f"converted({s.op!r}, [{arguments}], dtype)"
            else:
                value, functions[f"f_{s.op}"] = f"f_{s.op}({arguments})", _plain(s.op)
            lines.append(f"    {names[s.target]} = {value}")
        computed = {s.target for s in self.kernel if s.op in OPS and s.target in self.element_names} - conditions
        outputs = [names[out] if isinstance(out, str) else _literal(out) for out in self.outputs]
        whole = [
            text if out in computed else f"as_tensor({text}, x0)"
            for text, out in zip(outputs, self.outputs, strict=True)
        ]
        exec("\n".join([*lines, f"    return [{', '.join(whole)}]"]), functions)
        return functions["run"]

    def scalar_values(self, scalars: Mapping[str, Any]) -> dict[str, Any]:
        """Run the prelude on floats or on float64 tensors; returns the kernel's `coefficients`."""
        values: dict[str, Any] = {name: _wide(scalars[name]) for name in self.scalars_read}
        if not any(isinstance(value, Tensor) for value in values.values()):  # each step of an optimizer: make it quick
            return self._prelude_on_floats(*values.values())
        for s in self.prelude:
            args = [values[arg] if isinstance(arg, str) else arg for arg in s.args]
            op = OPS[s.op]
            if any(isinstance(arg, Tensor) for arg in args):
                values[s.target] = op.plain(*_operands(s.op, args, torch.float64))
            else:
                values[s.target] = op.scalar(*args)
        return {name: values[name] for name in self.coefficients}


def reduction_depths(statements: Sequence[Statement]) -> dict[Arg, int]:
    """How many reductions, one after another, each value waits for, itself included where it is one."""
    depths: dict[Arg, int] = {}
    for s in statements:
        depths[s.target] = max((depths.get(arg, 0) for arg in s.args), default=0) + (s.op in REDUCTIONS)
    return depths


def _literal(number: float) -> str:
    return repr(number) if math.isfinite(number) else f"float('{number!r}')"


def _wide(value: Any) -> Any:
    """Scalars are computed in float64: 1 - 0.999**t in float32 is wrong by 6e-5 at the first step.

    A number that nothing records or transforms becomes Python's, with which the prelude is much quicker.
    """
    if not isinstance(value, Tensor):
        return float(value)
    plain = type(value) is Tensor and value.is_cpu and not value.dim() and not value.requires_grad
    if plain and not torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return float(value)
    return value.to(torch.float64)


def evaluate(program: Program, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> list[Tensor]:
    """Run ``program`` out of place on plain tensors: differentiable, vmap-safe, the reference of all executions.

    Args:
        program: what to run.
        tensors: one tensor per name in ``program.tensors``, all of one shape and floating dtype.
        scalars: a float or 0-d tensor per name in ``program.scalars``.

    Returns:
        The new parameter and slots, or the loss, in the tensors' dtype.
    """
    return evaluate_tree(program, [tensors], scalars)[0]


def evaluate_tree(
    program: Program, tree: Sequence[Mapping[str, Tensor]], scalars: Mapping[str, Any]
) -> list[list[Tensor]]:
    """As `evaluate`, on all parameters of a tree: reductions over the tree see them together.

    Args:
        program: what to run.
        tree: per parameter one tensor per name in ``program.tensors``; all of one floating dtype.
        scalars: a float or 0-d tensor per name in ``program.scalars``.

    Returns:
        Per parameter the new parameter and slots.
    """
    dtype = tree[0][program.tensors[0]].dtype
    run, numbers = program._all_on_tensors, []
    for name in program.scalars_read:
        value = scalars[name]
        if type(value) is not float:
            value = _wide(value)
        if isinstance(value, Tensor):
            coefficients = program.scalar_values(scalars).values()
            numbers = [value.to(dtype) if isinstance(value, Tensor) else value for value in coefficients]
            run = program._kernel_on_tensors
            break
        numbers.append(value)
    runs = [run(dtype, *map(leaf.__getitem__, program.tensors), *numbers) for leaf in tree]
    if not program.reductions:
        return runs
    columns = [next(run) for run in runs]
    *before, last = program.reductions
    for reduction in before:
        columns = [run.send(number) for run, number in zip(runs, _reduced(reduction, columns, dtype), strict=True)]
    return [_last(run, number) for run, number in zip(runs, _reduced(last, columns, dtype), strict=True)]


def _last(run: Generator[Tensor, Tensor, list[Tensor]], number: Tensor) -> list[Tensor]:
    """What a run gives once it is sent its last number."""
    try:
        run.send(number)
    except StopIteration as end:
        return end.value
    raise AssertionError("a kernel yields once per reduction")


def _reduced(reduction: Reduction, columns: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The number that each tensor of the tree gets."""
    columns = [column.to(dtype) for column in columns]
    sums, counts = [reduction.part(column).sum() for column in columns], [column.numel() for column in columns]
    if reduction.over == "tree":
        sums, counts = [sum(sums[1:], sums[0])] * len(sums), [sum(counts)] * len(counts)
    return [reduction.finish(total, count) for total, count in zip(sums, counts, strict=True)]


def _converted(op: str, args: list[Any], dtype: torch.dtype) -> Tensor:
    """The operation, where conditions have to be made numbers or numbers conditions."""
    value = _plain(op)(*_operands(op, args, dtype))
    return value.to(dtype) if op == "where" else value


def _plain(op: str) -> Callable[..., Any]:
    return MATRIX_OPS[op].plain if op in MATRIX_OPS else OPS[op].plain


def _operands(op: str, args: list[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments as torch expects them: a condition is a bool tensor, a comparison used as a number is 1 or 0."""
    numbers = [arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype == torch.bool else arg for arg in args]
    if op != "where":
        return numbers
    condition, *branches = args[0], *numbers[1:]
    if not isinstance(condition, Tensor):
        like = next(branch for branch in branches if isinstance(branch, Tensor))
        condition = torch.full((), bool(condition), device=like.device)
    return [condition if condition.dtype == torch.bool else condition != 0, *branches]


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == like.dim():
        return value.to(like.dtype)
    return torch.zeros_like(like) + value
