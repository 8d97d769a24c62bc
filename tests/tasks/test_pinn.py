"""Physics-informed networks: the solutions solve the equations, and the network's derivatives are its derivatives."""

import pytest
import torch
from torch import Generator, Tensor
from torch.func import jacfwd, vmap

from metaopt_tasks.data.equations import EQUATIONS, collocation
from metaopt_tasks.pinn import SMOOTH, pinn


def central(f: object, x: Tensor, i: int, step: float) -> tuple[Tensor, Tensor]:
    """First and second derivative of ``f`` in coordinate i, by fourth-order differences."""
    move = torch.zeros(x.shape[1], dtype=x.dtype)
    move[i] = step
    a, b, c, d, e = (f(x + k * move) for k in (-2, -1, 0, 1, 2))  # type: ignore[operator]
    return (a - 8 * b + 8 * d - e) / (12 * step), (-a + 16 * b - 30 * c + 16 * d - e) / (12 * step**2)


@pytest.mark.parametrize("name", EQUATIONS)
def test_solution_satisfies_its_equation(name: str) -> None:
    equation = EQUATIONS[name]
    lower, upper = torch.tensor(equation.lower).double(), torch.tensor(equation.upper).double()
    inside = torch.rand(40, len(lower), generator=Generator().manual_seed(0), dtype=torch.float64)
    x = lower + (upper - lower) * (0.05 + 0.9 * inside)
    slopes = [central(equation.solution, x, i, 2e-3) for i in range(len(lower))]
    first, second = (torch.stack(part) for part in zip(*slopes, strict=True))
    residual = equation.residual(x, equation.solution(x), first, second)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "point", "value"),
    [
        ("logistic_ode", [0.0], [0.5]),
        ("oscillator_ode", [0.0], [1.0, 0.0]),
        ("pendulum_ode", [0.0], [2.0, 0.0]),
        ("lotka_volterra_ode", [0.0], [1.5, 1.0]),
        ("van_der_pol_ode", [0.0], [2.0, 0.0]),
        ("poisson_equation", [1.0], [0.0]),
        ("heat_equation", [0.5, 0.0], [0.5]),
        ("burgers_equation", [-0.5, 0.0], [1.0]),
        ("burgers_equation", [1.0, 0.7], [0.0]),
        ("laplace_equation", [0.5, 1.0], [1.0]),
    ],
)
def test_solution_has_the_right_values_on_the_boundary(name: str, point: list[float], value: list[float]) -> None:
    found = EQUATIONS[name].solution(torch.tensor([point], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([value], dtype=torch.float64), rtol=0, atol=1e-9)


def test_lotka_and_volterra_keep_their_invariant() -> None:
    target = collocation("lotka_volterra_ode")["test"].tensors["target"].double()
    invariant = (target - target.log()).sum(1)
    torch.testing.assert_close(invariant, torch.full_like(invariant, float(invariant[0])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("data", ["heat_equation", "oscillator_ode", "poisson_equation"])
def test_derivatives_equal_nested_forward_differentiation(data: str, activation: str) -> None:
    task = pinn(data=data, hidden=(6, 5, 4), activation=activation)
    generator = Generator().manual_seed(1)
    params = {
        n: (p + 0.5 * torch.randn(p.shape, generator=generator)).double() for n, p in task.init(generator).items()
    }
    x = task.train.tensors["input"][:9].double()

    def at(point: Tensor) -> Tensor:
        return task.predict(params, point[None])[0]

    u, first, second = task.derivatives(params, x)
    torch.testing.assert_close(u, task.predict(params, x))
    torch.testing.assert_close(first, vmap(jacfwd(at))(x).permute(2, 0, 1))
    if EQUATIONS[data].order == 2:
        nested = vmap(jacfwd(jacfwd(at)))(x).diagonal(dim1=2, dim2=3)
        torch.testing.assert_close(second, nested.permute(2, 0, 1))


def test_training_never_looks_at_the_solution_inside() -> None:
    task = pinn(data="wave_equation")
    params, batch = task.init(Generator().manual_seed(0)), task.train.take(torch.arange(32))
    spoiled = batch | {"target": batch["target"] + 1}
    assert torch.equal(task.training_loss(params, {}, batch)[0], task.training_loss(params, {}, spoiled)[0])
    assert not torch.equal(task.loss(params, batch), task.loss(params, spoiled))


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_lie_in_the_box_and_boundary_points_on_its_sides(name: str) -> None:
    equation = EQUATIONS[name]
    lower, upper = torch.tensor(equation.lower), torch.tensor(equation.upper)
    for split in collocation(name).values():
        for key in ("input", "boundary"):
            points = split.tensors[key]
            assert bool((points >= lower).all()) and bool((points <= upper).all())
        on_a_side = torch.zeros(len(split), dtype=torch.bool)
        for coordinate, end in equation.sides:
            on_a_side |= split.tensors["boundary"][:, coordinate] == (lower, upper)[end][coordinate]
        assert bool(on_a_side.all())


def test_zero_normalizes_to_one() -> None:
    task = pinn(data="burgers_equation")
    silent = {name: torch.zeros_like(p) for name, p in task.init(Generator().manual_seed(0)).items()}
    assert float(task.normalize(task.loss(silent, task.valid.tensors))) == pytest.approx(1, abs=1e-5)


def test_bad_arguments_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="boundary_weight must be above 0"):
        pinn(boundary_weight=0.0)
    with pytest.raises(ValueError, match="data must be one of logistic_ode"):
        pinn(data="moons2d")
    with pytest.raises(ValueError, match="activation must be one of tanh"):
        pinn(activation="relu")
