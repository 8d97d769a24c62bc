"""A training run that is saved, copied or moved goes on as if nothing had happened."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optimizer_cases import OPEN_LOOP, RULES, assert_same_state, backward, flat, make, net, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import metaopt
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.adam import AdamW
from metaopt_classic.lion import Lion
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import Lookahead

DISTRIBUTED = ["sgd", "adamw", "lion", "adafactor", "muon", "clipped", "lookahead", "learned", "celo2", "velo"]


def started(name: str, steps: int = 5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, RuleOptimizer]:
    model = net(dtype)
    optimizer = make(name, model.parameters())
    train(model, optimizer, steps)
    return model, optimizer


# -- saving and copying --


@pytest.mark.parametrize("name", RULES)
def test_a_run_resumes_bit_for_bit_from_a_file(name: str, tmp_path: Path) -> None:
    model, optimizer = started(name)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train(model, optimizer, 5, first=5)
    again = net(torch.float32, seed=9)
    resumed = make(name, again.parameters())
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, first=5)
    assert torch.equal(flat(again), flat(model))
    assert_same_state(optimizer, resumed)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", RULES)
def test_a_copied_run_goes_its_own_way(name: str, how: Any) -> None:
    model, optimizer = started(name)
    twin, its_optimizer = how((model, optimizer))
    assert its_optimizer.execution == optimizer.execution
    before = flat(model)
    train(twin, its_optimizer, 5, first=5)
    assert torch.equal(flat(model), before), "the copy stepped the original's parameters"
    train(model, optimizer, 5, first=5)
    assert torch.equal(flat(twin), flat(model))
    assert_same_state(optimizer, its_optimizer)


def test_a_state_dict_may_be_loaded_twice() -> None:
    """Two optimizers that share state tensors would each advance the other's moments."""
    model, optimizer = started("adamw")
    saved = copy.deepcopy(optimizer.state_dict())
    models = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [make("adamw", m.parameters()) for m in models]
    for other in optimizers:
        other.load_state_dict(saved)
    for m, other in zip(models, optimizers, strict=True):
        train(m, other, 3, first=5)
    assert torch.equal(flat(models[0]), flat(models[1]))
    optimizers[0].load_state_dict(saved)
    assert_same_state(optimizers[0], optimizer)


def test_a_state_dict_holds_only_plain_things() -> None:
    _, optimizer = started("clipped")
    for slots in optimizer.state_dict()["state"].values():
        assert slots["step"] == 5
        assert all(isinstance(value, Tensor) and not value.requires_grad for s, value in slots.items() if s != "step")


def test_state_dict_hooks_have_their_say() -> None:
    """Pre-hooks that rename or reorder a checkpoint are how sharded and adapted models are loaded."""
    _, optimizer = started("adamw")
    saved = optimizer.state_dict()
    other = make("adamw", net(torch.float32, seed=3).parameters())
    seen: list[str] = []

    def double(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        state = {i: {**slots, "exp_avg": slots["exp_avg"] * 2} for i, slots in given["state"].items()}
        return {**given, "state": state}

    def check(loaded: Any) -> None:
        seen.append("post")
        slots = next(iter(loaded.state.values()))
        torch.testing.assert_close(slots["exp_avg"], saved["state"][0]["exp_avg"] * 2)

    other.register_load_state_dict_pre_hook(double)
    other.register_load_state_dict_post_hook(check)
    other.register_state_dict_pre_hook(lambda _: seen.append("save"))
    other.register_state_dict_post_hook(lambda _, out: {**out, "version": 1})
    other.load_state_dict(saved)
    assert other.state_dict()["version"] == 1
    assert seen == ["pre", "post", "save"]


# -- dtypes, layouts, other checkpoints --


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "lookahead", "learned", "celo2", "velo"])
def test_state_of_bf16_parameters_stays_float32_through_a_checkpoint(name: str) -> None:
    """torch's own load_state_dict rounds it to bf16: the run goes on, a little worse, and nobody sees why."""
    model, optimizer = started(name, dtype=torch.bfloat16)
    again = net(torch.bfloat16, seed=9)
    again.load_state_dict(model.state_dict())
    resumed = make(name, again.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, resumed)
    tensors = [v for slots in resumed.state.values() for v in slots.values() if isinstance(v, Tensor)]
    assert {v.dtype for v in tensors} == {torch.float32}
    train(model, optimizer, 3, first=5)
    train(again, resumed, 3, first=5)
    assert torch.equal(flat(again), flat(model))


