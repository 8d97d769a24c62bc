"""Time and memory of one hypergradient: every method beside a raw autograd unroll and the peers that are installed.

    python benchmarks/hypergradient.py [--rounds 3] [--only agreement cleaning ridge growth] [--out FILE.json]

One thread, processor time, methods interleaved round by round, each round in another order by chance. Seconds are the minimum;
ratios to the raw unroll are the median of those within a round, which other load on the machine moves least, with an interval
of 95 % (from six rounds on; below, all there is). Memory is the peak of what tensors hold above what was there before, counted
operation by operation in a run of its own. Problems: data hyper-cleaning (softmax regression, 5,000 x 784 samples with a weight
each, 2,000 for validation, T = 100 steps on all of them) and ridge regression with 1,000 penalties (2,000 x 1,000, T = 100).
``growth`` is a small problem at T = 100 to 10,000; ``agreement`` a ridge regression whose hypergradient has a formula. Peers,
where installed: TorchOpt, higher, Betty, hypergrad.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import random
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metaopt.rule import ElementwiseRule
from metaopt.space import learning_rate
from metaopt.tune import METHODS, Hypers, Inner, hypergradient

GROWTH = (100, 1000, 10000)
PARTS = ("agreement", "cleaning", "ridge", "growth")
Loss = Callable[[Tensor, Tensor], Tensor]


class GradientDescent(ElementwiseRule):
    """``w - lr * g``, which all contenders train with; `metaopt_classic.sgd.SGD` holds a buffer for momentum as well."""

    lr: float = learning_rate(0.1, search=(1e-3, 10.0))

    def elementwise(self, param: Any, grad: Any, lr: Any) -> Any:
        """See the class."""
        return param - lr * grad


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        loss, outer: of weights and hypers; of weights.
        start, hypers: tensors.
        rate, steps: of gradient descent.
    """

    loss: Loss
    outer: Callable[[Tensor], Tensor]
    start: Tensor
    hypers: Tensor
    rate: float
    steps: int

    @cached_property
    def inner(self) -> Inner:
        return Inner.of_rule(
            lambda p, h, _: self.loss(p["w"], h["l"]), GradientDescent(lr=self.rate), {"w": self.start}, self.steps
        )


