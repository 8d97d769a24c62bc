"""Features that respect the symmetry of networks: hidden neurons may be put in any order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from metaopt.learned import LearnedRule, Theta
from metaopt.perparameter import layers_with_time, random_layers, run_layers
from metaopt.perparameter.features import normalised
from metaopt.perparameter.rule import TIME_SCALES
from metaopt.rule import Context, HyperValues, ParamInfo, Params, State, compute_dtype, hp_of
from metaopt.space import hyper, option

MOMENTUM_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
SUMMARIES = 7
"""How many features `equivariant_features` makes of one."""


class Neurons(NamedTuple):
    """Which neurons the two sides of a parameter belong to.

    Attributes:
        outputs, inputs: (axis, layer): the axis that runs over neurons, and the number of their layer; None where a
            parameter has no such side. Axes of one layer have one length and are permuted together.
    """

    outputs: tuple[int, int] | None
    inputs: tuple[int, int] | None

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Those that are there."""
        return tuple(side for side in self if side is not None)


def feed_forward_neurons(info: Mapping[str, ParamInfo]) -> dict[str, Neurons]:
    """The layers of neurons of a feed-forward network, read from the order of its parameters.

    A weight's input side is the output side of the weight before it, and a vector belongs to the output side of the
    weight before it, where lengths agree; other sides are layers of their own. Where this links axes that have nothing
    to do with each other (branches and residual connections of one width), features are equivariant to fewer permutations
    than the network is; axes that are not linked cost none of it.
    """
    found: dict[str, Neurons] = {}
    layers = 0
    last: tuple[int, int] | None = None  # number and size of the layer that the last weight led to
    for name, facts in info.items():
        shape = facts.shape
        if not shape:
            found[name] = Neurons(None, None)
            continue
        matrix = len(shape) > 1
        out_axis = 1 if matrix and facts.role == "embedding" else 0  # [tokens, width]
        reads = shape[1 - out_axis] if matrix else shape[0]
        linked = last is not None and last[1] == reads
        layer = last[0] if last is not None and linked else layers
        layers += int(not linked)
        if matrix:
            found[name] = Neurons((out_axis, layers), (1 - out_axis, layer))
            last, layers = (layers, shape[out_axis]), layers + 1
        else:
            found[name] = Neurons((0, layer), None)
    return found


def equivariant_features(features: Mapping[str, Tensor], neurons: Mapping[str, Neurons]) -> dict[str, Tensor]:
    """Every feature with its means over what it has in common with others: an equivariant map of weight space.

    A permutation of the neurons of any layer permutes the results as it permutes the inputs. For a weight W of layer l
    the seven are: the feature itself; its mean over each output neuron's entries of W, and over each input neuron's;
    the mean, over all tensors that touch it, of the same means of that output neuron, and of that input neuron (so
    neighbouring layers and biases share what they know of a neuron); the mean over W; and the mean over all tensors of
    their means. Positions of kernels are averaged over. A missing side has the mean over the tensor in its place.

    These are terms of the general equivariant linear map between two weight tensors, with one set of coefficients for all
    pairs of tensors (the papers have one per pair), so that it applies to any network: Zhou et al., 2023,
    "Permutation equivariant neural functionals" (https://arxiv.org/abs/2302.14040), and Zhou, Finn and Harrison, 2024,
    "Universal neural functionals", algorithm 1 (https://arxiv.org/abs/2402.05232).

    Args:
        features: name -> [F, *shape].
        neurons: of the same names, such as `feed_forward_neurons`.

    Returns:
        name -> [7 F, *shape].
    """
    whole = {name: _mean_except(value, None) for name, value in features.items()}
    overall = torch.stack([value.to(next(iter(whole.values()))) for value in whole.values()]).mean(0)
    of_layer: dict[int, list[Tensor]] = {}
    for name, value in features.items():
        for axis, layer in neurons[name].sides:
            of_layer.setdefault(layer, []).append(_mean_except(value, axis))
    shared = {layer: torch.stack([v.to(values[0]) for v in values]).mean(0) for layer, values in of_layer.items()}
    found = {}
    for name, value in features.items():
        planes = [value]
        for side in neurons[name]:
            if side is None:
                planes += [_along(whole[name], None, value)] * 2
            else:
                axis, layer = side
                planes += [_along(means, axis, value) for means in (_mean_except(value, axis), shared[layer])]
        planes += [_along(means, None, value) for means in (whole[name], overall)]
        found[name] = torch.cat(planes)
    return found


def _mean_except(value: Tensor, axis: int | None) -> Tensor:
    """Means [F, n] of ``value`` [F, *shape] over all axes of shape but one; [F] for None. No entries have mean 0."""
    kept = {0} if axis is None else {0, axis + 1}
    others = [dim for dim in range(value.dim()) if dim not in kept]
    count = math.prod([value.shape[dim] for dim in others])
    return value.sum(others) / max(count, 1) if others else value


def _along(means: Tensor, axis: int | None, value: Tensor) -> Tensor:
    """``means`` [F] or [F, n] broadcast to ``value`` [F, *shape], n along ``axis`` of shape."""
    shape = [len(value)] + [1] * (value.dim() - 1)
    if axis is not None:
        shape[axis + 1] = value.shape[axis + 1]
    return means.to(value).reshape(shape).expand_as(value)


