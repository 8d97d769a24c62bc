from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib import image
from rich.console import Console
from torch import nn

from metaopt.evaluate import race, save, split_losses, table
from metaopt.learned import LearnedRule
from metaopt.rule import ElementwiseRule
from metaopt.space import learning_rate
from metaopt.task import Split, Task, TaskFamily

STEEP = 4.0
QUICK = {"seeds": 3, "grid": 5, "rounds": 1, "steps": 6, "progress": False}


class Descent(ElementwiseRule):
    lr: float = learning_rate(0.1, search=(1e-3, 10.0))

    def elementwise(self, param, grad, *, lr):
        return (param - lr * grad,)


class TimidDescent(ElementwiseRule):
    lr: float = learning_rate(0.001, search=(1e-3, 1e-1))

    def elementwise(self, param, grad, *, lr):
        return (param - lr * grad,)


class SignDescent(ElementwiseRule):
    lr: float = learning_rate(0.1, search=(1e-3, 1.0))

    def elementwise(self, param, grad, *, lr):
        return (param - lr * torch.sign(grad),)


class Reckless(ElementwiseRule):
    lr: float = learning_rate(1e12, search=(1e12, 1e15))

    def elementwise(self, param, grad, *, lr):
        return (param - lr * grad,)


class Unsteerable(ElementwiseRule):
    def elementwise(self, param, grad):
        return (param - 0.01 * grad,)


class LearnedDescent(LearnedRule):
    def init_theta(self, generator):
        return {"log_lr": torch.tensor(-2.0)}

    def init(self, params, info, theta):
        return {name: {"step": torch.zeros((), dtype=torch.int64)} for name in params}

    def update(self, theta, grads, state, params, hp, ctx):
        return {name: param - theta["log_lr"].exp() * grads[name] for name, param in params.items()}, state


@dataclass(eq=False)
class Bowl(Task):
    """0.5 steepness x^2, so that gradient descent with lr = 1 / steepness arrives in one step."""

    def init(self, generator):
        return {"x": 1 + torch.rand(1, generator=generator)}

    def loss(self, params, batch):
        return 0.5 * ({**self.config, **batch}["steepness"] * params["x"] ** 2).sum()


def bowl(name="bowl", steepness=STEEP):
    return Bowl(name, Split(), Split(), Split(), horizon=6, config={"steepness": torch.tensor(steepness)})


class Bowls(TaskFamily):
    name = "bowls"

    def sample(self, generator):
        return bowl(self.name, 1 + float(torch.rand((), generator=generator)))


def regression(test_shift=0.0):
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    data = {name: (inputs, inputs.sum(1, keepdim=True)) for name in ("train", "valid")}
    data["test"] = (inputs, inputs.sum(1, keepdim=True) + test_shift)
    return Task.from_module(nn.Linear(3, 1), nn.functional.mse_loss, data, name="regression", batch_size=8, horizon=12)


def comparable(result, tmp_path):
    saved = json.loads(save(result, tmp_path)["json"].read_text())
    assert saved.pop("wall_clock")["seconds"]
    return saved


def test_tuner_finds_the_known_best_learning_rate():
    entry = race({"descent": Descent()}, [bowl()], grid=9, rounds=2, seeds=2, progress=False).entries["descent"]["bowl"]
    assert abs(math.log10(entry.lr * STEEP)) < 0.1
    assert not entry.tuning.edge
    assert entry.loss.iqm < 1e-3


def test_every_contender_has_the_same_budget_wherever_its_optimum_lies():
    result = race({"inside": Descent(), "outside": TimidDescent()}, [bowl()], **QUICK)
    inside, outside = (result.entries[name]["bowl"].tuning for name in ("inside", "outside"))
    assert inside.runs == outside.runs == result.protocol["tuning_runs"] == (5 + 2) * 2
    assert (inside.extended, outside.extended) == (0, 1)
    assert outside.lr > 0.1, "the search went on beyond the declared range"
    assert not outside.edge


