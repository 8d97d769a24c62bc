"""Every learning-rate scheduler of torch drives a metaopt optimizer exactly as it drives torch's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import backward, flat, make, net
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import metaopt
from metaopt_classic.adam import AdamW
from metaopt_classic.sgd import SGD

STEPS = 24
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [4, 9], 0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 6),
    "LinearLR": lambda o: schedulers.LinearLR(o, 1.0, 0.0, STEPS),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.05, 5, mode="triangular2"),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.05, 0.02], STEPS + 1),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 5), schedulers.CosineAnnealingLR(o, STEPS)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, 5),
}
PAIRS = {
    "adamw": (lambda g: make(AdamW(lr=0.01), g), lambda g: torch.optim.AdamW(g, lr=0.01)),
    "momentum": (lambda g: make(SGD(lr=0.01, momentum=0.9), g), lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9)),
}


def test_the_list_is_complete() -> None:
    assert {*schedulers.__all__} - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_moves_parameters_as_with_torchs_class(name: str, pair: str) -> None:
    """Momentum cycling writes ``betas`` or ``momentum`` into the groups; the step must read them there, and use them."""
    ends, traces = [], []
    for build in PAIRS[pair]:
        model = net()
        params = [*model.parameters()]
        optimizer = build([{"params": params[:3]}, {"params": params[3:], "lr": 0.02}])
        scheduler = SCHEDULERS[name](optimizer)
        trace = []
        for step in range(STEPS):
            loss = backward(model, step)
            optimizer.step()
            trace.append([(g["lr"], g.get("betas"), g.get("momentum")) for g in optimizer.param_groups])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)  # torch's own, in SequentialLR
                scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        ends.append(flat(model))
        traces.append(trace)
    assert len({repr(entry) for entry in traces[1]}) > 1, "the schedule did nothing"
    assert traces[0] == traces[1]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-11)


def test_a_schedule_fills_a_tensor_learning_rate_in_place() -> None:
    ends = []
    for build in (
        lambda p: metaopt.optimizer("adamw", p, lr=torch.tensor(0.01)),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    ):
        model = net(torch.float32)
        optimizer = build(model.parameters())
        scheduler = schedulers.ExponentialLR(optimizer, 0.8)
        for step in range(8):
            backward(model, step)
            optimizer.step()
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        ends.append(flat(model))
    torch.testing.assert_close(*ends)


def test_a_schedule_goes_on_after_a_restart() -> None:
    """Scheduler and optimizer are saved apart; the initial lr travels in the groups."""

    def build(model: Any) -> Any:
        optimizer = metaopt.optimizer("adamw", model.parameters(), lr=0.01)
        return optimizer, schedulers.OneCycleLR(optimizer, 0.05, STEPS)

    def run(model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        for step in range(first, last):
            backward(model, step)
            optimizer.step()
            scheduler.step()

    whole, half = net(), net()
    run(whole, *build(whole), 0, 20)
    optimizer, scheduler = build(half)
    run(half, optimizer, scheduler, 0, 10)
    resumed = net(seed=5)
    resumed.load_state_dict(half.state_dict())
    parts = build(resumed)
    for part, saved in zip(parts, (optimizer, scheduler), strict=True):
        part.load_state_dict(saved.state_dict())
    run(resumed, *parts, 10, 20)
    assert torch.equal(flat(resumed), flat(whole))
