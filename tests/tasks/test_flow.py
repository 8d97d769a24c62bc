"""Normalising flows: exact likelihoods, and densities of known entropy to learn."""

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.func import jacrev, vmap

from metaopt.rule import Params
from metaopt_tasks.data.densities import SHAPES, density, entropy
from metaopt_tasks.flow import Flow, flow


def trained_looking(task: Flow) -> Params:
    """Float64 parameters far from the start, so that the flow bends space."""
    generator = Generator().manual_seed(1)
    params = task.init(generator)
    return {name: (p + 0.2 * torch.randn(p.shape, generator=generator)).double() for name, p in params.items()}


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_log_determinant_is_that_of_the_jacobian(coupling: str) -> None:
    task = flow(layers=5, coupling=coupling)
    params, x = trained_looking(task), torch.randn(7, 2, generator=Generator().manual_seed(0), dtype=torch.float64)

    def noise(point: Tensor) -> Tensor:
        return task.encode(params, point[None])[0][0]

    expected = torch.linalg.slogdet(vmap(jacrev(noise))(x)).logabsdet
    torch.testing.assert_close(task.encode(params, x)[1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_density_integrates_to_one(coupling: str) -> None:
    task = flow(layers=3, coupling=coupling)
    line = torch.linspace(-20, 20, 801, dtype=torch.float64)
    density_there = task.log_prob(trained_looking(task), torch.cartesian_prod(line, line)).exp()
    assert float(density_there.sum()) * float(line[1] - line[0]) ** 2 == pytest.approx(1, abs=2e-3)


def test_a_fresh_flow_is_a_gaussian() -> None:
    task = flow()
    loss = task.loss(task.init(Generator().manual_seed(0)), task.valid.tensors)
    assert float(task.normalize(loss)) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("dim", "scale"), [(1, 2.0), (2, 0.5), (3, 1.0)])
def test_entropy_of_gaussian_points(dim: int, scale: float) -> None:
    points = scale * torch.randn(4000, dim, generator=Generator().manual_seed(0), dtype=torch.float64)
    exact = dim * (0.5 * (1 + math.log(2 * math.pi)) + math.log(scale))
    assert entropy(points) == pytest.approx(exact, abs=0.08)


def test_entropy_of_a_checkerboard_is_the_log_of_its_area() -> None:
    points = SHAPES["checkerboard"](8000, Generator().manual_seed(0))
    assert entropy(points) == pytest.approx(math.log(8), abs=0.05)


def test_entropy_of_eight_gaussians_is_that_of_their_mixture() -> None:
    line = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    angle = torch.arange(8) * math.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], -1).double()
    log_p = (-0.5 * ((grid[:, None] - centres) / 0.2).square().sum(-1) - math.log(8 * 2 * math.pi * 0.04)).logsumexp(1)
    exact = -float((log_p.exp() * log_p).sum()) * float(line[1] - line[0]) ** 2
    assert entropy(SHAPES["eight_gaussians"](8000, Generator().manual_seed(0))) == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_densities_are_standardised_points_in_disjoint_splits(shape: str) -> None:
    data = density(shape)
    train = data["train"].tensors["input"]
    assert [len(data[split]) for split in ("train", "valid", "test")] == [5600, 1200, 1200]
    torch.testing.assert_close(train.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(train.std(0), torch.ones(2), rtol=0, atol=1e-4)
    together = torch.cat([split.tensors["input"] for split in data.values()])
    assert len(together.unique(dim=0)) == 8000


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="coupling must be one of affine, additive"):
        flow(coupling="planar")
    with pytest.raises(ValueError, match="shape must be one of"):
        density("pretzel")
