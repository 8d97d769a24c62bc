"""`metaopt.optimizer` steps as torch's own classes do, on whatever parameters and gradients a training script has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import EXECUTIONS, OPEN_LOOP, RULES, backward, flat, learned, loss_at, make, net, train
from torch import Tensor, nn

import metaopt
from metaopt import EightBitState
from metaopt.execution import Executor, say_unfused
from metaopt.program import compiler
from metaopt.program.cpp import CppStep
from metaopt.rule import Chain, ElementwiseRule, UpdateRule
from metaopt.space import learning_rate
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.adafactor import Adafactor
from metaopt_classic.adam import LAMB, Adam, AdamW, AMSGrad
from metaopt_classic.lion import Lion
from metaopt_classic.muon import Muon
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM, ClipByGlobalNorm, Lookahead

TORCH: dict[str, tuple[UpdateRule, Any]] = {
    "sgd": (SGD(lr=0.1, weight_decay=0.01), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, dampening=0.2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adam": (Adam(lr=0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
    "adamw": (
        AdamW(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "amsgrad": (
        AMSGrad(lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    ),
    "adafactor": (
        Adafactor(lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    ),
}


def usable(execution: str) -> bool:
    return execution != "fused" or compiler() is not None


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


# -- the same optimizer as torch's --


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_thirty_steps_end_where_torch_ends(name: str, execution: Any, dtype: torch.dtype) -> None:
    if not usable(execution):
        pytest.skip("there is no C++ compiler here")
    rule, theirs = TORCH[name]
    ours_model, their_model = net(dtype), net(dtype)
    start = flat(ours_model)
    train(ours_model, make(rule, ours_model.parameters(), execution), 30)
    train(their_model, theirs(their_model.parameters()), 30)
    moved = (flat(their_model) - start).abs().max()
    assert moved > 0.05
    tolerance = 1e-11 if dtype == torch.float64 else 3e-4
    if name == "adafactor" and dtype == torch.float64:
        tolerance = 1e-6  # torch takes the roots of the step count in float32
    assert (flat(ours_model) - flat(their_model)).abs().max() <= tolerance * moved


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_lion_is_its_closed_form(execution: Any) -> None:
    if not usable(execution):
        pytest.skip("no C++ compiler")
    (p,) = parameters((4, 5), dtype=torch.float64)
    optimizer = make(Lion(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), [p], execution)
    expected, m = p.detach().clone(), torch.zeros(4, 5, dtype=torch.float64)
    for step in range(30):
        give_gradients([p], seed=step)
        g = p.grad
        optimizer.step()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.8 * m + 0.2 * g)
        m = 0.9 * m + 0.1 * g
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("execution", ["loop", "foreach"])
@pytest.mark.parametrize("name", OPEN_LOOP)
def test_every_rule_steps_alike_by_every_execution(name: str, execution: Any) -> None:
    """A fast execution that differs from the rule as written would be another optimizer under the same name."""
    models = [net(), net()]
    for model, how in zip(models, ("plain", execution), strict=True):
        train(model, make(name, model.parameters(), how), 10)
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in ("learned", "decayed", "velo")]
)  # not meta-trained
def test_every_rule_learns_something(name: str) -> None:
    model = net()
    before = loss_at(model, 0).item()
    optimizer = make(name, model.parameters())
    for _ in range(30):
        optimizer.step(lambda: backward(model, 0))
    assert loss_at(model, 0).item() < before
    assert torch.isfinite(flat(model)).all()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_compiled_step_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, every test above would pass on the fallback."""
    calls = []
    run = CppStep.__call__
    monkeypatch.setattr(CppStep, "__call__", lambda self, *args: calls.append(1) or run(self, *args))
    params = parameters((8, 4), (3,), (0, 2), ())
    give_gradients(params)
    make("adamw", params, "fused").step()
    assert calls == [1]


