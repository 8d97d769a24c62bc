"""What holds for all methods: which runs they take, what they refuse, and that they agree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_forms import PROBLEMS, draws
from torch import Tensor

from metaopt import registry
from metaopt.rule import Params, PerParameter, State, UpdateRule
from metaopt.tune import METHODS, Hypers, Inner, MissingGradient, hypergradient, plan, tolerances
from metaopt_classic.adam import Adam
from metaopt_classic.sgd import SGD

OF_THE_RUN = ("unroll", "checkpoint", "replay", "forward")


def network(dtype: torch.dtype = torch.float64) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Params, Hypers]:
    """A small net with weights of samples and a decay: inner loss, outer loss, parameters, hypers."""
    x, y, xv, yv = (draws(*shape, seed=i).to(dtype) for i, shape in enumerate([(12, 3), (12,), (9, 3), (9,)]))
    params = {"hidden": 0.5 * draws(3, 4, seed=5).to(dtype), "out": 0.5 * draws(4, seed=6).to(dtype)}
    hypers = {"weights": torch.linspace(-1, 1, 12, dtype=dtype), "decay": torch.tensor(-3.0, dtype=dtype)}

    def predict(p: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["hidden"]) @ p["out"]

    def loss(p: Params, h: Hypers, batch: Any) -> Tensor:
        rows = slice(None) if batch is None else batch
        fit = (h["weights"][rows].sigmoid() * (predict(p, x[rows]) - y[rows]) ** 2).mean()
        return fit + h["decay"].exp() * sum((leaf**2).sum() for leaf in p.values())

    return loss, lambda p, h: ((predict(p, xv) - yv) ** 2).mean(), params, hypers


def gradient_of(inner: Inner, outer: Any, hypers: Hypers, method: str, **options: Any) -> Hypers:
    return hypergradient(inner, outer, hypers, method, **options).grads


def same(a: Hypers, b: Hypers) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rule", [SGD(lr=0.3, momentum=0.9), Adam(lr=0.1)])
def test_exact_methods_equal_finite_differences_of_the_run(rule: UpdateRule) -> None:
    loss, outer, params, hypers = network()
    inner = Inner.of_rule(
        loss, rule, params, 9, batches=lambda t: torch.tensor([t % 12, (5 * t + 1) % 12, (t + 7) % 12])
    )
    direction = {"weights": draws(12, seed=3), "decay": draws(seed=4)}
    ends = []
    for sign in (1, -1):
        moved = {name: value + sign * 1e-6 * direction[name] for name, value in hypers.items()}
        ends.append(outer(inner.params(inner.advance(inner.start(moved), moved, 0, 9)), moved))
    slope = (ends[0] - ends[1]) / 2e-6
    for method in OF_THE_RUN:
        grads = gradient_of(inner, outer, hypers, method)
        along = sum((grads[name] * direction[name]).sum() for name in hypers)
        # central differences of step 1e-6 in float64 err by 1e-10 of the value
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replay_is_the_unroll_bit_for_bit(dtype: torch.dtype) -> None:
    loss, outer, params, hypers = network(dtype)
    inner = Inner.of_rule(loss, SGD(lr=0.3), params, 23)
    expected = gradient_of(inner, outer, hypers, "unroll")
    for options in ({}, {"states": 1, "branching": 2}, {"states": 4, "branching": 3}, {"states": 1, "branching": 30}):
        assert same(gradient_of(inner, outer, hypers, "replay", graph=1, **options), expected)
    for graph in (2, 8, 40):  # what graphs of several steps find for the hypers is summed in another order
        found = gradient_of(inner, outer, hypers, "replay", graph=graph, states=2)
        torch.testing.assert_close(
            found, expected, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps
        )


def test_adjoint_norms_are_those_of_the_states_between_graphs() -> None:
    loss, outer, params, hypers = network()
    inner = Inner.of_rule(loss, SGD(lr=0.3), params, 23)

    def norms(method: str, **options: Any) -> Tensor:
        return hypergradient(inner, outer, hypers, method, **options).diagnostics["adjoint_norms"]

    curve = norms("replay", graph=1)
    assert curve.shape == (24,)
    torch.testing.assert_close(norms("replay", graph=8), curve[[0, 8, 16, 23]])
    torch.testing.assert_close(norms("checkpoint"), curve[[0, 6, 12, 18, 23]])


def test_replay_repeats_the_training_once_per_level() -> None:
    loss, outer, params, hypers = network()
    count = 0
    whole = Inner.of_rule(loss, SGD(), params, 27)

    def step(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return whole.step(*arguments)

    inner = Inner(whole.start, step, 27, whole.params)
    for options, most in (
        ({}, 2),
        ({"states": 27, "graph": 1}, 2),
        ({"states": 3, "branching": 9, "graph": 1}, 3),
        ({"states": 1, "branching": 3, "graph": 1}, 4),
    ):
        count = 0
        gradient_of(inner, outer, hypers, "replay", **options)
        assert count <= most * 27 + 4  # and the probes for unused hypers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_under_vmap_over_problems(method: str) -> None:
    x, hypers = draws(3, 6, 2, seed=1), {"l": draws(3, 2, seed=2) / 4}

    def grad(x: Tensor, log: Tensor) -> Tensor:
        inner = Inner.of_rule(
            lambda p, h, _: ((x @ p["w"] - 1) ** 2).mean() + (h["l"].exp() * p["w"] ** 2).sum(),
            SGD(lr=0.2, momentum=0.5), {"w": torch.zeros(2, dtype=torch.float64)}, 6,
        )  # fmt: skip
        return gradient_of(inner, lambda p, h: (p["w"] ** 3).sum(), {"l": log}, method)["l"]

    apart = torch.stack([grad(*pair) for pair in zip(x, hypers["l"], strict=True)])
    # finite differences of radius 0.01 amplify rounding a hundredfold
    torch.testing.assert_close(torch.vmap(grad)(x, hypers["l"]), apart, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", OF_THE_RUN)
def test_a_coordinate_without_gradient_does_not_poison_adam(method: str) -> None:
    inner = Inner.of_rule(
        lambda p, h, _: (h["l"] * p["w"][:2] ** 2).sum(), Adam(lr=0.1), {"w": torch.ones(3, dtype=torch.float64)}, 4
    )
    grads = gradient_of(inner, lambda p, h: p["w"].sum(), {"l": torch.ones(2, dtype=torch.float64)}, method)
    assert grads["l"].isfinite().all()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"es"}))
def test_unused_hypers_have_zero_gradients_and_direct_terms_stay(method: str) -> None:
    loss, outer, params, hypers = network()
    inner = Inner.of_rule(loss, SGD(lr=0.1), params, 3)
    more = hypers | {"nowhere": torch.ones(2, dtype=torch.float64), "direct": torch.tensor(2.0, dtype=torch.float64)}
    grads = gradient_of(inner, lambda p, h: outer(p, h) + h["direct"] ** 3, more, method)
    assert torch.equal(grads["nowhere"], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(grads["direct"], torch.tensor(12.0, dtype=torch.float64))


@pytest.mark.parametrize("method", OF_THE_RUN)
def test_no_steps_leave_the_start_and_the_direct_term(method: str) -> None:
    inner = Inner(lambda h: {"w": 3 * h["a"]}, lambda state, h, t: state, 0, lambda state: state)
    grads = gradient_of(inner, lambda p, h: p["w"] * h["b"], {"a": torch.tensor(2.0), "b": torch.tensor(5.0)}, method)
    assert (float(grads["a"]), float(grads["b"])) == (15.0, 6.0)


@pytest.mark.parametrize("method", OF_THE_RUN)
def test_no_parameters_leave_the_direct_term(method: str) -> None:
    inner = Inner.of_rule(lambda p, h, _: h["a"] ** 2, SGD(lr=0.1), {}, 3)
    assert float(gradient_of(inner, lambda p, h: h["a"] ** 2, {"a": torch.tensor(2.0)}, method)["a"]) == 4.0


@pytest.mark.parametrize("method", OF_THE_RUN)
def test_initial_parameters_may_be_hypers(method: str) -> None:
    """MAML on a quadratic: w' = (1 - lr) w_0, F = w'^2 / 2."""
    inner = Inner.of_rule(lambda p, h, _: p["w"] ** 2 / 2, SGD(lr=0.1), lambda h: {"w": h["start"]}, 1)
    grads = gradient_of(inner, lambda p, h: p["w"] ** 2 / 2, {"start": torch.tensor(3.0)}, method)
    assert float(grads["start"]) == pytest.approx(0.9 * 0.9 * 3.0, rel=1e-6)


def test_conjugate_gradients_that_converge_at_once_are_not_zero() -> None:
    inner = Inner.of_rule(
        lambda p, h, _: ((p["w"] - h["l"]) ** 2).sum(), SGD(lr=0.5), {"w": torch.zeros(3, dtype=torch.float64)}, 1
    )
    hypers = {"l": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    result = hypergradient(inner, lambda p, h: (p["w"] ** 2).sum(), hypers, "cg")
    torch.testing.assert_close(result.grads["l"], 2 * hypers["l"])
    assert float(result.diagnostics["residual"]) == 0


def test_a_solver_that_stops_at_its_tolerance_says_so() -> None:
    problem = PROBLEMS["weighted_least_squares"]()
    first = tolerances(0.1, 0.5, 0)
    assert [tolerances(0.1, 0.5, k) for k in range(3)] == pytest.approx([0.1, 0.05, 0.025])
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\)"):
        tolerances(0.1, 1.0, 3)
    result = hypergradient(problem.inner(), problem.outer, problem.hypers, "cg", iterations=50, tolerance=first)
    assert 0 < float(result.diagnostics["residual"]) <= first


class _OnceDifferentiable(torch.autograd.Function):
    """The sum of scale w^2, whose gradient is a constant to autograd, as that of a compiled function can be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, scale: Tensor) -> Tensor:
        return (w**2 * scale).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor]:
        w, scale = (saved.detach() for saved in ctx.saved_tensors)
        return 2 * w * scale * bar.detach(), w**2 * bar.detach()


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize(
    "method", ["unroll", "checkpoint", "replay", "truncated", "cg", "neumann", "identity", "nystrom", "fixed_point"]
)
def test_a_missing_gradient_is_refused_and_never_zero(method: str, vmapped: bool) -> None:
    inner = Inner.of_rule(
        lambda p, h, _: _OnceDifferentiable.apply(p["w"], h["l"]), SGD(lr=0.1), {"w": torch.ones(2)}, 3
    )

    def run(scale: Tensor) -> Tensor:
        return gradient_of(inner, lambda p, h: p["w"].sum(), {"l": scale}, method)["l"]

    with pytest.raises(MissingGradient, match=r"depends on .* but has no derivative"):
        _ = torch.vmap(run)(torch.ones(2, 2)) if vmapped else run(torch.ones(2))


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("method", ["unroll", "checkpoint", "replay"])
def test_a_hessian_that_got_lost_is_refused_though_the_step_has_derivatives(method: str, vmapped: bool) -> None:
    """The step's derivative in w is then the identity, less nothing: wrong, and finite."""
    inner = Inner.of_rule(
        lambda p, h, _: _OnceDifferentiable.apply(p["w"], torch.ones(2)), SGD(), {"w": torch.ones(2)}, 3, hp=["lr"]
    )

    def run(lr: Tensor) -> Tensor:
        return gradient_of(inner, lambda p, h: p["w"].sum(), {"lr": lr}, method)["lr"]

    with pytest.raises(MissingGradient, match=r"params\['w'\]"):
        _ = torch.vmap(run)(torch.full((2,), 0.1)) if vmapped else run(torch.tensor(0.1))


