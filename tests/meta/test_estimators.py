"""ES and PES against exact meta-gradients of small problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import load
from torch import Tensor

from metaopt_learned.es import PES, TruncatedES, pes_gradient

ARRAYS, META = load("pes_toy")
T, K = 20, 5


class Linear:
    """s_0 = 0, s_t = s_{t-1} + theta; loss s_t at every step, or s_T at the last step only."""

    horizon = T

    def __init__(self, loss: str) -> None:
        self.loss = loss

    def start(self, theta: dict[str, Tensor], seeds: Tensor) -> dict[str, Any]:
        zeros = torch.zeros(len(seeds), dtype=torch.float64)
        return {"s": zeros, "t": zeros.clone()}

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
            losses.append(value if self.loss == "every" else torch.where(t == self.horizon, value, 0.0))
        return torch.stack(losses, 1), {"s": s, "t": t}


class Quadratic(Linear):
    """s_0 = 1, s_t = 0.9 s_{t-1} + theta_0 + theta_1 cos(t); loss 0.5 (s_t - 0.7)^2."""

    def start(self, theta: dict[str, Tensor], seeds: Tensor) -> dict[str, Any]:
        ones = torch.ones(len(seeds), dtype=torch.float64)
        return {"s": ones, "t": torch.zeros_like(ones)}

    def advance(self, s: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        return 0.9 * s + theta[:, 0] + theta[:, 1] * torch.cos(t)

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (s - 0.7) ** 2


def long_run_mean(estimator: Any, inner: Any, theta: list[float], windows: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the estimate over the windows after one episode of warm-up."""
    parameters = {"theta": torch.tensor(theta, dtype=torch.float64)}
    carry = estimator.start(inner, parameters, seed=7)
    samples = []
    for window in range(windows):
        gradient, carry, _ = estimator.estimate(inner, parameters, carry)
        if window >= T // K:
            samples.append(gradient["theta"])
    batches = torch.stack(samples)[: len(samples) // T * T].reshape(T, -1, len(theta)).mean(1)
    return batches.mean(0), batches.std(0) / T**0.5


TOYS = [(Linear, "linear", [0.3]), (Quadratic, "quadratic", [0.05, -0.03])]


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize(("toy", "name", "theta"), TOYS, ids=["linear", "quadratic"])
def test_pes_is_unbiased_at_episode_ends(toy: Any, name: str, theta: list[float], loss: str) -> None:
    exact = torch.from_numpy(ARRAYS[f"{name}/{loss}/full/no_reset_slot"]).reshape(-1)
    mean, error = long_run_mean(PES(pairs=2000, window=K, sigma=0.01), toy(loss), theta, 204)
    assert (error < 0.1 * exact.abs().max()).all(), "the test must be able to tell the truth from the peer's bias"
    assert ((mean - exact).abs() < 4 * error).all(), (mean, exact, error)


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize(("toy", "name", "theta"), TOYS, ids=["linear", "quadratic"])
def test_truncated_es_has_exactly_the_known_truncation_bias(toy: Any, name: str, theta: list[float], loss: str) -> None:
    known = torch.from_numpy(ARRAYS[f"{name}/{loss}/es/no_reset_slot"]).reshape(-1)
    # in phase (no stagger): a window never straddles two episodes, as the closed form assumes
    mean, error = long_run_mean(TruncatedES(pairs=2000, window=K, stagger=False), toy(loss), theta, 84)
    assert ((mean - known).abs() < 4 * error + 1e-3 * known.abs()).all(), (mean, known, error)


def test_one_window_equals_the_reference_computation() -> None:
    """Stored inputs with episodes that end mid-window, in the last slot, in the first slot, and a masked slot."""
    delta = torch.from_numpy(ARRAYS["function/loss_pos"] - ARRAYS["function/loss_neg"]).double().T
    done = torch.from_numpy(ARRAYS["function/is_done"]).T
    ended = done.long().cumsum(1) - done.long() > 0  # before this step, not at it
    live = torch.from_numpy(ARRAYS["function/mask"]).T
    accumulator, eps = (torch.from_numpy(ARRAYS[f"function/{key}"]).double() for key in ("accumulator", "eps"))
    gradient = pes_gradient(delta, live, ended, accumulator, eps, float(ARRAYS["function/std"]))
    right = torch.from_numpy(ARRAYS["function/pes/right_rule_float64"])
    assert (gradient - right).abs().max() <= 1e-5 * right.abs().max()
    credited_at_the_end = done.long().cumsum(1) > 0  # the peer's mistake
    biased = pes_gradient(delta, live, credited_at_the_end, accumulator, eps, float(ARRAYS["function/std"]))
    peer = torch.from_numpy(ARRAYS["function/pes/peer/grad"]).double()
    assert (biased - peer).abs().max() <= 1e-5 * peer.abs().max()
    assert (biased - right).abs().max() > 0.1 * right.abs().max()


def test_smoothing_bias_of_pes_is_that_of_independent_perturbations() -> None:
    """loss s_T^3: PES smooths each window by itself, 3 T^3 theta^2 + 3 T^2 K sigma^2 (per episode)."""

    class Cubic(Linear):
        def value(self, s: Tensor, t: Tensor) -> Tensor:
            return s**3

    windows = T // K
    mean, error = long_run_mean(PES(pairs=4000, window=K, sigma=0.1), Cubic("last"), [0.3], 204)
    per_episode, spread = mean * K * windows, error * K * windows
    assert (per_episode - float(ARRAYS["cubic/pes_smoothed"])).abs() < 4 * spread
    assert spread < 60


@pytest.mark.parametrize("estimator", [PES(pairs=4, window=7, sigma=0.1), TruncatedES(pairs=4, window=7)])
def test_a_pair_whose_loss_is_not_finite_is_dropped_and_counted(estimator: Any) -> None:
    class Poisoned(Linear):
        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            losses[1] = torch.nan
            return losses, state

    theta = {"theta": torch.tensor([0.3], dtype=torch.float64)}
    carry = estimator.start(Poisoned("every"), theta, seed=0)
    gradient, _, metrics = estimator.estimate(Poisoned("every"), theta, carry)
    assert torch.isfinite(gradient["theta"]).all()
    assert gradient["theta"].abs() > 0
    assert metrics["dropped_pairs"] == 1


def test_windows_longer_than_an_episode_restart_it_as_often_as_needed() -> None:
    theta = {"theta": torch.tensor([0.3], dtype=torch.float64)}
    inner = Linear("last")
    estimator = PES(pairs=2000, window=50, sigma=0.01)
    carry = estimator.start(inner, theta, seed=1)
    gradient, carry, _ = estimator.estimate(inner, theta, carry)
    assert (carry["clock"]["episode"] >= 2).all()
    samples = []
    for _ in range(20):
        gradient, carry, _ = estimator.estimate(inner, theta, carry)
        samples.append(gradient["theta"])
    mean, error = torch.stack(samples).mean(), torch.stack(samples).std() / 20**0.5
    assert (mean - 1.0).abs() < 4 * error + 0.02
