"""Preference optimisation: the published losses, the policy they train, and the hidden reward that judges it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt.objective import LOG_PROBABILITIES, Kind, Objective
from metaopt.task import Split
from metaopt_tasks.data.preferences import FLIPS, preferences
from metaopt_tasks.preference import PreferencePolicy, preference


class Margin(Objective):
    """rho, times ``weights``."""

    kind: ClassVar[Kind] = "preference"
    inputs: ClassVar[tuple[str, ...]] = LOG_PROBABILITIES
    weights: Any = 1.0
    of: Any = staticmethod(lambda rho: rho)

    def loss(self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        return self.weights * self.of(chosen - reference_chosen - (rejected - reference_rejected))


def test_the_reference_policy_scores_one_and_the_best_answers_zero() -> None:
    task = preference(data="preferences_clean", hidden=(16,))
    params = task.init(Generator().manual_seed(0))
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    whole = task.train.take(torch.arange(len(task.train)))
    assert float(task.normalize(task.loss(zero, whole))) == pytest.approx(1.0, abs=1e-5)
    certain = torch.where(whole["reward"] == 0, 0.0, -1e4)  # all the reference's weight on the best answer
    assert float(task.normalize(task.loss(zero, whole | {"reference": certain}))) == pytest.approx(0.0, abs=1e-6)


def test_training_loss_is_the_objective_of_the_log_ratio_of_log_ratios() -> None:
    task = preference(data="preferences_shuffled", hidden=(), objective=Margin())
    params = task.init(Generator().manual_seed(1))
    batch = task.train.take(torch.arange(5))

    def ratio(inputs: Tensor, reference: Tensor, answer: Tensor) -> Tensor:
        logits = F.linear(inputs, params["head.weight"], params["head.bias"]) + reference
        return torch.distributions.Categorical(logits=logits).log_prob(answer) - torch.distributions.Categorical(
            logits=reference
        ).log_prob(answer)

    expected = ratio(batch["input"], batch["reference"], batch["chosen"]) - ratio(
        batch["rejected_input"], batch["rejected_reference"], batch["rejected"]
    )
    torch.testing.assert_close(task.training_loss(params, {}, batch)[0], expected.mean(), rtol=1e-5, atol=1e-6)


def test_dpo_has_its_optimum_at_the_reference_times_exponential_reward() -> None:
    """Rafailov et al. 2023, theorem 1: with Bradley-Terry preferences, pi* ~ reference exp(reward / beta)."""
    beta, generator = 0.7, Generator().manual_seed(3)
    reward = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    reference = torch.randn(1, 4, generator=generator, dtype=torch.float64).log_softmax(1)
    one, two = (torch.tensor(c) for c in zip(*[(a, b) for a in range(4) for b in range(4) if a != b], strict=True))
    x = torch.ones(len(one), 1, dtype=torch.float64)
    data = Split({"input": x, "rejected_input": x, "chosen": one, "rejected": two,
                  "reference": reference.expand(len(one), -1), "rejected_reference": reference.expand(len(one), -1),
                  "reward": reward.expand(len(one), -1)})  # fmt: skip
    wins = torch.sigmoid(reward[0, one] - reward[0, two])  # how often one beats two
    task = PreferencePolicy(
        "pairs", data, data, data, objective=Margin(2 * wins, lambda rho: -F.logsigmoid(beta * rho))
    )
    params = {
        "head.weight": (reward / beta).T.clone().requires_grad_(), "head.bias": torch.zeros(4, dtype=torch.float64)
    }  # fmt: skip
    loss, _ = task.training_loss(params, {}, data.tensors)
    (slope,) = torch.autograd.grad(loss, params["head.weight"])
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "wrong"), [("clean", 0.0), ("noisy", FLIPS)])
def test_pairs_are_ranked_by_the_hidden_reward_but_for_the_declared_noise(kind: str, wrong: float) -> None:
    pairs = preferences(kind=kind)["train"].tensors
    chosen, rejected = (pairs["reward"].gather(1, pairs[which][:, None]) for which in ("chosen", "rejected"))
    assert bool((pairs["chosen"] != pairs["rejected"]).all())
    assert float((chosen < rejected).double().mean()) == pytest.approx(wrong, abs=0.03)
    assert torch.equal(pairs["input"], pairs["rejected_input"])


@pytest.mark.parametrize(("noise", "wrong"), [(0.5, 0.16), (1.0, 0.26), (2.0, 0.35)])
def test_bradley_terry_pairs_are_ranked_by_chance_and_reward(noise: float, wrong: float) -> None:
    pairs = preferences(kind="bradley_terry", noise=noise, examples=20_000)["train"].tensors
    chosen, rejected = (pairs["reward"].gather(1, pairs[which][:, None]) for which in ("chosen", "rejected"))
    assert float((chosen < rejected).double().mean()) == pytest.approx(wrong, abs=0.02)


def test_noise_is_above_zero() -> None:
    with pytest.raises(ValueError, match="noise must be above 0, got 0; for none, choose kind='clean'"):
        preference(data="preferences_bradley_terry", noise=0)


def test_win_rate_and_divergence_are_those_of_sampled_answers() -> None:
    task = preference(data="preferences_bradley_terry", noise=0.5, objective=Margin())
    params = task.init(Generator().manual_seed(0))
    whole = task.train.take(torch.arange(len(task.train)))
    same = {name: torch.zeros_like(p) for name, p in params.items()}
    assert task.win_rate(same, whole).item() == pytest.approx(0.5, abs=1e-5)
    assert task.kl(same, whole).item() == pytest.approx(0, abs=1e-6)
    moved = {name: 2 * torch.randn(p.shape, generator=Generator().manual_seed(1)) for name, p in params.items()}
    policy = torch.distributions.Categorical(logits=task.log_policy(moved, whole["input"], whole["reference"]))
    reference = torch.distributions.Categorical(logits=whole["reference"])
    torch.testing.assert_close(task.kl(moved, whole), torch.distributions.kl_divergence(policy, reference).mean())
    torch.manual_seed(0)
    own, others = (whole["reward"].gather(1, d.sample((100,)).T) for d in (policy, reference))
    sampled = ((own > others).double() + 0.5 * (own == others)).mean()
    assert task.win_rate(moved, whole).item() == pytest.approx(
        sampled.item(), abs=0.005
    )  # of 210,000 samples: 4.6 errors


def test_shuffled_pairs_answer_two_questions() -> None:
    pairs = preferences(kind="shuffled")["train"].tensors
    assert bool((pairs["input"] != pairs["rejected_input"]).any(1).all())


def test_references_are_distributions_and_rewards_count_from_the_best_answer() -> None:
    for split in preferences(kind="noisy", reward="curved", features=12, actions=6).values():
        for name in ("reference", "rejected_reference"):
            torch.testing.assert_close(split.tensors[name].exp().sum(1), torch.ones(len(split)), rtol=0, atol=1e-5)
        assert bool((split.tensors["reward"].amax(1) == 0).all())


def test_dpo_on_clean_pairs_finds_good_answers() -> None:
    task = preference(data="preferences_clean", hidden=(16,))
    params = {name: p.requires_grad_() for name, p in task.init(Generator().manual_seed(0)).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=0.05)
    for step in range(60):
        rows = torch.randint(len(task.train), (64,), generator=Generator().manual_seed(step))
        optimizer.zero_grad()
        task.training_loss(params, {}, task.train.take(rows))[0].backward()
        optimizer.step()
    held_out = task.normalize(task.loss(params, task.test.take(torch.arange(len(task.test)))))
    assert held_out.item() < 0.3, "pairs it has not seen, judged by a reward it has not seen"


def test_unknown_kinds_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="kind must be one of clean, noisy, shuffled, bradley_terry, got 'mixed'"):
        preferences(kind="mixed")
