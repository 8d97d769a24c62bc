"""Every estimator: diverged copies, several processes, determinism, checkpoints; and the options of evolution strategies."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from toys import Diverging, K, Linear, Quadratic, T, Varied, as_theta, estimates

from metaopt import registry, tree
from metaopt.meta.estimator import copy_noise
from metaopt.meta.shard import Shard
from metaopt_learned.estimators.es import TruncatedES
from metaopt_learned.estimators.full_es import FullES
from metaopt_learned.estimators.nres import NRES
from metaopt_learned.estimators.pes import PES
from metaopt_learned.estimators.pes_analytic import PESAnalytic

NAMES = sorted(registry.specs("estimator"))
WINDOWED = [name for name in NAMES if not name.startswith("full")]


def make(name: str, n: int = 16, **options: Any) -> Any:
    counted = "copies" if "unroll" in name or "forward" in name else "pairs"
    window = {"window": K} if name in WINDOWED else {}
    return registry.create("estimator", name, **{counted: n, **window, **options})


every = pytest.mark.parametrize("name", NAMES)


@every
def test_diverging_copies_never_spoil_an_outer_step(name: str) -> None:
    """The peer loses 70 of 100 outer steps when each of 16 episodes diverges with probability 0.05."""
    theta, inner, estimator = as_theta([0.3]), Diverging(), make(name)
    carry, diverged = estimator.start(inner, theta, seed=0), 0.0
    for _ in range(100):
        gradient, carry, metrics = estimator.estimate(inner, theta, carry)
        assert torch.isfinite(gradient["theta"]).all()
        assert gradient["theta"].abs() > 0
        assert metrics["diverged"] < 16
        assert torch.isfinite(torch.tensor(metrics["meta_loss"]))
        diverged += metrics["diverged"]
    episodes = 16 * 100 * (K / 20 if name in WINDOWED else 1)
    assert 0.02 * episodes < diverged < 0.1 * episodes


@pytest.mark.parametrize("name", ["full_unroll", "truncated_unroll"])
def test_the_mean_is_over_the_live_copies(name: str) -> None:
    """Copies without noise are all alike, so leaving some out changes nothing."""

    class SomeDie(Linear):
        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            return torch.where((state["seed"] % 2 == 0)[:, None], torch.nan, losses), state

    estimator = make(name, stagger=False) if name in WINDOWED else make(name)
    alone, some = (estimates(estimator, inner, [0.3], 1) for inner in (Linear(), SomeDie()))
    torch.testing.assert_close(alone, some, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["es", "pes", "nres", "full_es"])
def test_a_contribution_that_overflows_is_left_out_and_counted_like_a_diverged_copy(name: str) -> None:
    class Half(Linear):
        """Every second episode's losses are ``size`` times the sign of the perturbation."""

        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = size

        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            doomed, sign = state["seed"] % 2 == 0, (theta["theta"] - 0.3).sign()
            return torch.where(doomed[:, None], self.size * sign, losses), state

    estimator, found = make(name, sigma=1e-4), []
    for size in (1e306, torch.nan):  # 1e306 is finite, a hundred thousand times that is not
        carry = estimator.start(Half(size), as_theta([0.3]), seed=0)
        gradient, _, metrics = estimator.estimate(Half(size), as_theta([0.3]), carry)
        found.append((float(gradient["theta"]), metrics["diverged"]))
    assert found[0] == found[1]
    assert 0 < found[0][0] < 1e3
    assert 0 < found[0][1] < 16


@every
def test_a_loss_that_is_not_finite_counts_as_the_worst_where_there_is_one(name: str) -> None:
    class Kept(Diverging):
        worst = 1000.0

    excluded, kept = ([], []), ([], [])
    for inner, (metrics, carries) in ((Diverging(), excluded), (Kept(), kept)):
        estimator = make(name)
        carry = estimator.start(inner, as_theta([0.3]), seed=0)
        for _ in range(8):
            gradient, carry, measured = estimator.estimate(inner, as_theta([0.3]), carry)
            assert torch.isfinite(gradient["theta"]).all()
            metrics.append(measured)
            carries.append(carry)
    assert sum(one["diverged"] for one in excluded[0]) > 0
    assert [one["worst"] for one in kept[0]] == [one["diverged"] for one in excluded[0]]
    assert all(one["diverged"] == 0 for one in kept[0])
    for one, other in zip(excluded[0], kept[0], strict=True):
        assert (other["meta_loss"] > one["meta_loss"]) == (one["diverged"] > 0)
    clocks = [[c["copies"].get("left", torch.zeros(0)).tolist() for c in carries] for _, carries in (excluded, kept)]
    assert clocks[0] == clocks[1], "they begin anew all the same"


