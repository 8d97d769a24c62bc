"""Learned rules as torch optimizers: how the loss reaches them, executions, param groups, and several processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import RULES, assert_same_state, backward, flat, learned, make, net, train
from torch import Tensor, distributed, nn
from torchrun import torchrun

import metaopt
from metaopt import cpp_kernels, tree
from metaopt.program import compiler
from metaopt.rule import Chain, UpdateRule
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.wrappers import ClipByGlobalNorm
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo import Celo
from metaopt_learned.celo2 import Celo2
from metaopt_learned.mulo import MuLO

IN_PLACE = ["foreach", pytest.param("fused", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))]


def by_attribute(optimizer: RuleOptimizer, loss: Tensor) -> None:
    optimizer.loss = loss
    optimizer.step()


GIVEN: dict[str, Any] = {
    "positional": lambda optimizer, loss: optimizer.step(loss),
    "keyword": lambda optimizer, loss: optimizer.step(loss=loss),
    "number": lambda optimizer, loss: optimizer.step(loss.item()),
    "one element": lambda optimizer, loss: optimizer.step(loss.reshape(1, 1).requires_grad_()),
    "array": lambda optimizer, loss: optimizer.step(loss.numpy().reshape(1)),
    "closure": lambda optimizer, loss: optimizer.step(lambda: loss),
    "attribute": by_attribute,
}


@pytest.mark.parametrize("how", GIVEN.values(), ids=GIVEN)
def test_the_loss_may_be_given_as_people_write_it(how: Any) -> None:
    """PyLO's users write step(loss), torch's step(closure), and a gradient scaler calls step()."""
    ours, theirs = net(), net()
    optimizer, reference = (make("velo", model.parameters()) for model in (ours, theirs))
    for step in range(3):
        how(optimizer, backward(ours, step))
        reference.step(lambda step=step: backward(theirs, step))
    assert torch.equal(flat(ours), flat(theirs))


def test_the_loss_changes_the_step() -> None:
    """Else the tests above would pass on an optimizer that ignores it."""
    models = [net(), net()]
    for model, factor in zip(models, (1.0, 0.5), strict=True):
        optimizer = make("velo", model.parameters())
        for step in range(4):
            optimizer.step(backward(model, step) * factor**step)
    assert not torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.step(), ValueError, r"VeLO needs the loss; call step\(loss\) or step\(closure\)"),
        (lambda o: o.step(lambda: None), ValueError, r"VeLO needs the loss"),
        (lambda o: o.step([1.0]), TypeError, r"the loss must be a number or a tensor of one element, got list"),
        (lambda o: o.step("low"), TypeError, r"the loss must be a number .*, got str"),
        (lambda o: o.step(torch.zeros(2)), TypeError, r"the loss must be .*, got Tensor of shape \(2,\)"),
        (lambda o: o.step(np.zeros(2)), TypeError, r"the loss must be .*, got ndarray of shape \(2,\)"),
        (lambda o: o.step(lambda: torch.zeros(2)), TypeError, r"got Tensor of shape \(2,\)"),
        (lambda o: o.step(1.0, loss=2.0), TypeError, r"the loss was given twice"),
        (lambda o: o.step(lambda: 1.0, loss=2.0), TypeError, r"a closure or a loss, not both"),
    ],
)
def test_a_missing_or_wrong_loss_is_refused_and_nothing_moves(call: Any, error: Any, message: str) -> None:
    model = net()
    optimizer = make("velo", model.parameters())
    backward(model, 0)
    before = flat(model)
    with pytest.raises(error, match=message) as raised:
        call(optimizer)
    assert "\n" not in str(raised.value)
    assert torch.equal(flat(model), before)


def test_a_loss_that_was_set_is_good_for_one_step() -> None:
    """A stale loss would mislead the rule from then on, and nobody would see why."""
    model = net()
    optimizer = make("velo", model.parameters())
    by_attribute(optimizer, backward(model, 0))
    with pytest.raises(ValueError, match="VeLO needs the loss"):
        optimizer.step()


def test_rules_that_need_no_loss_take_step_loss_too() -> None:
    """A script that was written for a learned optimizer runs with any."""
    models = [net(), net()]
    optimizers = [make("adamw", model.parameters()) for model in models]
    loss = backward(models[0], 0)
    assert optimizers[0].step(loss) is None
    backward(models[1], 0)
    optimizers[1].step(lambda: {"logits": None, "loss": loss})
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("horizon", [0, -1, 2.5, True, "long"])
def test_a_horizon_that_is_none_is_refused(horizon: Any) -> None:
    with pytest.raises(ValueError, match=r"horizon must be an integer of at least 1, got .*planned number of steps"):
        metaopt.optimizer(RULES["velo"](), net().parameters(), horizon=horizon)


def test_a_missing_horizon_names_the_rule() -> None:
    with pytest.raises(ValueError, match=r"^VeLO needs the planned number of steps; pass horizon=\.\.\.$"):
        metaopt.optimizer(RULES["velo"](), net().parameters())


def test_a_wrong_loss_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_group must be 'world', a torch.distributed process group or None"):
        metaopt.optimizer("adamw", net().parameters(), loss_group="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule", [Celo2(), MuLO(), Chain(ClipByGlobalNorm(1.0), learned(Celo2()))], ids=lambda r: type(r).__name__
)
def test_a_rule_that_goes_by_roles_warns_once_where_there_are_none(rule: Any) -> None:
    """Celo2 would orthogonalise embeddings, and muLO divide their steps, and nobody would see why it learns badly."""
    rule = rule if isinstance(rule, UpdateRule) else learned(rule)
    with pytest.warns(
        UserWarning, match=r"neither names nor roles.*pass the module, model.named_parameters\(\) or"
    ) as found:
        optimizer = metaopt.optimizer(rule, net().parameters())
    assert len(found) == 1 and found[0].filename == __file__
    copy.deepcopy(optimizer)  # warnings are errors here
    metaopt.optimizer(rule, net())
    metaopt.optimizer(rule, net().named_parameters())
    metaopt.optimizer(rule, [{"params": list(net().parameters()), "role": "hidden"}])
    metaopt.optimizer(rule, [nn.Parameter(torch.zeros(3))])


def test_copies_share_the_process_group_and_pickles_refuse_it() -> None:
    """Lightning and others copy optimizers; a group cannot be copied, and one that became "world" could wait for ever."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.new_group([0])
        model = net()
        optimizer = make("velo", model.parameters(), loss_group=group)
        train(model, optimizer, 2)
        other = copy.deepcopy(optimizer)
        assert other.loss_group is group
        assert_same_state(optimizer, other)
        assert all(p is not q for p, q in zip(other.param_groups[0]["params"], model.parameters(), strict=True))
        with pytest.raises(TypeError, match="cannot be pickled; save its state_dict"):
            pickle.dumps(optimizer)
    finally:
        distributed.destroy_process_group()
    world = pickle.loads(pickle.dumps(make("adamw", net().parameters())))
    assert world.loss_group == "world"


