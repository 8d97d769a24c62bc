"""Two processes share a search for losses, and one of them is killed: nothing is lost, no answer is paid for twice."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chat_server import Step, proposes, serving

from metaopt.search import Archive

BUDGET, BATCH = 6, 2
SEARCH = """
import sys
from metaopt.cli import main
from metaopt_symbolic.losses import judge
from metaopt_symbolic.losses.judge import Regime, Stage

tiny = Stage((Regime("noisy", {"data": "preferences_noisy"}),), 2, (0,))
judge.search_stages, judge.selection_stage = lambda: (tiny,), lambda: tiny
sys.exit(main(["discover", "loss", *sys.argv[1:]]))
"""


def worker(number: int, url: str, out: Path) -> subprocess.Popen[bytes]:
    settings = [f"base_url={url}", "model=tiny", "key_env=", "dialect=other"]
    options = {"--proposer": "openai", "--budget": BUDGET, "--batch": BATCH, "--worker": number, "--out": out}
    given = [str(part) for pair in options.items() for part in pair]
    given += [text for setting in settings for text in ("--set", setting)]
    command = [sys.executable, "-c", SEARCH, *given]
    return subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def entries(out: Path, number: int, kind: str) -> list[dict[str, Any]]:
    """What a worker has asked (``ask``), or been answered and paid for (``answer``); a line that is being written is none."""
    ledger = out / f"ledger-{number}.jsonl"
    lines = ledger.read_text().splitlines(keepends=True) if ledger.is_file() else []
    return [entry for line in lines if line.endswith("\n") for entry in [json.loads(line)] if kind in entry]


def test_a_killed_process_loses_nothing_and_the_search_is_completed(tmp_path: Path) -> None:
    def script() -> Iterator[Step]:
        for k in itertools.count():
            yield proposes(f"def loss(rho, beta):\n    return F.softplus({k}.5 - beta * rho)", f"soft_{k}")

    with serving(script()) as running:
        first, killed = worker(0, running.url, tmp_path), worker(1, running.url, tmp_path)
        end = time.monotonic() + 120
        while len(entries(tmp_path, 1, "answer")) <= BATCH and time.monotonic() < end:
            time.sleep(0.005)
        killed.kill()
        killed.communicate()
        paid = entries(tmp_path, 1, "answer")
        assert len(paid) > BATCH
        again = worker(1, running.url, tmp_path)
        for process in (first, again):
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said.decode()
    candidates = [json.loads((tmp_path / f"worker-{k}.json").read_text())["candidates"] for k in (0, 1)]
    own = [{c["name"] for c in each if (c["proposal"] or {}).get("proposer") == "openai"} for each in candidates]
    assert [len(names) for names in own] == [BUDGET, BUDGET] and not own[0] & own[1]
    assert entries(tmp_path, 1, "answer")[: len(paid)] == paid, "what was paid for before the kill is kept"
    assert {json.loads(entry["reply"]["text"])["name"] for entry in paid} <= own[1], "and was trained with"
    asked = [[entry["key"] for entry in entries(tmp_path, k, "ask")] for k in (0, 1)]
    assert len(running.seen) <= sum(map(len, asked)), "a call is written down before it is made"
    assert [len({*keys}) for keys in asked] == [len(entries(tmp_path, k, "answer")) for k in (0, 1)] == [BUDGET, BUDGET]
    assert len(asked[0]) == BUDGET
    assert len(asked[1]) <= BUDGET + BATCH, "again only what was under way at the kill"
    archived = {elite.facts["name"] for elite in Archive(tmp_path, "discover-loss", None).elites()}
    assert own[0] | own[1] <= archived
