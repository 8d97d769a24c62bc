"""The kernel's losses and gradients are those that torch's autograd gives in float64.

Blocks are summed in float32, so entries differ by some roundings of the largest: 4e-6 of it allows for thirty or so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaopt.dense.network import ACTIVATIONS, LOSSES, DenseNetwork
from metaopt.rule import Params
from metaopt_kernels.dense import MOST_LAYERS, PRECISIONS, WIDEST, Shape, dense_gradients, gradients_source
from metaopt_tasks.mlp import mlp_classifier

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: inf - inf and the like

FUNCTIONS = {
    "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "softplus": F.softplus, "tanh": torch.tanh,
    "sin": torch.sin, "linear": lambda z: z,
}  # fmt: skip


def network_of(layers: int, activation: str = "relu", loss: str = "cross_entropy", **options: float) -> DenseNetwork:
    return DenseNetwork(tuple((f"fc{i}.weight", f"fc{i}.bias") for i in range(layers)), activation, loss, **options)


def drawn(
    network: DenseNetwork, widths: Sequence[int], batch: int, device: torch.device, copies: int = 2
) -> tuple[Params, Tensor, Tensor]:
    """Parameters [K, ...], inputs and targets; biases that are not 0 see that padding is not counted."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    params = {}
    for (weight, bias), (fan_in, fan_out) in zip(network.layers, pairwise(widths), strict=True):
        params |= {weight: normal(copies, fan_out, fan_in) / fan_in**0.5, bias: normal(copies, fan_out)}
    if network.loss == "mse":
        return params, normal(copies, batch, widths[0]), normal(copies, batch, widths[-1])
    labels = torch.randint(widths[-1], (copies, batch), generator=generator)
    return params, normal(copies, batch, widths[0]), labels.to(device)


def loss_of(network: DenseNetwork, params: Params, x: Tensor, target: Tensor) -> Tensor:
    """One copy's, by torch."""
    for i, (weight, bias) in enumerate(network.layers):
        x = F.linear(FUNCTIONS[network.activations[i - 1]](x) if i else x, params[weight], params[bias])
    match network.loss:
        case "cross_entropy":
            return F.cross_entropy(x, target, label_smoothing=network.label_smoothing)
        case "squared_error":
            return (x - F.one_hot(target, x.shape[1]) + 1 / x.shape[1]).square().sum(1).mean()
        case "hinge":
            return F.multi_margin_loss(x, target)
        case _:
            return F.mse_loss(x, target)


def exact(network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor) -> tuple[Tensor, Params]:
    """Losses [K] and gradients in float64, copy by copy."""
    wide = {name: p.double().requires_grad_() for name, p in params.items()}
    targets = target if target.dtype == torch.int64 else target.double()
    losses = torch.stack(
        [
            loss_of(network, {name: p[k] for name, p in wide.items()}, inputs[k].double(), targets[k])
            for k in range(len(inputs))
        ]
    )
    return losses.detach(), dict(zip(wide, torch.autograd.grad(losses.sum(), [*wide.values()]), strict=True))


