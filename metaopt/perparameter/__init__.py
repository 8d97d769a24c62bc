"""Learned rules that run one small network on features of every parameter: the features, the rule, its executions."""

from metaopt.perparameter.features import (
    Decays,
    Features,
    Slots,
    accumulate,
    factored_axes,
    inputs,
    norm_axes,
    normalised,
    zero_slots,
)
from metaopt.perparameter.rule import (
    TIME_SCALES,
    Layers,
    PerParameterRule,
    Prepared,
    layers_with_time,
    once,
    random_layers,
    run_layers,
)

__all__ = [
    "TIME_SCALES",
    "Decays",
    "Features",
    "Layers",
    "PerParameterRule",
    "Prepared",
    "Slots",
    "accumulate",
    "factored_axes",
    "inputs",
    "layers_with_time",
    "norm_axes",
    "normalised",
    "once",
    "random_layers",
    "run_layers",
    "zero_slots",
]
