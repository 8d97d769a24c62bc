"""Factorisation, completion and sensing of matrices: what is known of their best losses."""

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from metaopt import tree
from metaopt_tasks.matrix import MEASUREMENTS, matrix_completion, matrix_factorization, matrix_sensing


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_target_has_the_asked_rank_condition_and_size() -> None:
    target = matrix_factorization(rows=12, columns=9, rank=4, condition=50.0).config["target"]
    values = np.linalg.svd(target.double().numpy(), compute_uv=False)
    assert values[0] / values[3] == pytest.approx(50, rel=1e-4)
    assert values[4] < 1e-5
    assert float(target.square().mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("rank", "inner", "noise"), [(5, 2, 0.0), (3, 3, 0.2), (4, 4, 0.0)])
def test_no_factors_beat_the_truncated_svd(rank: int, inner: int, noise: float) -> None:
    task = matrix_factorization(rows=10, columns=14, rank=rank, inner=inner, noise=noise, condition=5.0, seed=2)
    left, values, right = np.linalg.svd(task.config["target"].double().numpy())
    roots = np.sqrt(values[:inner])
    best = {
        "factor1.weight": torch.tensor(roots[:, None] * right[:inner]),
        "factor2.weight": torch.tensor(left[:, :inner] * roots),
    }
    loss = task.loss(best, {})
    assert float(loss) == pytest.approx(task.floor, abs=1e-9)
    assert float(task.normalize(loss)) == pytest.approx(0, abs=1e-6)
    assert all(float(g.abs().max()) < 1e-7 for g in grad(task.loss)(best, {}).values())
    nothing = {name: torch.zeros_like(p) for name, p in best.items()}
    assert float(task.normalize(task.loss(nothing, {}))) == pytest.approx(1)


def test_a_deep_factorization_is_a_linear_network() -> None:
    task = matrix_factorization(rows=6, columns=5, rank=2, inner=3, depth=4)
    params = task.init(generator(0))
    net = torch.nn.Sequential(*(torch.nn.Linear(p.shape[1], p.shape[0], bias=False) for p in params.values()))
    net.load_state_dict({f"{i}.weight": p for i, p in enumerate(params.values())})
    expected = torch.nn.functional.mse_loss(net(torch.eye(5)).T, task.config["target"])
    torch.testing.assert_close(task.loss(params, {}), expected)
    roles = [info.role for info in task.info().values()]
    assert roles == ["input", "hidden", "hidden", "output"]


def test_initial_products_have_the_size_that_init_scale_asks_for() -> None:
    task = matrix_factorization(rows=40, columns=40, rank=4, inner=40, depth=3, init_scale=0.5)
    starts = tree.stack([task.init(generator(seed)) for seed in range(20)])
    product = starts["factor3.weight"] @ starts["factor2.weight"] @ starts["factor1.weight"]
    assert float(product.square().mean()) == pytest.approx(0.5**6 / 40, rel=0.1)


def test_completion_is_judged_on_entries_that_training_never_sees() -> None:
    task = matrix_completion(rows=12, columns=10, observed=0.5)
    cells = [
        set(zip(s.tensors["row"].tolist(), s.tensors["column"].tolist(), strict=True))
        for s in (task.train, task.valid, task.test)
    ]
    assert [len(part) for part in cells] == [60, 30, 30]
    assert len(set.union(*cells)) == 120, "each entry is in one split"


def test_completion_is_solved_by_the_factors_of_the_whole_matrix() -> None:
    task = matrix_completion(rows=12, columns=10, rank=3, inner=3, condition=4.0)
    whole = torch.zeros(12, 10, dtype=torch.float64)
    for split in (task.train, task.valid, task.test):
        whole[split.tensors["row"], split.tensors["column"]] = split.tensors["value"].double()
    left, values, right = torch.linalg.svd(whole)
    best = {"row.embedding": left[:, :3] * values[:3], "column.embedding": right[:3].T}
    for split in (task.train, task.valid, task.test):
        assert float(task.loss(best, split.tensors)) == pytest.approx(0, abs=1e-10)
    nothing = {name: torch.zeros_like(p) for name, p in best.items()}
    assert float(task.normalize(task.loss(nothing, task.train.tensors))) == pytest.approx(1, abs=0.3)


