"""Attacks on the search: the language refuses them, and the sandbox of free Python contains what they do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attack_cases import ATTACKS, KNOWN, OWN, Attack

from metaopt import registry
from metaopt.objective import LOG_PROBABILITIES, Objective
from metaopt.program import ProgramObjective, ProgramTextError, evaluate, read_loss
from metaopt.unroll import start, unroll
from metaopt_llm.sandbox import CandidateError, FreeLoss, Level, Limits, Sandbox, SandboxError
from metaopt_tasks.preference import preference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="free Python runs on Linux only")

TOKEN = "token-of-the-user-4711"
SECONDS = 1.0
HONEST = "def loss(self, rho, beta):\n    return -F.logsigmoid(self.beta * rho)\n"
IDS = [attack.name for attack in ATTACKS]


def test_there_are_forty_known_attacks_and_twenty_of_our_own() -> None:
    assert len(KNOWN) == 40
    assert len(OWN) >= 20


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_the_language_refuses(attack: Attack, prey: Prey) -> None:
    started = time.process_time()
    if attack.defused:
        evaluate(read_loss(prey.text(attack), ["rho"], ["beta"]), {"rho": torch.ones(2)}, {"beta": 1.0})
    else:
        with pytest.raises(ProgramTextError):
            read_loss(prey.text(attack), ["rho"], ["beta"])
    assert time.process_time() - started < 1.0
    prey.require_unharmed()


# -- free Python ---------------------------------------------------------------------------------------------------------


@dataclass
class Prey:
    """What the attacks are after."""

    secret: Path
    canary: Path
    server: socket.socket
    weights: torch.Tensor

    def text(self, attack: Attack) -> str:
        """With the paths and numbers of this test."""
        named = {"SECRET": self.secret, "CANARY": self.canary, "PORT": self.server.getsockname()[1], "PID": os.getpid()}
        text = attack.text
        for name, value in named.items():
            text = text.replace(name, str(value))
        return text

    def require_unharmed(self) -> None:
        assert list(self.canary.iterdir()) == []
        with pytest.raises(BlockingIOError):
            self.server.accept()
        assert torch.equal(self.weights, torch.ones(3))
        assert self.weights.grad is None or self.weights.grad.isfinite().all()


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prey]:
    secret = tmp_path_factory.mktemp("secret") / "key"
    secret.write_text(TOKEN)
    secret.chmod(0o644)
    canary = tmp_path_factory.mktemp("canary")
    canary.chmod(0o777)
    for directory in {*secret.parents, *canary.parents}:  # not where the files are shall save them
        if directory.stat().st_uid == os.getuid() and directory.is_relative_to(tmp_path_factory.getbasetemp().parent):
            directory.chmod(directory.stat().st_mode | 0o055)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield Prey(secret, canary, server, torch.ones(3, requires_grad=True))


LAYERS = {
    "full": "",
    "no seccomp": "import metaopt_llm.sandbox.confinement as c; c.seccomp = None; ",
    "no namespaces": "import metaopt_llm.sandbox.server as s; s.enter_namespaces = lambda: False; ",
    "rlimits only": "import metaopt_llm.sandbox.confinement as c; c.seccomp = None; "
    "import metaopt_llm.sandbox.server as s; s.enter_namespaces = lambda: False; ",
}
"""What takes layers away, in the server's process."""


