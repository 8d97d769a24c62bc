"""Several processes do what one does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import COPIES, STRATEGIES, equal, estimates, example
from torch import Tensor
from torchrun import torchrun
from toys import Linear, as_theta

from metaopt import registry, tree
from metaopt.meta.checkpoint import load_checkpoint, save_checkpoint
from metaopt.meta.distributed import process_group
from metaopt.meta.shard import ALONE, Shard


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, str]:
    """How many processes ran `distributed_worker`, the directory of their results, and what they printed."""
    directory = tmp_path_factory.mktemp("workers")
    save_checkpoint(directory / "alone.pt", {"step": 3, "carries": {"task": {"copies": example(torch.arange(COPIES))}}})
    done = torchrun(Path(__file__).with_name("distributed_worker.py"), directory, processes=request.param)
    assert done.returncode != 0, "torchrun reports the process that killed itself at the end"
    return request.param, directory, done.stdout


def test_messages_and_checkpoints_between_processes(launch: tuple[int, Path, str]) -> None:
    """`distributed_worker` checks on every process; here a single process reads what several wrote."""
    world, directory, output = launch
    assert "Error" not in re.sub("ChildFailedError|error_file|errors", "", output), output
    one, several = (load_checkpoint(directory / name) for name in ("alone.pt", f"world{world}.pt"))
    assert one is not None
    assert several is not None
    assert several["step"] == 3
    assert equal(one["carries"], several["carries"])


def test_a_process_whose_theta_differs_stops_all_before_the_checkpoint(launch: tuple[int, Path, str]) -> None:
    world, directory, output = launch
    told = [file.read_text() for file in directory.glob("astray*")]
    assert len(told) == world, output
    assert all("the processes hold different thetas after outer step 7" in text for text in told)


def test_estimators_do_not_depend_on_the_number_of_processes(launch: tuple[int, Path, str]) -> None:
    """In float64 on a problem that does not amplify rounding; 7 copies in shares of 3 and 4, or of 2, 2 and 3."""
    several, one = load_checkpoint(launch[1] / "estimates.pt"), estimates()
    assert several is not None, launch[2]
    assert several.keys() == one.keys()
    for name, result in one.items():
        assert result["metrics"][:, 0].sum() > 0, f"no copy diverged: {name}"
        tree.map_tree(
            lambda left, right: torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, equal_nan=True),
            several[name],
            result,
        )


class Recording(Shard):
    """A single process that notes how many numbers each message holds."""

    def __init__(self) -> None:
        self.messages: list[int] = []

    def sum(self, value: Tensor) -> Tensor:
        self.messages.append(value.numel())
        return value

    def gather(self, own: tree.Tree, n: int) -> tree.Tree:
        self.messages.append(sum(leaf.numel() for leaf in tree.leaves(own)))
        return own


@pytest.mark.parametrize(("name", "options"), STRATEGIES)
def test_seed_replay_exchanges_nothing_of_thetas_size(name: str, options: dict[str, Any]) -> None:
    gradients = []
    for replay in (False, True):
        estimator, shard = registry.create("estimator", name, **options, seed_replay=replay), Recording()
        theta = as_theta([0.1] * 1000)
        carry = estimator.start(Linear(), theta, 0, shard)
        for _ in range(4):
            gradient, carry, _ = estimator.estimate(Linear(), theta, carry, shard)
        assert (max(shard.messages) < 200) == replay, "2 losses of 7 pairs and steps, a few numbers of their clocks"
        gradients.append(gradient["theta"])
    assert torch.equal(*gradients)


def test_a_lost_process_stops_the_others_at_once(launch: tuple[int, Path, str]) -> None:
    world, directory, output = launch
    waited = [float(file.read_text()) for file in directory.glob("noticed*")]
    assert len(waited) == world - 1, output
    assert max(waited) < 10, "of a timeout of 30 minutes"
    assert load_checkpoint(directory / f"world{world}.pt") is not None


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group() as shard:
        assert shard is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(ValueError, match="device must be cpu or cuda under torchrun, got 'cuda:0'"),
        process_group("cuda:0"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="has 1; start torchrun with --nproc-per-node 1"), process_group("cuda"):
        pass


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 3})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged or no checkpoint; delete it"):
        load_checkpoint(path)