def cleaning(rows: int = 5000, inputs: int = 784, steps: int = 100) -> Problem:
    """Weights of samples, of which half have a random label."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, inputs, generator=generator) / inputs**0.5

    def sample(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        return centres[labels] + torch.randn(count, inputs, generator=generator) / inputs**0.5, labels

    (x, y), (xv, yv) = sample(rows), sample(max(rows * 2 // 5, 50))
    y[: rows // 2] = torch.randint(10, (rows // 2,), generator=generator)
    return Problem(
        lambda w, h: (torch.sigmoid(h) * F.cross_entropy(x @ w, y, reduction="none")).mean(),
        lambda w: F.cross_entropy(xv @ w, yv), torch.zeros(inputs, 10), torch.zeros(rows), 1.0, steps,
    )  # fmt: skip


def ridge() -> Problem:
    """A log-penalty per weight."""
    generator = torch.Generator().manual_seed(0)
    x, xv = torch.randn(2000, 1000, generator=generator), torch.randn(500, 1000, generator=generator)
    truth = torch.randn(1000, generator=generator) / 30
    y, yv = (rows @ truth + torch.randn(len(rows), generator=generator) for rows in (x, xv))
    return Problem(
        lambda w, h: ((x @ w - y) ** 2).mean() / 2 + (h.exp() * w**2).sum() / 2,
        lambda w: ((xv @ w - yv) ** 2).mean() / 2, torch.zeros(1000), torch.full((1000,), -1.0), 0.3, 100,
    )  # fmt: skip


PROBLEMS: dict[str, tuple[Callable[[], Problem], int]] = {"cleaning": (cleaning, 1), "ridge": (ridge, 20)}
"""How to make it, and how many times the rounds: runs of the second are as much shorter."""


def raw(problem: Problem) -> Tensor:
    """What one writes by hand."""
    hypers = problem.hypers.clone().requires_grad_()
    w = problem.start.clone().requires_grad_()
    for _ in range(problem.steps):
        (grad,) = torch.autograd.grad(problem.loss(w, hypers), w, create_graph=True)
        w = w - problem.rate * grad
    return torch.autograd.grad(problem.outer(w), hypers)[0]


def trained(problem: Problem) -> Tensor:
    """The training alone."""
    w = problem.start
    for _ in range(problem.steps):
        leaf = w.detach().requires_grad_()
        (grad,) = torch.autograd.grad(problem.loss(leaf, problem.hypers), leaf)
        w = w - problem.rate * grad
    return w


def torchopt(problem: Problem) -> Tensor:
    import torchopt as peer

    hypers = problem.hypers.clone().requires_grad_()
    params: Any = (problem.start.clone().requires_grad_(),)
    optimizer = peer.sgd(lr=problem.rate)
    state = optimizer.init(params)
    for _ in range(problem.steps):
        grads = torch.autograd.grad(problem.loss(params[0], hypers), params, create_graph=True)
        updates, state = optimizer.update(grads, state, inplace=False)
        params = peer.apply_updates(params, updates, inplace=False)
    return torch.autograd.grad(problem.outer(params[0]), hypers)[0]


def higher(problem: Problem) -> Tensor:
    import higher as peer

    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(problem.start.clone())

        def forward(self) -> Tensor:
            return self.w * 1

    hypers = problem.hypers.clone().requires_grad_()
    module = Weights()
    optimizer = torch.optim.SGD(module.parameters(), lr=problem.rate)
    with peer.innerloop_ctx(module, optimizer) as (functional, differentiable):
        for _ in range(problem.steps):
            differentiable.step(problem.loss(functional(), hypers))
        return torch.autograd.grad(problem.outer(functional()), hypers)[0]


PRODUCTS = 20
"""Hessian products of the peers' inverses, as many as ours make by default."""


def betty(kind: str) -> Callable[[Problem], Tensor]:
    """Two levels of Betty's engine until the first outer step, which subtracts the hypergradient."""

    def run(problem: Problem) -> Tensor:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Values(torch.nn.Module):
            def __init__(self, values: Tensor) -> None:
                super().__init__()
                self.values = torch.nn.Parameter(values.clone())

            def forward(self) -> Tensor:
                return self.values * 1

        class Level(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                if self.name == "outer":
                    return problem.outer(self.inner())
                return problem.loss(self.module(), self.outer())

        def level(name: str, values: Tensor, rate: float, config: Any) -> Any:
            module = Values(values)
            optimizer = torch.optim.SGD(module.parameters(), lr=rate)
            nothing = [(torch.zeros(1),)]
            return Level(
                name=name, config=config, module=module, optimizer=optimizer, train_data_loader=nothing, device="cpu"
            )

        options = {
            "cg": {"cg_iterations": PRODUCTS},
            "neumann": {"neumann_iterations": PRODUCTS, "neumann_alpha": problem.rate},
        }
        outer = level("outer", problem.hypers, 1.0, Config(retain_graph=True))
        inner = level(
            "inner", problem.start, problem.rate, Config(type=kind, unroll_steps=problem.steps, **options[kind])
        )
        depends = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
        Engine([outer, inner], EngineConfig(train_iters=problem.steps), depends).run()
        return problem.hypers - outer.module.values.detach()

    return run


def hypergrad(kind: str) -> Callable[[Problem], Tensor]:
    """Training, and hypergrad's inverse."""

    def run(problem: Problem) -> Tensor:
        from hypergrad import approx_hypergrad as peer

        (grad,) = getattr(peer, kind)(
            lambda w, h: problem.loss(w[0], h[0]), lambda w, h: problem.outer(w[0]), (trained(problem),), (problem.hypers,),
            PRODUCTS, problem.rate,
        )  # fmt: skip
        return grad

    return run


PEERS = {
    "TorchOpt unroll": ("torchopt", torchopt),
    "higher unroll": ("higher", higher),
    "Betty cg": ("betty", betty("cg")),
    "Betty neumann": ("betty", betty("neumann")),
    "hypergrad cg": ("hypergrad", hypergrad("conjugate_gradient")),
    "hypergrad neumann": ("hypergrad", hypergrad("neumann")),
}


def ours(method: str, **options: Any) -> Callable[[Problem], Tensor]:
    def run(problem: Problem) -> Tensor:
        def outer(params: dict[str, Tensor], hypers: Hypers) -> Tensor:
            return problem.outer(params["w"])

        return hypergradient(problem.inner, outer, {"l": problem.hypers}, method, **options).grads["l"]

    return run


def contenders() -> dict[str, Callable[[Problem], Tensor]]:
    found = {"training alone": trained, "raw autograd unroll": raw}
    for name, (module, run) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        found[name] = run
    return found | {
        "unroll": ours("unroll"),
        "checkpoint": ours("checkpoint"),
        "replay": ours("replay"),
        "replay, graph=1": ours("replay", graph=1),
        "replay, states=8, graph=1": ours("replay", states=8, graph=1),
        "truncated, window=10": ours("truncated"),
        "cg": ours("cg"),
        "neumann": ours("neumann"),
        "nystrom": ours("nystrom"),
        "identity": ours("identity"),
        "darts": ours("darts"),
        "sama": ours("sama"),
        "penalty, steps=20": ours("penalty", steps=20),
    }


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations inside make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                storage = leaf.untyped_storage()
                at = storage.data_ptr()
                if at and at not in self._sizes:
                    self._sizes[at] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, at)
        return result

    def _free(self, at: int) -> None:
        self.now -= self._sizes.pop(at)


