"""Point clouds: made as told, and classified whatever the order of their points."""

import pytest
import torch
from torch import Generator, nn

from metaopt_tasks.data.clouds import KINDS, clouds
from metaopt_tasks.points import point_cloud


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_equals_torch_modules_with_the_same_weights(pool: str) -> None:
    task = point_cloud(point_hidden=(8, 6), hidden=(5,), pool=pool, activation="gelu")
    params, x = task.init(Generator().manual_seed(0)), task.valid.tensors["input"][:10]
    point = nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU())
    cloud = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6))
    names = {"point1": point[0], "point2": point[2], "fc1": cloud[0], "head": cloud[2]}
    for name, layer in names.items():
        layer.load_state_dict({"weight": params[f"{name}.weight"], "bias": params[f"{name}.bias"]})
    h = point(x)
    expected = cloud(h.mean(1) if pool == "mean" else h.max(1).values)
    torch.testing.assert_close(task.logits(params, x), expected)
    loss = task.loss(params, {"input": x, "label": task.valid.tensors["label"][:10]})
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, task.valid.tensors["label"][:10]))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_order_of_points_does_not_matter(pool: str) -> None:
    task = point_cloud(pool=pool)
    params, x = task.init(Generator().manual_seed(0)), task.valid.tensors["input"][:10]
    torch.testing.assert_close(task.logits(params, x), task.logits(params, x.flip(1)))


@pytest.mark.parametrize(("kind", "points", "dim"), [("outlines", 24, 2), ("surfaces", 32, 3), ("curves", 32, 3)])
def test_clouds_are_balanced_and_standardised(kind: str, points: int, dim: int) -> None:
    train = clouds(kind)["train"].tensors
    assert train["input"].shape[1:] == (points, dim) and len(train["input"]) == pytest.approx(1400, abs=6)
    counts = train["label"].bincount()
    assert len(counts) == 6 and int(counts.max() - counts.min()) <= 1
    assert float(train["input"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(train["input"].std()) == pytest.approx(1, abs=1e-4)


def uniforms(points: int = 500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, v, w = torch.rand(3, 1, points, generator=Generator().manual_seed(0), dtype=torch.float64)
    return u, v, w


def test_surfaces_satisfy_their_equations() -> None:
    sphere, cube, cylinder, cone, torus, saddle = (torch.stack(s(uniforms()), -1)[0] for s in KINDS["surfaces"][1])
    ones = torch.ones(500, dtype=torch.float64)
    torch.testing.assert_close(sphere.norm(dim=1), ones)
    torch.testing.assert_close(cube.abs().amax(1), 0.8 * ones)
    torch.testing.assert_close(cylinder[:, :2].norm(dim=1), 0.7 * ones)
    torch.testing.assert_close(cone[:, :2].norm(dim=1) + cone[:, 2] / 1.5, 2 / 3 * ones)
    torch.testing.assert_close((torus[:, :2].norm(dim=1) - 0.9) ** 2 + torus[:, 2] ** 2, 0.35**2 * ones)
    torch.testing.assert_close(saddle[:, 2], saddle[:, 0] ** 2 - saddle[:, 1] ** 2)


def test_outlines_satisfy_their_equations() -> None:
    circle, triangle, square, ellipse, cross, flower = (torch.stack(s(uniforms()), -1)[0] for s in KINDS["outlines"][1])
    ones = torch.ones(500, dtype=torch.float64)
    torch.testing.assert_close(circle.norm(dim=1), ones)
    torch.testing.assert_close(square.abs().sum(1), ones)
    torch.testing.assert_close((ellipse / torch.tensor([1.3, 0.5])).norm(dim=1), ones)
    torch.testing.assert_close(cross.prod(1), 0 * ones)
    normals = -torch.stack([torch.tensor([1, 1, -2]) / 2, torch.tensor([3**0.5, -(3**0.5), 0]) / 2]).double()
    torch.testing.assert_close((triangle @ -normals).amax(1), 0.5 * ones)
    assert float(flower.norm(dim=1).max()) <= 1.5 and float(flower.norm(dim=1).min()) >= 0.5


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="pool must be one of mean, max"):
        point_cloud(pool="sum")
    with pytest.raises(ValueError, match="point_hidden must have at least one width"):
        point_cloud(point_hidden=())
