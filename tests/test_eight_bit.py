"""State in 8 bits: it trains as in 32 on a small problem, takes a quarter of the memory, and is saved like any other."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_cases import assert_same_state, flat
from torch import Generator, Tensor, nn

import metaopt
from metaopt import EightBitState, registry
from metaopt.eight_bit import BLOCK, dequantise, dynamic_map, quantise
from metaopt.execution import Execution
from metaopt.rule import Chain, ElementwiseRule
from metaopt.torch_optimizer import RuleOptimizer
from metaopt.unroll import start, unroll
from metaopt_classic.adafactor import Adafactor
from metaopt_classic.adam import LAMB, AdamW, AMSGrad
from metaopt_classic.lion import Lion
from metaopt_classic.muon import Muon
from metaopt_classic.wrappers import Cautious, ClipByGlobalNorm, Lookahead
from metaopt_kernels.blockwise import BlockwiseStep as TritonStep
from metaopt_kernels.triton_kernels import TritonKernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter: inf / inf
RULES: dict[str, ElementwiseRule] = {
    "adamw": AdamW(lr=0.01), "amsgrad": AMSGrad(lr=0.01), "lamb": LAMB(lr=0.01), "lion": Lion(lr=0.001)
}  # fmt: skip


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two large matrices, one of them no multiple of a block, and small tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 211), nn.Tanh(), nn.Linear(211, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Regression on a function of the inputs; returns losses."""
    losses = []
    for step in range(first, first + steps):
        inputs = torch.randn(32, 20, generator=Generator().manual_seed(step)).to(next(net.parameters()))
        loss = (net(inputs) - torch.sin(2 * inputs[:, :3])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_nearest_numbers_of_the_map_are_kept() -> None:
    values = 10 ** (-9 * torch.rand(700, generator=Generator().manual_seed(0)))
    for signed in (True, False):
        given = values * torch.randn(700, generator=Generator().manual_seed(1)).sign() if signed else values
        found = dequantise(quantise(given, signed), signed)
        for block, made in zip(given.split(BLOCK), found.split(BLOCK), strict=True):
            distances = (block[:, None].double() / block.abs().max() - dynamic_map(signed)).abs()
            error = (block.double() - made).abs() / block.abs().max()
            torch.testing.assert_close(error, distances.min(1).values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_it_trains_as_in_32_bits(name: str) -> None:
    """Losses of the last steps within 2 %; different data moves them by more than 10."""
    losses = []
    for rule in (RULES[name], EightBitState(RULES[name])):
        net = model()
        losses.append(train(net, metaopt.optimizer(rule, net), 150))
    wide, narrow = (sum(each[-30:]) / 30 for each in losses)
    assert wide < 0.5 * losses[0][0]
    assert narrow == pytest.approx(wide, rel=0.02)


def test_state_takes_a_quarter_of_the_memory() -> None:
    net = nn.Linear(256, 128)
    sizes = []
    for rule in (AdamW(), EightBitState(AdamW())):
        optimizer = metaopt.optimizer(rule, net)
        train_once(net, optimizer)
        slots = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        sizes.append(sum(value.nbytes for value in slots))
    assert 0.25 < sizes[1] / sizes[0] < 0.27  # 8.125 bits of 32, and the bias


def train_once(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=Generator().manual_seed(0)).to(p)
    optimizer.step()


def test_small_tensors_are_stepped_as_ever() -> None:
    nets = [model(), model()]
    for net, rule in zip(nets, (AdamW(), EightBitState(AdamW())), strict=True):
        optimizer = metaopt.optimizer(rule, net)
        train_once(net, optimizer)
        train_once(net, optimizer)
    for (name, p), (_, q) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        assert torch.equal(p, q) == (p.numel() < 4096), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("execution", ["loop", "foreach", "fused"])
def test_every_execution_makes_the_same_step(execution: Any, dtype: torch.dtype) -> None:
    nets = [model(dtype), model(dtype)]
    for net, how in zip(nets, ("plain", execution), strict=True):
        optimizer = metaopt.optimizer(EightBitState(AdamW(lr=0.01)), net, execution=how)
        for _ in range(3):
            train_once(net, optimizer)
    # steps are of size 0.01; what lies in the middle between two codes may become either
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_kernel_steps_all_large_tensors_in_one_launch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launches = []

    class Counted(TritonStep):
        def __call__(self, params: Sequence[Tensor], *rest: Any) -> None:
            launches.append(len(params))
            super().__call__(params, *rest)

    monkeypatch.setattr("metaopt_kernels.blockwise.BlockwiseStep", Counted)
    nets = [model().to(device), model().to(device)]
    executions: tuple[Execution, Execution] = ("plain", "fused")
    for net, execution in zip(nets, executions, strict=True):
        monkeypatch.setattr("metaopt.execution.kernels_of", lambda _: TritonKernels())
        optimizer = metaopt.optimizer(EightBitState(AdamW(lr=0.01)), net, execution=execution)
        for _ in range(2):
            train_once(net, optimizer)
    assert launches == [2, 2]
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=1e-6, atol=1e-4)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    def made() -> tuple[nn.Module, RuleOptimizer]:
        net = model()
        return net, metaopt.optimizer(Chain(ClipByGlobalNorm(1.0), EightBitState(AdamW(lr=0.01))), net)

    net, optimizer = made()
    train(net, optimizer, 3)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    train(net, optimizer, 3, first=3)
    file.seek(0)
    again, other = made()
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, other, 3, first=3)
    assert torch.equal(flat(net), flat(again))
    assert_same_state(optimizer, other)
    assert {value.dtype for s in other.state.values() for value in s.values() if isinstance(value, Tensor)} == {
        torch.uint8, torch.float32,
    }  # fmt: skip
    wide = metaopt.optimizer(AdamW(), model())
    with pytest.raises(ValueError, match="is not that of AdamW"):
        wide.load_state_dict({**state, "param_groups": wide.state_dict()["param_groups"]})