def test_a_parameter_that_joins_late_is_corrected_for_its_own_steps() -> None:
    """With one step count per group, a layer unfrozen at step 50 would start with steps up to 7 times too large."""
    ours, theirs = (parameters((3, 2), (4,), dtype=torch.float64) for _ in range(2))
    optimizers = [AdamW_ours := make(AdamW(lr=0.01), ours), torch.optim.AdamW(theirs, lr=0.01)]
    for step in range(60):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params if step >= 50 else params[:1], seed=step)
            optimizer.step()
    assert AdamW_ours.state[ours[1]]["step"] == 10
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


# -- param groups --


@pytest.mark.parametrize("execution", ["plain", "loop", "foreach"])
@pytest.mark.parametrize("name", ["momentum", "adamw", "lion", "adafactor", "muon", "lookahead", "cautious", "learned"])
def test_two_groups_are_two_optimizers(name: str, execution: Any) -> None:
    together, apart = (parameters((4, 3), (4,), (2, 3), dtype=torch.float64) for _ in range(2))
    rule = RULES[name]()
    both = make(rule, [{"params": together[:1]}, {"params": together[1:], "lr": 0.03}], execution)
    each = [make(rule, apart[:1], execution), make(rule.replaced(lr=0.03), apart[1:], execution)]
    for step in range(5):
        give_gradients(together, step)
        give_gradients(apart, step)
        both.step()
        for optimizer in each:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_options_may_differ_between_groups() -> None:
    ours, theirs = (parameters((4, 3), (4,), dtype=torch.float64) for _ in range(2))
    groups = [[{"params": p[:1], "nesterov": True}, {"params": p[1:], "momentum": 0.5}] for p in (ours, theirs)]
    optimizers = [make(SGD(lr=0.1, momentum=0.9), groups[0]), torch.optim.SGD(groups[1], lr=0.1, momentum=0.9)]
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_group_added_later_trains_and_keeps_its_own_settings() -> None:
    params = parameters((4, 3), (4,))
    optimizer = make(AdamW(lr=0.01), params[:1])
    give_gradients(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[1], "lr": 0.5, "weight_decay": 0})
    before = params[1].detach().clone()
    optimizer.step()
    assert optimizer.param_groups[1]["lr"] == 0.5
    torch.testing.assert_close((params[1] - before).abs(), torch.full((4,), 0.5), rtol=1e-5, atol=0)
    assert [optimizer.state[p]["step"] for p in params] == [2, 1]


def test_the_learning_rate_of_a_group_may_be_set_between_steps() -> None:
    (p,) = parameters((3,))
    optimizer = make(SGD(lr=1.0), [p])
    p.grad = torch.ones(3)
    for lr in (0.25, 0.0, 4, torch.tensor(0.5)):
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        torch.testing.assert_close(before - p, torch.full((3,), float(lr)), rtol=1e-6, atol=1e-6)


def test_a_tensor_learning_rate_is_read_at_every_step() -> None:
    ours, theirs = parameters((3,)), parameters((3,))
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    optimizers = [
        metaopt.optimizer("adamw", ours, lr=rates[0]),
        torch.optim.AdamW(theirs, lr=rates[1], foreach=False),
    ]
    for step in range(4):
        for params, optimizer, lr in zip((ours, theirs), optimizers, rates, strict=True):
            give_gradients(params, step)
            optimizer.step()
            lr.mul_(0.5)
    torch.testing.assert_close(ours[0], theirs[0])


def test_the_global_norm_is_that_of_all_groups() -> None:
    """Clipping each group by itself would silently raise the limit to max_norm times the root of their number."""
    ours, theirs = (parameters((4, 3), (4,), dtype=torch.float64) for _ in range(2))
    rule = Chain(ClipByGlobalNorm(1.0), SGD(lr=0.1, momentum=0.9))
    optimizer = make(rule, [{"params": ours[:1], "nesterov": True}, {"params": ours[1:], "lr": 0.2}])
    reference = torch.optim.SGD([{"params": theirs[:1], "nesterov": True}, {"params": theirs[1:], "lr": 0.2}], 0.1, 0.9)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert norm > 1.5
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)  # torch divides by the norm plus 1e-6


