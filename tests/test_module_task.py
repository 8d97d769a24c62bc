"""Any stock module is a task: K copies of it train side by side as each would alone in plain torch."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from metaopt import registry, tree
from metaopt.evaluate import race
from metaopt.evaluate.losses import split_losses
from metaopt.module_task import ModuleTask
from metaopt.random import sample_indices
from metaopt.replayable import Replayable
from metaopt.rule import UpdateRule
from metaopt.task import Task
from metaopt.unroll import start, unroll
from metaopt_classic.wrappers import SAM

VOCABULARY, LENGTH, WIDTH = 11, 6, 8


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def tokens(size: int = 40) -> dict[str, tuple[Tensor, Tensor]]:
    text = torch.randint(0, VOCABULARY, (size, LENGTH + 1), generator=Generator().manual_seed(0))
    return {"train": (text[:, :-1], text[:, 1:])}


def next_token_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


class TokenModel(nn.Module):
    """Embedding, something in between, head."""

    def __init__(self, between: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.between = between
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(self.embedding(x), x))

    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.between(h)[0]


class MaskedEncoder(TokenModel):
    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.between(h, mask=self.mask)


class CausalEncoder(TokenModel):
    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.between(h, mask=self.mask, is_causal=True)


class PaddedEncoder(TokenModel):
    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.between(h, src_key_padding_mask=x == 0)


class Translator(TokenModel):
    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.between(h, h, tgt_mask=self.mask)


class Attending(TokenModel):
    def mixed(self, h: Tensor, x: Tensor) -> Tensor:
        output, weights = self.between(h, h, h, need_weights=True)
        return output + weights.sum((1, 2))[:, None, None]


def encoder(**arguments: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not arguments.get("norm_first", False))


TOKEN_MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: MaskedEncoder(encoder()),
    "causal": lambda: CausalEncoder(encoder(activation="gelu", norm_first=True)),
    "padded": lambda: PaddedEncoder(encoder()),
    "tied": lambda: MaskedEncoder(encoder(), tied=True),
    "translator": lambda: Translator(nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)),
    "attention": lambda: Attending(nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)),
    "lstm": lambda: TokenModel(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.2)),
    "gru": lambda: TokenModel(nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)),
}


class BasicBlock(nn.Module):
    """As torchvision's, with in-place activations."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        BasicBlock(4, 4), BasicBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def images(module: nn.Module | None = None) -> ModuleTask:
    data = (numbers(50, 1, 8, 8) * 2 + 1, torch.arange(50) % 3)
    task = Task.from_module(module or resnet(), F.cross_entropy, {"train": data}, batch_size=8)
    assert isinstance(task, ModuleTask)
    return task


def token_task(name: str) -> ModuleTask:
    task = Task.from_module(TOKEN_MODELS[name](), next_token_loss, tokens(), batch_size=4)
    assert isinstance(task, ModuleTask)
    return task


