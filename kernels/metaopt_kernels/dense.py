"""Loss and gradient of K dense networks in one launch: a program takes one copy through forward and backward passes.

A program holds the copy's whole batch and weights as blocks, whose sides are padded to powers of two of at least 16, the
least that ``tl.dot`` multiplies::

    inputs [B, n0] --w1 [n1, n0], b1--> z1 --activation--> a1 [B, n1] --w2 [n2, n1], b2--> ... --> outputs [B, nL] --> loss

The layers are chained by generated text (`network_source`), which `metaopt_kernels.dense_unroll` takes too; what it calls
is in `metaopt_kernels.dense_arithmetic`. In padding every weight, activation and slope is 0. Against torch in float32 losses
and gradients differ by rounding, about 1e-6 of the largest entry; with ``tf32`` by about 1e-3 of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.dense.network import DenseNetwork
from metaopt.rule import Params
from metaopt_kernels.aot import AotCase
from metaopt_kernels.network_source import padded
from metaopt_kernels.source import load_module
from metaopt_kernels.statements import IMPORTS

PRECISIONS = ("tf32x3", "tf32", "ieee")
"""Of matrix products: on the tensor cores, factors in two parts of 10 bits of mantissa each, or rounded to one; or float32
without these, whose unrolled code is for little networks only: at 128-64-16 it is one long spill."""

MOST_LAYERS = 4
WIDEST = 128
"""Units of a layer, inputs, and examples of a batch."""

_MOST_NUMBERS = 36 * 1024
"""Of all blocks of activations and weights, that they fit into a multiprocessor's 227 kB of shared memory with what else goes
there: up to 1.7 times as much (ahead-of-time compilation, Triton 3.6 and 3.9)."""

OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
"""Of every launch. The first makes elementwise arithmetic round as torch's does; in products a factor is still fused."""


class Shape(NamedTuple):
    """What a kernel is generated for besides the `DenseNetwork`: ``widths`` from inputs to outputs, and the ``batch``."""

    widths: tuple[int, ...]
    batch: int

    @property
    def activations(self) -> list[int]:
        """Sizes of the blocks of activations, in numbers."""
        return [padded(self.batch) * padded(width) for width in self.widths]

    @property
    def weights(self) -> list[int]:
        """Sizes of the blocks of weights, in numbers."""
        return [padded(fan_in) * padded(fan_out) for fan_in, fan_out in pairwise(self.widths)]


def dense_gradients(
    network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor, *, precision: str = "tf32x3"
) -> tuple[Tensor, Params] | None:
    """Losses [K] and gradients of K copies of ``network``, each on a batch of its own.

    Args:
        network: layers, activation and loss.
        params: float32 [K, *shape] each.
        inputs: float32 [K, B, D].
        target: [K, B] int64 classes, or float32 [K, B, outputs].
        precision: of matrix products, a name in `PRECISIONS`.

    Returns:
        None for other dtypes, parameters besides the layers', more than `MOST_LAYERS` layers, a width or batch beyond
        `WIDEST`, and what together does not fit into a multiprocessor.

    Raises:
        ValueError: a precision that is none.
    """
    shape = shape_of(network, params, inputs, target, inputs.shape[1])
    if shape is None:
        return None
    module = load_module(gradients_source(network, shape, precision), "dense_gradients")
    names = [name for layer in network.layers for name in layer]
    grads = {name: torch.empty_like(params[name], memory_format=torch.contiguous_format) for name in params}
    losses = torch.empty(len(inputs), dtype=torch.float32, device=inputs.device)
    with torch.cuda.device_of(inputs):
        module.gradients[(len(inputs),)](
            inputs.contiguous(), target.contiguous(), losses,
            *(params[name].contiguous() for name in names), *(grads[name] for name in names),
            num_warps=num_warps(shape, precision), **OPTIONS,
        )  # fmt: skip
    return losses, grads


