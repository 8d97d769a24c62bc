"""A real model on this machine searches for losses, end to end. Of quality nothing is asked: it has 135M parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaopt.search import Archive
from metaopt_llm.local_model import packaged_model
from metaopt_symbolic.genome import LOSS_SEEDS
from metaopt_symbolic.losses.candidate import LossValidator
from metaopt_symbolic.losses.judge import Judge, search_stages
from metaopt_symbolic.proposals.loop import Loop, LoopConfig
from metaopt_symbolic.proposals.proposers import proposing

pytest.importorskip("xllamacpp", reason="no wheel of llama.cpp: pip install 'torch-metaopt[local-llm]'")
try:
    packaged_model()
except ValueError as absent:
    pytest.skip(f"no model: {absent}", allow_module_level=True)


def test_a_local_model_proposes_losses_that_train_policies(tmp_path: Path) -> None:
    validator, judge = LossValidator(), Judge(search_stages())
    config = LoopConfig("Learn from preferences.", ("local",), judge.describe(), LOSS_SEEDS, batch=4, ahead=True)
    with proposing(["local"], validator, tmp_path, options={"examples": 2, "repairs": 0}) as (proposer, _):
        loop = Loop(config, judge, proposer, validator, tmp_path)
        while loop.counts.proposed < 24:
            loop.run(evaluations=loop.counts.evaluated + 4)
    assert loop.counts.failed == 0
    assert (loop.counts.proposed - loop.counts.invalid) / loop.counts.proposed >= 0.9
    archived = [e for e in Archive(tmp_path, LossValidator.study, None).elites() if e.facts.get("proposer") == "local"]
    assert len(archived) == loop.counts.evaluated
    assert all("F." in e.text or "torch." in e.text for e in archived)
    assert min(e.score for e in archived) < 1, "some of them teach a policy something"
