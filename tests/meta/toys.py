"""Inner problems of two lines whose meta-gradients are known, and the long-run mean of an estimator on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

T, K = 20, 5


class Linear:
    """s_0 = 0, s_t = s_{t-1} + theta; loss s_t at every step, or s_T at the last step only."""

    worst: float | None = None

    def __init__(self, loss: str = "every", horizon: int = T) -> None:
        self.loss, self.horizon = loss, horizon

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        return torch.full((len(seeds),), self.horizon)

    def start(self, theta: dict[str, Tensor], seeds: Tensor, lengths: Tensor) -> dict[str, Any]:
        assert len(theta["theta"]) == len(seeds) == len(lengths)
        t = torch.zeros(len(seeds), dtype=torch.float64)
        return {"s": self.initial(theta["theta"]), "t": t, "length": lengths, "seed": seeds}

    def initial(self, theta: Tensor) -> Tensor:
        return torch.zeros_like(theta[:, 0])

    def advance(self, s: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        return s + theta[:, 0]

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        return s

    def run(self, theta: dict[str, Tensor], state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        s, t, losses = state["s"], state["t"], []
        for _ in range(steps):
            t = t + 1
            s = self.advance(s, t, theta["theta"])
            value = self.value(s, t)
            losses.append(value if self.loss == "every" else torch.where(t == state["length"], value, 0.0))
        return torch.stack(losses, 1), {**state, "s": s, "t": t}

    def judge(self, theta: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        return 3 * self.value(state["s"], state["t"])


class Quadratic(Linear):
    """s_0 = 1, s_t = 0.9 s_{t-1} + theta_0 + theta_1 cos(t); loss 0.5 (s_t - 0.7)^2."""

    def initial(self, theta: Tensor) -> Tensor:
        return torch.ones_like(theta[:, 0])

    def advance(self, s: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        return 0.9 * s + theta[:, 0] + theta[:, 1] * torch.cos(t)

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (s - 0.7) ** 2


class LearnedStart(Linear):
    """As `Linear`, with s_0 = theta: the initial state is learned."""

    def initial(self, theta: Tensor) -> Tensor:
        return theta[:, 0]


class Cubic(Linear):
    """As `Linear`; loss s_T^3 at the last step."""

    def __init__(self) -> None:
        super().__init__("last")

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        return s**3


class Varied(Linear):
    """As `Linear`, with 3 to 9 steps as the seed says."""

    def lengths(self, seeds: Tensor, window: int) -> Tensor:
        return 3 + seeds % 7


class Diverging(Linear):
    """As `Linear`; an episode of 1 in 20 yields NaN from its fourth step on, as its seed says."""

    def run(self, theta: dict[str, Tensor], state: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
        losses, new = super().run(theta, state, steps)
        doomed, step = state["seed"] % 20 == 0, state["t"][:, None] + torch.arange(1, steps + 1)
        losses = torch.where(doomed[:, None] & (step >= 4), torch.nan, losses)
        return losses, {**new, "s": torch.where(doomed & (new["t"] >= 4), torch.nan, new["s"])}


def as_theta(values: list[float]) -> dict[str, Tensor]:
    return {"theta": torch.tensor(values, dtype=torch.float64)}


def estimates(estimator: Any, inner: Any, theta: list[float], windows: int, seed: int = 7) -> Tensor:
    """[windows, D]."""
    parameters, found = as_theta(theta), []
    carry = estimator.start(inner, parameters, seed=seed)
    for _ in range(windows):
        gradient, carry, _ = estimator.estimate(inner, parameters, carry)
        found.append(gradient["theta"])
    return torch.stack(found)


def long_run_mean(estimator: Any, inner: Any, theta: list[float], windows: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the estimate over the windows after one episode of warm-up."""
    warmup = T // getattr(estimator, "window", T)
    found = estimates(estimator, inner, theta, windows + warmup)[warmup:]
    # windows of one episode are correlated, so the error is that of the means of longer batches
    batches = found[: windows // 20 * 20].reshape(20, -1, len(theta)).mean(1)
    return batches.mean(0), batches.std(0) / 20**0.5
