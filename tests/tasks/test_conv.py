"""Convolutional and residual networks: the same functions as torch.nn's modules with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from metaopt import registry
from metaopt.rule import Params
from metaopt.task import Split, Task
from metaopt_tasks.conv import CHANNEL_NORMS, DOWNSAMPLES, ConvNet, channel_norm, conv_classifier, halved
from metaopt_tasks.layers import hidden_weight, output_weight
from metaopt_tasks.resnet import resnet


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def disturbed(params: Params) -> Params:
    """No biases at zero and no norms at one, which would hide mistakes."""
    return {name: p + 0.1 * torch.randn(p.shape, generator=generator(len(name))) for name, p in params.items()}


def images(task: Task, count: int = 5) -> Tensor:
    return task.train.tensors["input"][:count]


def test_digits_conv_starts_where_it_always_did() -> None:
    task = registry.create("task", "digits_conv")
    g = generator(3)
    expected = {
        "conv1.weight": hidden_weight((8, 1, 3, 3), g, math.sqrt(2)),
        "conv1.bias": torch.zeros(8),
        "conv2.weight": hidden_weight((16, 8, 3, 3), g, math.sqrt(2)),
        "conv2.bias": torch.zeros(16),
        "head.weight": output_weight((10, 64), g),
        "head.bias": torch.zeros(10),
    }
    params = task.init(generator(3))
    assert list(params) == list(expected)
    torch.testing.assert_close(params, expected, rtol=0, atol=0)
    assert (task.batch_size, task.horizon) == (64, 200)
    h = images(task)
    for name in ("conv1", "conv2"):
        h = torch.relu(F.conv2d(h, params[f"{name}.weight"], params[f"{name}.bias"], stride=2, padding=1))
    logits = F.linear(h.flatten(1), params["head.weight"], params["head.bias"])
    torch.testing.assert_close(task.logits(params, images(task)), logits)


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("norm", CHANNEL_NORMS)
def test_convnet_equals_a_module_of_torch_with_the_same_weights(downsample: str, norm: str) -> None:
    task = conv_classifier(channels=(4, 8), kernel=5, activation="gelu", norm=norm, downsample=downsample)
    params = disturbed(task.init(generator(0)))
    stride = 2 if downsample == "stride" else 1
    pools = {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2)}

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def normalizer(channels: int) -> nn.Module:
        return {"none": nn.Identity(), "layer": LayerNorm2d(channels), "group": nn.GroupNorm(channels // 4, channels)}[
            norm
        ]

    side = 8 if downsample == "none" else 2
    module = nn.Sequential(
        nn.Conv2d(1, 4, 5, stride, 2), normalizer(4), nn.GELU(), pools.get(downsample, nn.Identity()),
        nn.Conv2d(4, 8, 5, stride, 2), normalizer(8), nn.GELU(), pools.get(downsample, nn.Identity()),
        nn.Flatten(), nn.Linear(8 * side * side, 10),
    )  # fmt: skip
    # both lay out their parameters in the order of use
    module.load_state_dict(dict(zip(module.state_dict(), params.values(), strict=True)))
    torch.testing.assert_close(task.logits(params, images(task)), module(images(task)), rtol=1e-4, atol=1e-5)


def test_convnet_on_series_equals_a_module_of_torch_with_the_same_weights() -> None:
    task = conv_classifier(data="mnist1d", channels=(5, 6, 7), downsample="max", head="mean")
    params = disturbed(task.init(generator(0)))
    layers: list[nn.Module] = []
    for old, new in ((1, 5), (5, 6), (6, 7)):
        layers += [nn.Conv1d(old, new, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(7, 10))
    module.load_state_dict(dict(zip(module.state_dict(), params.values(), strict=True)))
    torch.testing.assert_close(task.logits(params, images(task)), module(images(task)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("downsample", ["stride", "max", "average"])
@pytest.mark.parametrize(("shape", "depth"), [((1, 25, 25), 3), ((3, 7, 10), 4), ((2, 13), 5)])
def test_maps_of_any_size_halve_rounding_up_down_to_one(downsample: str, shape: tuple[int, ...], depth: int) -> None:
    split = Split({"input": torch.randn(2, *shape, generator=generator(0)), "label": torch.tensor([0, 1])})
    task = ConvNet("", split, split, split, channels=(2,) * depth, downsample=downsample, classes=2)
    params = task.init(generator(0))
    assert params["head.weight"].shape[1] == 2 * math.prod(halved(shape[1:], depth))
    assert task.logits(params, split.tensors["input"]).shape == (2, 2)


def test_group_norm_makes_groups_of_four_channels_zero_mean_and_unit_variance() -> None:
    x = 3 + 2 * torch.randn(2, 8, 6, 6, generator=generator(0), dtype=torch.float64)
    params = {"n.weight": torch.ones(8).double(), "n.bias": torch.zeros(8).double()}
    groups = channel_norm(params, "n", x, "group").reshape(2, 2, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(groups.var(-1, correction=0), torch.ones(2, 2).double(), rtol=0, atol=1e-4)


class PreActivationBlock(nn.Module):
    """He et al. 2016, figure 4e, from torch's parts."""

    def __init__(self, old: int, new: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(old // 4, old), nn.Conv2d(old, new, 3, stride, 1)
        self.norm2, self.conv2 = nn.GroupNorm(new // 4, new), nn.Conv2d(new, new, 3, 1, 1)
        self.shortcut = nn.Conv2d(old, new, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu()) + self.shortcut(x)


def test_resnet_equals_a_module_of_torch_with_the_same_weights() -> None:
    task = resnet(width=4, stages=2, blocks=2)
    params = disturbed(task.init(generator(0)))
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1),
        PreActivationBlock(4, 4, 1), PreActivationBlock(4, 4, 1),
        PreActivationBlock(4, 8, 2), PreActivationBlock(8, 8, 1),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    module.load_state_dict(dict(zip(module.state_dict(), params.values(), strict=True)))
    torch.testing.assert_close(task.logits(params, images(task)), module(images(task)), rtol=1e-4, atol=1e-5)


def test_resnets_of_any_depth_start_with_gradients_of_one_size() -> None:
    def stem_gradient(blocks: int) -> float:
        task = resnet(width=8, stages=2, blocks=blocks)
        batch = task.train.take(torch.arange(64))
        return float(grad(task.loss)(task.init(generator(0)), batch)["stem.weight"].norm())

    assert 0.5 < stem_gradient(8) / stem_gradient(1) < 2


def test_flops_are_two_per_multiply_add_of_every_layer() -> None:
    task = registry.create("task", "digits_conv")
    per_image = 16 * 8 * 9 + 4 * 16 * 8 * 9 + 64 * 10  # outputs x inputs x kernel of each convolution, and the head
    assert task.forward_flops() == 2 * task.batch_size * per_image


def test_only_convolutions_that_fill_a_cpu_run_copy_by_copy() -> None:
    assert not registry.create("task", "digits_conv").compute_bound
    assert conv_classifier(channels=(64, 128), batch_size=256).compute_bound
    assert resnet(width=64, batch_size=128).compute_bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 4}, "kernel must be odd"),
        ({"channels": (6,), "norm": "group"}, "multiples of 4"),
        ({"channels": ()}, "channels must be one or more"),
        ({"downsample": "half"}, "downsample must be one of"),
        ({"norm": "batch"}, "norm must be one of none, layer, group"),
    ],
)
def test_bad_arguments_are_refused_with_the_allowed_ones(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_classifier(**arguments)