def test_groups_that_disagree_on_the_global_norm_are_told_so() -> None:
    params = parameters((4, 3), (4,))
    rule = Chain(ClipByGlobalNorm(1.0), AdamW())
    optimizer = make(rule, [{"params": params[:1]}, {"params": params[1:], "max_norm": 2.0}])
    give_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"max_norm acts on all parameters together, so its param groups must agree"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[1]["max_norm"] = 1.0
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("rule", [SAM(SGD()), Lookahead(Chain(ClipByGlobalNorm(), SGD()))], ids=["sam", "inner clip"])
def test_options_cannot_differ_where_parameters_are_coupled(rule: UpdateRule) -> None:
    """Stepped apart, each group would be clipped, or evaluated, without the other."""
    params = parameters((4, 3), (4,))
    optimizer = make(rule, [{"params": params[:1], "nesterov": True}, {"params": params[1:]}])
    give_gradients(params)
    with pytest.raises(ValueError, match=r"nesterov .* param groups must agree"):
        optimizer.step(lambda: torch.zeros(()))


# -- what a user may get wrong --


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: metaopt.optimizer("adamw", p, lr=-1), r"lr must be in \[0, inf\), got -1"),
        (lambda p: metaopt.optimizer("adamw", p, lr=float("nan")), r"lr must be in \[0, inf\), got nan"),
        (lambda p: metaopt.optimizer("adamw", p, betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1"),
        (lambda p: metaopt.optimizer("adamw", p, betas=0.9), r"betas must be 2 numbers in \[0, 1\), got 0.9"),
        (lambda p: metaopt.optimizer("adamw", p, lr="high"), r"lr must be a number in \[0, inf\), got 'high'"),
        (lambda p: metaopt.optimizer(AdamW(), p, lr=-1), r"lr must be in \[0, inf\), got -1"),
        (lambda p: metaopt.optimizer("nesterov", p, nesterov=3), r"nesterov must be one of \[False, True\], got 3"),
        (lambda p: metaopt.optimizer("adamw", p, momentum=0.9), r"'momentum'.*betas"),
        (
            lambda p: metaopt.optimizer(AdamW(), p, momentum=0.9),
            r"AdamW has no hyperparameter or option 'momentum'; it has lr, ",
        ),
        (lambda p: metaopt.optimizer("adamv", p), r"'adamv'.*adamw"),
        (lambda p: metaopt.optimizer("adamw", [{"params": p, "lr": -1}]), r"lr must be in \[0, inf\), got -1"),
        (lambda p: metaopt.optimizer("adamw", [{"params": p, "weigth_decay": 0}]), r"did you mean 'weight_decay'\?"),
        (
            lambda p: metaopt.optimizer("adamw", [{"params": p, "role": "head"}]),
            r"role must be one of hidden, .*'head'",
        ),
        (lambda p: metaopt.optimizer("adamw", p, execution="fast"), r"execution must be one of auto, .*'fast'"),
        (lambda p: metaopt.optimizer("adamw", []), r"empty parameter list"),
        (lambda p: metaopt.optimizer("adamw", torch.zeros(3)), r"iterable of Tensors or dicts"),
        (lambda p: metaopt.optimizer("adamw", [p[0] * 2]), r"non-leaf"),
        (lambda p: metaopt.optimizer("adamw", [torch.zeros(2, dtype=torch.cfloat)]), r"complex .*view_as_real"),
    ],
)
def test_a_bad_argument_is_refused_in_one_sentence(build: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        build(parameters((3,)))
    assert "\n" not in str(error.value)


def test_keys_that_are_no_hyperparameters_stay_in_the_group() -> None:
    """Layer names, lr scales and the like are the user's; torch keeps them too."""
    (p,) = parameters((3,))
    group = {"params": [p], "name": "decoder", "lr_scale": 0.5, "initial_lr": 0.1, "max_momentum": 0.9}
    optimizer = metaopt.optimizer("momentum", [group])
    assert optimizer.param_groups[0]["name"] == "decoder"
    assert "momentum" not in group, "the caller's dict was written to"


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params = parameters((3,), (2,))
    optimizer = metaopt.optimizer("adamw", params[:1])
    for group in ({"lr": -1}, {"role": "head"}, {"params": torch.zeros(2, dtype=torch.cfloat)}, {"betas": (1, 1)}):
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": params[1:], **group})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})
    give_gradients(params)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "clipped"])