@every
def test_when_all_copies_diverge_the_gradient_is_zero_and_new_episodes_begin(name: str) -> None:
    class Dead(Linear):
        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            return losses * torch.nan, state

    estimator = make(name)
    carry = estimator.start(Dead(), as_theta([0.3]), seed=0)
    gradient, carry, metrics = estimator.estimate(Dead(), as_theta([0.3]), carry)
    assert gradient["theta"] == 0
    assert metrics["diverged"] == 16
    gradient, _, metrics = estimator.estimate(Linear(), as_theta([0.3]), carry)
    assert metrics["diverged"] == 0
    assert gradient["theta"] > 0


def test_pairs_of_one_task_begin_anew_together() -> None:
    """Else the rest of the group would go on with other data, and the group would share nothing any more."""

    class OneDies(Linear):
        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            losses[2] = torch.nan  # the plus run of the second pair
            return losses, state

    estimator = PES(pairs=4, pairs_per_task=2, window=K, stagger=False)
    carry = estimator.start(OneDies(), as_theta([0.3]), seed=0)
    _, carry, metrics = estimator.estimate(OneDies(), as_theta([0.3]), carry)
    assert metrics["diverged"] == 1
    assert carry["copies"]["left"].tolist() == [0, 0, 15, 15]
    _, carry, _ = estimator.estimate(Linear(), as_theta([0.3]), carry)
    seeds = carry["copies"]["state"]["seed"][:, 0].tolist()
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert carry["copies"]["begun"].tolist() == [2, 2, 1, 1]


class _Waits(Exception):
    def __init__(self, value: Any, combine: Callable[[list[Any]], Any]) -> None:
        self.value, self.combine = value, combine


