"""The expression language: ops, programs, tracing a rule, running it, writing it as source."""

from metaopt.program.ops import OPS, Op
from metaopt.program.program import Program, Statement, evaluate
from metaopt.program.source import python_source
from metaopt.program.trace import TraceError, trace, where

__all__ = ["OPS", "Op", "Program", "Statement", "TraceError", "evaluate", "python_source", "trace", "where"]