def peak(run: Callable[[], object]) -> int | None:
    """Bytes at the peak; None of what runs inside `torch.func`, whose tensors show no storage."""
    try:
        with PeakMemory() as counted:
            run()
    except RuntimeError:
        return None
    return counted.peak


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Between the k-th smallest and the k-th largest, k as large as 95 % allow: whatever the distribution is."""
    k = max(int(stats.binom.ppf(0.025, len(values), 0.5)) - 1, 0)
    ordered = sorted(values)
    return ordered[k], ordered[-1 - k]


def compare(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Processor seconds, their ratio to the raw unroll's, peak bytes, and agreement with the raw unroll, of every contender."""
    found = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in found}
    results = {}
    order, chance = list(found), random.Random(0)
    gc.disable()  # as timeit does: or one pays for what others leave
    for _ in range(rounds):
        chance.shuffle(order)  # else each would always follow the same one, which leaves caches as it does
        for name in order:
            began = time.process_time()
            results[name] = found[name](problem)
            seconds[name].append(time.process_time() - began)
        gc.collect()
    gc.enable()
    expected, reference = results["raw autograd unroll"], seconds["raw autograd unroll"]
    rows = []
    for name, run in found.items():
        ratios = [own / raw for own, raw in zip(seconds[name], reference, strict=True)]
        row = {
            "method": name,
            "seconds": min(seconds[name]),
            "of_raw": statistics.median(ratios),
            "of_raw_interval": interval_of_median(ratios),
            "bytes": peak(lambda run=run: run(problem)),
        }
        if results[name].shape == expected.shape:
            row["error"] = float((results[name] - expected).norm() / expected.norm())
            row["cosine"] = float(F.cosine_similarity(results[name], expected, dim=0))
        rows.append(row)
    return rows


def growth() -> list[dict[str, Any]]:
    """Peak bytes at growing T, of a problem of 100 samples of 20 numbers."""
    methods = {name: ours(name) for name in ("unroll", "checkpoint", "replay", "cg")}
    methods["replay, states=8, graph=1"] = ours("replay", states=8, graph=1)
    rows = []
    for problem in (cleaning(100, 20, steps) for steps in GROWTH):
        rows.append({"steps": problem.steps} | {name: peak(lambda: run(problem)) for name, run in methods.items()})  # noqa: B023
    return rows


SUITED: dict[str, dict[str, Any]] = {
    "truncated": {"window": 30},
    "neumann": {"terms": 60},
    "fixed_point": {"iterations": 60},
    "nystrom": {"rank": 30, "rho": 1e-3},
    "penalty": {"strength": 1000.0},
    "es": {"pairs": 1000, "copies": 250},
}
"""Options with which a method comes near on `agreement`'s problem."""