@pytest.mark.parametrize("method", ["darts", "sama", "penalty", "es"])
def test_first_order_methods_take_losses_without_second_derivatives(method: str) -> None:
    def inner(sum_of_squares: Any) -> Inner:
        return Inner.of_rule(lambda p, h, _: sum_of_squares(p["w"], h["l"]), SGD(lr=0.1), {"w": torch.ones(2)}, 3)

    once, twice = (
        gradient_of(inner(f), lambda p, h: p["w"].sum(), {"l": torch.ones(2)}, method)["l"]
        for f in (_OnceDifferentiable.apply, lambda w, scale: (w**2 * scale).sum())
    )
    torch.testing.assert_close(once, twice)


def test_a_step_may_bring_its_own_adjoint() -> None:
    """As a fused kernel does: the step itself records nothing."""

    def step(state: Any, h: Hypers, t: int) -> Any:
        with torch.no_grad():
            return {"w": (1 - h["lr"]) * state["w"]}

    def adjoint(state: Any, h: Hypers, t: int, bar: Any) -> Any:
        return {"w": (1 - h["lr"]) * bar["w"]}, {"lr": -(state["w"] * bar["w"]).sum()}

    def start(h: Hypers) -> Any:
        return {"w": torch.ones(2, dtype=torch.float64)}

    hypers = {"lr": torch.tensor(0.25, dtype=torch.float64)}
    by_hand = Inner(start, step, 5, lambda state: state, vjp=adjoint)
    result = hypergradient(by_hand, lambda p, h: p["w"].sum(), hypers)
    assert result.diagnostics["method"] == "replay" and "adjoint" in result.diagnostics["why"]
    torch.testing.assert_close(result.grads["lr"], torch.tensor(-2 * 5 * 0.75**4, dtype=torch.float64))
    with pytest.raises(MissingGradient):
        hypergradient(Inner(start, step, 5, lambda state: state), lambda p, h: p["w"].sum(), hypers, "replay")


