"""metaopt: write an update rule once; run, differentiate, meta-train, race and export it.

Names resolve when first used (PEP 562), so ``import metaopt`` imports no torch. A public name never equals the name
of a submodule: importing the submodule would replace it. Hence ``unroll`` is ``metaopt.unroll.unroll``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt.eight_bit import EightBitState
    from metaopt.evaluate.race import race
    from metaopt.export import write_module
    from metaopt.hookspecs import Spec, hookimpl
    from metaopt.learned import LearnedRule
    from metaopt.program import where
    from metaopt.registry import create, get, specs
    from metaopt.rule import Chain, Context, ElementwiseRule, GradientTransform, ParamInfo, TensorRule, UpdateRule
    from metaopt.space import hyper, learning_rate, option
    from metaopt.task import Split, Task, TaskFamily
    from metaopt.torch_optimizer import optimizer

    __version__: str

__all__ = [
    "Chain",
    "Context",
    "EightBitState",
    "ElementwiseRule",
    "GradientTransform",
    "LearnedRule",
    "ParamInfo",
    "Spec",
    "Split",
    "Task",
    "TaskFamily",
    "TensorRule",
    "UpdateRule",
    "__version__",
    "create",
    "get",
    "hookimpl",
    "hyper",
    "learning_rate",
    "optimizer",
    "option",
    "race",
    "specs",
    "where",
    "write_module",
]

_HOMES = {
    "metaopt.eight_bit": "EightBitState",
    "metaopt.evaluate": "race",
    "metaopt.export": "write_module",
    "metaopt.hookspecs": "Spec hookimpl",
    "metaopt.learned": "LearnedRule",
    "metaopt.program": "where",
    "metaopt.registry": "create get specs",
    "metaopt.rule": "Chain Context ElementwiseRule GradientTransform ParamInfo TensorRule UpdateRule",
    "metaopt.space": "hyper learning_rate option",
    "metaopt.task": "Split Task TaskFamily",
    "metaopt.torch_optimizer": "optimizer",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("torch-metaopt")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
