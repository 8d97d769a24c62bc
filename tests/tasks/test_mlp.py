"""Multi-layer perceptrons: the network, its losses, and what training does that judging does not."""

import math
import tomllib

import pytest
import scipy.stats
import torch
from torch import Generator, Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from metaopt import registry, tree
from metaopt.random import sample_indices, step_keys
from metaopt.rule import Params
from metaopt.task import Batch, Task
from metaopt_tasks.mlp import CRITERIA, MLPClassifier, hinge, mlp_classifier, mlp_regressor, squared_error
from metaopt_tasks.suites import FOLDER

MEMBERS = {
    name: arguments
    for family in ("mlp_classifier", "mlp_regressor")
    for name, arguments in tomllib.loads((FOLDER / f"{family}.toml").read_text())["members"].items()
}


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def first_batch(task: Task, step: int = 0) -> Batch:
    seeds, steps = torch.tensor([0]), torch.tensor([step])
    batch = tree.index(task.train.take(sample_indices(seeds, steps, task.batch_size, len(task.train))), 0)
    return batch | ({"random": step_keys(seeds, steps)[0]} if task.stochastic else {})


def outputs_and_labels(classes: int = 5) -> tuple[Tensor, Tensor]:
    outputs = torch.randn(32, classes, generator=generator(), dtype=torch.float64)
    return outputs, torch.arange(32) % classes


@pytest.mark.parametrize(("norm", "layer"), [("none", nn.Identity), ("layer", nn.LayerNorm), ("rms", nn.RMSNorm)])
def test_predictions_are_those_of_torch_modules_with_the_same_weights(norm: str, layer: type[nn.Module]) -> None:
    task = mlp_classifier(data="wine", hidden=(7, 5), activation="gelu", norm=norm)
    extra = {"eps": 1e-5} if norm == "rms" else {}
    names, layers, width = [], [], 13
    for i, new in enumerate((7, 5), start=1):
        layers += [nn.Linear(width, new), layer(new, **extra), nn.GELU()]
        names += [f"fc{i}", f"norm{i}", ""]
        width = new
    module = nn.Sequential(*layers, nn.Linear(width, 3))
    params = task.init(generator())
    state = {
        f"{place}.{kind}": params[f"{name}.{kind}"]
        for place, name in enumerate([*names, "fc3"])
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in params
    }
    module.load_state_dict(state)
    inputs = task.test.tensors["input"]
    torch.testing.assert_close(task.predict(params, inputs), module(inputs))


def test_a_squared_error_is_the_brier_score_of_shifted_outputs_and_starts_at_knowing_nothing() -> None:
    outputs, label = outputs_and_labels()
    one_hot = torch.eye(5, dtype=torch.float64)[label]
    torch.testing.assert_close(squared_error(outputs - 0.2, label), F.mse_loss(outputs, one_hot) * 5)
    assert float(squared_error(torch.zeros(32, 5), label)) == pytest.approx(1 - 1 / 5)


def test_the_hinge_loss_is_torchs() -> None:
    outputs, label = outputs_and_labels()
    torch.testing.assert_close(hinge(outputs, label), F.multi_margin_loss(outputs, label))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equal_outputs_have_normalized_loss_one_and_perfect_ones_zero(criterion: str) -> None:
    for data in ("digits", "breast_cancer"):
        task = mlp_classifier(data=data, criterion=criterion)
        label = torch.arange(task.classes)
        loss = CRITERIA[criterion][0]
        assert float(task.normalize(loss(torch.zeros(task.classes, task.classes), label))) == pytest.approx(1, abs=1e-6)
        perfect = torch.eye(task.classes) - 1 / task.classes
        right = perfect if criterion == "squared_error" else 100 * perfect
        assert float(task.normalize(loss(right, label))) == pytest.approx(0, abs=1e-6)
        for bad in (math.nan, math.inf, 1e30):
            assert float(task.normalize(torch.tensor(bad))) == pytest.approx(1.5)


def test_label_smoothing_changes_training_and_not_judging() -> None:
    plain, smoothed = mlp_classifier(), mlp_classifier(label_smoothing=0.2)
    params, batch = plain.init(generator()), first_batch(plain)
    logits = plain.predict(params, batch["input"])
    torch.testing.assert_close(smoothed.loss(params, batch), plain.loss(params, batch))
    expected = F.cross_entropy(logits, batch["label"], label_smoothing=0.2)
    torch.testing.assert_close(smoothed.training_loss(params, {}, batch)[0], expected)