@pytest.mark.parametrize("method", ["cg", "darts", "penalty", "sama"])
def test_methods_that_see_the_loss_alone_refuse_hyperparameters_of_the_optimizer(method: str) -> None:
    loss, outer, params, hypers = network()
    inner = Inner.of_rule(loss, SGD(), params, 3, hp=["lr"])
    with pytest.raises(ValueError, match=r"hypers\['lr'\] acts on the steps but not on the inner loss"):
        hypergradient(inner, outer, hypers | {"lr": torch.tensor(0.1, dtype=torch.float64)}, method)


@pytest.mark.parametrize("vmapped", [False, True])
def test_neumann_refuses_a_step_that_diverges(vmapped: bool) -> None:
    problem = PROBLEMS["ridge"]()

    def run(hypers: Hypers) -> Hypers:
        return gradient_of(problem.inner(2), problem.outer, hypers, "neumann", step=10.0)

    with pytest.raises(ValueError, match=r"step must be below 2 / L"):
        _ = (
            torch.vmap(run)({n: h.expand(2, *h.shape) for n, h in problem.hypers.items()})
            if vmapped
            else run(problem.hypers)
        )


def test_what_is_refused_at_the_door() -> None:
    loss, outer, params, hypers = network()
    inner = Inner.of_rule(loss, SGD(), params, 2, batches=lambda t: torch.tensor([t]))
    with pytest.raises(ValueError, match="no hypergradient is called 'unrol'"):
        hypergradient(inner, outer, hypers, "unrol")
    with pytest.raises(ValueError, match=r"floating-point tensors, got torch\.int64"):
        hypergradient(inner, outer, {"n": torch.tensor(3)}, "unroll")
    with pytest.raises(ValueError, match=r"the outer objective must be a scalar, got shape \(4,\)"):
        hypergradient(inner, lambda p, h: p["out"], hypers, "unroll")
    with pytest.raises(ValueError, match=r"the inner loss must be a scalar, got shape \(4,\)"):
        hypergradient(Inner.of_rule(lambda p, h, _: p["out"], SGD(), params, 2), outer, hypers, "unroll")
    with pytest.raises(TypeError, match=r"the inner loss must be a tensor of one number, got float 1\.0"):
        hypergradient(Inner.of_rule(lambda p, h, _: 1.0, SGD(), params, 2), outer, hypers, "unroll")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"the outer objective must be a tensor of one number, got float 2\.0"):
        hypergradient(inner, lambda p, h: 2.0, hypers, "unroll")  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="differentiates the inner loss of all data"):
        hypergradient(inner, outer, hypers, "cg")
    with pytest.raises(TypeError, match="SGD has no hyperparameter 'rate'"):
        Inner.of_rule(loss, SGD(), params, 2, hp=["rate"])
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=rf"parameter 'n' must be a floating-point tensor, got {dtype}"):
            hypergradient(Inner.of_rule(loss, SGD(), {"n": torch.ones(2, dtype=dtype)}, 2), outer, hypers)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        Inner.of_rule(loss, SGD(), params, -1)
    with pytest.raises(ValueError, match=r"hypers\['lr'\] must be one number or one per step \[2\]"):
        hypergradient(Inner.of_rule(loss, SGD(), params, 2, hp=["lr"]), outer, hypers | {"lr": torch.ones(3)}, "unroll")


