"""MuP scales learning rates as Table 3 of Yang et al. 2022 says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import metaopt
from metaopt.rule import Chain, ElementwiseRule, ParamInfo, UpdateRule, infer_info
from metaopt.space import learning_rate
from metaopt.unroll import start, unroll
from metaopt_classic.adam import Adam, AdamW
from metaopt_classic.mup import MuP
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import Cautious, ClipByGlobalNorm, DecoupledWeightDecay, Lookahead
from metaopt_tasks.mlp import mlp_classifier

BASE, WIDE = 8, 32  # n = m = 4
VOCABULARY, CLASSES = 11, 5


class Net(nn.Module):
    """Every role: embedding, hidden, norm, output, biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.fc(self.embedding(tokens)))).mean(1))


def net(width: int) -> Net:
    torch.manual_seed(0)
    return Net(width)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int = 5) -> dict[str, Tensor]:
    generator = Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (16, 4), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), tokens[:, 0] % CLASSES).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def by_hand(model: Net, lr: float, weight_decay: float, factors: dict[str, float]) -> list[dict[str, Any]]:
    """Torch's param groups with each parameter's own numbers."""
    return [
        {"params": [p], "lr": lr * factors.get(name, 1.0), "weight_decay": weight_decay / factors.get(name, 1.0)}
        for name, p in model.named_parameters()
    ]


WIDE_VECTORS = ("embedding.weight", "fc.bias", "norm.weight", "norm.bias")