def test_a_float32_checkpoint_loads_into_a_bf16_or_float64_model() -> None:
    _, optimizer = started("adamw")
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        other = make("adamw", net(dtype).parameters())
        other.load_state_dict(optimizer.state_dict())
        for slots, saved in zip(other.state.values(), optimizer.state.values(), strict=True):
            assert slots["exp_avg"].dtype == kept
            assert torch.equal(slots["exp_avg"].float(), saved["exp_avg"])


def test_loaded_state_takes_the_layout_of_its_parameter() -> None:
    """A state laid out unlike its parameter would keep the compiled step away for the rest of the run."""
    p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    p.grad = torch.randn_like(p)
    optimizer = make("adamw", [p])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in saved["state"][0].items()}
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW(lr=0.01), torch.optim.AdamW)], ids=["adamw"])
def test_a_checkpoint_of_torchs_class_goes_on_here(ours: Any, theirs: Any) -> None:
    """Nobody restarts a long run in order to change the library."""
    whole, moved = net(), net()
    train(whole, theirs(whole.parameters(), lr=0.01), 10)
    old = theirs(moved.parameters(), lr=0.01)
    train(moved, old, 5)
    optimizer = make(ours.replaced(lr=1.0), moved.parameters())
    optimizer.load_state_dict(old.state_dict())
    train(moved, optimizer, 5, first=5)
    torch.testing.assert_close(flat(moved), flat(whole), rtol=1e-10, atol=1e-12)


def test_a_checkpoint_of_another_rule_is_refused_and_changes_nothing() -> None:
    model, optimizer = started("adamw")
    before = copy.deepcopy(optimizer.state_dict())
    for other in (Lion(), Lookahead(AdamW())):
        saved = make(other, net(torch.float32).parameters())
        for p in saved.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        saved.step()
        with pytest.raises(ValueError, match=r"the saved state of 'parameter_0' is not that of AdamW") as error:
            optimizer.load_state_dict(saved.state_dict())
        assert "\n" not in str(error.value)
    small = make("adamw", [nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(small.state_dict())
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    train(model, optimizer, 1)
    assert {slots["step"] for slots in optimizer.state.values()} == {6}


def test_a_checkpoint_from_before_a_hyperparameter_existed_gets_its_value() -> None:
    model, optimizer = started("momentum")
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["dampening"], group["nesterov"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["dampening"] == 0.1
    train(model, optimizer, 1)


def test_groups_and_their_options_travel_with_the_checkpoint() -> None:
    def build() -> tuple[nn.Module, RuleOptimizer]:
        model = net()
        params = [*model.named_parameters()]
        groups = [{"params": params[:2], "nesterov": True, "role": "hidden"}, {"params": params[2:], "momentum": 0.5}]
        return model, make(SGD(lr=0.1, momentum=0.9), groups)

    model, optimizer = build()
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.01
    again, resumed = build()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.01 and resumed.param_groups[0]["nesterov"] is True
    assert resumed.param_groups[1]["param_names"] == optimizer.param_groups[1]["param_names"]
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, 3, first=3)
    assert torch.equal(flat(again), flat(model))


def test_names_in_a_checkpoint_tell_what_state_to_expect() -> None:
    """Muon keeps other state for what is named an embedding; the names travel with the groups, as in torch."""
    model, again = net(), net()
    optimizer, resumed = make("muon", model.named_parameters()), make("muon", again.parameters())
    train(model, optimizer, 2)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, resumed)
    again.load_state_dict(model.state_dict())
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert torch.equal(flat(again), flat(model))


def test_state_that_the_user_drops_or_moves_is_not_remembered_elsewhere() -> None:
    """Trainers reset state after a warm-up and swap the inner dicts when they move an optimizer to a device."""
    model, optimizer = started("adamw")
    for p, slots in list(optimizer.state.items()):
        optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in slots.items()}
    kept = optimizer.state[model.scale]["exp_avg"]
    before = kept.clone()
    train(model, optimizer, 1)
    assert not torch.equal(kept, before)
    optimizer.state.clear()
    train(model, optimizer, 1)
    assert {slots["step"] for slots in optimizer.state.values()} == {1}