class ResidualMLP(LearnedRule):
    r"""A hand-designed direction, corrected by a small network on equivariant features of the weights.

    .. math:: p \leftarrow p - \eta\, \alpha\, (d + \beta\, \mathrm{MLP}(\Phi(p, g, m_1, \dots, m_6, t)))

    d is the momentum :math:`m \leftarrow \gamma_0 m + g`, or Adam's direction with :math:`\gamma_0` for its first decay and
    0.999 for its second; alpha, beta and gamma_0 are meta-parameters, :math:`m_k` are moving averages of the gradient
    (decays 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), and p, g and m_k are divided by their root mean squares over the tensor.
    ``equivariant``: Phi adds `equivariant_features` over the neurons of `feed_forward_neurons` to them; else the network
    sees each parameter by itself. t enters by tanh(t / tau - 1). The learned optimizer of Zhou, Finn and Harrison, 2024,
    section 4.2, "Universal neural functionals" (https://arxiv.org/abs/2402.05232), with one equivariant layer followed by
    a network on each entry, and weights that do not depend on the architecture that is trained.
    """

    lr: float = hyper(1.0, 0.0, scale="log", search=(0.1, 10.0), doc="multiplies the whole step")
    hidden: int = option(16, low=1, doc="width of the network")
    equivariant: bool = option(True, choices=(False, True), doc="mix features over rows, columns and layers")
    direction: str = option("momentum", choices=("momentum", "adam"), doc="the hand-designed direction d")

    def init_theta(self, generator: Generator) -> Theta:
        """`random_layers`; alpha = 0.01 (Adam's: 0.001), beta = 0.1 and gamma_0 = 0.9."""
        planes = self._features() + len(TIME_SCALES)
        theta: Theta = {}
        for i, (weight, bias) in enumerate(random_layers((planes, self.hidden, self.hidden, 1), generator)):
            theta[f"w{i}"], theta[f"b{i}"] = weight, bias
        theta["log_step"] = torch.tensor(math.log(0.01 if self.direction == "momentum" else 0.001))
        theta["correction"] = torch.tensor(0.1)
        theta["log_forget"] = torch.tensor(math.log(1 - 0.9))
        return theta

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """``averages`` [6, *shape], ``direction`` [*shape] and for Adam ``square`` [*shape]: zeros, float32 or better."""
        state: State = {}
        for name, param in params.items():
            zeros = param.new_zeros(param.shape, dtype=compute_dtype(param.dtype))
            slots = {"averages": zeros.expand(len(MOMENTUM_DECAYS), *param.shape).clone(), "direction": zeros}
            slots |= {"square": zeros.clone()} if self.direction == "adam" else {}
            state[name] = {"step": param.new_zeros((), dtype=torch.int64), **slots}
        return state

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        steps, new_state, seen = {}, {}, {}
        for name, param in params.items():
            dtype = compute_dtype(param.dtype)
            grad = grads[name].to(dtype)
            steps[name], slots = self._direct(theta, grad, state[name])
            planes = torch.cat([param.to(dtype).unsqueeze(0), grad.unsqueeze(0), slots["averages"]])
            seen[name] = normalised(planes, tuple(range(param.dim())), 1e-5)
            new_state[name] = {"step": state[name]["step"] + 1, **slots}
        if self.equivariant and seen:
            neurons = feed_forward_neurons({name: ctx.info[name] for name in params})
            seen = equivariant_features(seen, neurons)
        layers = layers_with_time(tuple((theta[f"w{i}"], theta[f"b{i}"]) for i in range(3)), state, params, ctx)
        new_params = {}
        for name, param in params.items():
            dtype = seen[name].dtype
            moved = steps[name] + theta["correction"].to(dtype) * run_layers(layers[name], seen[name])[0]
            moved = hp_of(hp, name)["lr"] * torch.exp(theta["log_step"].to(dtype)) * moved
            new_params[name] = (param.to(dtype) - moved).to(param.dtype)
        return new_params, new_state

    def _features(self) -> int:
        """Inputs of the network besides time: p, g and the averages, each with its summaries."""
        return (2 + len(MOMENTUM_DECAYS)) * (SUMMARIES if self.equivariant else 1)

    def _direct(self, theta: Theta, grad: Tensor, slots: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The hand-designed direction of one tensor, and its new slots."""
        decays = torch.tensor(MOMENTUM_DECAYS, dtype=grad.dtype, device=grad.device)
        decays = decays.reshape(-1, *(1,) * grad.dim())
        new = {"averages": decays * slots["averages"] + (1 - decays) * grad}
        gamma = 1 - torch.exp(theta["log_forget"].to(grad.dtype)).clamp(1e-6, 1.0)
        if self.direction == "momentum":
            new["direction"] = gamma * slots["direction"] + grad
            return new["direction"], new
        t = (slots["step"] + 1).to(grad.dtype)
        new["direction"] = gamma * slots["direction"] + (1 - gamma) * grad
        new["square"] = 0.999 * slots["square"] + 0.001 * grad * grad
        first, second = new["direction"] / (1 - gamma**t), new["square"] / (1 - 0.999**t)
        return first * torch.rsqrt(second + 1e-16), new