def _fit(p: Params, h: Hypers, _: Any) -> Tensor:
    return ((p["w"] - 1) ** 2).sum() + (h["a"] * p["w"] ** 2).sum()


def _size(p: Params, h: Hypers) -> Tensor:
    return (p["w"] ** 2).sum()


LOST: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "all of the inner loss": (
        lambda p, h, _: (p["w"].detach() * h["a"]).sum(), _size, ValueError, "the inner loss has no gradient"
    ),
    "the hypers": (lambda p, h, _: _fit(p, {"a": h["a"].detach()}, _), _size, MissingGradient, "has no derivative"),
    "the outer objective": (_fit, lambda p, h: _size({"w": p["w"].detach()}, h), MissingGradient, "has no derivative"),
    "the start": (
        lambda p, h, _: ((p["w"] - 1) ** 2).sum(), _size, ValueError, r"hypers\['a'\] acts on the start of the run"
    ),
    "the path of the learning rate": (
        _fit, _size, ValueError, r"hypers\['lr'\] acts on the steps but not on the inner loss"
    ),
}  # fmt: skip


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("method", METHODS)
def test_a_lost_gradient_is_refused(method: str, what: str, vmapped: bool) -> None:
    """Under vmap, where `torch.func` gives zeros for it, as without."""
    loss, outer, error, message = LOST[what]
    rates = what == "the path of the learning rate"
    params = (lambda h: {"w": h["a"]}) if what == "the start" else {"w": torch.tensor([1.0, 2.0])}
    inner = Inner.of_rule(loss, SGD(lr=0.1), params, 3, hp=["lr"] if rates else ())
    options = {"window": 2} if method == "truncated" else {}

    def run(a: Tensor) -> Hypers:
        return gradient_of(inner, outer, {"a": a} | ({"lr": a.mean()} if rates else {}), method, **options)

    def answer() -> Hypers:
        return torch.vmap(run)(torch.full((2, 2), 0.5)) if vmapped else run(torch.full((2,), 0.5))

    if (method == "es" and what != "all of the inner loss") or (
        (rates and method in {*OF_THE_RUN, "truncated", "fixed_point"})
        or (what == "the start" and method in OF_THE_RUN)
    ):  # they need none, or do not lose it
        assert all(bool((grad != 0).any()) for grad in answer().values())
    else:
        with pytest.raises(error, match=message):
            answer()


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("method", OF_THE_RUN)
def test_a_gradient_that_is_zero_is_not_held_for_lost(method: str, vmapped: bool) -> None:
    inner = Inner.of_rule(lambda p, h, _: ((p["w"] - 1) ** 2).sum(), SGD(lr=0.1), lambda h: {"w": h["w"]}, 2)

    def run(w: Tensor) -> Tensor:
        return gradient_of(inner, lambda p, h: ((p["w"] - 1) ** 2).sum(), {"w": w}, method)["w"]

    ones = torch.ones(3)
    assert torch.equal(
        torch.vmap(run)(ones.expand(2, 3)) if vmapped else run(ones),
        torch.zeros_like(ones.expand(2, 3) if vmapped else ones),
    )


