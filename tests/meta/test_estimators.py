"""Bias and variance of every estimator against exact meta-gradients of small problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import load
from torch import Tensor
from toys import Cubic, K, LearnedStart, Linear, Quadratic, T, Varied, as_theta, estimates, long_run_mean

from metaopt.meta.estimator import copy_noise
from metaopt_learned.estimators.es import TruncatedES
from metaopt_learned.estimators.forward import ForwardGradient
from metaopt_learned.estimators.full_es import FullES
from metaopt_learned.estimators.nres import NRES
from metaopt_learned.estimators.pes import PES
from metaopt_learned.estimators.pes_analytic import PESAnalytic
from metaopt_learned.estimators.unroll import FullUnroll, TruncatedUnroll
from metaopt_learned.estimators.windowed import credited

ARRAYS, META = load("pes_toy")


def unbiased_estimators(n: int) -> dict[str, Any]:
    return {
        "pes": PES(pairs=n, window=K),
        "pes_one_sided": PES(pairs=n, window=K, antithetic=False, pairs_per_task=4),
        "nres": NRES(pairs=n, window=K),
        "full_es": FullES(pairs=n),
        "pes_analytic": PESAnalytic(pairs=n, window=K, segment=K),
        "forward_gradient": ForwardGradient(copies=n, window=K),
    }


unbiased = pytest.mark.parametrize("name", unbiased_estimators(4).keys())


class BothLosses(Linear):
    """Two `Linear` side by side: a tenth of the every-step loss of theta_0, and the last-step loss of theta_1."""

    def initial(self, theta: Tensor) -> Tensor:
        return torch.zeros_like(theta)

    def advance(self, s: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        return s + theta

    def value(self, s: Tensor, t: Tensor) -> Tensor:
        return s[:, 0] / 10 + torch.where(t == T, s[:, 1], 0.0)


@pytest.mark.parametrize("name", ["pes", "nres", "full_es", "pes_analytic", "forward_gradient"])
def test_unbiased_on_the_linear_toy(name: str) -> None:
    estimator = unbiased_estimators(2000)[name]
    full = [float(ARRAYS[f"linear/{loss}/full/no_reset_slot"]) for loss in ("every", "last")]
    exact = torch.tensor([full[0] / 10, full[1]], dtype=torch.float64)
    windows = 300 * K // (T if name == "full_es" else K)  # equally many inner steps
    mean, error = long_run_mean(estimator, BothLosses(), [0.3, 0.3], windows)
    assert (error < 0.02 * exact).all(), "the test must be able to tell the truth from the peer's -9 % and -83 %"
    assert ((mean - exact).abs() < 3 * error).all(), (mean, exact, error)


@pytest.mark.parametrize("loss", ["every", "last"])
@unbiased
def test_unbiased_on_the_quadratic_toy(name: str, loss: str) -> None:
    exact = torch.from_numpy(ARRAYS[f"quadratic/{loss}/full/no_reset_slot"])
    mean, error = long_run_mean(unbiased_estimators(300)[name], Quadratic(loss), [0.05, -0.03], 100)
    assert (error < 0.1 * exact.abs().max()).all()
    assert ((mean - exact).abs() < 3 * error).all(), (mean, exact, error)


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize(("toy", "name", "theta"), [(Linear, "linear", [0.3]), (Quadratic, "quadratic", [0.05, -0.03])])
def test_full_unroll_is_exact_and_truncated_unroll_has_the_known_bias(
    toy: Any, name: str, theta: list[float], loss: str
) -> None:
    for kind, estimator in (("full", FullUnroll(copies=3)), ("es", TruncatedUnroll(copies=3, window=K, stagger=False))):
        known = torch.from_numpy(ARRAYS[f"{name}/{loss}/{kind}/no_reset_slot"]).reshape(-1)
        mean, _ = long_run_mean(estimator, toy(loss), theta, 20)  # whole episodes, in phase as the closed form assumes
        torch.testing.assert_close(mean, known, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["every", "last"])
def test_truncated_es_has_exactly_the_known_truncation_bias(loss: str) -> None:
    known = torch.from_numpy(ARRAYS[f"quadratic/{loss}/es/no_reset_slot"])
    found = estimates(TruncatedES(pairs=1000, window=K, stagger=False), Quadratic(loss), [0.05, -0.03], 80)
    episodes = found.reshape(20, T // K, 2).mean(1)  # windows in phase differ by their place in the episode
    mean, error = episodes.mean(0), episodes.std(0) / 20**0.5
    # besides: each window starts from the + run, whose smoothing shifts s by O(sigma^2)
    assert ((mean - known).abs() < 3 * error + 1e-3 * known.abs()).all(), (mean, known, error)


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [
        (PES, float(ARRAYS["cubic/unsmoothed"]) + 9 * (float(ARRAYS["cubic/pes_smoothed"] - ARRAYS["cubic/unsmoothed"]))),
        (NRES, float(ARRAYS["cubic/unsmoothed"]) + 9 * float(ARRAYS["cubic/full_es_smoothed"] - ARRAYS["cubic/unsmoothed"])),
        # its own window is not smoothed: + 3 T K^2 (T / K - 1) sigma^2
        (PESAnalytic, float(ARRAYS["cubic/unsmoothed"]) + 3 * T * K**2 * (T / K - 1) * 0.3**2),
    ],
)  # fmt: skip
def test_smoothing_is_that_of_the_perturbations(estimator: Any, exact: float) -> None:
    """loss s_T^3 of one episode, 2160 unsmoothed; stored for sigma 0.1, and the difference goes with sigma^2."""
    mean, error = long_run_mean(estimator(pairs=500, window=K, sigma=0.3), Cubic(), [0.3], 100)
    assert ((mean - exact / T).abs() < 3 * error).all()


@unbiased
def test_learned_initial_states_are_perturbed_too(name: str) -> None:
    mean, error = long_run_mean(unbiased_estimators(300)[name], LearnedStart("last"), [0.3], 100)
    assert (mean - 21 / 20).abs() < 3 * error
    assert error < 0.04


def test_full_unroll_differentiates_a_learned_initial_state() -> None:
    assert float(estimates(FullUnroll(copies=2), LearnedStart("last"), [0.3], 1)) == pytest.approx(21 / 20, rel=1e-12)


def _function(key: str) -> Tensor:
    return torch.from_numpy(ARRAYS[f"function/{key}"])


@pytest.mark.parametrize("strategy", ["pes", "es"])
def test_one_window_equals_the_reference_computation(strategy: str) -> None:
    """Stored inputs with episodes that end mid-window, in the last slot, in the first slot, and a masked slot."""
    done, live = _function("is_done").T, _function("mask").T
    delta = (_function("loss_pos") - _function("loss_neg")).double().T / 2 * live
    delta = delta * delta.shape[1] / live.sum(1, keepdim=True).clamp(min=1)  # the peer divides by live slots
    ended = done.long().cumsum(1) - done.long() > 0  # before this step, not at it
    accumulator, eps, variance = (
        _function("accumulator").double(),
        _function("eps").double(),
        float(_function("std")) ** 2,
    )
    credits = [accumulator + eps, eps] if strategy == "pes" else [eps, eps]
    gradient = credited(delta, ended.long(), credits).mean(0) / variance
    right = _function("pes/right_rule_float64" if strategy == "pes" else "es/peer/grad").double()
    assert (gradient - right).abs().max() <= 1e-5 * right.abs().max()
    if strategy == "pes":
        credited_at_the_end = (done.long().cumsum(1) > 0).long()  # the peer's mistake
        biased = credited(delta, credited_at_the_end, credits).mean(0) / variance
        peer = _function("pes/peer/grad").double()
        assert (biased - peer).abs().max() <= 1e-5 * peer.abs().max()
        assert (biased - right).abs().max() > 0.1 * right.abs().max()


def test_sign_shaping_equals_the_reference_computation() -> None:
    live = _function("mask").T
    losses = torch.stack([_function("loss_pos").T, _function("loss_neg").T], 1).double() * live.unsqueeze(1)
    estimator = PES(pairs=len(live), shaping="sign")
    delta = estimator._differences(losses, torch.ones(len(live), dtype=torch.bool))
    eps, variance = _function("eps").double(), float(_function("std")) ** 2
    gradient = credited(delta, torch.zeros_like(live, dtype=torch.int64), [eps]).mean(0) / variance
    peer = _function("es/peer_sign1/grad").double()
    assert (gradient - peer).abs().max() <= 1e-5 * peer.abs().max()


def _full_es_by_hand(objective: str, shaping: str) -> Tensor:
    """s_t = t theta': the mean over its length T is theta' (T + 1) / 2, the lowest theta', the last T theta'."""
    recorded: list[Tensor] = []

    class Recorded(Varied):
        def start(self, theta: Any, seeds: Tensor, lengths: Tensor) -> Any:
            recorded[:] = [lengths]
            return super().start(theta, seeds, lengths)

    estimator = FullES(pairs=8, objective=objective, shaping=shaping, sigma=0.1)
    gradient = estimates(estimator, Recorded(), [0.3], 1)[0]
    eps = 0.1 * copy_noise(7, 0, torch.arange(8), 1, torch.zeros(1, dtype=torch.float64))[:, 0]
    lengths = recorded[0][::2].double()
    assert len(lengths.unique()) > 2
    slope = {"mean": (lengths + 1) / 2, "min": 1.0, "last": lengths, "recomputed": 3 * lengths}[objective]
    delta = slope * eps if shaping == "none" else eps.sign() / 2
    return torch.stack([gradient[0], (delta * eps).mean() / 0.1**2])


@pytest.mark.parametrize("shaping", ["none", "sign"])
@pytest.mark.parametrize("objective", ["mean", "min", "last", "recomputed"])
def test_full_es_objectives_equal_direct_computation(objective: str, shaping: str) -> None:
    ours, direct = _full_es_by_hand(objective, shaping)
    assert float(ours) == pytest.approx(float(direct), rel=1e-9)


@pytest.mark.parametrize(("objective", "exact"), [("mean", 3.5), ("min", 1.0), ("last", 6.0)])
def test_full_unroll_objectives(objective: str, exact: float) -> None:
    estimator = FullUnroll(copies=5, objective=objective, segment=4)
    assert float(estimates(estimator, Linear(horizon=6), [0.3], 1)) == pytest.approx(exact, rel=1e-12)


def test_episodes_of_many_lengths_are_differentiated_each_to_its_end() -> None:
    found = {segment: estimates(FullUnroll(copies=9, segment=segment), Varied(), [0.3], 3) for segment in (1, 2, 50)}
    torch.testing.assert_close(found[1], found[50], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], found[50], rtol=1e-12, atol=0)
    assert (found[1] > 2).all()  # (T + 1) / 2 of 3 to 9 steps
    assert (found[1] < 5).all()


def test_windows_longer_than_an_episode_restart_it_as_often_as_needed() -> None:
    for estimator in (PES(pairs=500, window=50), NRES(pairs=500, window=50), ForwardGradient(copies=500, window=50)):
        mean, error = long_run_mean(estimator, Linear("last"), [0.3], 20)
        assert (mean - 1.0).abs() < 3 * error
        assert error < 0.03
    carry = PES(pairs=9, window=50).start(Linear(), as_theta([0.3]), seed=1)
    _, carry, _ = PES(pairs=9, window=50).estimate(Linear(), as_theta([0.3]), carry)
    assert (carry["copies"]["begun"] >= 3).all()