def test_a_value_outside_the_domain_that_is_set_later_stops_the_step(name: str) -> None:
    """A scheduler with a sign error, or an lr that overflowed, must not become NaN weights an hour later."""
    params = parameters((3, 2), (2,))
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}])
    give_gradients(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    for value in (-1e-3, float("nan"), float("inf"), torch.tensor(-1.0)):
        optimizer.param_groups[1]["lr"] = value
        with pytest.raises(ValueError, match=r"lr must be in \[0, inf\)"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    dense, table = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    optimizer = metaopt.optimizer("adamw", [*dense.parameters(), *table.parameters()])
    dense(table(torch.tensor([1, 2]))).sum().backward()
    before = flat(dense)
    with pytest.raises(ValueError, match=r"gradients must be dense, got torch.sparse_coo; use nn.Embedding") as error:
        optimizer.step()
    assert "\n" not in str(error.value)
    assert torch.equal(flat(dense), before)
    table.weight.grad = table.weight.grad.to_dense()
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}


# -- closures and hooks --


def test_a_closure_runs_with_gradients_on_and_its_loss_is_returned() -> None:
    model = net()
    optimizer = make("adamw", model.parameters())
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert loss == loss_at(net(), 0)
    assert optimizer.step() is None


def test_a_rule_gets_the_loss_and_the_horizon_that_it_needs() -> None:
    class PolyakToTheEnd(UpdateRule):
        """Divides the loss by what is left of the horizon."""

        needs_loss = needs_horizon = True

        def init(self, params: Any, info: Any) -> Any:
            return {name: {"step": torch.zeros((), dtype=torch.int64)} for name in params}

        def update(self, grads: Any, state: Any, params: Any, hp: Any, ctx: Any) -> Any:
            assert not ctx.loss.requires_grad
            moved = {n: p - ctx.loss / (ctx.horizon - state[n]["step"]) * grads[n] for n, p in params.items()}
            return moved, {name: {"step": slots["step"] + 1} for name, slots in state.items()}

    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"PolyakToTheEnd needs the planned number of steps; pass horizon="):
        metaopt.optimizer(PolyakToTheEnd(), [p])
    optimizer = metaopt.optimizer(PolyakToTheEnd(), [p], horizon=4)
    p.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"PolyakToTheEnd needs the loss; call step\(loss\) or step\(closure\)"):
        optimizer.step()
    optimizer.step(loss=torch.tensor(8.0, requires_grad=True))
    assert p.item() == -2
    optimizer.step(lambda: 3.0)
    assert p.item() == -3


def test_sam_without_a_closure_says_what_it_needs() -> None:
    params = parameters((3,))
    optimizer = make("sam", params)
    give_gradients(params)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"^SAM evaluates the loss again; call step\(closure\)$"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_sam_is_the_two_step_loop_written_by_hand() -> None:
    ours, theirs = net(), net()
    optimizer = make(SAM(SGD(lr=0.1, momentum=0.9), rho=0.1), ours.parameters())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(10):
        loss = optimizer.step(lambda step=step: backward(ours, step))
        expected = backward(theirs, step)
        saved = [p.detach().clone() for p in theirs.parameters()]
        norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        with torch.no_grad():
            for p in theirs.parameters():
                p += 0.1 * p.grad / (norm + 1e-12)
        backward(theirs, step)
        with torch.no_grad():
            for p, old in zip(theirs.parameters(), saved, strict=True):
                p.copy_(old)
        reference.step()
        assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-11)


def test_a_closure_that_fails_at_the_second_point_leaves_the_parameters_in_place() -> None:
    model = net()
    optimizer = make("sam", model.parameters())
    before, calls = flat(model), []

    def closure() -> Tensor:
        calls.append(flat(model))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return backward(model, 0)

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert not torch.equal(calls[1], before)
    assert torch.equal(flat(model), before)