def test_auto_does_not_take_the_optimum_where_the_start_is_a_hyper() -> None:
    """Fewer samples than parameters: training solves the problem, and the solution depends on where it begins."""
    x, y = draws(3, 5, seed=1), draws(3, seed=2)
    inner = Inner.of_rule(lambda p, h, _: ((x @ p["w"] - y) ** 2).mean(), SGD(lr=0.1), lambda h: {"w": h["w"]}, 2000)
    hypers = {"w": torch.ones(5, dtype=torch.float64)}
    found, exact = (hypergradient(inner, lambda p, h: (p["w"] ** 2).sum(), hypers, m, **o) for m, o in (
        ("auto", {"memory": 20000}), ("unroll", {})
    ))  # fmt: skip
    assert found.diagnostics["method"] not in ("unroll", "cg")
    torch.testing.assert_close(found.grads["w"], exact.grads["w"])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_a_hypergradient_has_no_derivatives_itself(transform: Any) -> None:
    inner = Inner.of_rule(_fit, SGD(lr=0.1), {"w": torch.ones(2)}, 2)
    with pytest.raises(ValueError, match=r"cannot be taken of it; that of its value is what \.grads holds"):
        transform(lambda a: hypergradient(inner, _size, {"a": a}, "unroll").value)(torch.ones(2))


