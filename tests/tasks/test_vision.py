"""Vision transformers and MLP-Mixers: the same functions as torch.nn's modules with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from metaopt.rule import Params
from metaopt.task import Task
from metaopt_tasks.mixer import mixer
from metaopt_tasks.vit import patches, vit


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def disturbed(params: Params) -> Params:
    """No biases at zero and no norms at one, which would hide mistakes."""
    return {name: p + 0.1 * torch.randn(p.shape, generator=generator(len(name))) for name, p in params.items()}


def images(task: Task, count: int = 5) -> Tensor:
    return task.train.tensors["input"][:count]


def load(module: nn.Module, params: Params, prefix: str, names: dict[str, str]) -> None:
    """Our parameters ``prefix + value`` as the module's ``key``; what it has besides (biases of attention) is 0."""
    state = {key: torch.zeros_like(p) for key, p in module.state_dict().items()}
    for key, name in names.items():
        for part in ("weight", "bias"):
            if f"{prefix}{name}.{part}" in params:
                state[key.replace("*", part)] = params[f"{prefix}{name}.{part}"]
    module.load_state_dict(state)


ENCODER_LAYER = {
    "norm1.*": "norm1", "self_attn.in_proj_*": "qkv", "self_attn.out_proj.*": "proj",
    "norm2.*": "norm2", "linear1.*": "fc1", "linear2.*": "fc2",
}  # fmt: skip


def test_patches_times_a_matrix_are_a_strided_convolution() -> None:
    x = torch.randn(2, 3, 6, 9, generator=generator(0))
    kernel = torch.randn(5, 3, 3, 3, generator=generator(1))
    expected = F.conv2d(x, kernel, stride=3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(x, 3) @ kernel.flatten(1).T, expected, rtol=1e-4, atol=1e-5)
    series = torch.randn(2, 3, 12, generator=generator(0))
    kernel = torch.randn(5, 3, 4, generator=generator(1))
    expected = F.conv1d(series, kernel, stride=4).transpose(1, 2)
    torch.testing.assert_close(patches(series, 4) @ kernel.flatten(1).T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("data", ["digits", "mnist1d"])
def test_vit_equals_torch_s_transformer_encoder_with_the_same_weights(data: str, pool: str) -> None:
    task = vit(data=data, patch=4, width=12, layers=2, heads=3, pool=pool)
    params = disturbed(task.init(generator(0)))
    h = patches(images(task), 4) @ params["patch.weight"].T + params["patch.bias"] + params["position.embedding"]
    if pool == "class":
        h = torch.cat([params["class.embedding"].expand(5, 1, 12), h], 1)
    for i in (1, 2):
        block = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        load(block, params, f"block{i}.", ENCODER_LAYER)
        h = block(h)
    h = F.layer_norm(h, (12,), params["norm.weight"], params["norm.bias"])
    h = h.mean(1) if pool == "mean" else h[:, 0]
    expected = F.linear(h, params["head.weight"], params["head.bias"])
    torch.testing.assert_close(task.logits(params, images(task)), expected, rtol=1e-4, atol=1e-5)


def test_vit_without_positions_sees_a_bag_of_patches() -> None:
    task = vit(patch=2, width=8, heads=1)
    params = task.init(generator(0))
    x = images(task)
    swapped = x.roll(2, -1)  # moves whole patches
    assert not torch.allclose(task.logits(disturbed(params), x), task.logits(disturbed(params), swapped))
    params["position.embedding"] = torch.zeros_like(params["position.embedding"])
    torch.testing.assert_close(task.logits(params, x), task.logits(params, swapped), rtol=1e-4, atol=1e-6)


def test_mixer_equals_modules_of_torch_with_the_same_weights() -> None:
    task = mixer(patch=2, width=12, layers=2, token_width=5, channel_width=7)
    params = disturbed(task.init(generator(0)))
    h = patches(images(task), 2) @ params["patch.weight"].T + params["patch.bias"]
    for i in (1, 2):
        for part, outer, inner in (("token", 16, 5), ("channel", 12, 7)):
            name = f"block{i}.{part}."
            norm, mlp = nn.LayerNorm(12), nn.Sequential(nn.Linear(outer, inner), nn.GELU(), nn.Linear(inner, outer))
            load(norm, params, name, {"*": "norm"})
            load(mlp, params, name, {"0.*": "fc1", "2.*": "fc2"})
            h = h + (mlp(norm(h).mT).mT if part == "token" else mlp(norm(h)))
    h = F.layer_norm(h, (12,), params["norm.weight"], params["norm.bias"]).mean(1)
    expected = F.linear(h, params["head.weight"], params["head.bias"])
    torch.testing.assert_close(task.logits(params, images(task)), expected, rtol=1e-4, atol=1e-5)


def test_roles_are_exact() -> None:
    def by_role(task: Task, role: str) -> set[str]:
        return {name for name, info in task.info().items() if info.role == role}

    transformer, mixing = vit(layers=1, pool="class"), mixer(layers=1)
    for task in (transformer, mixing):
        assert by_role(task, "input") == {"patch.weight"}
        assert by_role(task, "output") == {"head.weight"}
    assert by_role(transformer, "embedding") == {"position.embedding", "class.embedding"}
    assert by_role(transformer, "hidden") == {f"block1.{name}.weight" for name in ("qkv", "proj", "fc1", "fc2")}
    assert by_role(mixing, "hidden") == {
        f"block1.{part}.{fc}.weight" for part in ("token", "channel") for fc in ("fc1", "fc2")
    }
    assert by_role(mixing, "norm") == {"block1.token.norm.weight", "block1.channel.norm.weight", "norm.weight"}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (vit, {"patch": 3}, r"patch must divide the inputs' size \(8, 8\), got 3"),
        (vit, {"width": 10, "heads": 4}, "width must be a multiple of heads"),
        (vit, {"pool": "max"}, "pool must be one of mean, class"),
        (mixer, {"patch": 5}, "patch must divide"),
        (mixer, {"norm": "batch"}, "norm must be one of layer, rms"),
    ],
)
def test_bad_arguments_are_refused_with_the_allowed_ones(make: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