def test_hooks_see_every_step() -> None:
    params = parameters((3,))
    optimizer = metaopt.optimizer("adamw", params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("pre"))
    removed = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("post"))
    give_gradients(params)
    optimizer.step()
    removed.remove()
    optimizer.step()
    assert seen == ["pre", "post", "pre"]


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_the_users(name: str) -> None:
    """An optimizer that scales, negates or drops p.grad breaks accumulation, logging and a second step."""
    model = net()
    optimizer = make(name, model.parameters())
    grads: list[Tensor] = []
    copies: list[Tensor] = []

    def closure() -> Tensor:
        loss = backward(model, 0)
        grads[:] = [p.grad for p in model.parameters()]
        copies[:] = [p.grad.clone() for p in model.parameters()]
        return loss

    for _ in range(3):
        optimizer.step(closure)
        for p, grad, copied in zip(model.parameters(), grads, copies, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, copied)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_that_zeroes_gradients_in_place_does_not_reach_into_the_step() -> None:
    class SumOfBoth(UpdateRule):
        """Steps along the gradients of both evaluations."""

        needs_closure = True

        def init(self, params: Any, info: Any) -> Any:
            return {name: {"step": torch.zeros((), dtype=torch.int64)} for name in params}

        def update(self, grads: Any, state: Any, params: Any, hp: Any, ctx: Any) -> Any:
            _, others = ctx.closure({name: p + 1 for name, p in params.items()})
            moved = {name: p - grads[name] - others[name] for name, p in params.items()}
            return moved, {name: {"step": slots["step"] + 1} for name, slots in state.items()}

    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = RuleOptimizer(SumOfBoth(), [p])

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (p * p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert p.item() == 3 - 6 - 8


def test_a_rule_may_hand_back_its_old_tensors_in_other_places() -> None:
    """The step must read as one parallel assignment, or a slot that keeps the previous parameter gets the new one."""

    class Swap(UpdateRule):
        """Exchanges the parameter and its slot."""

        def init(self, params: Any, info: Any) -> Any:
            return {name: {"step": torch.zeros((), dtype=torch.int64), "other": p} for name, p in params.items()}

        def update(self, grads: Any, state: Any, params: Any, hp: Any, ctx: Any) -> Any:
            new = {name: {"step": slots["step"] + 1, "other": params[name]} for name, slots in state.items()}
            return {name: slots["other"] - grads[name] for name, slots in state.items()}, new

    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = RuleOptimizer(Swap(), [p])
    seen = []
    for _ in range(4):
        p.grad = torch.ones(1)
        optimizer.step()
        seen.append((p.item(), optimizer.state[p]["other"].item()))
    assert seen == [(0, 1), (0, 0), (-1, 0), (-1, -1)]


# -- unusual parameters and gradients --


@pytest.mark.parametrize("name", OPEN_LOOP)
def test_parameters_without_gradients_or_elements_are_no_trouble(name: str) -> None:
    params = parameters((3, 2), (4,), (0, 3), (3, 0), (0,), (), (2, 3, 4))
    frozen = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    idle = nn.Parameter(torch.ones(3, 2))
    optimizer = make(name, [*params, frozen, idle])
    for step in range(4):
        give_gradients(params, step)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in params)
        assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True) if p.numel() > 1)
    assert torch.equal(frozen, torch.ones(3, 2)) and torch.equal(idle, torch.ones(3, 2))
    assert not optimizer.state.get(idle)


