"""What a kernel is told of a learned rule: once, and before every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metaopt import tree
from metaopt.perparameter.features import Decays, Features
from metaopt.rule import State

Layers = tuple[tuple[Tensor, Tensor], ...]
"""A network: weight [in, out] and bias [out] of each layer, ReLU between them."""


class Prepared(NamedTuple):
    """What one step needs besides gradients, parameters and accumulators: small tensors, of one copy.

    Attributes:
        decays: of the accumulators.
        layers: the network of each parameter; inputs are the features alone, whatever else enters (time) is in the first bias.
        scale: 0-d per parameter: the step is this times the network's direction; holds lr.
        keep: 0-d per parameter: what is left of the old value (weight decay); 1 = all.
        memory: further slots of each parameter's new state (an LSTM's).
    """

    decays: Decays
    layers: Mapping[str, Layers]
    scale: Mapping[str, Tensor]
    keep: Mapping[str, Tensor]
    memory: State

    def map(self, function: Callable[[Tensor], Any]) -> Prepared:
        """The same with ``function`` of every tensor."""
        layers = {
            name: tuple((function(weight), function(bias)) for weight, bias in layers)
            for name, layers in self.layers.items()
        }
        rest = (tree.map_tree(function, dict(part)) for part in (self.scale, self.keep, self.memory))
        return Prepared(tree.map_tree(function, dict(self.decays)), layers, *rest)

    def of(self, name: str) -> tuple[Decays, Layers, Tensor, Tensor]:
        """Decays, network, scale and keep of one parameter."""
        return self.decays, self.layers[name], self.scale[name], self.keep[name]

    def distinct(self) -> dict[int, Tensor]:
        """The tensors by their ids; parameters share most."""
        found: dict[int, Tensor] = {}
        self.map(lambda value: found.setdefault(id(value), value))
        return found


class Step(NamedTuple):
    """What a kernel of one rule depends on besides its networks.

    Attributes:
        features: what the networks see.
        magnitude: the constant of the exponent; None without one.
        own_finish: whether the networks' outputs are written in place of new parameters.
        direction_eps: of an own finish that normalises the direction (`PerParameterRule.direction_eps`); None: another.
    """

    features: Features
    magnitude: float | None
    own_finish: bool
    direction_eps: float | None