def sgd() -> UpdateRule:
    return registry.create("optimizer", "sgd", lr=0.1)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_copies_of_stock_sequence_models_train_together_as_each_alone(name: str) -> None:
    task, rule = token_task(name), sgd()
    begin = start(task, rule, torch.arange(4))
    with torch.no_grad():
        eager, end = unroll(task, rule, begin, 3, backend="eager")
        loop, alone = unroll(task, rule, begin, 3, backend="loop")
    recorded, _ = unroll(task, rule, begin, 3, backend="eager")
    torch.testing.assert_close(eager, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(eager, recorded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.params, alone.params, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(p, begin.params[name]) for name, p in end.params.items() if "in_proj_bias" not in name)
    judged = split_losses(task, end.params, task.valid, end.config | end.buffers)
    for k in range(4):
        plain = TOKEN_MODELS[name]().eval()
        plain.load_state_dict(tree.index(end.params, k), strict=False)
        expected = next_token_loss(plain(tokens()["train"][0]), tokens()["train"][1])
        torch.testing.assert_close(judged[k].float(), expected.detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_64_copies_of_a_stock_transformer_are_64_single_runs() -> None:
    task, rule = token_task("encoder"), sgd()
    losses, carry = unroll(task, rule, start(task, rule, torch.arange(64)), 3)
    for k in (0, 63):
        alone, single = unroll(task, rule, start(task, rule, [k]), 3)
        torch.testing.assert_close(losses[k], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tree.index(carry.params, k), tree.index(single.params, 0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_64_copies_of_a_residual_net_follow_plain_torch_step_by_step_running_statistics_included() -> None:
    task, rule, lr = images(), sgd(), 0.1
    seeds = torch.arange(64)
    carry = start(task, rule, seeds)
    plain = {}
    for k in (0, 63):
        plain[k] = resnet().train()
        plain[k].load_state_dict(tree.index(carry.params, k) | tree.index(carry.buffers, k))
    for t in range(3):
        losses, carry = unroll(task, rule, carry, 1, backend="eager")
        drawn = sample_indices(seeds, torch.full_like(seeds, t), task.batch_size, len(task.train))
        for k, module in plain.items():
            batch = task.train.take(drawn[k])
            with torch.enable_grad():
                loss = F.cross_entropy(module(batch["input"]), batch["target"])
                gradients = torch.autograd.grad(loss, list(module.parameters()))
            for p, g in zip(module.parameters(), gradients, strict=True):
                p -= lr * g
            torch.testing.assert_close(losses[k, 0], loss, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tree.index(carry.buffers, k), dict(module.named_buffers()), rtol=1e-4, atol=1e-4)
    assert carry.buffers["1.num_batches_tracked"].tolist() == [3] * 64
    judged = split_losses(task, carry.params, task.valid, carry.config | carry.buffers)
    for k, module in plain.items():
        whole = task.valid.tensors
        expected = F.cross_entropy(module.eval()(whole["input"]), whole["target"])
        torch.testing.assert_close(judged[k].float(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_looped_copies_give_the_numbers_of_vmapped_ones() -> None:
    task, rule = images(), sgd()
    begin = start(task, rule, torch.arange(4))
    (eager, end), (loop, other) = (unroll(task, rule, begin, 2, backend=b) for b in ("eager", "loop"))
    torch.testing.assert_close(eager, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end.buffers, other.buffers, rtol=1e-4, atol=1e-5)


def test_the_users_module_is_left_as_it_was() -> None:
    module = resnet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    task, state = images(module), torch.get_rng_state()
    unroll(task, sgd(), start(task, sgd(), [1, 2]), 2)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state), "and so is torch's generator"


@torch.no_grad()
def test_dropout_masks_depend_on_seed_and_step_only() -> None:
    module = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1))
    data = (numbers(20, 3), numbers(20, 1, seed=1))
    task, rule = Task.from_module(module, F.mse_loss, {"train": data}, batch_size=4), sgd()
    begin = start(task, rule, [5, 5, 6])
    whole, end = unroll(task, rule, begin, 4)
    first, middle = unroll(task, rule, begin, 1)
    second, _ = unroll(task, rule, middle, 3)
    assert torch.equal(whole, torch.cat([first, second], 1)), "whatever the window"
    assert torch.equal(end.params["0.weight"][0], end.params["0.weight"][1]), "antithetic pairs see the same masks"
    assert not torch.equal(whole[0], whole[2])
    alone, _ = unroll(task, rule, start(task, rule, [6]), 4)
    torch.testing.assert_close(alone[0], whole[2], msg="a copy's masks do not depend on its neighbours")


@pytest.mark.parametrize("dim", [0, 1])
@torch.no_grad()
def test_weight_norm_is_that_of_torch_and_vmaps(dim: int) -> None:
    module = nn.Sequential(weight_norm(nn.Conv1d(3, 4, 2), dim=dim), nn.Flatten(), nn.Linear(8, 1))
    x = numbers(20, 3, 3)
    expected = module(x)
    with Replayable(None):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    task = Task.from_module(module, F.mse_loss, {"train": (x, numbers(20, 1))}, batch_size=4)
    begin = start(task, sgd(), torch.arange(4))
    eager, loop = (unroll(task, sgd(), begin, 2, backend=backend)[0] for backend in ("eager", "loop"))
    torch.testing.assert_close(eager, loop, rtol=1e-5, atol=1e-5)


class Random(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(3, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.draw(x) if self.training else x)


def random_task(draw: Callable[[Tensor], Tensor]) -> Task:
    return Task.from_module(lambda: Random(draw), F.mse_loss, {"train": (numbers(20, 3), numbers(20, 1))}, batch_size=4)


@pytest.mark.parametrize("draw", [
    torch.bernoulli, lambda x: torch.randn(x.shape), lambda x: torch.empty_like(x).normal_(), lambda x: F.gumbel_softmax(x),
    lambda x: F.rrelu(x, training=True), lambda x: F.alpha_dropout(x, training=True), lambda x: x * x.new_ones(3).bernoulli(),
    lambda x: F.dropout(x) + torch.randint(0, 2, x.shape),
])  # fmt: skip
def test_randomness_that_cannot_be_replayed_is_refused(draw: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"the module draws random numbers by .*, which cannot be replayed"):
        random_task(draw)


@pytest.mark.parametrize("draw", [torch.rand_like, torch.randn_like, lambda x: F.alpha_dropout(x, training=False)])
def test_replayable_randomness_is_the_same_side_by_side_and_one_after_the_other(draw: Any) -> None:
    task = random_task(draw)
    begin, state = start(task, sgd(), [0, 1]), torch.get_rng_state()
    both = [unroll(task, sgd(), begin, 3, backend=backend)[0] for backend in ("eager", "loop")]
    torch.testing.assert_close(*both)
    assert torch.equal(torch.get_rng_state(), state)


class Centred(nn.Module):
    """Keeps a running mean by assignment, counts in place, and holds a table and a mask that nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.count += 1
        if not bool(self.mask.any()):  # a branch on a constant is none on the copies
            raise AssertionError
        return self.linear((x - self.mean)[:, self.table])


@pytest.mark.parametrize("backend", ["eager", "loop"])
@torch.no_grad()
def test_buffers_that_training_changes_are_carried_and_constants_are_not(backend: str) -> None:
    data = (numbers(20, 3) + 5, numbers(20, 1))
    task = Task.from_module(Centred(), F.mse_loss, {"train": data}, batch_size=4)
    assert list(task.buffers()) == ["mean", "count"]
    _, carry = unroll(task, sgd(), start(task, sgd(), [3, 4]), 3, backend=backend)
    assert carry.buffers["count"].tolist() == [3, 3]
    mean = torch.zeros(2, 3)
    for t in range(3):
        drawn = sample_indices(carry.seeds, torch.full((2,), t), 4, 20)
        mean = 0.9 * mean + 0.1 * data[0][drawn].mean(1)
    torch.testing.assert_close(carry.buffers["mean"], mean)
    assert not task.buffers()["mean"].any(), "the task itself holds no run's state"


def test_tied_weights_are_one_parameter_with_both_gradients() -> None:
    task = token_task("tied")
    params = task.init(Generator().manual_seed(0))
    assert "embedding.weight" in params and "head.weight" not in params
    module = TOKEN_MODELS["tied"]().eval()
    module.load_state_dict(params, strict=False)
    batch = task.train.take(torch.arange(4))
    expected = torch.autograd.grad(next_token_loss(module(batch["input"]), batch["target"]), module.embedding.weight)[0]  # type: ignore[arg-type, union-attr]
    found = torch.func.grad(task.loss)(params, batch)["embedding.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_every_layer_is_drawn_anew_for_each_seed() -> None:
    task = token_task("encoder")
    one, again, other = (task.init(Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    drawn = [name for name, p in one.items() if p.dim() == 2]
    assert len(drawn) == 10 and all(not torch.equal(one[name], other[name]) for name in drawn)
    assert not torch.equal(one["between.layers.0.linear1.weight"], one["between.layers.1.linear1.weight"])


def test_a_module_that_cannot_be_a_task_is_refused_in_one_sentence() -> None:
    class Named(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("target", torch.zeros(1))

    data = {"train": (numbers(20, 3), numbers(20, 1))}
    with pytest.raises(ValueError, match="a buffer must not be called 'target'"):
        Task.from_module(Named(), F.mse_loss, data)
    frozen = copy.deepcopy(nn.Linear(3, 1))
    frozen.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is trained, but 'bias' asks for no gradient"):
        Task.from_module(frozen, F.mse_loss, data)
    with pytest.raises(ValueError, match="data must hold a 'train' split"):
        Task.from_module(nn.Linear(3, 1), F.mse_loss, {"valid": data["train"]})
    task = Task.from_module(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)), F.mse_loss, data)
    with pytest.raises(ValueError, match="its batch needs a key"):
        task.training_loss(task.init(Generator()), {}, task.train.take(torch.arange(2)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_a_module_with_dropout_and_batch_norm_compiles() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 1))
    task = Task.from_module(module, F.mse_loss, {"train": (numbers(20, 3), numbers(20, 1))}, batch_size=4)
    begin = start(task, sgd(), [0, 1])
    (eager, end), (compiled, other) = (unroll(task, sgd(), begin, 3, backend=b) for b in ("eager", "compile"))
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end.buffers, other.buffers, rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """Decides by the value of its weights, which ``vmap`` cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if bool(self.linear.weight.sum() > 0) else -x)


def branching_task() -> Task:
    data = {"train": (numbers(20, 3), numbers(20, 1))}
    return Task.from_module(Branching, F.mse_loss, data, name="branching", batch_size=4, horizon=3)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_vmap_cannot_take_loops_with_rules_that_evaluate_elsewhere_too(recorded: bool) -> None:
    task, rule = branching_task(), SAM(sgd(), rho=0.1)
    with torch.set_grad_enabled(recorded):
        losses, _ = unroll(task, rule, start(task, rule, [0, 1]), 3, backend="loop")
    assert bool(torch.isfinite(losses).all())


def test_what_vmap_cannot_take_is_judged_and_raced_one_copy_after_the_other() -> None:
    task = branching_task()
    found = race(["sgd"], [task], seeds=2, grid=0, backend="loop", progress=False).entries["sgd"]["branching"]
    assert all(math.isfinite(loss) for loss in found.test)
    params = tree.stack([task.init(Generator().manual_seed(i)) for i in range(3)])
    judged = split_losses(task, params, task.test, vmapped=False)
    for k in range(3):
        alone = task.loss(tree.index(params, k), task.test.take(torch.arange(20)))
        torch.testing.assert_close(judged[k].float(), alone)


def test_a_role_for_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"roles name 'lniear\.weight', which is no parameter"):
        Task.from_module(
            Branching, F.mse_loss, {"train": (numbers(20, 3), numbers(20, 1))}, roles={"lniear.weight": "output"}
        )


def test_losses_are_normalised_by_a_fresh_modules_and_stay_finite() -> None:
    task = images()
    fresh = task.loss(
        {name: p for name, p in task._judging.named_parameters()}, task.train.take(torch.arange(len(task.train)))
    )
    assert float(task.normalize(fresh.detach())) == pytest.approx(1.0, rel=0.05)
    assert float(task.normalize(torch.tensor(0.0))) == 0
    for bad in (math.nan, math.inf, 1e30):
        assert float(task.normalize(torch.tensor(bad))) == 1.5