@pytest.mark.parametrize("execution", ["auto", *EXECUTIONS])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "clipped", "learned"])
def test_memory_layout_does_not_matter(name: str, execution: Any) -> None:
    """Transposed weights, channels_last convolutions, strided views and gradients laid out unlike their parameter."""
    if not usable(execution):
        pytest.skip("there is no C++ compiler here")
    usual = parameters((4, 6), (2, 3, 5, 5), (3, 4), (6,), dtype=torch.float64)
    odd = [
        nn.Parameter(usual[0].detach().t().contiguous().t()),
        nn.Parameter(usual[1].detach().clone().to(memory_format=torch.channels_last)),
        nn.Parameter(usual[2].detach().clone()),
        nn.Parameter(torch.stack([usual[3].detach(), torch.zeros(6)], 1)[:, 0]),
    ]
    optimizers = [make(name, usual, execution), make(name, odd, execution)]
    for step in range(4):
        give_gradients(usual, step)
        give_gradients(odd, step)
        odd[2].grad = odd[2].grad.t().contiguous().t()
        if step % 2:
            odd[1].grad = odd[1].grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(usual, odd, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_bf16_parameters_are_computed_in_float32_and_rounded_once(name: str, execution: Any) -> None:
    """With state in bf16, 0.999 v + 0.001 g^2 would stop moving after a few hundred steps."""
    if not usable(execution):
        pytest.skip("there is no C++ compiler here")
    (p,) = parameters((8, 4), dtype=torch.bfloat16)
    wide = nn.Parameter(p.detach().float())
    rule = RULES[name]().replaced(lr=1e-3)
    optimizers = [make(rule, [p], execution), make(rule, [wide], execution)]
    for step in range(300 if execution != "plain" else 40):
        give_gradients([p], seed=step)
        wide.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        wide.data = wide.data.bfloat16().float()
        assert torch.equal(p.float(), wide)
    slots = {slot: value for slot, value in optimizers[0].state[p].items() if slot != "step"}
    assert {value.dtype for value in slots.values()} == {torch.float32}
    for slot, value in slots.items():
        assert torch.equal(value, optimizers[1].state[wide][slot])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["adamw", "adafactor", "clipped"])
def test_gradients_may_have_another_dtype_than_the_parameter(name: str, execution: Any) -> None:
    if not usable(execution):
        pytest.skip("there is no C++ compiler here")
    for param_dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        (p,) = parameters((8, 4), dtype=param_dtype)
        (wide,) = parameters((8, 4), dtype=param_dtype)
        wide = nn.Parameter(wide.detach().float())
        p.grad_dtype = grad_dtype
        optimizers = [make(name, [p], execution), make(name, [wide], execution)]
        for step in range(5):
            wide.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(grad_dtype).float()
            p.grad = wide.grad.to(grad_dtype)
            for optimizer in optimizers:
                optimizer.step()
            wide.data = wide.data.to(param_dtype).float()
        torch.testing.assert_close(p.float(), wide, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("execution", ["loop", "foreach", "plain", "auto"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "lookahead"])
def test_one_optimizer_may_hold_parameters_on_several_devices(name: str, execution: Any) -> None:
    here, there = parameters((4, 3), (5,)), [nn.Parameter(torch.empty(s, device="meta")) for s in ((4, 3), (5,))]
    alone = copy.deepcopy(here)
    optimizers = [make(name, [here[0], there[0], here[1], there[1]], execution), make(name, alone, execution)]
    for step in range(3):
        give_gradients(here, step)
        give_gradients(alone, step)
        for p in there:
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, alone, strict=True):
        torch.testing.assert_close(p, q)
    slots = [v for p in there for v in optimizers[0].state[p].values() if isinstance(v, Tensor)]
    assert all(value.device == p.device for p in there for value in slots)


@pytest.mark.parametrize("execution", ["auto", "plain", "loop", "foreach", "fused"])
@pytest.mark.parametrize("name", [name for name in OPEN_LOOP if not name.startswith("clipped")])
def test_nan_in_one_gradient_stays_with_its_parameter(name: str, execution: Any) -> None:
    """A bad batch for one expert must not destroy the others; bias corrections and stacks are the usual leaks."""
    if not usable(execution):
        pytest.skip("there is no C++ compiler here")
    params = parameters((4, 3), (4, 3), (4,), (4,), (3, 4))
    alone = copy.deepcopy(params)
    optimizers = [make(name, params, execution), make(name, alone, execution)]
    for step in range(3):
        give_gradients(params, step)
        give_gradients(alone, step)
        for k in (0, 2):
            params[k].grad[0] = float("nan")
        for optimizer in optimizers:
            optimizer.step()
    for k in (1, 3, 4):
        torch.testing.assert_close(params[k], alone[k])
    if name != "lion":  # sign(NaN) is NaN too, but where a rule hides it is its own affair
        assert torch.isnan(params[0]).any()


