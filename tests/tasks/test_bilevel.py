"""Bilevel tasks: the inner run, its hypergradient, and outer parameters that do what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn
from torch.nn import functional as F

from metaopt.task import Batch, Task
from metaopt_tasks.bilevel import (
    hyper_cleaning,
    inner_and_outer,
    learned_augmentation,
    regression,
    weight_decay,
    with_one,
)


def whole(task: Task) -> Batch:
    return task.valid.take(torch.arange(len(task.valid)))


def test_inner_run_is_gradient_descent_on_the_weighted_and_decayed_cross_entropy() -> None:
    generator = Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (12,), generator=generator)
    shares = torch.rand(12, generator=generator, dtype=torch.float64) / 12
    decay = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    module = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    for _ in range(6):
        optimizer.zero_grad()
        errors = F.cross_entropy(module(inputs), label, reduction="none")
        (shares @ errors + (decay * module.weight.square()).sum() / 2).backward()
        optimizer.step()
    targets = F.one_hot(label, 3).T.double()
    torch.testing.assert_close(regression(inputs, targets, shares, 6, 0.4, decay), module.weight.detach())


def test_corrupted_labels_are_wrong_the_others_right_and_outer_examples_are_never_inner_ones() -> None:
    inner, outer, classes = inner_and_outer("digits", 100, 0.4, "cpu")
    clean, _, _ = inner_and_outer("digits", 100, 0.0, "cpu")
    assert classes == 10 and torch.equal(inner.tensors["input"], clean.tensors["input"])
    wrong = inner.tensors["label"] != clean.tensors["label"]
    assert wrong.tolist() == [True] * 40 + [False] * 60
    assert int(inner.tensors["label"].max()) < 10
    seen = {tuple(row.tolist()) for row in inner.tensors["input"].flatten(1)}
    assert not any(tuple(row.tolist()) in seen for row in outer["train"].tensors["input"].flatten(1))
    assert len(inner) + len(outer["train"]) == 1258


def test_leaving_out_the_wrong_labels_is_better_than_keeping_them() -> None:
    task = hyper_cleaning(examples=100, corrupted=0.5)
    kept = {"example_logits": torch.zeros(100)}
    left_out = {"example_logits": torch.where(torch.arange(100) < 50, -20.0, 20.0)}
    assert task.loss(left_out, whole(task)) < task.loss(kept, whole(task)) - 0.2


def test_hyper_cleaning_finds_the_wrong_labels() -> None:
    task = hyper_cleaning(examples=100, corrupted=0.5)
    logits = task.init(Generator().manual_seed(0))["example_logits"].requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(60):
        rows = torch.randint(len(task.train), (64,), generator=Generator().manual_seed(step))
        optimizer.zero_grad()
        task.loss({"example_logits": logits}, task.train.take(rows)).backward()
        optimizer.step()
    wrong, right = logits.detach().split(50)
    assert float((wrong[:, None] < right).double().mean()) > 0.85, "area under the ROC curve"


def test_weight_decay_at_minus_infinity_is_plain_regression() -> None:
    task = weight_decay()
    plain = regression(task._inputs, task._targets, torch.full((60,), 1 / 60), task.inner_steps, task.inner_lr)
    none = {"log_decay": torch.full((10, 65), -torch.inf)}
    expected = F.cross_entropy(with_one(whole(task)["input"]) @ plain.T, whole(task)["label"])
    torch.testing.assert_close(task.loss(none, whole(task)), expected)


def test_augmentation_without_shift_and_noise_is_plain_regression() -> None:
    task = learned_augmentation(examples=30)
    centre = torch.where(torch.arange(9) == 4, 0.0, -torch.inf)
    still = {"shift_logits": centre, "log_noise": torch.full((64,), -torch.inf)}
    plain = regression(task._inputs, task._targets, torch.full((30,), 1 / 30), task.inner_steps, task.inner_lr)
    expected = F.cross_entropy(with_one(whole(task)["input"]) @ plain.T, whole(task)["label"])
    torch.testing.assert_close(task.loss(still, whole(task) | {"random": torch.tensor(0)}), expected)


def test_shifted_copies_are_the_images_moved_by_one_pixel() -> None:
    task = learned_augmentation(examples=5)
    images = task.inner.tensors["input"]
    first = task._shifted[:5].reshape(
        5, 1, 8, 8
    )  # the window starts one pixel up and left: the image moves down and right
    torch.testing.assert_close(first[..., 1:, 1:], images[..., :-1, :-1])
    assert bool((first[..., 0, :] == images.min()).all())


@pytest.mark.parametrize("examples", [0, 1258])
def test_inner_examples_must_leave_some_for_the_outer_problem(examples: int) -> None:
    with pytest.raises(ValueError, match=r"examples must be in \[1, 1257\]"):
        hyper_cleaning(examples=examples)