def assert_agree(network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor) -> None:
    done = dense_gradients(network, params, inputs, target)
    assert done is not None
    losses, grads = exact(network, params, inputs, target)
    torch.testing.assert_close(done[0].double(), losses, rtol=4e-6, atol=0)
    assert done[1].keys() == params.keys()
    for name, grad in grads.items():
        assert (done[1][name] - grad).abs().max() <= 4e-6 * grad.abs().max(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_passes_gradients_as_torch_does(activation: str, device: torch.device) -> None:
    network = network_of(3, activation)
    assert_agree(network, *drawn(network, (7, 20, 5, 3), 6, device))


def test_each_layer_may_have_an_activation_of_its_own(device: torch.device) -> None:
    layers = tuple((f"fc{i}.weight", f"fc{i}.bias") for i in range(4))
    network = DenseNetwork(layers, ("relu", "linear", "softplus"), "mse")
    assert_agree(network, *drawn(network, (7, 20, 3, 5, 7), 6, device))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_torchs(loss: str, device: torch.device) -> None:
    network = network_of(2, "softplus", loss)  # whose value at the padding's 0 is not 0
    assert_agree(network, *drawn(network, (5, 17, 3), 18, device))


def test_smoothed_labels(device: torch.device) -> None:
    network = network_of(2, label_smoothing=0.3)
    assert_agree(network, *drawn(network, (5, 6, 3), 4, device))


@pytest.mark.parametrize(
    ("widths", "batch"), [((1, 1), 1), ((16, 16, 16), 16), ((9, 8, 7, 6, 5), 2), ((128, 33, 2), 65)]
)
def test_any_number_of_layers_and_any_width(widths: tuple[int, ...], batch: int, device: torch.device) -> None:
    network = network_of(len(widths) - 1, "tanh", "mse")
    assert_agree(network, *drawn(network, widths, batch, device))


def test_logits_that_overflow_exp_have_a_finite_loss(device: torch.device) -> None:
    network = network_of(2)
    params, inputs, labels = drawn(network, (5, 6, 3), 4, device)
    params["fc1.weight"] *= 1e3
    assert_agree(network, params, inputs, labels)


def test_parameters_may_lie_in_memory_in_any_order(device: torch.device) -> None:
    network = network_of(2)
    params, inputs, labels = drawn(network, (5, 6, 3), 4, device)
    params["fc0.weight"] = params["fc0.weight"].mT.contiguous().mT
    assert_agree(network, params, inputs.mT.contiguous().mT, labels)


def test_the_digits_task_hands_its_loss_over(device: torch.device) -> None:
    task = mlp_classifier(hidden=(12,), activation="gelu", label_smoothing=0.1, batch_size=10, device=device)
    assert task.dense is not None
    params = {name: p[None].to(device) for name, p in task.init(torch.Generator().manual_seed(0)).items()}
    batch = task.train.take(torch.arange(10, device=device))
    done = dense_gradients(
        task.dense, params, batch[task.dense.inputs].flatten(1)[None], batch[task.dense.target][None]
    )
    assert done is not None
    alone = {name: p[0].requires_grad_() for name, p in params.items()}
    loss, _ = task.training_loss(alone, {}, batch)
    torch.testing.assert_close(done[0][0], loss.detach(), rtol=1e-6, atol=0)
    for name, grad in zip(alone, torch.autograd.grad(loss, [*alone.values()]), strict=True):
        torch.testing.assert_close(done[1][name][0], grad, rtol=0, atol=4e-6 * float(grad.abs().max()))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("loss", ["cross_entropy", "hinge"])
def test_nan_stays_in_its_copy_and_is_seen_there(activation: str, loss: str, device: torch.device) -> None:
    network = network_of(2, activation, loss)
    params, inputs, labels = drawn(network, (5, 6, 3), 4, device)
    clean = dense_gradients(network, params, inputs, labels)
    params["fc0.weight"][1, 0, 0] = torch.nan
    broken = dense_gradients(network, params, inputs, labels)
    assert clean is not None and broken is not None
    assert broken[0][1].isnan()
    assert torch.equal(broken[0][0], clean[0][0])
    for name, grad in clean[1].items():
        assert torch.equal(broken[1][name][0], grad[0])


def test_what_does_not_fit_is_left_to_torch(device: torch.device) -> None:
    network = network_of(2)
    params, inputs, labels = drawn(network, (5, 6, 3), 4, device)

    def refused(network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor) -> bool:
        return dense_gradients(network, params, inputs, target) is None

    assert not refused(network, params, inputs, labels)
    assert refused(network, {name: p.double() for name, p in params.items()}, inputs.double(), labels)
    assert refused(network, params, inputs.half(), labels)
    assert refused(network, params | {"scale": labels.float()}, inputs, labels)
    assert refused(network, params, inputs[..., :4], labels)
    assert refused(network_of(2, loss="mse"), params, inputs, labels)
    assert refused(network, params, inputs[:, :0], labels[:, :0])
    for widths, batch in [((5, WIDEST + 1, 3), 4), ((5, 6, 3), WIDEST + 1), ((4,) * (MOST_LAYERS + 2), 4)]:
        large = network_of(len(widths) - 1)
        assert refused(large, *drawn(large, widths, batch, device))
    whole = network_of(3)  # each block would do, but not all together
    assert refused(whole, *drawn(whole, (WIDEST,) * 4, WIDEST, device))


def test_an_unknown_precision_is_refused(device: torch.device) -> None:
    network = network_of(1)
    with pytest.raises(ValueError, match="precision must be one of tf32x3, tf32, ieee, got 'fp64'"):
        dense_gradients(network, *drawn(network, (5, 3), 4, device), precision="fp64")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_states_its_precision_and_every_copy_is_found_with_64_bits(precision: str) -> None:
    source = gradients_source(network_of(2), Shape((64, 32, 10), 64), precision)
    assert source.count("tl.dot(") == source.count(f'input_precision="{precision}"') == 5
    assert "copy = tl.program_id(0).to(tl.int64)" in source