def test_autograd_notices_that_a_parameter_has_moved() -> None:
    """A second backward through a graph that saved the old weights must fail, not give wrong gradients."""
    for execution in EXECUTIONS:
        (p,) = parameters((4, 4))
        optimizer = make("adamw", [p], execution)
        loss = (p * p).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_class_in_the_place_of_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a rule, such as AdamW\(\), or a name, such as 'adamw', got <class .*Lion'>"):
        metaopt.optimizer(Lion, [torch.zeros(1)])  # type: ignore[arg-type]


# -- what "fused" cannot take --


class Halving(ElementwiseRule):
    """param * 0.5."""

    lr: float = learning_rate(0.1, search=(0.01, 1.0))

    def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:  # type: ignore[override]
        return 0.5 * param


@pytest.mark.parametrize(
    ("rule", "device", "reason"),
    [
        (Muon(), "cpu", "no kernel takes a step of Muon"),
        (LAMB(), "cpu", "no kernel takes a step of LAMB"),
        (Chain(ClipByGlobalNorm(1.0), Adafactor()), "cpu", "no kernel takes a step of Adafactor"),
        (Halving(), "meta", "no kernel on meta takes a step of torch.float32 parameters"),
        (EightBitState(AdamW(), min_size=1), "cpu", "no kernel on cpu reads and writes state in 8 bits"),
        (learned(), "meta", "no kernel on meta takes a step of AdafacMLP"),
    ],
    ids=lambda value: value.label() if isinstance(value, UpdateRule) else "",
)
def test_fused_says_once_where_torch_operations_run(
    rule: UpdateRule, device: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    say_unfused.cache_clear()
    caplog.set_level("INFO", "metaopt")
    for execution in ("auto", "fused", "fused"):
        p = nn.Parameter(torch.ones(3, 2, device=device))
        optimizer = metaopt.optimizer(rule, [("weight", p)], execution=execution)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
    told = [record.getMessage() for record in caplog.records]
    assert told.count(f"execution 'fused': {reason}, so torch operations run") == 1


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_fused_says_nothing_where_kernels_run(caplog: pytest.LogCaptureFixture) -> None:
    say_unfused.cache_clear()
    caplog.set_level("INFO", "metaopt")
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    metaopt.optimizer("adamw", [p], execution="fused").step()
    assert not caplog.records


# -- names and roles --


def test_a_module_tells_each_parameters_role() -> None:
    """Muon on an embedding, a norm or the output layer trains visibly worse; no one should have to list them."""
    model = net()
    optimizer = metaopt.optimizer("muon", model)
    train(model, optimizer, 1)
    roles = {name: g["role"] for g in optimizer.param_groups for name in g["param_names"]}
    assert roles == {
        "embedding.weight": "embedding",
        "hidden.weight": "hidden",
        "hidden.bias": "bias",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "scale": "scalar",
        "output.weight": "output",
        "output.bias": "bias",
    }
    orthogonalised = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert orthogonalised == {"hidden.weight"}


def test_a_group_may_state_its_role() -> None:
    params = parameters((4, 3), (4, 3))
    optimizer = metaopt.optimizer("muon", [{"params": params[:1], "role": "output"}, {"params": params[1:]}])
    give_gradients(params)
    optimizer.step()
    assert "exp_avg" in optimizer.state[params[0]]
    assert "momentum_buffer" in optimizer.state[params[1]]


def test_names_give_roles_and_may_repeat() -> None:
    """Two models with a parameter of one name each are two parameters."""
    first, second = net(), net(seed=1)
    named = [{"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 2]} for model in (first, second)]
    optimizer = metaopt.optimizer("muon", named)
    for model in (first, second):
        backward(model, 0)
    before = flat(first), flat(second)
    optimizer.step()
    assert "exp_avg" in optimizer.state[second.embedding.weight]
    assert "momentum_buffer" in optimizer.state[first.hidden.weight]
    assert not torch.equal(flat(first), before[0]) and not torch.equal(flat(second), before[1])


def test_a_small_optimizer_never_starts_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "_kernel", lambda *_: pytest.fail("compiled a kernel for nine numbers"))
    params = parameters((3, 3))
    give_gradients(params)
    metaopt.optimizer("adamw", params).step()
