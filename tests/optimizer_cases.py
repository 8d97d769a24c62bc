"""Rules, a small model and its training loop: what the tests of the torch optimizer run on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.learned import LearnedRule
from metaopt.rule import Chain, UpdateRule
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.adafactor import Adafactor
from metaopt_classic.adam import Adam, AdamW, AMSGrad
from metaopt_classic.lion import Lion
from metaopt_classic.muon import Muon
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM, Cautious, ClipByGlobalNorm, DecoupledWeightDecay, Lookahead
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2
from metaopt_learned.lstm import CoordinateLSTM
from metaopt_learned.velo import VeLO


def learned(rule: LearnedRule | None = None) -> UpdateRule:
    rule = rule or AdafacMLP(step_scale=0.1)
    return rule.bind(rule.init_theta(torch.Generator().manual_seed(0)))


RULES: dict[str, Callable[[], UpdateRule]] = {
    "sgd": lambda: SGD(lr=0.1),
    "momentum": lambda: SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda: SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda: Adam(lr=0.01, weight_decay=0.1),
    "adamw": lambda: AdamW(lr=0.01, weight_decay=0.1),
    "amsgrad": lambda: AMSGrad(lr=0.01),
    "lion": lambda: Lion(lr=0.01, weight_decay=0.1),
    "adafactor": lambda: Adafactor(lr=0.1),
    "muon": lambda: Muon(lr=0.01),
    "clipped": lambda: Chain(ClipByGlobalNorm(0.1), AdamW(lr=0.01)),
    "clipped_muon": lambda: Chain(ClipByGlobalNorm(0.1), Muon(lr=0.01)),
    "lookahead": lambda: Lookahead(AdamW(lr=0.01), k=3),
    "cautious": lambda: Cautious(AdamW(lr=0.01)),
    "decayed": lambda: DecoupledWeightDecay(learned(CoordinateLSTM(hidden=4)), weight_decay=0.1),
    "sam": lambda: SAM(SGD(lr=0.1, momentum=0.9)),
    "learned": learned,
    "celo2": lambda: learned(Celo2()),
    "velo": lambda: learned(VeLO(lstm_hidden=8, bank=4, mixing_scale=1.0)),
}
OPEN_LOOP = [name for name in RULES if name not in ("sam", "velo")]
"""The rules that can be stepped without a closure and without the loss."""

EXECUTIONS = ("plain", "loop", "foreach", "fused")


class Net(nn.Module):
    """An embedding, a hidden matrix, a norm, a 0-d scale and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.output = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.scale * torch.tanh(self.norm(self.hidden(self.embedding(tokens)))))


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def loss_at(model: nn.Module, step: int) -> Tensor:
    """The loss on the batch of this step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens, labels = (torch.randint(high, (16,), generator=generator) for high in (7, 3))
    return nn.functional.cross_entropy(model(tokens).float(), labels)


def backward(model: nn.Module, step: int) -> Tensor:
    model.zero_grad()
    loss = loss_at(model, step)
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """``steps`` steps with a closure, which every rule accepts."""
    for step in range(first, first + steps):
        optimizer.step(lambda step=step: backward(model, step))


def make(rule: str | UpdateRule, params: Any, execution: Any = "auto", **options: Any) -> RuleOptimizer:
    """An optimizer of one of `RULES`, or of the rule itself, which may guess the roles of parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* neither names nor roles")
        return RuleOptimizer(
            RULES[rule]() if isinstance(rule, str) else rule, params, execution, horizon=100, **options
        )


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Bit for bit, dtype for dtype."""
    one, other = a.state_dict()["state"], b.state_dict()["state"]
    assert one.keys() == other.keys()
    for key, slots in one.items():
        assert slots.keys() == other[key].keys()
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                assert value.dtype == other[key][slot].dtype
                assert torch.equal(value, other[key][slot]), (key, slot)
            else:
                assert value == other[key][slot]
