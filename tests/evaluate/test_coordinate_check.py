"""The coordinate check sees what torch's own hooks see, and tells parametrisations apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor, nn

from metaopt import registry
from metaopt.evaluate.coordinate_check import CoordinateCheck, coordinate_check, layer_outputs
from metaopt.random import hash64, sample_indices
from metaopt.task import Task
from metaopt_classic.adam import AdamW
from metaopt_classic.muon import Muon
from metaopt_classic.mup import MuP
from metaopt_classic.sgd import SGD
from metaopt_tasks.mlp import mlp_classifier

WIDTHS = (32, 64, 128, 256)


def mlp(width: int) -> Task:
    return mlp_classifier(hidden=(width, width, width))


def module_task(width: int = 4) -> Task:
    generator = Generator().manual_seed(0)
    data = torch.randint(5, (16, 6), generator=generator), torch.randint(3, (16,), generator=generator)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(5, width), nn.Conv1d(6, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * (width - 2), 3)
        )

    return Task.from_module(build, nn.functional.cross_entropy, {"train": data}, batch_size=8)


def test_layer_outputs_are_those_that_forward_hooks_of_a_module_see() -> None:
    task = module_task()
    params = task.init(Generator().manual_seed(1))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(6, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(14, 3))
    model.load_state_dict(params)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, __, out, name=name: seen.update({f"{name}.weight": out.detach().flatten()})
        )
    batch = task.train.take(torch.arange(8))
    model(batch["input"])
    outputs = layer_outputs(task, params, batch)
    assert list(outputs) == ["0.weight", "1.weight", "4.weight"]
    for name, output in outputs.items():
        torch.testing.assert_close(output, seen[name])


def test_a_weight_that_is_handed_over_by_name_is_seen() -> None:
    class Named(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, weight=self.weight, bias=self.bias)

    data = torch.ones(4, 2), torch.ones(4, 3)
    task = Task.from_module(lambda: Named(2, 3), nn.functional.mse_loss, {"train": data}, batch_size=4)
    assert list(layer_outputs(task, task.init(Generator().manual_seed(0)), task.train.tensors)) == ["weight"]


def test_first_change_of_a_linear_models_logits_is_the_gradient_step_by_hand() -> None:
    task = mlp_classifier(hidden=(), batch_size=2000)  # its probe is the whole training set, in order
    found = coordinate_check(lambda _: task, SGD(lr=0.5), (1, 2), steps=1, seeds=[3])
    model = nn.Linear(64, 10)
    init = task.init(Generator().manual_seed(int(hash64(torch.tensor([3]))[0])))
    model.load_state_dict({name.removeprefix("fc1."): value for name, value in init.items()})
    inputs, labels = task.train.tensors["input"].flatten(1), task.train.tensors["label"]
    before = model(inputs).detach()
    drawn = sample_indices(torch.tensor([3]), torch.tensor([0]), 2000, len(inputs))[0]
    nn.functional.cross_entropy(model(inputs[drawn]), labels[drawn]).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    expected = (model(inputs) - before).abs().mean().item()
    assert found.moved["fc1.weight"][0] == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "like"),
    [
        (AdamW(lr=0.002), "adam"),
        (SGD(lr=0.1), "sgd"),
        (Muon(lr=0.002), "adam"),
        (Muon(lr=0.002, scaling="original"), "muon"),
    ],
    ids=["adamw", "sgd", "muon with the size of adam's steps", "muon of fixed spectral norm"],
)
def test_no_layer_of_an_mlp_moves_more_or_less_with_width_under_mup(rule: AdamW | SGD | Muon, like: str) -> None:
    slopes = coordinate_check(mlp, MuP(rule, mlp(WIDTHS[0]).info(), like=like), WIDTHS, steps=4).slopes()
    assert all(abs(slope) < 0.15 for slope in slopes.values()), slopes
    plain = coordinate_check(mlp, rule, WIDTHS, steps=4).slopes()
    assert plain["fc4.weight"] > 0.35, "with one learning rate for all, logits blow up with width"


@pytest.mark.parametrize(
    ("prefix", "widths", "lr"), [("mup_conv_w", (8, 16, 32), 2e-3), ("mup_transformer_w", (16, 32, 64), 5e-3)]
)
def test_the_suites_width_scaled_members_pass_it_under_mup_and_only_there(
    prefix: str, widths: tuple[int, ...], lr: float
) -> None:
    def member(width: int) -> Task:
        return registry.create("task", f"{prefix}{width}")

    rule = MuP(AdamW(lr=lr), member(widths[0]).info())
    slopes = coordinate_check(member, rule, widths, seeds=(0, 1)).slopes()
    assert all(abs(slope) < 0.3 for slope in slopes.values()), slopes
    plain = coordinate_check(member, AdamW(lr=lr), widths, seeds=(0, 1)).slopes()
    assert max(plain.values()) > 0.5


def test_slope_of_an_exact_power_law_is_its_exponent() -> None:
    moved = {"a": [[9.0, 2.0 * width**0.5] for width in WIDTHS], "b": [[1.0, math.nan] for _ in WIDTHS]}
    slopes = CoordinateCheck(list(WIDTHS), moved).slopes()
    assert slopes["a"] == pytest.approx(0.5)
    assert math.isnan(slopes["b"]), "a run that diverged gives no slope"


def test_one_width_is_refused() -> None:
    with pytest.raises(ValueError, match="widths must be at least two"):
        coordinate_check(mlp, AdamW(), [16])
