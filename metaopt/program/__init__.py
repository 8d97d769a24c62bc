"""The expression language: ops, programs, tracing a rule, running it, writing it as source."""

from metaopt.program.build import compiler
from metaopt.program.cpp import CppStep, compile_cpp, cpp_source
from metaopt.program.inplace import compile_in_place, in_place_source
from metaopt.program.loss import ProgramObjective
from metaopt.program.ops import MATRIX_OPS, OPS, REDUCTIONS, MatrixOp, Op, Reduction
from metaopt.program.parse import ProgramTextError, parse_loss, parse_program
from metaopt.program.program import Program, Statement, evaluate, evaluate_tree
from metaopt.program.source import python_source
from metaopt.program.statements import (
    loss_statements_schema,
    read_loss,
    read_rule_statements,
    rule_statements_schema,
)
from metaopt.program.trace import TraceError, global_norm, global_sum, trace, where

__all__ = [
    "MATRIX_OPS",
    "OPS",
    "REDUCTIONS",
    "CppStep",
    "MatrixOp",
    "Op",
    "Program",
    "ProgramObjective",
    "ProgramTextError",
    "Reduction",
    "Statement",
    "TraceError",
    "compile_cpp",
    "compile_in_place",
    "compiler",
    "cpp_source",
    "evaluate",
    "evaluate_tree",
    "global_norm",
    "global_sum",
    "in_place_source",
    "loss_statements_schema",
    "parse_loss",
    "parse_program",
    "python_source",
    "read_loss",
    "read_rule_statements",
    "rule_statements_schema",
    "trace",
    "where",
]