def test_an_optimum_that_the_search_does_not_reach_is_reported():
    entry = race({"timid": TimidDescent()}, [bowl(steepness=1e-4)], **QUICK).entries["timid"]["bowl"]
    assert entry.tuning.edge
    assert entry.lr == max(trial.lr for trial in entry.tuning.trials)


def test_without_a_grid_each_rule_runs_with_its_own_learning_rate():
    result = race({"descent": Descent(lr=0.07)}, [bowl()], **{**QUICK, "grid": 0})
    entry = result.entries["descent"]["bowl"]
    assert (entry.lr, entry.tuning, result.protocol["tuning_runs"]) == (0.07, None, 0)


def test_contenders_without_a_learning_rate_run_as_they_are():
    learned = LearnedDescent()
    contenders = {"fixed": Unsteerable(), "learned": learned.bind(learned.init_theta(torch.Generator()))}
    result = race(contenders, [bowl()], **QUICK)
    assert all(result.entries[name]["bowl"].tuning is None for name in contenders)
    start = np.asarray(result.entries["learned"]["bowl"].train)[:, 0]
    expected = start * (1 - math.exp(-2.0) * STEEP) ** (2 * 6)
    np.testing.assert_allclose(result.entries["learned"]["bowl"].test, expected, rtol=1e-4)


def test_order_of_contenders_and_repetition_change_nothing(tmp_path):
    contenders = {"descent": Descent(), "sign": SignDescent(), "fixed": Unsteerable()}
    tasks = [regression(), bowl()]
    first = comparable(race(contenders, tasks, **QUICK), tmp_path)
    backwards = dict(reversed(contenders.items()))
    assert comparable(race(backwards, tasks, **QUICK), tmp_path) == first
    assert comparable(race(contenders, tasks, **QUICK, seed=1), tmp_path)["entries"] != first["entries"]
    alone = comparable(race({"sign": SignDescent()}, tasks, **QUICK), tmp_path)
    assert alone["entries"]["sign"] == first["entries"]["sign"], "who else races does not matter"


def test_contenders_start_alike_and_see_the_same_batches():
    entries = race([Descent(), SignDescent()], [regression()], **QUICK).entries
    first_losses = [np.asarray(entries[name]["regression"].train)[:, 0] for name in ("Descent", "SignDescent")]
    np.testing.assert_array_equal(*first_losses)


def test_tuning_never_sees_the_test_split():
    plain, shifted = (
        race([Descent()], [regression(shift)], **QUICK).entries["Descent"]["regression"] for shift in (0.0, 5.0)
    )
    assert plain.tuning == shifted.tuning
    assert plain.train == shifted.train
    assert min(shifted.test) > 20 > max(plain.test)


def test_diverged_runs_are_reported_not_dropped(tmp_path):
    result = race({"reckless": Reckless(), "sane": Descent()}, [bowl()], **QUICK)
    entry = result.entries["reckless"]["bowl"]
    assert entry.diverged == result.diverged("reckless") == 3
    assert all(math.isnan(loss) for loss in entry.test)
    assert entry.loss.iqm == math.inf
    assert entry.scores == [1e6] * 3
    assert entry.tuning.edge and any(trial.diverged for trial in entry.tuning.trials)
    assert result.ranking == ["sane", "reckless"]
    page = Console(width=120, file=io.StringIO())
    page.print(table(result))
    assert "3 of 3 diverged" in page.file.getvalue()
    saved = comparable(result, tmp_path)
    assert saved["entries"]["reckless"]["bowl"]["test"] == [None] * 3
    assert saved["entries"]["reckless"]["bowl"]["loss"]["iqm"] is None


def test_a_family_is_raced_on_one_member_per_seed():
    result = race({"descent": Descent()}, [Bowls()], **QUICK)
    entry = result.entries["descent"]["bowls"]
    for seed, losses in zip(entry.seeds, entry.train, strict=True):
        steepness = float(Bowls().sample(torch.Generator().manual_seed(seed)).config["steepness"])
        shrink = (1 - entry.lr * steepness) ** 2
        assert losses[1] / losses[0] == pytest.approx(shrink, rel=1e-3)