@contextmanager
def without(layers: str) -> Iterator[Sandbox]:
    """A sandbox, at whatever level it then reaches."""

    class Weaker(Sandbox):
        _START = Sandbox._START.replace("from metaopt_llm", f"{LAYERS[layers]}from metaopt_llm", 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("API_KEY", TOKEN)
        with Weaker(Limits(seconds=SECONDS, cpu_seconds=10, megabytes=256), Level.LIMITS) as made:
            with made.candidate(HONEST, ["rho"], {"beta": 0.5}) as candidate:
                made.least = candidate.level
            yield made


@pytest.fixture(scope="module")
def best() -> Iterator[Sandbox]:
    with without("full") as made:
        yield made


@pytest.fixture(scope="module", params=[level for level in LAYERS if level != "full"])
def confined(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with without(request.param) as made:
        if str(made.least) != request.param:
            pytest.skip(f"this machine confines to level {str(made.least)!r}, not {request.param!r}")
        yield made


def run(confined: Sandbox, text: str, weights: torch.Tensor) -> str:
    """Two steps of training by a candidate; what went wrong."""
    weights.grad = None
    try:
        with confined.candidate(text, ["rho"], {"beta": 0.5}) as candidate:
            loss = FreeLoss(candidate)
            for _ in range(2):
                loss({"rho": weights * torch.tensor([1.0, -2.0, 0.5])}).mean().backward()
    except CandidateError as error:
        return str(error)
    return ""


def runs(pid: int) -> bool:
    """Also one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, last = {pid}, 0
    while len(found) != last:
        last = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def require_honest_work(confined: Sandbox) -> None:
    rho = torch.tensor([-3.0, 0.0, 5.0], requires_grad=True)
    limits, confined.limits = confined.limits, Limits(seconds=60)  # however busy the machine is
    try:
        with confined.candidate(HONEST, ["rho"], {"beta": 0.5}) as candidate:
            value = FreeLoss(candidate)({"rho": rho})
            value.mean().backward()
    finally:
        confined.limits = limits
    expected = torch.tensor([-3.0, 0.0, 5.0], requires_grad=True)
    F.logsigmoid(0.5 * expected).mul(-1).mean().backward()
    torch.testing.assert_close(value, -F.logsigmoid(0.5 * expected))
    torch.testing.assert_close(rho.grad, expected.grad)


def require_contained(confined: Sandbox, prey: Prey, attack: Attack) -> None:
    before = descendants(confined._server.pid)
    started = time.monotonic()
    outcome = run(confined, prey.text(attack), prey.weights)
    assert time.monotonic() - started < 20 * SECONDS, attack.name  # a busy machine forks slowly
    if attack.slow:
        assert "longer than" in outcome or "something else" in outcome
    assert "PWNED" not in outcome, attack.name
    assert TOKEN not in outcome, attack.name
    assert len(outcome) < 500
    prey.require_unharmed()
    assert descendants(confined._server.pid) == before


def met(level: Level, attack: Attack) -> bool:
    """Limits alone do not hide other processes of the same user; that is why they are not enough by default."""
    return not (attack.others and level == Level.LIMITS)


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_free_python_is_contained(best: Sandbox, prey: Prey, attack: Attack) -> None:
    if not met(best.least, attack):
        pytest.skip(f"this machine confines to level {str(best.least)!r}, which is refused by default")
    require_contained(best, prey, attack)
    require_honest_work(best)


def test_what_reaches_out_is_contained_at_each_level(confined: Sandbox, prey: Prey) -> None:
    for attack in ATTACKS:
        if attack.reaches_out and met(confined.least, attack):
            require_contained(confined, prey, attack)
    require_honest_work(confined)


def test_losses_and_gradients_that_a_candidate_writes_itself_are_only_numbers(best: Sandbox, prey: Prey) -> None:
    spoof = """
def loss(rho, beta):
    import os, struct
    for number, count in ((2, 3), (3, 6)):
        os.write(4, struct.pack("<BIQ", 4, number, 4 * count) + struct.pack(f"<{count}f", *[7.0] * count))
    return rho
"""
    with best.candidate(spoof, ["rho"], {"beta": 0.5}) as candidate:
        loss = FreeLoss(candidate)({"rho": prey.weights * 1})
        assert loss.tolist() == [7.0, 7.0, 7.0]
        prey.weights.grad = None
        loss.sum().backward()
        assert prey.weights.grad is not None
        assert prey.weights.grad.tolist() == [7.0, 7.0, 7.0]
        with pytest.raises(CandidateError, match="something else"):
            FreeLoss(candidate)({"rho": prey.weights * 1})
    prey.require_unharmed()


def test_a_candidate_that_failed_is_asked_no_more(best: Sandbox) -> None:
    with best.candidate("def loss(rho): return rho / 0", ["rho"], {}) as candidate:
        with pytest.raises(CandidateError, match="not finite"):
            candidate.evaluate([torch.ones(2)])
        with pytest.raises(CandidateError, match="cannot be asked"):
            candidate.evaluate([torch.ones(2)])


def test_a_second_candidate_waits_for_the_first(best: Sandbox) -> None:
    with (
        best.candidate(HONEST, ["rho"], {"beta": 1.0}),
        pytest.raises(SandboxError, match="one candidate at a time"),
    ):
        require_honest_work(best)


def test_a_server_that_was_killed_is_replaced(best: Sandbox) -> None:
    os.killpg(best._server.pid, 9)
    require_honest_work(best)


def test_too_low_a_level_is_refused(confined: Sandbox) -> None:
    level, confined.least = confined.least, Level.FULL
    with pytest.raises(SandboxError, match=f"level '{level}' here, and 'full' is asked for"):
        require_honest_work(confined)
    confined.least = level
    require_honest_work(confined)


def test_nothing_outlives_a_search_that_is_killed() -> None:
    search = """
import threading, os, torch
from metaopt_llm.sandbox import Level, Limits, Sandbox
with Sandbox(Limits(seconds=600), Level.LIMITS) as sandbox:
    with sandbox.candidate("def loss(rho):\\n    while True: pass", ["rho"], {}) as candidate:
        threading.Timer(1.0, lambda: (print("running", flush=True), input(), os.kill(os.getpid(), 9))).start()
        candidate.evaluate([torch.zeros(1)])
"""
    with subprocess.Popen(
        [sys.executable, "-c", search], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        started = descendants(process.pid)
        assert len(started) >= 2  # the server and the candidate
        process.communicate("\n")
    assert process.returncode == -9
    deadline = time.monotonic() + 60
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_copies_under_vmap_have_their_own_losses_and_gradients(best: Sandbox) -> None:
    text = "def loss(rho, beta):\n    return torch.exp(-beta * rho) * rho.std()\n"
    rho = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4) ** 3

    def reference(x: torch.Tensor) -> torch.Tensor:
        return (torch.exp(-0.5 * x) * x.std() * torch.arange(4.0)).sum()

    with best.candidate(text, ["rho"], {"beta": 0.5}) as candidate:
        loss = FreeLoss(candidate)
        made = torch.vmap(torch.func.grad(lambda x: (loss({"rho": x}) * torch.arange(4.0)).sum()))(rho)
    torch.testing.assert_close(made, torch.vmap(torch.func.grad(reference))(rho), rtol=1e-12, atol=1e-12)


def test_a_free_loss_trains_a_task_as_the_same_text_does_in_the_language(best: Sandbox) -> None:
    text = """
def loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    rho = policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)
    return -F.logsigmoid(self.beta * rho)
"""
    rule = registry.create("optimizer", "adamw", lr=0.02)

    def losses(objective: Objective) -> torch.Tensor:
        task = preference(objective=objective)
        return unroll(task, rule, start(task, rule, [0, 1]), 5)[0]

    with best.candidate(text, LOG_PROBABILITIES, {"beta": 0.5}) as candidate:
        made = losses(FreeLoss(candidate))
    program = read_loss(text, LOG_PROBABILITIES, ["beta"])
    # both are float32, and log-sigmoid is computed in two ways
    expected = losses(ProgramObjective(code=program, numbers=(("beta", 0.5),)))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
