"""Linear, LASSO and logistic regression: their best losses are scikit-learn's, and are best."""

import numpy as np
import pytest
import sklearn.linear_model
import torch
from torch.func import grad

from metaopt import registry
from metaopt.rule import Params
from metaopt.task import Batch
from metaopt_tasks.linear_models import LinearModel, LinearRegression, linear_regression, logistic_regression


def train(task: LinearModel) -> Batch:
    return {key: t.double() if t.is_floating_point() else t for key, t in task.train.tensors.items()}


def arrays(task: LinearModel) -> tuple[np.ndarray, np.ndarray]:
    data = train(task)
    return data["input"].numpy(), (data["label"] if "label" in data else data["target"][:, 0]).numpy()


@pytest.mark.parametrize("data", ["diabetes", "ill_conditioned_regression", "sparse_regression"])
def test_the_best_least_squares_model_is_scikit_learns(data: str) -> None:
    task = linear_regression(data=data)
    expected = sklearn.linear_model.LinearRegression().fit(*arrays(task))
    best = task.optimum()
    np.testing.assert_allclose(best["head.weight"][0].numpy(), expected.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(best["head.bias"].numpy(), expected.intercept_, rtol=1e-6, atol=1e-8)


def test_the_best_ridge_model_is_scikit_learns() -> None:
    task = linear_regression(data="diabetes", l2=0.1)
    inputs, target = arrays(task)
    expected = sklearn.linear_model.Ridge(alpha=0.1 * len(target)).fit(inputs, target)
    np.testing.assert_allclose(task.optimum()["head.weight"][0].numpy(), expected.coef_, rtol=1e-6)


@pytest.mark.parametrize("l2", [0.0, 0.05])
@pytest.mark.parametrize("data", ["diabetes", "sparse_regression_correlated"])
def test_the_best_lasso_model_obeys_the_optimality_conditions(data: str, l2: float) -> None:
    task = linear_regression(data=data, l1=0.03, l2=l2)
    best, smooth = task.optimum(), linear_regression(data=data, l2=l2)
    slope = grad(smooth.loss)(best, train(task))
    weight, gradient = best["head.weight"], slope["head.weight"]
    kept = weight != 0
    assert 0 < int(kept.sum()) < weight.numel()
    torch.testing.assert_close(gradient[kept], -0.03 * weight[kept].sign(), rtol=0, atol=1e-6)
    assert float(gradient[~kept].abs().max()) < 0.03 + 1e-9
    assert float(slope["head.bias"].abs().max()) < 1e-6


def test_the_lasso_of_sparse_data_finds_its_support() -> None:
    from metaopt_tasks.data.regression import sparse_weights

    weight = linear_regression(data="sparse_regression", l1=0.05).optimum()["head.weight"][0]
    truth = sparse_weights(100, 10)
    assert torch.equal(weight.nonzero(), truth.nonzero())
    assert torch.equal(weight.sign(), truth.sign())


@pytest.mark.parametrize(("data", "l2"), [("iris", 1e-3), ("breast_cancer", 1e-2), ("ill_conditioned_classes", 1e-3)])
def test_the_best_logistic_model_has_gradient_zero(data: str, l2: float) -> None:
    task = logistic_regression(data=data, l2=l2)
    slope = grad(task.loss)(task.optimum(), train(task))
    assert max(float(g.abs().max()) for g in slope.values()) < 1e-6, "the loss is convex: no slope, no better place"


def test_a_binary_logistic_model_predicts_scikit_learns_probabilities() -> None:
    task = logistic_regression(data="breast_cancer", l2=0.02)
    inputs, label = arrays(task)
    expected = sklearn.linear_model.LogisticRegression(C=2 / (0.02 * len(label)), tol=1e-8).fit(inputs, label)
    found = task.predict(task.optimum(), torch.as_tensor(inputs)).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected.predict_proba(inputs), atol=1e-4)


def convex_tasks() -> list[LinearModel]:
    return [linear_regression(), linear_regression(l1=0.01), logistic_regression(data="wine", l2=0.01)]


@pytest.mark.parametrize("task", convex_tasks(), ids=["least squares", "lasso", "logistic"])
def test_normalized_losses_are_zero_at_the_best_and_one_at_the_best_constant(task: LinearModel) -> None:
    best, data = task.optimum(), train(task)
    assert float(task.normalize(task.loss(best, data))) == pytest.approx(0, abs=1e-9)
    assert float(task.normalize(task.loss(task.constant(), data))) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other: Params = {
            name: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in best.items()
        }
        assert float(task.loss(other, data)) > task.floor
    assert float(task.loss(task.constant(), data)) > task.floor


def test_the_best_constant_of_a_classifier_is_the_entropy_of_its_classes() -> None:
    task = logistic_regression(data="breast_cancer")
    shares = np.bincount(task.train.tensors["label"]) / len(task.train)
    assert float(task.loss(task.constant(), train(task))) == pytest.approx(-np.sum(shares * np.log(shares)))


def test_the_only_layer_is_the_output() -> None:
    info = logistic_regression().info()
    assert {name: i.role for name, i in info.items()} == {"head.weight": "output", "head.bias": "bias"}
    assert info["head.weight"].shape == (3, 4)


def test_ill_conditioned_data_are_ill_conditioned_and_standardised() -> None:
    inputs = registry.create("data_source", "ill_conditioned_regression")["train"].tensors["input"].double().numpy()
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(inputs.std(0, ddof=1), 1, atol=1e-5)
    assert np.linalg.cond(np.cov(inputs.T)) > 1e3


def test_correlated_columns_have_the_asked_correlation() -> None:
    data = registry.create("data_source", "sparse_regression", rows=4000, correlation=0.8, features=5, informative=2)
    found = np.corrcoef(data["train"].tensors["input"].numpy().T)
    np.testing.assert_allclose(found, 0.8 ** np.abs(np.subtract.outer(range(5), range(5))), atol=0.05)


def test_labels_are_drawn_from_a_model_that_beats_guessing_and_is_not_sure() -> None:
    task = logistic_regression(data="ill_conditioned_classes", l2=1e-5)
    best = float(task.loss(task.optimum(), train(task)))
    assert 0.05 < best < 0.5 * np.log(4)
    assert task.classes == 4


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"l1 must be at least 0, got -1"):
        linear_regression(l1=-1)
    with pytest.raises(ValueError, match="l2 must be above 0, got 0"):
        logistic_regression(l2=0)
    with pytest.raises(ValueError, match=r"informative must be in \[1, features = 5\], got 6"):
        registry.create("data_source", "sparse_regression", features=5, informative=6)
    with pytest.raises(ValueError, match=r"correlation must be in \[0, 1\), got 1"):
        registry.create("data_source", "sparse_regression", correlation=1)
    assert isinstance(linear_regression(), LinearRegression)