class _Replayed(Shard):
    """One of several ranks; what they tell each other is taken from ``known``, and what is not known yet waits."""

    def __init__(self, rank: int, world: int, known: list[Any]) -> None:
        self.rank, self.world, self._known = rank, world, iter(known)

    def _exchange(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        for found in self._known:
            return found
        raise _Waits(value, combine)

    def sum(self, value: Tensor) -> Tensor:
        return self._exchange(value, sum)

    def gather(self, own: Any, n: int) -> Any:
        return self._exchange(own, lambda values: tree.map_tree(lambda *parts: torch.cat(parts), *values))


def on_ranks(world: int, work: Callable[[Shard, int], Any]) -> list[Any]:
    """``work(shard, rank)`` of every rank: repeated until all that the ranks exchange is known."""
    known: list[Any] = []
    while True:
        found = []
        for rank in range(world):
            try:
                found.append(work(_Replayed(rank, world, known), rank))
            except _Waits as waits:
                found.append(waits)
        if not any(isinstance(value, _Waits) for value in found):
            return found
        assert all(isinstance(value, _Waits) for value in found), "the ranks must call the same collectives"
        known.append(found[0].combine([value.value for value in found]))


SHARED_OUT = [
    (name, options)
    for name in NAMES
    for options in ({}, {"clip_task": 2.0}, {"shaping": "rank"}, {"antithetic": False})
    if options.keys() <= make(name).declared().keys() and (name, options) != ("pes_analytic", {"shaping": "rank"})
]


@pytest.mark.parametrize(("name", "options"), SHARED_OUT, ids=str)
def test_two_and_three_processes_give_the_gradient_of_one(name: str, options: dict[str, Any]) -> None:
    estimator = make(name, 7, **options)
    theta = as_theta([0.3])
    whole = estimator.start(Diverging(), theta, seed=3)
    shares = {
        world: on_ranks(world, lambda shard, _: estimator.start(Diverging(), theta, 3, shard)) for world in (2, 3)
    }
    for _ in range(8):
        gradient, whole, metrics = estimator.estimate(Diverging(), theta, whole)
        for world, carries in shares.items():
            found = on_ranks(
                world, lambda shard, rank, c=carries: estimator.estimate(Diverging(), theta, c[rank], shard)
            )
            for part, _, reported in found:
                torch.testing.assert_close(part["theta"], gradient["theta"], rtol=1e-12, atol=1e-12)
                assert reported == pytest.approx(metrics, rel=1e-12)
            shares[world] = [carry for _, carry, _ in found]
            joined = tree.map_tree(lambda *rows: torch.cat(rows), *(c["copies"] for c in shares[world]))
            tree.map_tree(
                lambda ours, one: torch.testing.assert_close(ours, one, rtol=1e-12, atol=1e-12, equal_nan=True),
                joined, whole["copies"],
            )  # fmt: skip


@every
def test_more_processes_than_copies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be at least the number of processes 3, got 2; start fewer processes"):
        make(name, 2).start(Linear(), as_theta([0.3]), 0, _Replayed(0, 3, []))


@every
def test_same_seed_same_bits_also_through_a_checkpoint(name: str) -> None:
    estimator, inner, theta = make(name), Varied(), as_theta([0.3])
    assert torch.equal(estimates(estimator, inner, [0.3], 6), estimates(estimator, inner, [0.3], 6))
    carry = estimator.start(inner, theta, seed=7)
    found = []
    for _ in range(6):
        file = io.BytesIO()
        torch.save(carry, file)
        file.seek(0)
        gradient, carry, _ = estimator.estimate(inner, theta, torch.load(file, weights_only=True))
        found.append(gradient["theta"])
    assert torch.equal(torch.stack(found), estimates(estimator, inner, [0.3], 6))
    assert not torch.equal(estimates(estimator, inner, [0.3], 6, seed=8), torch.stack(found))


@pytest.mark.parametrize("name", WINDOWED)
def test_staggered_copies_end_their_first_episodes_evenly(name: str) -> None:
    estimator = make(name, 20)
    _, carry, _ = estimator.estimate(Linear(), as_theta([0.3]), estimator.start(Linear(), as_theta([0.3]), seed=0))
    ends = torch.where(carry["copies"]["left"] == 0, 20, carry["copies"]["left"])
    assert sorted(ends.tolist()) == list(range(1, 21))


@pytest.mark.parametrize("strategy", [TruncatedES, PES, NRES, FullES])
def test_sigma_scale_sets_the_deviation_by_name(strategy: Any) -> None:
    theta = {"a": as_theta([0.05])["theta"], "b": as_theta([-0.03])["theta"]}

    class Named(Linear):
        """Its losses are linear in theta, so smoothing changes nothing: step t's is t (2 a + 3 b)."""

        def start(self, theta: Any, seeds: Tensor, lengths: Tensor) -> Any:
            return super().start({"theta": theta["a"]}, seeds, lengths)

        def run(self, theta: Any, state: Any, steps: int) -> Any:
            seen.append((theta["a"] - 0.05, theta["b"] + 0.03))
            return super().run({"theta": 2 * theta["a"] + 3 * theta["b"]}, state, steps)

    seen: list[tuple[Tensor, Tensor]] = []
    pairs, options = 2000, {} if strategy is FullES else {"window": T, "stagger": False}
    estimator = strategy(pairs=pairs, sigma=0.1, sigma_scale={"b*": 0.1}, **options)
    assert estimator.sigma_scale == (("b*", 0.1),)
    gradient, _, _ = estimator.estimate(Named(), theta, estimator.start(Named(), theta, seed=0))
    assert seen[0][0].std() == pytest.approx(0.1, rel=0.1)
    assert seen[0][1].std() == pytest.approx(0.01, rel=0.1)
    a, b = 2 * (T + 1) / 2, 3 * (T + 1) / 2  # of the mean loss of an episode
    # a pair's contribution to a is xi (a xi + 0.1 b zeta), to b zeta (b zeta + 10 a xi), for standard normal xi and zeta
    errors = {"a": (2 * a**2 + (0.1 * b) ** 2) ** 0.5, "b": (2 * b**2 + (10 * a) ** 2) ** 0.5}
    for name, exact in (("a", a), ("b", b)):
        assert abs(float(gradient[name]) - exact) < 3 * errors[name] / pairs**0.5
    with pytest.raises(ValueError, match="sigma_scale names 'c', but theta has only a, b"):
        strategy(sigma_scale=[["c", 1.0]]).start(Named(), theta, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 6, "pairs_per_task": 4}, "pairs must be a multiple of pairs_per_task 4, got 6; 8 is one"),
        ({"pairs": 1, "antithetic": False}, "antithetic=False needs a second pair to compare with, got pairs=1"),
        ({"sigma_scale": {"a": 0.0}}, "sigma_scale of 'a' must be above 0 and finite, got 0.0"),
        ({"shaping": "log"}, r"shaping must be one of \['none', 'rank', 'sign'\], got 'log'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PES(**options)


def test_shaping_beside_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="shaping must be 'none' where gradients are added"):
        PESAnalytic(shaping="rank")


def test_rank_shaping_equals_scipy_ranks_and_shares_ties() -> None:
    losses = torch.tensor([[3.0, 1.0], [torch.nan, 0.0], [1.0, 7.0], [1.0, -2.0]], dtype=torch.float64).unsqueeze(2)
    live = torch.tensor([True, False, True, True])
    ranks = torch.from_numpy(scipy.stats.rankdata(losses[live].flatten().numpy())) - 1
    utilities = (ranks / 5 - 0.5).reshape(3, 2)
    delta = PES(pairs=4, shaping="rank")._differences(losses, live)
    torch.testing.assert_close(delta[live, 0], (utilities[:, 0] - utilities[:, 1]) / 2)
    assert delta[1] == 0