@pytest.mark.parametrize(
    ("rule", "like", "peer", "factors"),
    [
        (AdamW(lr=0.01, weight_decay=0.1), "adam", torch.optim.AdamW, {"fc.weight": 0.25, "head.weight": 0.25}),
        (
            SGD(lr=0.01, weight_decay=0.1),
            "sgd",
            torch.optim.SGD,
            {"head.weight": 0.25, **dict.fromkeys(WIDE_VECTORS, 4)},
        ),
    ],
    ids=["adam", "sgd"],
)
def test_torchs_own_optimizer_with_the_tables_numbers_by_hand_does_the_same(
    rule: UpdateRule, like: str, peer: Any, factors: dict[str, float]
) -> None:
    ours, theirs = net(WIDE), net(WIDE)
    optimizer = metaopt.optimizer(MuP(rule, dict(net(BASE).named_parameters()), like=like), ours)
    groups = by_hand(theirs, 0.01, 0.1, factors)
    expected = train(theirs, peer(groups, lr=0.01))
    for name, value in train(ours, optimizer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_table_3_equals_table_8_with_its_output_multiplier() -> None:
    # Table 8, SGD: output weights of variance 1, multiplied by 1 / fan_in, learn with lr * fan_in; the rest is the same
    # here. Lemma J.1: the same function all along. The base of 1 gives the powers themselves.
    width, lr = 64, 1e-2
    info = {"w": ParamInfo((width, width), "hidden", width, width), "v": ParamInfo((1, width), "output", width, 1)}
    generator = Generator().manual_seed(0)
    w = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    v8 = torch.randn(1, width, generator=generator, dtype=torch.float64)
    x = torch.randn(width, 3, generator=generator, dtype=torch.float64)
    rule = MuP(SGD(lr=lr), base=1, like="sgd")
    params = {"w": w, "v": v8 / width}
    w8, v8 = w.clone().requires_grad_(), v8.requires_grad_()
    table8 = torch.optim.SGD([{"params": [w8]}, {"params": [v8], "lr": lr * width}], lr=lr)
    state = rule.init(params, info)
    for _ in range(20):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        out = leaves["v"] @ torch.tanh(leaves["w"] @ x)
        grads = torch.autograd.grad((out - 1).square().sum(), list(leaves.values()))
        params, state = rule.update(
            dict(zip(leaves, grads, strict=True)), state, params, rule.hp, metaopt.Context(info)
        )
        table8.zero_grad()
        out8 = v8 @ torch.tanh(w8 @ x) / width
        (out8 - 1).square().sum().backward()
        table8.step()
        torch.testing.assert_close(out, out8, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [AdamW(lr=0.01), Chain(ClipByGlobalNorm(0.1), SGD(lr=0.1))], ids=["adamw", "chain"])
def test_on_the_base_it_is_the_rule_itself(rule: UpdateRule) -> None:
    task = mlp_classifier(hidden=(8, 8))
    with torch.no_grad():
        plain = unroll(task, rule, start(task, rule, [0]), 10)[0]
        scaled = MuP(rule, task.info())
        torch.testing.assert_close(unroll(task, scaled, start(task, scaled, [0]), 10)[0], plain, rtol=1e-6, atol=0)


def test_a_learning_rate_per_copy_gives_each_copy_its_run_alone() -> None:
    task, lrs = mlp_classifier(hidden=(16, 16)), torch.tensor([1e-3, 1e-2])
    rule = MuP(AdamW(), mlp_classifier(hidden=(8, 8)).info())
    with torch.no_grad():
        together = unroll(task, rule, start(task, rule, [4, 4]), 10, hp={"lr": lrs})[0]
        for k, lr in enumerate(lrs.tolist()):
            alone = rule.replaced(lr=lr)
            losses = unroll(task, alone, start(task, alone, [4]), 10)[0]
            torch.testing.assert_close(together[k], losses[0], rtol=1e-5, atol=1e-6)


def test_convolutions_scale_with_channels_and_not_with_their_kernels() -> None:
    def kernels(channels: int) -> dict[str, Tensor]:
        return {"stem.weight": torch.empty(channels, 3, 5, 5), "conv.weight": torch.empty(channels, channels, 3, 3)}

    adam, sgd = (MuP(AdamW(), kernels(8), like=like).factors(infer_info(kernels(32))) for like in ("adam", "sgd"))
    assert adam == {"stem.weight": 1.0, "conv.weight": 0.25}
    assert sgd == {"stem.weight": 4.0, "conv.weight": 1.0}


def test_a_number_is_the_base_of_every_fan() -> None:
    info = infer_info(dict(net(128).named_parameters()))
    assert MuP(AdamW(), 64).factors(info)["fc.weight"] == 0.5
    assert metaopt.create("optimizer", "mup_adamw", base=32, lr=0.1).factors(info)["head.weight"] == 0.25


def test_a_first_layer_that_no_name_tells_scales_as_an_input() -> None:
    layers = {width: {"0.weight": torch.empty(width, 3), "2.weight": torch.empty(width, width)} for width in (8, 32)}
    info = infer_info(layers[32])
    assert info["0.weight"].role == "hidden"
    assert MuP(AdamW(), layers[8]).factors(info) == {"0.weight": 1.0, "2.weight": 0.25}
    assert MuP(SGD(), layers[8], like="sgd").factors(info) == {"0.weight": 4.0, "2.weight": 1.0}


def test_an_embedding_looks_one_token_up() -> None:
    info = infer_info({"token.embedding": torch.empty(50, 8), "head.weight": torch.empty(50, 8)})
    assert (info["token.embedding"].fan_in, info["token.embedding"].fan_out) == (1, 8)
    assert (info["head.weight"].fan_in, info["head.weight"].fan_out) == (8, 50)


class Descent(ElementwiseRule):
    """It has no weight decay of its own."""

    lr: float = learning_rate(0.1, search=(0.01, 1.0))

    def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:  # type: ignore[override]
        return param - lr * grad


def test_wrappers_pass_the_scaled_learning_rates_on() -> None:
    # whichever is outside: the decay of a step is lr times weight_decay everywhere, as on the base
    shapes = {"fc.weight": torch.ones(4, 8)}
    info, zero = infer_info(shapes), {"fc.weight": torch.zeros(4, 8)}
    base = {"fc.weight": torch.ones(4, 2)}
    scaled = MuP(AdamW(lr=0.1, weight_decay=0.5), base)
    decayed = MuP(DecoupledWeightDecay(Descent(), weight_decay=0.5), base)
    for rule in (scaled, Lookahead(scaled, k=9), Cautious(scaled), MuP(Cautious(scaled.rule), base), decayed):
        stepped, _ = rule.update(zero, rule.init(shapes, info), shapes, rule.hp, metaopt.Context(info))
        torch.testing.assert_close(stepped["fc.weight"], torch.full((4, 8), 0.95))


def test_an_l2_penalty_may_stay_as_it_is() -> None:
    shapes = {"fc.weight": torch.ones(4, 8)}
    info, zero = infer_info(shapes), {"fc.weight": torch.zeros(4, 8)}
    rule = MuP(SGD(lr=0.1, weight_decay=0.5), {"fc.weight": (4, 2)}, scale_decay=False)
    stepped, _ = rule.update(zero, rule.init(shapes, info), shapes, rule.hp, metaopt.Context(info))
    torch.testing.assert_close(stepped["fc.weight"], torch.full((4, 8), 1 - 0.1 / 4 * 0.5))


@pytest.mark.parametrize("base", [0, -3, 1.5, {}, "16"])
def test_a_base_that_is_none_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="base must be a width of at least 1"):
        MuP(AdamW(), base)


@pytest.mark.parametrize(
    "base", [{"fc1.weight": (8, 64)}, {"fc1.weight": (8,)}], ids=["a name missing", "other dimensions"]
)
def test_a_base_of_another_model_is_refused(base: Any) -> None:
    task = mlp_classifier(hidden=(16,))
    with pytest.raises(ValueError, match="base must hold 'fc1"):
        MuP(Adam(), base).init(task.init(Generator()), task.info())


def test_a_rule_without_learning_rate_is_refused() -> None:
    class Fixed(SGD):
        lr: float = 0.1  # no declaration

    with pytest.raises(ValueError, match="has no lr"):
        MuP(Fixed())


@torch.no_grad()
def test_a_clip_inside_may_differ_per_copy() -> None:
    task = mlp_classifier(hidden=(8,))
    rule = MuP(Chain(ClipByGlobalNorm(1.0), SGD(lr=0.1)), base=4, like="sgd")
    begin = start(task, rule, [0, 0])
    losses, _ = unroll(task, rule, begin, 3, hp={"max_norm": torch.tensor([1.0, 0.01])})
    alone, _ = unroll(task, rule, start(task, rule, [0]), 3)
    torch.testing.assert_close(losses[0], alone[0])
    assert not torch.equal(losses[0], losses[1])