def test_final_seeds_are_fresh_and_more_of_them_extend_fewer():
    from metaopt.evaluate.course import seed_streams

    tune, final = seed_streams(0, "bowl", 50, 50)
    assert len({*tune, *final}) == 100
    assert seed_streams(0, "bowl", 2, 3) == (tune[:2], final[:3])
    assert not {*final} & {*seed_streams(0, "other", 50, 50)[1], *seed_streams(1, "bowl", 50, 50)[1]}


def test_files_are_complete_valid_and_whole(tmp_path):
    result = race({"descent": Descent(), "reckless": Reckless()}, [bowl(), regression(), bowl("b"), bowl("c")], **QUICK)
    written = save(result, tmp_path / "new")
    text = written["json"].read_text()
    assert "NaN" not in text and "Infinity" not in text
    saved = json.loads(text)
    assert json.loads(json.dumps(saved)) == saved
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["protocol"]["seeds"] == 3
    entry = saved["entries"]["descent"]["regression"]
    assert np.shape(entry["train"]) == (3, 6)
    assert np.shape(entry["valid"]) == (3, len(entry["checkpoints"]))
    assert entry["checkpoints"][0] == 0 and entry["checkpoints"][-1] == 6
    assert [len(trial["scores"]) for trial in entry["tuning"]["trials"]] == [2] * 7
    picture = image.imread(written["curves"])
    assert picture.ndim == 3 and picture.std() > 0.01
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["curves.png", "race.json", "race.txt"]


def test_split_losses_average_chunks_by_their_size():
    task = regression(1.0)
    params = {name: torch.stack([value, 2 * value]) for name, value in task.init(torch.Generator()).items()}
    split = task.test
    whole = torch.stack([task.loss({n: v[k] for n, v in params.items()}, split.tensors) for k in range(2)])
    torch.testing.assert_close(split_losses(task, params, split, chunk=7), whole.double(), rtol=1e-6, atol=0)
    some = split_losses(task, params, split, max_examples=20)
    torch.testing.assert_close(some, split_losses(task, params, split, max_examples=20, chunk=3), rtol=1e-6, atol=0)
    assert not torch.equal(some, whole.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contenders": {}}, "at least one contender"),
        ({"contenders": ["no_such_rule"]}, "no_such_rule"),
        ({"contenders": [Descent(), Descent()]}, "different names"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"tasks": [bowl(), bowl()]}, "different names"),
        ({"seeds": 0}, "seeds must be"),
        ({"steps": 0}, "steps must be"),
        ({"grid": 2}, "grid must be"),
        ({"tune_seeds": 1.5}, "tune_seeds must be"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, message):
    given = {"contenders": [Descent()], "tasks": [bowl()], "progress": False, **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        race(given.pop("contenders"), given.pop("tasks"), **given)
    assert "\n" not in str(caught.value)


def test_what_is_no_rule_or_no_task_is_refused():
    with pytest.raises(TypeError, match="bind"):
        race([LearnedDescent()], [bowl()])
    with pytest.raises(TypeError, match="update rule"):
        race([torch.optim.SGD], [bowl()])
    with pytest.raises(TypeError, match="tasks"):
        race([Descent()], [42])


def test_a_family_whose_members_have_their_own_data_is_refused():
    class Shuffled(TaskFamily):
        name = "shuffled"

        def sample(self, generator):
            return Task.from_module(
                nn.Linear(2, 1), nn.functional.mse_loss,
                {"train": (torch.randn(9, 2, generator=generator), torch.randn(9, 1, generator=generator))},
            )  # fmt: skip

    with pytest.raises(ValueError, match="different train data"):
        race([Descent()], [Shuffled()], **QUICK)


def test_many_tasks_are_rows_of_the_written_page(tmp_path):
    tasks = [bowl(name=f"bowl_{i}") for i in range(5)]
    result = race({"descent": Descent(), "reckless": Reckless()}, tasks, **QUICK)
    page = save(result, tmp_path)["table"].read_text()
    assert all(re.search(rf"^│ bowl_{i} +│", page, re.MULTILINE) for i in range(5))
    assert max(map(len, page.splitlines())) < 250