def test_rank_shaping_forgets_the_size_of_losses() -> None:
    class Stretched(Quadratic):
        def value(self, s: Tensor, t: Tensor) -> Tensor:
            return super().value(s, t) ** 3 * 50  # the same order

    for estimator in (
        FullES(pairs=8, objective="last", shaping="rank"),
        FullES(pairs=8, objective="last", shaping="sign"),
    ):
        plain, stretched = (estimates(estimator, inner, [0.05, -0.03], 2) for inner in (Quadratic(), Stretched()))
        torch.testing.assert_close(plain, stretched, rtol=1e-13, atol=0)


def test_one_sided_differences_are_to_the_others_of_the_same_task() -> None:
    losses = torch.tensor([1.0, 3.0, 8.0, torch.nan, 5.0, 6.0], dtype=torch.float64)[:, None, None]
    live = torch.tensor([True, True, True, False, True, True])
    alone = PES(pairs=6, antithetic=False)._differences(losses, live).flatten()
    torch.testing.assert_close(alone[0], torch.tensor(1 - (3 + 8 + 5 + 6) / 4, dtype=torch.float64))
    grouped = PES(pairs=6, antithetic=False, pairs_per_task=3)._differences(losses, live).flatten()
    torch.testing.assert_close(
        grouped, torch.tensor([1 - 5.5, 3 - 4.5, 8 - 2.0, 0, 5 - 6.0, 6 - 5.0], dtype=torch.float64)
    )


def test_a_one_sided_copy_without_a_live_one_beside_it_is_not_in_the_mean() -> None:
    class OneSurvives(Linear):
        def run(self, theta: Any, state: Any, steps: int) -> Any:
            losses, state = super().run(theta, state, steps)
            losses[1:3] = torch.nan  # two of the first group of three
            return losses, state

    both, alone = PES(pairs=6, pairs_per_task=3, antithetic=False, window=K, stagger=False), []
    for inner in (OneSurvives(), Linear()):
        gradient, _, metrics = both.estimate(inner, as_theta([0.3]), both.start(inner, as_theta([0.3]), seed=0))
        alone.append((float(gradient["theta"]), metrics["diverged"]))
    eps = 0.01 * copy_noise(0, 0, torch.arange(6), 1, as_theta([0.3])["theta"])[:, 0]
    # a loss of Linear grows by theta a step: in a window of K by (K + 1) / 2 of it in the mean
    each = (K + 1) / 2 * (eps - eps.unflatten(0, (2, 3)).mean(1).repeat_interleave(3)) * 1.5 * eps / 0.01**2
    assert alone[1] == (pytest.approx(float(each.mean()), rel=1e-9), 0)
    assert alone[0] == (pytest.approx(float(each[3:].mean()), rel=1e-9), 3)


@pytest.mark.parametrize("strategy", [TruncatedES, PES, NRES, FullES])
def test_pairs_of_one_task_share_its_seed_and_not_their_noise(strategy: Any) -> None:
    class Recorded(Linear):
        def start(self, theta: Any, seeds: Tensor, lengths: Tensor) -> Any:
            recorded.append((theta["theta"][:, 0], seeds))
            return super().start(theta, seeds, lengths)

    recorded: list[tuple[Tensor, Tensor]] = []
    estimates(strategy(pairs=12, pairs_per_task=3), Recorded(), [0.3], 1)
    thetas, seeds = recorded[-1] if strategy is FullES else recorded[1]
    assert [int((seeds == seed).sum()) for seed in seeds.unique()] == [6, 6, 6, 6]  # three pairs of two signs
    assert len(thetas.unique()) == 24
    torch.testing.assert_close(thetas[::2] + thetas[1::2], torch.full((12,), 0.6, dtype=torch.float64))


@every
def test_clipping_bounds_each_contribution(name: str) -> None:
    free, tight, loose = (
        estimates(make(name, 1, clip_task=clip), Quadratic(), [0.05, -0.03], 8) for clip in (0.0, 1e-3, 1e9)
    )
    assert torch.equal(free, loose)
    norms = torch.linalg.vector_norm(tight, dim=1)
    assert (norms <= 1e-3 * (1 + 1e-12)).all()
    scaled = free * (1e-3 / torch.linalg.vector_norm(free, dim=1)).clamp(max=1).unsqueeze(1)
    torch.testing.assert_close(tight, scaled, rtol=1e-12, atol=0)