def test_hypers_and_losses_of_two_dtypes() -> None:
    inner = Inner.of_rule(_fit, SGD(lr=0.1), {"w": torch.ones(2)}, 2)
    for method in METHODS:
        grad = gradient_of(inner, _size, {"a": torch.ones(2, dtype=torch.float64)}, method)["a"]
        assert grad.dtype == torch.float64 and bool((grad != 0).all())


@pytest.mark.parametrize("start", [lambda own: own, lambda own: lambda hypers: own], ids=["given", "function"])
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_a_model_leave_no_graph_behind(method: str, start: Any) -> None:
    own = {"w": torch.tensor([1.0, 2.0], requires_grad=True)}
    inner = Inner.of_rule(
        lambda p, h, _: ((p["w"] - 1) ** 2).sum() + (h["a"].exp() * p["w"] ** 2).sum(), SGD(lr=0.1), start(own), 3
    )
    found = hypergradient(inner, lambda p, h: (p["w"] ** 2).sum(), {"a": torch.zeros(2)}, method)
    for part in (found.grads, found.params, found.state["params"], {"value": found.value}):
        assert not any(leaf.requires_grad for leaf in part.values())
    assert own["w"].grad is None


def test_rates_per_parameter() -> None:
    """hp may give `PerParameter`: here one rate moves, the other does not."""
    loss, outer, params, hypers = network()

    def rates(h: Hypers, t: int) -> PerParameter:
        return PerParameter({name: {"lr": h["rates"][i]} for i, name in enumerate(params)})

    inner = Inner.of_rule(loss, SGD(), params, 4, hp=rates)
    more = hypers | {"rates": torch.tensor([0.2, 0.0], dtype=torch.float64)}
    result = hypergradient(inner, outer, more, "replay")
    assert torch.equal(result.params["out"], params["out"])
    assert same(result.grads, gradient_of(inner, outer, more, "unroll"))


