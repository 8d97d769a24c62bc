"""Recurrent language models: the cells are torch's, and they learn what a memory is for."""

import pytest
import torch
from torch import Tensor, nn

from metaopt import registry
from metaopt_tasks.data.sequences import copy_sequences
from metaopt_tasks.recurrent import GATES, RecurrentLM, recurrent_lm

MODULES = {
    "tanh": lambda *sizes: nn.RNN(*sizes, nonlinearity="tanh"),
    "relu": lambda *sizes: nn.RNN(*sizes, nonlinearity="relu"),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_params(task: RecurrentLM) -> dict[str, Tensor]:
    """Nothing is zero, so that a bias in the wrong place shows."""
    return {
        name: p.double() + 0.3 * torch.randn(p.shape, generator=generator(i), dtype=torch.float64)
        for i, (name, p) in enumerate(task.init(generator(0)).items())
    }


@pytest.mark.parametrize("cell", GATES)
def test_logits_are_those_of_torchs_module_with_the_same_weights(cell: str) -> None:
    task = recurrent_lm(cell=cell, data="copy_sequences", context=8, width=6, layers=2, embedding=5)
    params = random_params(task)
    module = MODULES[cell](5, 6, 2).double()
    for i in range(2):
        in_bias, state_bias = params[f"cell{i}.in.bias"], torch.zeros(6 * GATES[cell], dtype=torch.float64)
        if cell == "gru":
            state_bias[12:] = params[f"cell{i}.state.bias"]
        weights = (params[f"cell{i}.in.weight"], params[f"cell{i}.state.weight"], in_bias, state_bias)
        for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True):
            getattr(module, f"{name}_l{i}").data.copy_(weight)
    tokens = copy_sequences(context=8)["train"].tensors["tokens"][:7, :-1]
    states, _ = module(params["token.embedding"][tokens.T])
    expected = (states @ params["head.weight"].T + params["head.bias"]).transpose(0, 1)
    torch.testing.assert_close(task.logits(params, tokens), expected, rtol=1e-12, atol=1e-12)
    single = {name: p.float() for name, p in params.items()}
    torch.testing.assert_close(task.logits(single, tokens), expected.float(), rtol=1e-5, atol=1e-6)


def test_recurrent_matrices_start_as_asked() -> None:
    irnn = recurrent_lm(cell="relu", data="copy_sequences", recurrent="identity", recurrent_scale=0.5, width=4)
    assert torch.equal(irnn.init(generator(0))["cell0.state.weight"], 0.5 * torch.eye(4))
    blocks = recurrent_lm(cell="gru", data="copy_sequences", width=8).init(generator(0))["cell0.state.weight"].chunk(3)
    for block in blocks:
        torch.testing.assert_close(block @ block.T, torch.eye(8))
    assert not torch.equal(blocks[0], blocks[1])


def test_only_the_forget_gates_of_an_lstm_start_open() -> None:
    bias = recurrent_lm(cell="lstm", data="copy_sequences", width=3, forget_bias=2.0).init(generator(0))[
        "cell0.in.bias"
    ]
    assert bias.tolist() == [0.0] * 3 + [2.0] * 3 + [0.0] * 6


def test_roles_of_the_parameters_are_exact() -> None:
    info = recurrent_lm(cell="gru", data="copy_sequences", layers=2).info()
    roles = {role: {name for name in info if info[name].role == role} for role in ("embedding", "hidden", "output")}
    assert roles["embedding"] == {"token.embedding"} and roles["output"] == {"head.weight"}
    assert roles["hidden"] == {f"cell{i}.{name}.weight" for i in range(2) for name in ("in", "state")}
    assert all(info[name].role == "bias" for name in info if name.endswith("bias"))


@pytest.mark.parametrize("name", ["python_rnn", "python_gru", "python_lstm"])
def test_adamw_beats_the_unigram_entropy_in_100_steps(name: str) -> None:
    task = registry.create("task", name)
    params = {name: p.requires_grad_() for name, p in task.init(generator(0)).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    draws = generator(0)
    for _ in range(100):
        optimizer.zero_grad()
        rows = torch.randint(len(task.train), (task.batch_size,), generator=draws)
        task.loss(params, task.train.take(rows)).backward()
        optimizer.step()
    text = task.train.tensors["tokens"]
    shares = text.bincount(minlength=task.classes) / len(text)
    unigram = float(torch.special.entr(shares).sum())
    valid = task.valid.take(torch.arange(0, len(task.valid), 10))
    with torch.no_grad():
        assert float(task.loss(params, valid)) < unigram - 0.2


def test_a_fresh_model_guesses() -> None:
    for name in ("python_irnn", "python_bytes_gru", "copy_lstm"):
        task = registry.create("task", name)
        loss = task.loss(task.init(generator(0)), task.train.take(torch.arange(64)))
        assert float(task.normalize(loss)) == pytest.approx(1.0, abs=0.1)


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="cell must be one of tanh, relu, gru, lstm, got 'mgu'"):
        recurrent_lm(cell="mgu", data="recall")
    with pytest.raises(ValueError, match="recurrent must be one of normal"):
        recurrent_lm(recurrent="zeros", data="recall")
