"""Found losses compared with published ones, and published in a zoo."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metaopt
from metaopt import registry
from metaopt.cli import main
from metaopt.hookspecs import Spec, hookimpl
from metaopt.program import evaluate, read_loss
from metaopt.zoo import CARD_FILE, LossCard, entries, read_card, render
from metaopt.zoo.entry import load, verify
from metaopt.zoo.make import add
from metaopt_symbolic.genome import LOSS_SEEDS, parse
from metaopt_symbolic.losses import comparison
from metaopt_symbolic.losses import judge as judge_module
from metaopt_symbolic.losses.candidate import python
from metaopt_symbolic.losses.comparison import CDPO, _of_tasks, published, scaled, winner, with_beta
from metaopt_symbolic.losses.judge import Regime, Stage, train
from metaopt_tasks.preference import preference

TINY = Stage((Regime("noisy", {"data": "preferences_noisy", "seed": 3}),), 3, (0, 1, 2))
RHO = torch.linspace(-20, 20, 41, dtype=torch.float64)
TOLD = {"license": "Apache-2.0", "summary": "a tiny one", "limits": "Only three steps of one task."}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Short runs, few settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "search_stages", lambda: (TINY,))
        patch.setattr(judge_module, "selection_stage", lambda: TINY)
        patch.setattr(judge_module, "report_stage", lambda: TINY)
        patch.setattr(comparison, "TUNED_SCALES", (0.5, 1.0, 4.0))
        patch.setattr(comparison, "TUNED_RATES", (0.1, 0.3))
        patch.setattr(comparison, "PUBLISHED", {"dpo": ({},), "lrml": ({"tau": 0.05}, {"tau": 2.0})})
        patch.setattr(comparison, "SHARES", (0.2,))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``discover loss`` and ``discover compare`` leave behind."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    assert main(["discover", "loss", "--budget", "4", "--seed", "2", "--out", str(run)]) == 0
    assert main(["discover", "compare", str(run)]) == 0
    return run


@pytest.fixture
def entry(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry ``mine`` of a zoo whose plugin is installed."""
    words = ["--license", TOLD["license"], "--summary", TOLD["summary"], "--limits", TOLD["limits"]]
    assert main(["zoo", "add", str(compared), "mine", *words, "--to", str(tmp_path / "zoo")]) == 0

    class Plugin:
        @hookimpl
        def metaopt_zoo_rules(self) -> list[Spec]:
            return entries(tmp_path / "zoo")

    found = registry.Registry.discover()
    found.register(Plugin(), "strangers")
    monkeypatch.setattr(registry, "default", lambda: found)
    return tmp_path / "zoo" / "mine"


# -- compared ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*LOSS_SEEDS.values(), CDPO.format(share=0.3)])
def test_a_scale_of_rho_is_a_beta(text: str) -> None:
    genome = parse(text)
    (wanted,) = evaluate(genome.program(), {"rho": 4 * RHO}, {})
    (seen,) = evaluate(scaled(genome, 4.0).program(), {"rho": RHO}, {})
    program = read_loss(python(with_beta(genome)), ("rho",), ("beta",))
    (read,) = evaluate(program, {"rho": RHO}, {"beta": 4 * 0.05})
    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read, wanted, rtol=1e-9, atol=1e-9)


def test_the_conservative_loss_is_the_expected_one() -> None:
    dpo = metaopt.create("objective", "dpo", beta=0.05)
    (found,) = evaluate(parse(CDPO.format(share=0.3)).program(), {"rho": RHO}, {})
    torch.testing.assert_close(found, 0.7 * dpo({"rho": RHO}) + 0.3 * dpo({"rho": -RHO}))


def test_published_losses_are_tuned_with_all_their_numbers() -> None:
    found = published(TINY)
    assert {name: one.tried for name, one in found.items()} == {"dpo": 6, "lrml": 12, "cdpo": 6}
    task, rates = preference("t", data="preferences_noisy", seed=3), (0.1, 0.3)
    for name, numbers in (("dpo", [{}]), ("lrml", [{"tau": 0.05}, {"tau": 2.0}])):
        means = {}
        for own in numbers:
            for beta in (0.025, 0.05, 0.2):  # of registered objectives, in the place of scales
                made = metaopt.create("objective", name, beta=beta, **own)
                losses = train(task, [made], horizon=3, seeds=TINY.seeds, scales=(1.0,), rates=rates)[0, 0]
                means |= {
                    (beta / 0.05, rate, *own.values()): of.mean().item() for rate, of in zip(rates, losses, strict=True)
                }
        best = min(means, key=means.__getitem__)
        one = found[name]
        assert (one.scale, one.rate, *one.numbers.values()) == pytest.approx(best)
        assert one.selection == pytest.approx(means[best], abs=1e-5)
        assert one.edge  # all rates are, of two