def test_auto_says_why() -> None:
    problem = PROBLEMS["ridge"]()
    exact = problem.exact

    def choose(inner: Inner, memory: float | None = None) -> tuple[str, str]:
        result = hypergradient(inner, problem.outer, problem.hypers, memory=memory)
        torch.testing.assert_close(result.grads["l"], exact, rtol=1e-6, atol=0)
        return result.diagnostics["method"], result.diagnostics["why"]

    assert choose(problem.inner())[0] == "unroll"
    method, why = choose(problem.inner(), memory=2000)
    assert method == "cg" and "solves the inner problem" in why
    lossless = Inner(**{**vars(problem.inner()), "loss": None})
    method, why = choose(lossless, memory=20_000)
    assert method in ("checkpoint", "replay", "forward") and "quickest exact method that fits" in why
    method, why = choose(lossless, memory=10)
    assert method == "replay" and "no exact method fits" in why


def test_auto_takes_the_leanest_graphs_where_they_are_much_larger_than_states() -> None:
    x, y = draws(500, 2, seed=1), draws(500, seed=2)
    inner = Inner.of_rule(
        lambda p, h, _: (torch.tanh(x @ p["w"] * h["scale"]) - y).square().mean(), SGD(lr=0.1),
        {"w": torch.ones(2, dtype=torch.float64)}, 20,
    )  # fmt: skip
    # so many hypers that forward mode is slower
    hypers = {"scale": torch.tensor(1.0, dtype=torch.float64), "unused": torch.zeros(30, dtype=torch.float64)}
    rows = {row.method: row for row in plan(inner, lambda p, h: p["w"].sum(), hypers)}
    memory = rows["checkpoint"].bytes / 2
    found = hypergradient(inner, lambda p, h: p["w"].sum(), hypers, memory=memory)
    assert rows["checkpoint"].bytes < rows["replay"].bytes and found.diagnostics["method"] == "replay"
    assert "replay is the quickest exact method that fits" in found.diagnostics["why"]
    assert found.diagnostics["adjoint_norms"].shape == (21,)  # a graph per step


def test_auto_works_for_steps_that_use_torch_func() -> None:
    """Hooks for saved tensors, by which memory might be counted, are refused inside of them."""

    def step(state: Any, h: Hypers, t: int) -> Any:
        slope = torch.func.grad(lambda w: ((w - h["l"]) ** 2).sum())(state["w"])
        return {"w": state["w"] - 0.1 * slope}

    inner = Inner(lambda h: {"w": torch.zeros(3)}, step, 20, lambda state: state)
    found = hypergradient(inner, lambda p, h: p["w"].sum(), {"l": torch.ones(3)})
    torch.testing.assert_close(found.grads["l"], torch.full((3,), 1 - 0.8**20))


def test_auto_leaves_forward_mode_where_an_operation_lacks_it() -> None:
    """Torch's Huber loss has second derivatives and no forward ones; with a single hyper forward mode would be the quickest."""
    x, y = draws(12, 3, seed=1), draws(12, seed=2)
    inner = Inner.of_rule(
        lambda p, h, _: torch.nn.functional.huber_loss(x @ p["w"], y) + h["l"] * (p["w"] ** 2).sum(),
        SGD(lr=0.1), {"w": torch.zeros(3, dtype=torch.float64)}, 30,
    )  # fmt: skip
    hypers = {"l": torch.tensor(0.1, dtype=torch.float64)}

    def outer(p: Params, h: Hypers) -> Tensor:
        return (p["w"] - 1).square().sum()

    assert next(row for row in plan(inner, outer, hypers) if row.method == "forward").obstacle
    found = hypergradient(inner, outer, hypers, memory=3000)
    assert found.diagnostics["method"] in ("checkpoint", "replay") and "fits" in found.diagnostics["why"]
    assert same(found.grads, gradient_of(inner, outer, hypers, "unroll"))