def test_groups_choose_what_stays_in_32_bits() -> None:
    net = model()
    first, *rest = net.parameters()
    optimizer = metaopt.optimizer(EightBitState(AdamW()), [{"params": rest}, {"params": [first], "min_size": 10**9}])
    train_once(net, optimizer)
    assert optimizer.state[first]["exp_avg"].dtype == torch.float32
    assert optimizer.state[net[2].weight]["exp_avg"].dtype == torch.uint8  # type: ignore[index]


def test_copies_of_an_unroll_are_those_of_single_runs() -> None:
    task, rule = registry.create("task", "digits_mlp"), EightBitState(AdamW(lr=0.01), min_size=64)
    with torch.no_grad():
        together, _ = unroll(task, rule, start(task, rule, [0, 1]), 4)
        alone = [unroll(task, rule, start(task, rule, [seed]), 4)[0][0] for seed in (0, 1)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=0)


def test_it_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metaopt.write_module(EightBitState(AdamW(lr=0.01)), "AdamW8", tmp_path / "exported_adamw_8.py")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("exported_adamw_8")
    nets = [model(), model()]
    optimizers = [metaopt.optimizer(EightBitState(AdamW(lr=0.01)), nets[0], execution="plain")]
    optimizers.append(module.AdamW8(nets[1].parameters()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 3)
    assert torch.equal(flat(nets[0]), flat(nets[1]))


@given(size=st.integers(1, 600), signed=st.booleans(), scale=st.floats(1e-20, 1e20))
def test_the_largest_element_is_kept_and_errors_are_bounded(size: int, signed: bool, scale: float) -> None:
    values = scale * torch.randn(size, generator=Generator().manual_seed(size))
    values = values if signed else values.abs()
    made = dequantise(quantise(values, signed), signed)
    for block, found in zip(values.split(BLOCK), made.split(BLOCK), strict=True):
        largest = block.abs().max()
        assert (block - found).abs().max() <= (0.0071 if signed else 0.0036) * largest
        if block.max() == largest:
            assert found[block.argmax()] == largest


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (Muon(), "Muon"), (Adafactor(), "Adafactor"), (Chain(ClipByGlobalNorm(1.0), AdamW()), "Chain"),
        (Lookahead(AdamW()), "Lookahead"), (Cautious(AdamW()), "Cautious"), (EightBitState(AdamW()), "EightBitState"),
        ("adamw", "'adamw'"), (AdamW, "<class 'metaopt_classic.adam.AdamW'>"),
    ],
)  # fmt: skip
def test_what_is_no_elementwise_rule_is_refused_with_where_wrappers_go(given: Any, called: str) -> None:
    sentence = (
        f"EightBitState takes an elementwise rule, as in EightBitState(AdamW()), got {called}; wrappers go around it"
    )
    with pytest.raises(TypeError, match=re.escape(sentence)):
        EightBitState(given)


def test_what_cannot_be_is_refused() -> None:
    class Sharded(nn.Parameter):
        def to_local(self) -> Tensor:
            return self.data

    with pytest.raises(ValueError, match="8-bit state of a sharded parameter"):
        EightBitState(AdamW()).init({"w": Sharded(torch.ones(2))}, {})
    with pytest.raises(ValueError, match="min_size"):
        EightBitState(AdamW(), min_size=0)