def shape_of(network: DenseNetwork, params: Params, inputs: Tensor, target: Tensor, batch: int) -> Shape | None:
    """The shape of kernels for ``params`` [K, ...], ``inputs`` [..., D] and ``target``; None where there are none."""
    names = [name for layer in network.layers for name in layer]
    classes = target.dtype == torch.int64
    if {*names} != {*params} or len(network.layers) > MOST_LAYERS or classes == (network.loss == "mse"):
        return None
    floats = [inputs, *params.values()] if classes else [inputs, target, *params.values()]
    if any(value.dtype != torch.float32 for value in floats):
        return None
    widths = (inputs.shape[-1], *(params[weight].shape[1] for weight, _ in network.layers))
    for (weight, bias), ends in zip(network.layers, pairwise(widths), strict=True):
        if params[weight].shape[1:] != ends[::-1] or params[bias].shape[1:] != ends[1:]:
            return None
    shape = Shape(widths, batch)
    fits = (
        min(*widths, batch) >= 1
        and max(*widths, batch) <= WIDEST
        and sum(shape.activations + shape.weights) <= _MOST_NUMBERS
    )
    return shape if fits else None


def num_warps(shape: Shape, precision: str) -> int:
    """4; but 8 where a thread would have more than 32 numbers of the largest block, or 16 where products are unrolled."""
    return 8 if max(shape.activations + shape.weights) > (2048 if precision == "ieee" else 4096) else 4


# -- text --------------------------------------------------------------------------------------------------------------


_LOSS_AND_GRADIENTS = """\
@triton.jit
def loss_and_gradients(x, target, {params}):
    {forward}
    loss, d{last} = dense.{loss}(z{last}, target, {sizes})
    {backward}
    return loss, {grads}
"""

_GRADIENTS = """\
@triton.jit
def gradients(inputs, target, losses, {pointers}):
    {places}
    {loads}
    rows = copy * {batch} + at_batch
    {batch_loads}
    loss, {grads} = loss_and_gradients(x, y, {params})
    tl.store(losses + copy, loss)
    {stores}
"""

IMPORT = "from metaopt_kernels import dense_arithmetic as dense\n"


def tensors_of(shape: Shape) -> list[str]:
    """What generated text calls the parameters, in the order of the layers: ``w1, b1, w2, ...``."""
    return [f"{kind}{i}" for i in range(1, len(shape.widths)) for kind in "wb"]


def of(kind: str, names: Iterable[str]) -> list[str]:
    """What generated text calls a ``kind`` of tensors, one per parameter: ``grad_w1, grad_b1, ...``."""
    return [f"{kind}_{name}" for name in names]


def lines(found: Iterable[str], indent: int = 4) -> str:
    """As they stand in a template at ``indent``."""
    return ("\n" + " " * indent).join(found)