def test_noise_is_in_the_observed_entries_only() -> None:
    clean, noisy = matrix_completion(seed=1), matrix_completion(seed=1, noise=0.5)
    added = noisy.train.tensors["value"] - clean.train.tensors["value"]
    assert float(added.std()) == pytest.approx(0.5, rel=0.1)
    torch.testing.assert_close(noisy.test.tensors["value"], clean.test.tensors["value"])


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_measurements_are_inner_products_with_the_matrix_and_the_truth_has_loss_zero(measurement: str) -> None:
    task = matrix_sensing(measurement=measurement, dim=6, rank=2, inner=2, measurements=20)
    factors = [factor.numpy() for factor in task.truth.values()]
    matrix = factors[0] @ factors[-1].T
    for split in (task.train, task.valid, task.test):
        for given, target in zip(
            split.tensors["input"].double().numpy(), split.tensors["target"].tolist(), strict=True
        ):
            sensor = {"dense": lambda g: g, "rank_one": lambda g: np.outer(g, g), "bilinear": lambda g: np.outer(*g)}
            assert np.sum(sensor[measurement](given) * matrix) == pytest.approx(target, rel=1e-4, abs=1e-6)
        exact = {key: t.double() for key, t in split.tensors.items()}
        assert float(task.loss(dict(task.truth), exact)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_sensing_starts_near_what_knowing_nothing_costs(measurement: str) -> None:
    task = matrix_sensing(measurement=measurement, inner=4)
    starts = tree.stack([task.init(generator(seed)) for seed in range(20)])
    losses = vmap(task.loss, in_dims=(0, None))(starts, task.train.tensors)
    assert 0.4 < float(task.normalize(losses.mean())) < 1.5
    sizes = [start.square().sum((1, 2)).mean() for start in starts.values()]
    torch.testing.assert_close(torch.stack(sizes), torch.full((len(sizes),), 0.25), rtol=0.2, atol=0)


def test_gradient_descent_recovers_a_low_rank_matrix_from_wide_factors() -> None:
    """Li, Ma and Zhang 2018, for a small start, though many other matrices explain the measurements."""
    task = matrix_sensing(dim=8, rank=1, inner=8, measurements=30, init_scale=0.05, seed=1)
    assert len(task.train) < 8 * 9 / 2, "fewer measurements than a symmetric matrix has entries"
    params = {name: p.double().requires_grad_() for name, p in task.init(generator(0)).items()}
    data = {key: t.double() for key, t in task.train.tensors.items()}
    for _ in range(400):
        (gradient,) = torch.autograd.grad(task.loss(params, data), list(params.values()))
        params = {"factor.weight": (params["factor.weight"] - 0.05 * gradient).detach().requires_grad_()}
    found = params["factor.weight"].detach()
    truth = task.truth["factor.weight"]
    assert float((found @ found.T - truth @ truth.T).norm()) < 0.1


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, 5\] for a 5 x 20 matrix, got 6"):
        matrix_factorization(rows=5, rank=6)
    with pytest.raises(ValueError, match="depth must be at least 2, got 1"):
        matrix_factorization(depth=1)
    with pytest.raises(ValueError, match=r"condition must be at least 1, got 0\.1"):
        matrix_factorization(condition=0.1)
    with pytest.raises(ValueError, match=r"observed must be in \(0, 0\.9\], got 1"):
        matrix_completion(observed=1)
    with pytest.raises(ValueError, match="inner must be at least rank = 2"):
        matrix_sensing(inner=1)
    with pytest.raises(ValueError, match="measurement must be one of dense"):
        matrix_sensing(measurement="sparse")
