"""Permuting hidden neurons permutes features and updates; features are the means that they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learned_cases import values

from metaopt.learned import Theta
from metaopt.rule import Context, Params, infer_info
from metaopt_learned.equivariant import Neurons, ResidualMLP, equivariant_features, feed_forward_neurons

# a convolution with a pooled output, a hidden layer and a head
SHAPES = {
    "conv.weight": (6, 3, 2, 2), "conv.bias": (6,), "middle.weight": (5, 6), "middle.bias": (5,), "norm": (5,),
    "head.weight": (4, 5), "head.bias": (4,), "temperature": (),
}  # fmt: skip


def permuted(tree: Params, lead: int = 0) -> Params:
    """Channels of the convolution and units of the middle layer in another order; ``lead`` axes stand before the shape."""
    channels, units = torch.tensor([2, 0, 1, 5, 3, 4]), torch.tensor([4, 2, 0, 1, 3])
    axes = {
        "conv.weight": [(0, channels)], "conv.bias": [(0, channels)], "middle.weight": [(0, units), (1, channels)],
        "middle.bias": [(0, units)], "norm": [(0, units)], "head.weight": [(1, units)],
    }  # fmt: skip
    found = dict(tree)
    for name, moves in axes.items():
        for axis, order in moves:
            found[name] = found[name].index_select(axis + lead, order)
    return found


def test_neurons_of_a_feed_forward_network_are_linked_layer_by_layer() -> None:
    shapes = {"emb.weight": (9, 6), **{name: s for name, s in SHAPES.items() if not name.startswith("conv")}}
    found = feed_forward_neurons(infer_info(values(0, shapes)))
    assert found["emb.weight"] == Neurons((1, 1), (0, 0)), "an embedding is [tokens, width]"
    assert found["middle.weight"] == Neurons((0, 2), (1, 1))
    assert found["middle.bias"] == found["norm"] == Neurons((0, 2), None)
    assert found["head.weight"] == Neurons((0, 3), (1, 2))
    assert found["temperature"] == Neurons(None, None)


def test_sizes_that_do_not_agree_are_not_linked() -> None:
    shapes = {"a": (5, 3), "b": (7, 6), "c": (7,), "d": (2,)}
    found = feed_forward_neurons(infer_info(values(0, shapes)))
    layers = [layer for neurons in found.values() for _, layer in neurons.sides]
    assert layers == [1, 0, 3, 2, 3, 4]


def test_features_are_the_means_of_rows_columns_layers_and_tensors() -> None:
    shapes = {"w": (3, 2), "b": (3,), "v": (4, 3)}
    given = values(0, shapes, planes=(2,))
    found = equivariant_features(given, feed_forward_neurons(infer_info(values(0, shapes))))
    w, b, v = (given[name].numpy() for name in ("w", "b", "v"))
    everything = (w.mean((1, 2)) + b.mean(1) + v.mean((1, 2))) / 3
    hidden = (w.mean(2) + b + v.mean(1)) / 3  # of the 3 hidden neurons, over all that touches them
    ones = np.ones((2, 3, 2))
    wanted = np.concatenate([
        w, w.mean(2)[:, :, None] * ones, hidden[:, :, None] * ones,
        w.mean(1)[:, None] * ones, w.mean(1)[:, None] * ones,  # nothing else touches the inputs
        w.mean((1, 2))[:, None, None] * ones, everything[:, None, None] * ones,
    ])  # fmt: skip
    np.testing.assert_allclose(found["w"].numpy(), wanted, rtol=1e-12, atol=1e-14)
    whole = b.mean(1)[:, None] * np.ones((2, 3))
    wanted = np.concatenate([b, b, hidden, whole, whole, whole, everything[:, None] * np.ones((2, 3))])
    np.testing.assert_allclose(found["b"].numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_permuted_neurons_give_permuted_features_and_no_others() -> None:
    neurons = feed_forward_neurons(infer_info(values(0, SHAPES)))
    given = values(0, SHAPES, planes=(3,))
    plain, moved = equivariant_features(given, neurons), equivariant_features(permuted(given, 1), neurons)
    wanted = permuted(plain, 1)
    for name in SHAPES:
        torch.testing.assert_close(moved[name], wanted[name], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(moved["middle.weight"], plain["middle.weight"])


def trained(learned: ResidualMLP, theta: Theta, params: Params, grads: list[Params]) -> Params:
    info = infer_info(params)
    state = learned.init(params, info, theta)
    for t, grad in enumerate(grads):
        params, state = learned.update(theta, grad, state, params, learned.hp, Context(info, step=torch.tensor(t)))
    return params


def theta_of(learned: ResidualMLP) -> Theta:
    return {key: value.double() for key, value in learned.init_theta(torch.Generator().manual_seed(0)).items()}


@pytest.mark.parametrize("direction", ["momentum", "adam"])
@pytest.mark.parametrize("equivariant", [True, False])
def test_permuting_hidden_neurons_permutes_the_update(equivariant: bool, direction: str) -> None:
    learned = ResidualMLP(equivariant=equivariant, direction=direction)
    grads = [values(10 + t, SHAPES) for t in range(3)]
    plain = trained(learned, theta_of(learned), values(1, SHAPES), grads)
    moved = trained(learned, theta_of(learned), permuted(values(1, SHAPES)), [permuted(g) for g in grads])
    for name, wanted in permuted(plain).items():
        torch.testing.assert_close(moved[name], wanted, rtol=1e-11, atol=1e-12)


def test_layers_see_their_neighbours_only_where_features_are_equivariant() -> None:
    grads = [values(10 + t, SHAPES) for t in range(2)]
    other = [{**g, "head.weight": g["head.weight"] * torch.tensor([1.0, -2.0, 1.0, 3.0, 0.5])} for g in grads]
    for equivariant in (True, False):
        learned = ResidualMLP(equivariant=equivariant)
        found = [trained(learned, theta_of(learned), values(1, SHAPES), g) for g in (grads, other)]
        assert torch.equal(found[0]["middle.bias"], found[1]["middle.bias"]) == (not equivariant)


@pytest.mark.parametrize("direction", ["momentum", "adam"])
def test_update_is_the_docstrings_formula(direction: str) -> None:
    learned = ResidualMLP(equivariant=False, direction=direction, hidden=5)
    theta = theta_of(learned)
    numbers = {key: value.numpy() for key, value in theta.items()}
    grads = [values(10 + t, SHAPES) for t in range(4)]
    found = trained(learned, theta, values(1, SHAPES), grads)
    decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]
    gamma = 1 - np.exp(numbers["log_forget"])
    scales = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
    for name in ("middle.weight", "norm", "temperature"):
        p = values(1, SHAPES)[name].numpy().reshape(-1)
        averages, d, square = np.zeros((6, p.size)), np.zeros_like(p), np.zeros_like(p)
        for t in range(4):
            g = grads[t][name].numpy().reshape(-1)
            averages = decays * averages + (1 - decays) * g
            square = 0.999 * square + 0.001 * g * g
            d = gamma * d + (g if direction == "momentum" else (1 - gamma) * g)
            adam = d / (1 - gamma ** (t + 1)) / np.sqrt(square / (1 - 0.999 ** (t + 1)) + 1e-16)
            planes = np.stack([p, g, *averages])
            planes = planes / np.sqrt((planes**2).mean(1, keepdims=True) + 1e-5)
            times = np.tile(np.tanh(t / scales - 1)[:, None], p.size)
            layer = np.concatenate([planes, times])
            for i in range(3):
                layer = numbers[f"w{i}"].T @ (np.maximum(layer, 0) if i else layer) + numbers[f"b{i}"][:, None]
            step = d if direction == "momentum" else adam
            p = p - np.exp(numbers["log_step"]) * (step + numbers["correction"] * layer[0])
        np.testing.assert_allclose(found[name].numpy().reshape(-1), p, rtol=1e-10, atol=1e-12)