def test_celo_in_its_first_phase_asks_for_neither_loss_nor_horizon() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    metaopt.optimizer(learned(Celo(phase=1)), [p]).step()
    assert not torch.equal(p, torch.ones(3))
    with pytest.raises(ValueError, match="Celo needs the planned number of steps"):
        metaopt.optimizer(learned(Celo(phase=1).replaced(phase=2)), [p])


def test_stacked_theta_is_refused() -> None:
    """It is for the copies of an unroll; a step would fail deep inside, or broadcast."""
    rule = AdafacMLP()
    theta = tree.stack([rule.init_theta(torch.Generator().manual_seed(i)) for i in range(2)])
    with pytest.raises(ValueError, match=r"theta of AdafacMLP holds several copies"):
        metaopt.optimizer(rule.bind(theta, stacked=True), net().parameters())


def test_parameters_on_two_devices_are_refused_before_anything_moves() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = make("velo", params)
    with pytest.raises(ValueError, match=r"VeLO runs on one device, .* on cpu, meta"):
        optimizer.step(1.0)
    assert torch.equal(params[0], torch.ones(3)) and not optimizer.state[params[0]]


# -- executions --


@pytest.mark.parametrize("execution", IN_PLACE)
@pytest.mark.parametrize("name", ["learned", "celo2", "velo", "clipped_velo"])
def test_every_execution_takes_the_same_steps(name: str, execution: Any) -> None:
    rule = Chain(ClipByGlobalNorm(0.1), RULES["velo"]()) if name == "clipped_velo" else name
    models = [net(), net()]
    optimizers = [make(rule, m.parameters(), how) for m, how in zip(models, ("plain", execution), strict=True)]
    start = flat(models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 8)
    moved = (flat(models[0]) - start).abs().max()
    assert moved > 1e-5
    # float64 rounding, times what eight steps of training amplify it by
    torch.testing.assert_close(flat(models[1]), flat(models[0]), rtol=0, atol=1e-9 * moved.item())


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("execution", ["auto", "fused", "foreach"])
def test_the_compiled_step_runs_where_it_pays(execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second or two to build, and nothing is built before the first step."""
    calls = []
    run = cpp_kernels.fused_step
    monkeypatch.setattr(cpp_kernels, "fused_step", lambda *args, **options: calls.append(1) or run(*args, **options))
    for size in (10, 40_000):
        p = nn.Parameter(torch.zeros(size))
        p.grad = torch.ones(size)
        optimizer = make("learned", [p], execution)
        assert not calls
        optimizer.step()
        assert bool(calls) == (execution == "fused" or (execution == "auto" and size == 40_000))
        calls.clear()


def test_a_step_marks_its_parameters_as_changed() -> None:
    """Else backward through a graph that saved the old values would give wrong gradients without a word."""
    p = nn.Parameter(torch.ones(40_000))
    p.grad = torch.ones_like(p)
    optimizer = make("learned", [p])
    stale = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# -- groups --


def test_a_group_at_zero_lr_rests_while_the_others_learn() -> None:
    model = net()
    params = [*model.parameters()]
    optimizer = make("velo", [{"params": params[:2], "lr": 0.0}, {"params": params[2:]}])
    before = [p.detach().clone() for p in params]
    train(model, optimizer, 3)
    changed = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert changed == [False] * 2 + [True] * (len(params) - 2)


@pytest.mark.parametrize("execution", ["plain", *IN_PLACE])
def test_lr_and_weight_decay_of_a_group_are_read_at_every_step(execution: Any) -> None:
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = make(learned(AdafacMLP(weight_decay=0.5)), [p], execution)
    for lr in (0.0, 0.25, 1.0):
        p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["lr"] = lr
        before, twin = p.detach().clone(), nn.Parameter(p.detach().clone())
        undecayed = make(learned(AdafacMLP(lr=lr)), [twin], "plain")
        undecayed.load_state_dict({**undecayed.state_dict(), "state": optimizer.state_dict()["state"]})
        twin.grad = p.grad.clone()
        optimizer.step()
        undecayed.step()
        torch.testing.assert_close(p.detach(), twin.detach() - lr * 0.5 * before, rtol=1e-12, atol=1e-14)


def test_a_layer_that_joins_late_starts_with_a_history_of_its_own() -> None:
    model = net()
    params = [*model.parameters()]
    optimizer = make("velo", params[:-2])
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": params[-2:]})
    before = params[-1].detach().clone()
    train(model, optimizer, 2, first=3)
    assert [optimizer.state[p]["step"] for p in params] == [5] * (len(params) - 2) + [2, 2]
    assert not torch.equal(params[-1], before)


def test_parameters_of_several_dtypes_are_stepped_together() -> None:
    """Mixed precision keeps norms in float32; VeLO's tensors still exchange information."""
    model = net(torch.bfloat16)
    model.norm.float()
    params = [*model.parameters()]
    twins = [nn.Parameter(p.detach().float()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        p.grad = torch.full_like(p, 0.1)
        twin.grad = p.grad.float()
    make("velo", params, "fused" if compiler() else "foreach").step(1.0)
    make("velo", twins, "plain").step(1.0)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.float(), twin.to(p.dtype).float(), rtol=2**-7, atol=1e-6)  # an ulp of bfloat16


# -- several processes --


def test_replicas_and_shards_take_the_steps_of_one_process() -> None:
    """Each process of `optimizer_worker` checks that; without a reduced loss VeLO's replicas drift apart."""
    done = torchrun(Path(__file__).with_name("optimizer_worker.py"), processes=2)
    assert done.returncode == 0, done.stdout