def test_intervals_are_over_seeds_of_means_over_tasks() -> None:
    stage = Stage((Regime("a", {}), Regime("b", {"hidden": (3,)})), 1, (0, 1, 2))
    found = _of_tasks(stage, np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert found["mean"] == [2.0, 2.0, 2.0]
    assert found["linear policies"] == found["a"] and found["deeper policies"] == found["b"]
    assert found["a"] == pytest.approx([2.0, 2 - 4.3026527 / 3**0.5, 2 + 4.3026527 / 3**0.5])  # Student's t


def test_a_comparison_says_who_is_better(compared: Path) -> None:
    facts = json.loads((compared / "comparison.json").read_text())
    contestants = facts["contestants"]
    assert [*contestants] == ["dpo", "lrml", "cdpo", "mine"] and facts["best"]["found"] == "mine"
    mine, dpo = contestants["mine"], contestants["dpo"]
    assert mine["behind"]["dpo"]["mean"][0] == pytest.approx(mine["loss"]["mean"][0] - dpo["loss"]["mean"][0])
    assert mine["program"] == json.loads((compared / "report.json").read_text())["winner"]["program"]
    assert mine["beta"] == pytest.approx(0.05 * winner(compared).scale) and mine["tried"] == 144
    for picture in ("comparison.png", "curves.png"):
        assert (compared / picture).read_bytes().startswith(b"\x89PNG")


def test_every_seed_has_its_own_data() -> None:
    one = published(TINY)["dpo"]
    values = comparison._measured(TINY, [one])
    made = metaopt.create("objective", "dpo", beta=0.05 * one.scale)
    for k, seed in enumerate(TINY.seeds):
        task = preference("t", data="preferences_noisy", seed=3 + 1000 * (k + 1))
        alone = train(task, [made], horizon=3, seeds=(seed,), scales=(1.0,), rates=(one.rate,), split="test")
        assert values[0, 0, 0, k] == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("nothing",), "holds no search by proposers"),
        (("mine", "other/mine"), "searches are told apart by the names of their directories"),
        (("dpo",), "is called as a published loss is: dpo"),
        (("open",), "holds a search that has not ended"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    names: tuple[str, ...], wrong: str, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine", "other/mine", "dpo", "open"):
        shutil.copytree(compared, tmp_path / name)
    (tmp_path / "open" / "report.json").unlink()
    assert main(["discover", "compare", *(str(tmp_path / name) for name in names)]) != 0
    assert wrong in " ".join(capsys.readouterr().err.split())


# -- in a zoo ------------------------------------------------------------------------------------------------------------


def test_a_found_loss_is_an_entry(entry: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = winner(compared)
    (wanted,) = evaluate(one.genome.program(), {"rho": one.scale * RHO}, {})
    made = metaopt.create("objective", "zoo:mine")
    torch.testing.assert_close(made({"rho": RHO}), wanted, rtol=1e-9, atol=1e-9)
    twice = metaopt.create("objective", "zoo:mine", beta=0.1 * one.scale)
    torch.testing.assert_close(twice({"rho": RHO}), made({"rho": 2 * RHO}))
    assert preference(objective="zoo:mine", beta=0.1).objective.inputs == ("rho",)
    assert verify(entry) <= 1e-6
    card = read_card(entry)
    assert isinstance(card, LossCard)
    assert (card.seed, card.cost["trained_candidates"], card.hyperparameters) == (2, 4, {"beta": 0.05 * one.scale})
    assert card.tasks == ["preference(data='preferences_noisy', seed=3)"] and "preferences_noisy" in card.data
    assert card.command.splitlines() == [
        "metaopt discover loss --proposer mutator --budget 4 --batch 16 --seed 2 --out runs/mine",
        "metaopt discover compare runs/mine",
    ]
    assert card.lineage[-1].endswith("by start")
    assert hashlib.sha256((entry / "loss.txt").read_bytes()).hexdigest() == card.sha256
    assert main(["zoo", "show", "zoo:mine"]) == 0
    page = capsys.readouterr().out
    assert card.program in page and "| **mine** |" in page and "(comparison.png)" in page
    assert main(["zoo", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
    assert "loss" in row and "Apache-2.0" in row


def test_entries_are_of_what_they_are(entry: Path) -> None:
    with pytest.raises(ValueError, match="zoo:mine is an objective, no optimizer"):
        metaopt.optimizer("zoo:mine", [torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="zoo:orthogonal_fast is an optimizer, no objective"):
        metaopt.create("objective", "zoo:orthogonal_fast")
    with pytest.raises(TypeError, match="zoo:mine has no hyperparameter 'tau'; it has beta"):
        metaopt.create("objective", "zoo:mine", tau=0.1)


def _changed(entry: Path, text: str | None = None, **fields: Any) -> None:
    """Another text or card, and the page of it."""
    if text is not None:
        (entry / "loss.txt").write_text(text)
        fields["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (entry / CARD_FILE).write_text(json.dumps(json.loads((entry / CARD_FILE).read_text()) | fields))
    (entry / "README.md").write_text(render(read_card(entry)))


def test_another_loss_than_the_cards_is_refused(entry: Path, tmp_path: Path) -> None:
    other = "def loss(rho, beta):\n    return torch.square(rho - beta)\n"
    (entry / "loss.txt").write_text(other)
    with pytest.raises(ValueError, match="is not what its card describes: sha256"):
        load(entry)
    _changed(entry, other)
    with pytest.raises(ValueError, match="is not the loss on its card"):
        verify(entry)
    _changed(entry, other, program=other)
    with pytest.raises(ValueError, match="does not train as it did"):
        verify(entry)
    witness = tmp_path / "executed"
    harmful = f"open({str(witness)!r}, 'w')\ndef loss(rho, beta):\n    return rho * beta\n"
    _changed(entry, harmful, program=harmful)
    with pytest.raises(ValueError, match="one function"):
        load(entry)
    assert not witness.exists()
    with pytest.raises(ValueError, match=r"scores must hold .*; it lacks best"):
        _changed(entry, scores={"label": "mine"})


def test_a_loss_that_was_not_compared_is_not_published(compared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    with pytest.raises(ValueError, match="take part in no race; metaopt discover compare"):
        add(run, "mine", tmp_path / "zoo", race=tmp_path, **TOLD)
    report = json.loads((run / "report.json").read_text())
    report["winner"]["program"] = LOSS_SEEDS["slic"]
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is not of the search's winner"):
        add(run, "mine", tmp_path / "zoo", **TOLD)
    (run / "comparison.json").unlink()
    with pytest.raises(ValueError, match=r"metaopt discover compare compared: it holds no comparison\.json"):
        add(run, "mine", tmp_path / "zoo", **TOLD)