def agreement() -> list[dict[str, Any]]:
    """Every method against the formula: ridge regression with 30 penalties in float64, trained to its optimum."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y, xv, yv = draw(200, 30), draw(200), draw(100, 30), draw(100)
    logs = torch.full((30,), -2.0, dtype=torch.float64)
    problem = Problem(
        lambda w, h: ((x @ w - y) ** 2).mean() / 2 + (h.exp() * w**2).sum() / 2,
        lambda w: ((xv @ w - yv) ** 2).mean() / 2, torch.zeros(30, dtype=torch.float64), logs, 0.5, 100,
    )  # fmt: skip
    hessian = x.mT @ x / 200 + torch.diag(logs.exp())
    w = torch.linalg.solve(hessian, x.mT @ y / 200)
    exact = -logs.exp() * w * torch.linalg.solve(hessian, xv.mT @ (xv @ w - yv) / 100)
    rows = []
    for name in METHODS:
        for options in [{}, *([SUITED[name]] if name in SUITED else [])]:
            found = ours(name, **options)(problem)
            error = float((found - exact).norm() / exact.norm())
            cosine = float(F.cosine_similarity(found, exact, dim=0))
            rows.append({"method": name, "options": options, "error": error, "cosine": cosine})
    return rows


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/bilevel.md."""
    agreed = ["| method | relative error | cosine |", "|---|---|---|"]
    for row in results["agreement"]:
        options = "".join(f", {name}={value:g}" for name, value in row["options"].items())
        agreed.append(f"| `{row['method']}`{options} | {row['error']:.0e} | {row['cosine']:.3f} |")
    measured = {}
    for part in PROBLEMS:
        lines = ["| | CPU s | of raw | peak MB | of raw |", "|---|---|---|---|---|"]
        raw_row = next(row for row in results[part] if row["method"] == "raw autograd unroll")
        for row in results[part]:
            lines.append(
                f"| {row['method']} | {row['seconds']:.3g} | {_ratio(row)} "
                f"| {_megabytes(row, 2)} | {_share(row, raw_row, 2)} |"
            )
        measured[part] = "\n".join(lines)
    names = [name for name in results["growth"][0] if name != "steps"]
    grown = [f"| T | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in results["growth"]:
        grown.append(f"| {row['steps']:,} | {' | '.join(f'{row[name] / 1e3:,.0f}' for name in names)} |")
    return {"agreement": "\n".join(agreed), **measured, "growth": "\n".join(grown)}


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["of_raw_interval"]
    return f"{row['of_raw']:.2f} [{low:.2f}, {high:.2f}]"


def _megabytes(row: dict[str, Any], digits: int) -> str:
    return "?" if row["bytes"] is None else f"{row['bytes'] / 1e6:.{digits}f}"


def _share(row: dict[str, Any], of: dict[str, Any], digits: int) -> str:
    return "?" if row["bytes"] is None else f"{row['bytes'] / of['bytes']:.{digits}f}"


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    reference = next(row for row in rows if row["method"] == "raw autograd unroll")
    table = Table("", "CPU s", "of raw", "peak MB", "of raw", "error to raw", "cosine", title=title)
    for row in rows:
        table.add_row(
            row["method"], f"{row['seconds']:.3f}", _ratio(row),
            _megabytes(row, 2), _share(row, reference, 3),
            f"{row['error']:.1e}" if "error" in row else "", f"{row['cosine']:.3f}" if "cosine" in row else "",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hypergradient.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # Betty tells each run
    warnings.simplefilter("ignore", FutureWarning)  # hypergrad uses functorch
    console = Console(width=120)
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for part in arguments.only:
        if part in PROBLEMS:
            make, times = PROBLEMS[part]
            report[part] = compare(make(), times * arguments.rounds)
            show(console, part, report[part])
        else:
            report[part] = agreement() if part == "agreement" else growth()
            for row in report[part]:
                console.print(row)
        report["machine"] = machine()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
