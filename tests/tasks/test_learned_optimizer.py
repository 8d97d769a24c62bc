"""Training an optimizer as a task: its loss is that of real inner runs, and learning it helps them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from metaopt import registry, tree
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_tasks.learned_optimizer import ScheduleTraining, learned_optimizer, runs
from metaopt_tasks.quadratic import quadratic

SGD = registry.create("optimizer", "sgd")


def test_loss_of_gradient_descent_on_a_bowl_has_its_closed_form() -> None:
    bowl = quadratic(dim=4, condition=10.0)
    data = runs(bowl, 3, first=0)
    task = ScheduleTraining("bowl", data, data, data, inner=bowl, inner_steps=3, rule=SGD, inner_lr=0.05)
    rates = torch.tensor([0.05, 0.1, 0.02], dtype=torch.float64)
    params = {"log_lr": rates.log(), "momentum_logit": torch.tensor([-torch.inf], dtype=torch.float64)}
    batch = {name: t.double() if t.is_floating_point() else t for name, t in data.tensors.items()}
    a, total = bowl.config["A"].double(), 0.0
    for x in batch["start.x"]:
        offset = x - bowl.config["x_star"].double()
        for rate in rates:
            offset = offset - rate * (a @ offset)
            total += float(0.5 * offset @ a @ offset) / bowl.scale / 9
    assert float(task.loss(params, batch)) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("data", ["", "digits"])
def test_loss_of_a_learned_optimizer_is_that_of_the_platforms_unroll(data: str) -> None:
    task = learned_optimizer(optimizer="small_fc_lopt", data=data, inner_steps=3, inner_lr=20.0)
    theta, batch = task.init(Generator().manual_seed(0)), task.train.take(torch.arange(4))
    learned = registry.create("learned_optimizer", "small_fc_lopt", hidden=4)
    carry = start(task.inner, learned.bind(theta), batch["seed"])
    carry.params = {name.removeprefix("start."): p for name, p in batch.items() if name != "seed"}
    with torch.no_grad():
        losses, _ = unroll(task.inner, learned.bind(theta), carry, 4, hp={"lr": 20.0}, horizon=3)
    expected = task.inner.normalize(losses[:, 1:]).mean()
    torch.testing.assert_close(task.loss(theta, batch), expected, rtol=1e-4, atol=1e-5)


def train(task: Task, steps: int, lr: float) -> tuple[float, float]:
    """Judged loss on unseen runs before and after."""
    params = {name: p.requires_grad_() for name, p in task.init(Generator().manual_seed(0)).items()}
    unseen = task.test.take(torch.arange(16))
    before = task.loss(params, unseen).item()
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    for step in range(steps):
        rows = torch.randint(len(task.train), (task.batch_size,), generator=Generator().manual_seed(step))
        optimizer.zero_grad()
        task.loss(params, task.train.take(rows)).backward()
        optimizer.step()
    return before, task.loss(tree.detach(params), unseen).item()


def test_learning_the_schedule_makes_unseen_runs_faster() -> None:
    before, after = train(learned_optimizer(inner_steps=4, inner_lr=0.02), steps=30, lr=0.1)
    assert after < 0.6 * before


def test_learning_theta_makes_unseen_runs_faster() -> None:
    before, after = train(
        learned_optimizer(optimizer="small_fc_lopt", inner_steps=2, inner_lr=100.0), steps=40, lr=0.03
    )
    assert after < 0.7 * before


def test_inner_runs_of_train_valid_and_test_start_elsewhere() -> None:
    task = learned_optimizer()
    seeds = [set(split.tensors["seed"].tolist()) for split in (task.train, task.valid, task.test)]
    assert not seeds[0] & seeds[1] and not seeds[0] & seeds[2] and not seeds[1] & seeds[2]
