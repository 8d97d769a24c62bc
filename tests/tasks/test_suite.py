"""The suite as a whole: what it offers, that it runs here, and that its held-out part is held out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from metaopt import registry
from metaopt.cli import main
from metaopt.meta.trainer import MetaTrainConfig
from metaopt.suite import HELD_OUT, content_hash, listed, members, suite_hash, suites
from metaopt.task import Split, Task
from metaopt_tasks.measure import fingerprint
from metaopt_tasks.suites import SUITES, lock

SPECS = {name: spec for name, spec in registry.specs("task").items() if spec.facts.get("suite")}
LOCKED: dict[str, Any] = lock()["tasks"]


def sources_of(name: str) -> list[str]:
    return [source for source in SPECS[name].facts["data"].split(", ") if source]


def varies(name: str) -> bool:
    """Whether a task's data differ between Python versions."""
    sources = registry.specs("data_source")
    return any(sources[source].facts.get("varies") for source in sources_of(name))


@pytest.mark.parametrize("name", SPECS)
def test_a_named_task_runs_offline_and_gives_the_committed_losses(name: str) -> None:
    task = registry.create("task", name)
    assert isinstance(task, Task) and task.name == name
    losses = fingerprint(task)
    assert all(math.isfinite(loss) for loss in losses)
    if varies(name) and content_hash(task) != LOCKED[name]["content"]:
        pytest.skip(f"{SPECS[name].facts['data']} of this Python differs from the one that was measured")
    assert content_hash(task) == LOCKED[name]["content"]
    assert losses == pytest.approx(LOCKED[name]["fingerprint"], rel=1e-3, abs=1e-5)


def test_at_least_300_tasks_over_at_least_20_families_and_every_suite_is_there() -> None:
    assert len(SPECS) >= 300
    assert len({spec.facts["family"] for spec in SPECS.values()}) >= 20
    assert set(suites()) == set(SUITES)


def test_the_listing_says_what_each_task_costs_and_under_what_licence_its_data_are(capsys: Any) -> None:
    assert main(["list", "tasks", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["suite"]]
    assert {row["name"] for row in rows} == set(SPECS)
    for row in rows:
        assert row["parameters"] > 0 and row["bytes"] > 0 and row["ms_per_step"] > 0
        assert row["suite"] in SUITES and row["license"] and row["family"] and row["content"]


def test_the_lock_holds_these_tasks_and_no_others_and_its_hashes_are_theirs() -> None:
    assert set(LOCKED) == set(SPECS)
    for suite, expected in lock()["suites"].items():
        assert suite_hash({name: LOCKED[name]["content"] for name in members(suite)}) == expected


def test_held_out_tasks_share_no_data_no_architecture_and_no_horizon_with_the_others() -> None:
    used: dict[str, dict[bool, set[Any]]] = defaultdict(lambda: {True: set(), False: set()})
    for spec in SPECS.values():
        held_out = spec.facts["suite"] == HELD_OUT
        used["data source"][held_out].update(sources_of(spec.name))
        arguments = {k: v for k, v in spec.defaults.items() if k not in ("name", "suite", "batch_size", "horizon")}
        used["definition"][held_out].add(json.dumps([spec.factory, arguments], sort_keys=True))
        if spec.facts["suite"] != "large":
            used["horizon"][held_out].add(registry.create("task", spec.name).horizon)
    for what, sides in used.items():
        assert not sides[True] & sides[False], f"{what} shared with the held-out suite"


def test_a_search_cannot_use_a_held_out_task() -> None:
    with pytest.raises(ValueError, match=r"held-out suite 'test'.*choose a task of another suite"):
        MetaTrainConfig(tasks=[members(HELD_OUT)[0]])


def test_a_search_cannot_use_held_out_data_by_another_tasks_name_nor_a_whole_suite() -> None:
    with pytest.raises(ValueError, match="data source 'breast_cancer' is held out"):
        MetaTrainConfig(tasks=[{"name": "digits_mlp", "options": {"data": "breast_cancer"}}])
    with pytest.raises(ValueError, match=r"held-out suite 'test'"):
        MetaTrainConfig(tasks=["digits_mlp", f"suite:{HELD_OUT}"])
    MetaTrainConfig(tasks=[{"name": "digits_mlp", "options": {"data": "wine"}}, "suite:fast"])


def test_a_data_function_of_the_users_own_need_not_know_of_devices(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from metaopt_tasks.data.adapters import from_dataset\n"
        "def blobs():\n"
        "    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))\n"
        "    return from_dataset(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()))\n"
    )
    task = registry.create("task", "mlp_classifier", ranges={"data": [f"{tmp_path}/mine.py:blobs"], "hidden": [[4]]})
    member = task.sample(torch.Generator().manual_seed(0))
    assert member.outputs == 2 and len(member.train) == 42
    assert "tensor" not in repr(member), "a task prints as what it is, not as its data"


def test_suites_expand_by_name_and_unknown_ones_are_refused() -> None:
    assert listed(["digits_mlp", "suite:fast"]) == ["digits_mlp", *members("fast")]
    with pytest.raises(ValueError, match=r"no suite is called 'tset'; there are fast, large, test, train, valid"):
        listed(["suite:tset"])


def test_the_content_hash_sees_data_order_shape_and_settings_but_not_rounding() -> None:
    task = registry.create("task", "digits_mlp")
    original = content_hash(task)
    inputs, labels = task.train.tensors.values()

    def changed(**tensors: torch.Tensor) -> str:
        task.train = Split({"input": inputs, "label": labels} | tensors)
        return content_hash(task)

    assert changed(input=inputs * (1 + 1e-7)) == original
    assert changed(input=inputs.flip(0)) != original
    assert changed(label=labels.roll(1)) != original
    assert content_hash(registry.create("task", "digits_mlp", hidden=(33,))) != original
    assert content_hash(registry.create("task", "digits_mlp", horizon=201)) != original
