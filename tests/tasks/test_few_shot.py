"""Few-shot learning: episodes that cannot be learnt by heart, and the exact gradient through the inner steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from metaopt.random import uniform
from metaopt_tasks.data.episodes import class_episodes, curve_episodes
from metaopt_tasks.data.load import load
from metaopt_tasks.few_shot import few_shot


def leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.double().requires_grad_() for name, p in params.items()}


@pytest.mark.parametrize("data", ["sine_episodes", "digits_5way_1shot"])
def test_loss_and_gradient_are_those_of_autograd_through_a_torch_module(data: str) -> None:
    task = few_shot(data=data, hidden=(7,), inner_steps=3, inner_lr=0.2)
    params = leaves(task.init(Generator().manual_seed(0)))
    episodes = {k: v.double() if v.is_floating_point() else v for k, v in task.train.take(torch.arange(3)).items()}
    answer = "label" if "support_label" in episodes else "target"
    criterion = nn.CrossEntropyLoss() if answer == "label" else nn.MSELoss()
    sizes = (params["fc1.weight"].shape[1], 7, len(params["head.bias"]))
    module = nn.Sequential(nn.Linear(sizes[0], 7), nn.Tanh(), nn.Linear(7, sizes[2])).double()
    names = {"fc1.weight": "0.weight", "fc1.bias": "0.bias", "head.weight": "2.weight", "head.bias": "2.bias"}
    total = 0.0
    for e in range(3):
        weights = {names[name]: p for name, p in params.items()}
        for _ in range(3):
            prediction = functional_call(module, weights, episodes["support_input"][e])
            loss = criterion(prediction, episodes[f"support_{answer}"][e])
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - 0.2 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        query = functional_call(module, weights, episodes["query_input"][e])
        total = total + criterion(query, episodes[f"query_{answer}"][e]) / 3
    mine = task.loss(params, episodes)
    torch.testing.assert_close(mine, total, rtol=1e-10, atol=1e-12)
    mine_slopes, slopes = (torch.autograd.grad(loss, list(params.values())) for loss in (mine, total))
    for a, b in zip(mine_slopes, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_learned_inner_rate_has_the_right_slope() -> None:
    task = few_shot(data="triangle_episodes", hidden=(4,), inner_steps=2, learned_lr=True)
    params = leaves(task.init(Generator().manual_seed(0)))
    batch = {name: t.double() for name, t in task.train.take(torch.arange(2)).items()}
    rate = params.pop("log_inner_lr")
    assert rate.exp().item() == pytest.approx(0.1)
    fixed = {name: p.detach() for name, p in params.items()}
    assert torch.autograd.gradcheck(lambda r: task.loss(fixed | {"log_inner_lr": r}, batch), [rate])


def test_one_inner_step_of_a_linear_model_is_the_textbook_update() -> None:
    task = few_shot(data="sine_episodes", hidden=(), inner_steps=1, inner_lr=0.3)
    zero = {name: torch.zeros_like(p) for name, p in task.init(Generator().manual_seed(0)).items()}
    x, y = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[2.0], [1.0], [0.0]])
    adapted = task.adapt(zero, x, y)
    torch.testing.assert_close(adapted["head.weight"], 0.3 * 2 * (y.T @ x) / 3)
    torch.testing.assert_close(adapted["head.bias"], 0.3 * 2 * y.mean(0))


def test_every_sine_episode_is_one_sine_wave_in_both_sets() -> None:
    tensors = curve_episodes(curve="sine")["test"].tensors
    for e in range(20):
        x, y = (torch.cat([tensors[f"support_{k}"][e], tensors[f"query_{k}"][e]]).double() for k in ("input", "target"))
        angle = (x * 5 / math.sqrt(3)).numpy()
        basis = np.concatenate([np.sin(angle), np.cos(angle)], 1)
        fit = np.linalg.lstsq(basis, y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(basis @ fit, y, atol=1e-5)


def test_class_episodes_keep_classes_together_and_their_numbers_change() -> None:
    episodes = class_episodes(source="digits", ways=5, shots=2, queries=3)["valid"].tensors
    source = load("digits")["valid"].tensors
    rows = {
        tuple(image.tolist()): int(label)
        for image, label in zip(source["input"].flatten(1), source["label"], strict=True)
    }
    numbering = set()
    for e in range(30):
        seen = set()
        classes: dict[int, set[int]] = {}
        for part, per_class in (("support", 2), ("query", 3)):
            labels = episodes[f"{part}_label"][e]
            assert labels.bincount().tolist() == [per_class] * 5
            for image, label in zip(episodes[f"{part}_input"][e], labels, strict=True):
                seen.add(tuple(image.tolist()))
                classes.setdefault(int(label), set()).add(rows[tuple(image.tolist())])
        assert len(seen) == 25, "no example twice, so none in both sets"
        assert all(len(digits) == 1 for digits in classes.values())
        numbering.add(next(iter(classes[0])))
    assert len(numbering) > 5


def test_sources_too_small_for_their_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="episodes need 5 classes of 5 examples, got 3 classes"):
        class_episodes(source="iris", ways=5)


def test_episodes_are_drawn_before_training_and_do_not_depend_on_keys() -> None:
    task = few_shot(data="sine_episodes")
    params, batch = task.init(Generator().manual_seed(0)), task.train.take(torch.arange(4))
    ignored = {"random": uniform(torch.tensor(1), (1,)).long()}
    assert torch.equal(task.loss(params, batch), task.loss(params, batch | ignored))