def test_parameters_whose_data_is_replaced_are_still_stepped() -> None:
    model, optimizer = started("adamw")
    model.to(torch.float64)  # swaps p.data
    before = flat(model)
    train(model, optimizer, 1)
    assert flat(model).dtype == torch.float64
    assert not torch.equal(flat(model), before)


# -- torch.distributed.checkpoint --


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is what this test wants
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_distributed_checkpoint_resumes_bit_for_bit(name: str, flatten: bool, tmp_path: Path) -> None:
    """FSDP and torchtitan save through this; a fresh process has made no step when it loads."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = started(name)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    again = net(torch.float32, seed=9)
    again.load_state_dict(model.state_dict())
    resumed = make(name, again.parameters())
    before = flat(again)
    loaded = {"optimizer": get_optimizer_state_dict(again, resumed, options=options)}
    assert torch.equal(flat(again), before), "asking for the state moved the parameters"
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_optimizer_state_dict(again, resumed, loaded["optimizer"], options=options)
    assert_same_state(optimizer, resumed)
    train(model, optimizer, 3, first=5)
    train(again, resumed, 3, first=5)
    assert torch.equal(flat(again), flat(model))


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str)
def test_a_distributed_checkpoint_knows_the_groups_of_a_module(options: dict[str, bool]) -> None:
    model = net(torch.float32)
    optimizer = metaopt.optimizer("muon", model)
    train(model, optimizer, 2)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    again = net(torch.float32)
    resumed = metaopt.optimizer("muon", again)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=StateDictOptions(**options))
    assert_same_state(optimizer, resumed)
    assert [group["role"] for group in resumed.param_groups] == [group["role"] for group in optimizer.param_groups]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Found a non-scalar tensor:UserWarning")  # DTensor, of tensors of one element
@pytest.mark.parametrize("execution", ["auto", "fused", "foreach", "loop", "plain"])
@pytest.mark.parametrize(
    "name", ["adamw", "lion", "adafactor", "muon", "clipped", "lookahead", "learned", "celo2", "velo"]
)
def test_sharded_parameters_are_stepped_like_whole_ones(name: str, execution: Any, one_process: None) -> None:
    """FSDP2 makes DTensors of parameters: their data_ptr is not where their elements are."""
    whole, sharded = (net(torch.float32) for _ in range(2))
    for model in (whole, sharded):
        model.scale = nn.Parameter(torch.ones(1))  # FSDP refuses 0-d parameters
    fully_shard(sharded)
    for model in (whole, sharded):
        train(model, make(name, model.parameters(), execution), 3)
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(q, DTensor)
        torch.testing.assert_close(q.full_tensor(), p)


@pytest.mark.parametrize("name", OPEN_LOOP)
def test_moving_state_into_float64_and_back_needs_no_special_case(name: str) -> None:
    _, optimizer = started(name)
    wide = net(torch.float64)
    other = make(name, wide.parameters())
    other.load_state_dict(optimizer.state_dict())
    backward(wide, 0)
    other.step()
    assert torch.isfinite(flat(wide)).all()