def network_source(network: DenseNetwork, shape: Shape, precision: str) -> str:
    """Text of ``loss_and_gradients(x, target, param_w1, ...) -> loss, grad_w1, ...`` on blocks.

    Inputs ``x`` [B, n0], weights [out, in] and biases are 0 in padding; gradients are too.

    Raises:
        ValueError: a precision that is none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    names, (widths, batch) = tensors_of(shape), shape
    last = len(widths) - 1
    how = f'input_precision="{precision}"'
    below = ["x", *(f"a{i}" for i in range(1, last))]
    forward, backward = [], []
    for i in range(1, last + 1):
        forward.append(f"z{i} = tl.dot({below[i - 1]}, tl.trans(param_w{i}), {how}) + param_b{i}[None, :]")
        if i < last:
            forward.append(f"a{i} = dense.{network.activations[i - 1]}(z{i})")
        if i < last and padded(widths[i]) > widths[i]:  # some activations of 0 are not 0
            forward.append(f"a{i} = tl.where(dense.columns_of(z{i}) < {widths[i]}, a{i}, 0.0)")
    for i in range(last, 0, -1):
        backward.append(f"grad_w{i} = tl.dot(tl.trans(d{i}), {below[i - 1]}, {how})")
        backward.append(f"grad_b{i} = tl.sum(d{i}, 0)")
        if i > 1:
            slope = f"dense.{network.activations[i - 2]}_slope(z{i - 1}, a{i - 1})"
            backward.append(f"d{i - 1} = tl.dot(d{i}, param_w{i}, {how}) * {slope}")
    sizes = f"{batch}, {widths[-1]}"
    return _LOSS_AND_GRADIENTS.format(
        params=", ".join(of("param", names)),
        grads=", ".join(of("grad", names)),
        forward=lines(forward),
        backward=lines(backward),
        last=last,
        loss=network.loss,
        sizes=f"{sizes}, {network.label_smoothing!r}" if network.loss == "cross_entropy" else sizes,
    )


def gradients_source(network: DenseNetwork, shape: Shape, precision: str) -> str:
    """Text of the module whose ``gradients`` is the kernel of `dense_gradients`."""
    names = tensors_of(shape)
    kernel = _GRADIENTS.format(
        pointers=", ".join(of("to_param", names) + of("to_grad", names)),
        params=", ".join(of("param", names)),
        grads=", ".join(of("grad", names)),
        places=lines(places_source(shape)),
        loads=lines(load_source("param", name) for name in names),
        batch=shape.batch,
        batch_loads=lines(batch_source(network, shape)),
        stores=lines(store_source("grad", name) for name in names),
    )
    return "\n\n".join([IMPORTS + IMPORT, network_source(network, shape, precision), kernel])


def places_source(shape: Shape) -> list[str]:
    """Where the copy's parameters are in their tensors (``at_w1``), and which numbers of a block are theirs (``in_w1``)."""
    widths, batch = shape
    found = ["copy = tl.program_id(0).to(tl.int64)"]
    found += [f"n{i} = tl.arange(0, {padded(width)})" for i, width in enumerate(widths)]
    found += [f"at_batch = tl.arange(0, {padded(batch)})", f"in_batch = at_batch < {batch}"]
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        found.append(f"at_w{i} = copy * {fan_out * fan_in} + n{i}[:, None] * {fan_in} + n{i - 1}[None, :]")
        found.append(f"in_w{i} = (n{i} < {fan_out})[:, None] & (n{i - 1} < {fan_in})[None, :]")
        found += [f"at_b{i} = copy * {fan_out} + n{i}", f"in_b{i} = n{i} < {fan_out}"]
    return found


def load_source(kind: str, name: str) -> str:
    """The copy's block of the tensor that ``to_{kind}_{name}`` points to."""
    return f"{kind}_{name} = tl.load(to_{kind}_{name} + at_{name}, mask=in_{name}, other=0.0)"


def store_source(kind: str, name: str) -> str:
    """The counterpart of `load_source`."""
    return f"tl.store(to_{kind}_{name} + at_{name}, {kind}_{name}, mask=in_{name})"


def batch_source(network: DenseNetwork, shape: Shape) -> list[str]:
    """The examples ``rows`` [B], int64: ``x`` and ``y``."""

    def matrix(pointer: str, i: int) -> str:
        width = shape.widths[i]
        at = f"rows[:, None] * {width} + n{i}[None, :]"
        return f"tl.load({pointer} + {at}, mask=in_batch[:, None] & (n{i} < {width})[None, :], other=0.0)"

    labels = "tl.load(target + rows, mask=in_batch, other=0).to(tl.int32)"
    y = matrix("target", len(shape.widths) - 1) if network.loss == "mse" else labels
    return [f"x = {matrix('inputs', 0)}", f"y = {y}"]


# -- ahead of time -----------------------------------------------------------------------------------------------------


DIGITS = DenseNetwork((("fc1.weight", "fc1.bias"), ("fc2.weight", "fc2.bias")), "relu", "cross_entropy")
"""The network of the digits tasks, 64-32-10."""


def aot_cases() -> list[AotCase]:
    """The gradient of digits' network on batches of 64 in every precision, and of the largest that an issue asks for."""
    digits, large = Shape((64, 32, 10), 64), Shape((128, 64, 16), 128)
    chosen = [(f"digits.{precision}", digits, precision) for precision in PRECISIONS]
    cases = []
    for name, shape, precision in [*chosen, ("large", large, PRECISIONS[0])]:
        module = load_module(gradients_source(DIGITS, shape, precision), "dense_gradients")
        cases.append(aot_case(f"dense.gradients.{name}", module.gradients, {}, num_warps(shape, precision)))
    return cases


def aot_case(name: str, kernel: Any, types: dict[str, str], warps: int) -> AotCase:
    """A kernel whose arguments are pointers to float32, but for ``target`` and those of other ``types``."""
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"target": "*i64"} | types
    aligned = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
    return AotCase(name, kernel, signature, {}, warps, aligned, OPTIONS)