def test_auto_turns_to_first_order_methods_without_second_derivatives() -> None:
    inner = Inner.of_rule(
        lambda p, h, _: _OnceDifferentiable.apply(p["w"] - 1, h["l"]), SGD(lr=0.1), {"w": torch.zeros(2)}, 3
    )
    result = hypergradient(inner, lambda p, h: p["w"].sum(), {"l": torch.ones(2)})
    assert result.diagnostics["method"] == "penalty" and "no derivative" in result.diagnostics["why"]
    rates = Inner.of_rule(
        lambda p, h, _: _OnceDifferentiable.apply(p["w"] - 1, h["l"]), SGD(), {"w": torch.zeros(2)}, 3, hp=["lr"]
    )
    result = hypergradient(rates, lambda p, h: p["w"].sum(), {"l": torch.ones(2), "lr": torch.tensor(0.1)})
    assert result.diagnostics["method"] == "es"  # the inner loss knows no learning rate


def test_plan_predicts_memory_in_its_order() -> None:
    loss, outer, params, hypers = network()
    rows = {row.method: row for row in plan(Inner.of_rule(loss, SGD(), params, 400), outer, hypers, memory=1e5)}
    assert set(rows) == set(METHODS)
    assert rows["unroll"].bytes > 4 * rows["checkpoint"].bytes and not rows["unroll"].fits
    assert rows["cg"].bytes < rows["replay"].bytes < rows["unroll"].bytes
    assert rows["cg"].seconds < rows["unroll"].seconds < rows["replay"].seconds < rows["forward"].seconds
    assert not any(row.obstacle for row in rows.values())
    lossless = plan(Inner.of_rule(loss, SGD(), params, 4, batches=lambda t: None), outer, hypers)
    assert {row.method for row in lossless if row.obstacle} >= {"cg", "penalty", "darts"}


@pytest.mark.parametrize("method", ["unroll", "replay", "forward"])
def test_runs_of_registered_tasks(method: str) -> None:
    task = registry.create("task", "quadratic_20")
    inner = Inner.of_task(task, "adamw", seed=0, steps=4, hp=["lr"])
    hypers = {"lr": torch.tensor(0.01)}
    result = hypergradient(inner, lambda p, h: task.loss(p, task.config), hypers, method)
    higher, lower = (
        hypergradient(inner, lambda p, h: task.loss(p, task.config), {"lr": hypers["lr"] + d}, method).value
        for d in (1e-3, -1e-3)
    )
    assert float(result.grads["lr"]) == pytest.approx(float(higher - lower) / 2e-3, rel=0.02)


def test_stationarity_is_computed_when_it_is_read_and_of_what_was_then() -> None:
    """It takes a pass over all data, and an optimizer may have moved params and hypers in place by the time it is read."""
    calls = []

    def loss(p: Params, h: Hypers) -> Tensor:
        calls.append(0)
        return ((p["w"] - h["l"]) ** 2).sum() / 2

    def step(state: State, h: Hypers, t: int) -> State:
        return {"params": {"w": state["params"]["w"] - 0.5 * (state["params"]["w"] - h["l"])}}

    inner = Inner(lambda h: {"params": {"w": torch.zeros(3)}}, step, 2, lambda state: state["params"], loss)
    hypers = {"l": torch.tensor([1.0, -2.0, 2.0])}
    found = hypergradient(inner, lambda p, h: (p["w"] ** 2).sum(), hypers, "unroll")
    assert not calls and set(found.diagnostics) == {"method", "stationarity"} and len(found.diagnostics) == 2
    hypers["l"].zero_()
    found.params["w"].zero_()
    stored = pickle.loads(pickle.dumps(found.diagnostics))
    assert "stationarity" in repr(found.diagnostics) and dict(stored) == dict(found.diagnostics)
    assert float(found.diagnostics["stationarity"]) == 0.75, "w is 3/4 l by then, the norm of l is 3"
    assert len(calls) == 1, "however often it is read"