def test_dropout_is_unbiased_in_the_linear_head_and_differs_between_steps_and_copies() -> None:
    task = mlp_classifier(hidden=(32,), dropout=0.4, criterion="squared_error")
    params, batch = task.init(generator()), first_batch(task)
    seen: list[Tensor] = []
    predict = task.predict
    task.predict = lambda *arguments: seen.append(predict(*arguments)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    keys = step_keys(torch.arange(2000), torch.zeros(2000, dtype=torch.int64))
    losses = torch.stack([task.training_loss(params, {}, batch | {"random": key})[0] for key in keys])
    expected = predict(params, batch["input"])
    spread = torch.stack(seen).std(0) / math.sqrt(len(seen))
    assert float(((torch.stack(seen).mean(0) - expected) / spread).abs().max()) < 5
    assert len(losses.unique()) > 1900
    again = task.training_loss(params, {}, batch | {"random": keys[3]})[0]
    assert float(again) == float(losses[3])


def test_dropout_vmaps_over_copies_as_in_a_loop() -> None:
    task = mlp_classifier(hidden=(16, 8), dropout=0.5)
    params, batch = task.init(generator()), first_batch(task)
    keys = torch.tensor([5, -6, 7])
    together = vmap(lambda key: task.training_loss(params, {}, batch | {"random": key})[0])(keys)
    alone = [task.training_loss(params, {}, batch | {"random": key})[0] for key in keys]
    torch.testing.assert_close(together, torch.stack(alone))
    assert mlp_classifier().stochastic is False, "no keys are drawn where there is no dropout"


@pytest.mark.parametrize("criterion", ["mse", "l1", "huber"])
def test_predicting_the_mean_has_normalized_loss_one(criterion: str) -> None:
    task = mlp_regressor(data="teacher", criterion=criterion)
    params = tree.map_tree(torch.zeros_like, task.init(generator()))
    params["fc2.bias"] += task.train.tensors["target"].mean(0)
    loss = task.loss(params, task.train.tensors)
    assert float(task.normalize(loss)) == pytest.approx(1, abs=1e-5)


def train(task: Task, steps: int, lr: float) -> Params:
    """Plain torch.optim.AdamW on the task's own batches."""
    params = {name: p.requires_grad_() for name, p in task.init(generator()).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        task.training_loss(params, {}, first_batch(task, step))[0].backward()
        optimizer.step()
    return tree.detach(params)


@pytest.mark.parametrize("arguments", [{}, {"criterion": "squared_error"}, {"criterion": "hinge"}, {"dropout": 0.2}])
def test_adamw_reaches_90_percent_on_digits_in_200_steps(arguments: dict[str, object]) -> None:
    task = registry.create("task", "digits_mlp", **arguments)
    assert isinstance(task, MLPClassifier)
    params = train(task, steps=200, lr=1e-2)
    test = task.test.tensors
    accuracy = (task.predict(params, test["input"]).argmax(-1) == test["label"]).float().mean()
    assert float(accuracy) > 0.9


def test_adamw_explains_a_teacher_network() -> None:
    task = registry.create("task", "teacher_mlp")
    params = train(task, steps=200, lr=1e-2)
    assert float(task.normalize(task.loss(params, task.test.tensors))) < 0.2


def test_test_members_share_no_network_with_the_others() -> None:
    def network(arguments: dict) -> tuple:
        return arguments["hidden"], arguments.get("activation"), arguments.get("norm")

    test = [arguments for arguments in MEMBERS.values() if arguments["suite"] == "test"]
    others = [arguments for arguments in MEMBERS.values() if arguments["suite"] != "test"]
    assert not any(network(mine) == network(theirs) for mine in test for theirs in others)


def test_members_on_pictures_name_the_extra_that_they_need() -> None:
    specs = registry.specs("task")
    assert specs["textures8_mlp"].extra == specs["faces_mlp"].extra == "images"
    assert specs["digits_mlp"].extra == ""


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="criterion must be one of cross_entropy, squared_error, hinge, got 'exact'"):
        mlp_classifier(criterion="exact")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), and 0 unless .* got 0.1"):
        mlp_classifier(criterion="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"dropout must be in \(0, 1\), got 1.5"):
        mlp_classifier(dropout=1.5)
    with pytest.raises(ValueError, match="activation must be one of relu"):
        mlp_classifier(activation="step")


@pytest.mark.parametrize("freedom", [1.0, 1.5, 4.0])
def test_heavy_tailed_noise_is_students_t_and_in_the_train_split_alone(freedom: float) -> None:
    plain, noisy = mlp_regressor(data="teacher_32d"), mlp_regressor(data="teacher_32d", noise_freedom=freedom)
    noise = noisy.train.tensors["target"] - plain.train.tensors["target"]
    assert scipy.stats.kstest(noise.flatten(), scipy.stats.t(freedom).cdf).pvalue > 0.01
    assert torch.equal(noisy.train.tensors["input"], plain.train.tensors["input"])
    for split in ("valid", "test"):
        torch.testing.assert_close(getattr(noisy, split).tensors, getattr(plain, split).tensors, rtol=0, atol=0)
    assert noisy.scale == plain.scale, "losses of both are measured in the same unit"
    with pytest.raises(ValueError, match=r"noise_freedom must be in \[0, inf\), got -1"):
        mlp_regressor(noise_freedom=-1)
