r"""The outer loop of a bilevel problem: train, take the hypergradient, move the hyperparameters, again.

.. math::
    \lambda_{k+1} = \text{rule}(\lambda_k,\; \nabla_\lambda F(\lambda_k))

A *cold* start trains anew at each outer step: the result is that of a run from the problem's own initial parameters. A *warm*
start goes on from where the step before ended, which is cheaper; but then hyperparameters and parameters are optimised
together, and where the inner problem has many solutions the parameters remember all hyperparameters there ever were
(Vicol et al. 2022, arXiv:2212.14032), so what such a run finds need not be worth as much to a fresh run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.utils import get_total_norm

from metaopt import tree
from metaopt.files import write_atomic
from metaopt.interruptions import interruptions
from metaopt.meta.checkpoint import load_checkpoint, save_checkpoint
from metaopt.resolve import resolve_rule
from metaopt.rule import Context, Params, UpdateRule, infer_info
from metaopt.tune import METHODS, Hypers, Inner, hypergradient, tolerances
from metaopt.tune.hypergradient import stationarity
from metaopt.tune.problem import BilevelProblem

CHECKPOINT_FILE, CONFIG_FILE, RESULT_FILE, HYPERS_FILE = "checkpoint.pt", "config.json", "result.json", "hypers.pt"
STARTS = ("cold", "warm")

Line = dict[str, Any]
"""Of one outer step: ``step``, ``outer`` (the objective), ``holdout`` (or None), ``gradient_norm``, ``diagnostics``."""


class Diverged(ValueError):
    """A hypergradient is not finite."""


@dataclass(frozen=True)
class OuterConfig:
    """Settings of an outer loop; together with the problem they determine every bit of it.

    Attributes:
        method: of the hypergradient, a name in `metaopt.tune.METHODS`, or "auto".
        method_options: its options.
        steps: outer steps.
        rule, lr, rule_options: what moves the hyperparameters; any registered rule.
        start: "cold" or "warm"; see the module.
        tolerance: with a number, the inner run is repeated from where it ended until the norm of the inner loss's gradient is
            below ``tolerance * tolerance_decay ** step``, and the hypergradient is taken there: HOAG, whose errors must be
            summable (Pedregosa 2016, arXiv:1602.02355). For implicit methods, and problems whose `Inner` has a ``loss``.
        tolerance_decay: in (0, 1).
        most_runs: of the inner run at one outer step, where there is a tolerance.
        seed: of the initial hyperparameters.
        checkpoint_every: outer steps between checkpoints.
    """

    method: str = "auto"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 50
    rule: str = "adam"
    lr: float = 0.1
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    start: str = "cold"
    tolerance: float | None = None
    tolerance_decay: float = 0.9
    most_runs: int = 100
    seed: int = 0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")
        for name in ("steps", "most_runs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}; 0.1 is the default")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}; None takes the inner run as it is")
        if self.tolerance is not None and self.method != "auto":
            method = METHODS[self.method]
            if not method.implicit and "loss" not in method.needs:
                raise ValueError(
                    f"a tolerance asks for a solution, and {self.method!r} differentiates the run; leave it out, or take an "
                    f"implicit method such as 'cg'"
                )
        if not 0 < self.tolerance_decay < 1:
            raise ValueError(f"tolerance_decay must be in (0, 1), got {self.tolerance_decay}: errors must be summable")


@dataclass(frozen=True)
class OuterResult:
    """What an outer loop found.

    Attributes:
        hypers: those of the step with the lowest holdout loss; the last ones where the problem has no holdout.
        params: what the inner run ended with at ``hypers``, in this loop.
        step: whose hyperparameters they are: after so many outer steps.
        outer, holdout: the objective on the outer split and on the third one, at ``hypers``.
        last: the hyperparameters after all steps.
        history: one line per outer step, and one for ``last``.
        report: what the problem measures of ``params`` and ``hypers``.
    """

    hypers: Hypers
    params: Params
    step: int
    outer: float
    holdout: float | None
    last: Hypers
    history: list[Line]
    report: dict[str, float]

    @property
    def gap(self) -> float | None:
        """How much worse the kept hyperparameters are on the third split: how far they overfit the outer one."""
        return None if self.holdout is None else self.holdout - self.outer

    @property
    def last_gap(self) -> float | None:
        """The same after all steps."""
        line = self.history[-1]
        return None if line["holdout"] is None else line["holdout"] - line["outer"]


def solve(
    problem: BilevelProblem,
    config: OuterConfig,
    directory: Path | str | None = None,
    *,
    on_step: Callable[[Line], None] | None = None,
) -> OuterResult:
    """Run the outer loop, or go on with what ``directory`` holds.

    A loop that was killed goes on from its last checkpoint and ends with the same bits as an unbroken one. One that has ended
    goes on if ``config.steps`` are more now, unless its rule needs to know the last step beforehand.

    Args:
        problem: a dataclass whose ``repr`` tells its settings, by which a resumed run knows it.
        config: what to do.
        directory: where ``config.json``, ``checkpoint.pt`` and in the end ``result.json`` and ``hypers.pt`` go; None writes
            nothing.
        on_step: is told each line of the history; what it raises ends the loop.

    Raises:
        TypeError: ``problem`` is none.
        ValueError: ``directory`` holds another run (names the difference).
        Diverged: the hypergradient is not finite.
        KeyboardInterrupt: Ctrl-C, after the step at hand was saved; a second one does not wait.
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"problem must be a BilevelProblem, got {problem!r}; a registered one is metaopt.registry.create('problem', name)"
        )
    directory = None if directory is None else Path(directory)
    saved = None
    if directory is not None:
        settings = json.loads(json.dumps({"problem": repr(problem), **dataclasses.asdict(config)}))
        _require_same(directory / CONFIG_FILE, settings)
        saved = load_checkpoint(directory / CHECKPOINT_FILE)
        if saved is not None and "gradient_norm" not in saved["history"][-1] and len(saved["history"]) <= config.steps:
            saved["history"].pop()  # what was the end, and only judged, is a step like others now
    loop = _Loop(problem, config, saved)
    with interruptions() as interrupted:
        while not loop.is_finished:
            line = loop.advance()
            if on_step is not None:
                on_step(line)
            saves = loop.is_finished or bool(interrupted) or len(loop.history) % config.checkpoint_every == 0
            if directory is not None and saves:
                write_atomic(directory / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
                save_checkpoint(directory / CHECKPOINT_FILE, loop.content())
            if interrupted and not loop.is_finished:
                raise KeyboardInterrupt
    result = loop.result()
    if directory is not None:
        save_checkpoint(directory / HYPERS_FILE, result.hypers)
        write_atomic(directory / RESULT_FILE, json.dumps(_as_json(result, config), indent=2) + "\n")
    return result


class _Loop:
    """The state of an outer loop between two steps.

    Attributes:
        hypers, rule_state: that the next step moves.
        inner_state: what the last inner run ended with, where starts are warm.
        best: ``hypers``, ``params`` and line of the best step.
        history: lines; one more than ``config.steps`` when finished, since the last hyperparameters are judged too.
    """

    def __init__(self, problem: BilevelProblem, config: OuterConfig, saved: dict[str, Any] | None) -> None:
        self.problem, self.config = problem, config
        self.rule: UpdateRule = resolve_rule(config.rule, lr=config.lr, **config.rule_options)
        if "closure" in self.rule.requirements():
            raise ValueError(f"rule {config.rule!r} needs the outer objective elsewhere too; take another")
        self.hypers: Hypers = tree.detach(problem.hypers(Generator().manual_seed(config.seed)))
        self._info = infer_info(self.hypers, dict.fromkeys(self.hypers, "bias"))  # they act one by one
        self.rule_state = self.rule.init(self.hypers, self._info)
        self.inner_state: Any = None
        self.best: dict[str, Any] | None = None
        self.history: list[Line] = []
        device = next(tree.leaves(self.hypers)).device
        for name, value in (saved or {}).items():
            setattr(self, name, _moved(value, device))

    @property
    def is_finished(self) -> bool:
        return len(self.history) > self.config.steps

    def advance(self) -> Line:
        """One outer step; the last one only judges."""
        step = len(self.history)
        inner = self._started(self.problem.inner(step))
        if self.config.tolerance is not None:
            inner = self._solved(inner, tolerances(self.config.tolerance, self.config.tolerance_decay, step))
        outer = functools.partial(self.problem.outer, step=step)
        line: Line = {"step": step}
        if step < self.config.steps:
            options = self.config.method_options
            found = hypergradient(inner, outer, self.hypers, self.config.method, draw=step, **options)
            params, value, diagnostics = found.params, found.value, found.diagnostics
            if self.config.start == "warm":
                self.inner_state = found.state
            norm = float(get_total_norm(list(found.grads.values())))
            line |= {"gradient_norm": norm, "diagnostics": _plain(diagnostics)}
        else:
            state = run(inner, self.hypers)
            params = inner.params(state)
            with torch.no_grad():
                value = outer(params, self.hypers)
        with torch.no_grad():
            holdout = self.problem.holdout(params, self.hypers)
        line |= {"outer": float(value), "holdout": None if holdout is None else float(holdout)}
        self._keep(line, params)
        if step < self.config.steps:
            if not math.isfinite(norm):
                raise Diverged(
                    f"the hypergradient of outer step {step} is not finite (outer objective {float(value):g}); "
                    "lower the learning rate of the inner run or of the outer rule, or take fewer inner steps"
                )
            ctx = Context(self._info, loss=value, horizon=self.config.steps)
            with torch.no_grad():
                self.hypers, self.rule_state = self.rule.update(
                    found.grads, self.rule_state, self.hypers, self.rule.hp, ctx
                )
        self.history.append(line)
        return line

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("hypers", "rule_state", "inner_state", "best", "history")
        return {name: getattr(self, name) for name in names}

    def result(self) -> OuterResult:
        """Of a finished loop."""
        assert self.best is not None  # the loop has made a step
        line, params, hypers = self.best["line"], self.best["params"], self.best["hypers"]
        return OuterResult(
            hypers, params, line["step"], line["outer"], line["holdout"], self.hypers, self.history,
            self.problem.report(params, hypers),
        )  # fmt: skip

    def _started(self, inner: Inner) -> Inner:
        """The inner run from where the last one ended, if starts are warm."""
        return inner if self.inner_state is None else _from_state(inner, self.inner_state)

    def _solved(self, inner: Inner, tolerance: float) -> Inner:
        """No run from a solution of the inner problem: what is left is to differentiate it."""
        if inner.loss is None:
            raise ValueError(
                "a tolerance needs an inner problem with a loss, whose gradient shall vanish; leave it out"
            )
        state = inner.start(self.hypers)
        for _ in range(self.config.most_runs):
            if stationarity(inner, inner.params(state), self.hypers) <= tolerance:
                break
            state = run(_from_state(inner, state), self.hypers)
        return dataclasses.replace(_from_state(inner, state), steps=0)

    def _keep(self, line: Line, params: Params) -> None:
        loss = line["holdout"]
        if self.best is None or loss is None or not loss >= self.best["line"]["holdout"]:
            self.best = {"line": line, "hypers": self.hypers, "params": tree.detach(params)}


def run(inner: Inner, hypers: Hypers) -> Any:
    """The state that an inner run ends with; nothing is recorded."""
    with torch.no_grad():
        state = inner.start(hypers)
        return inner.advance(state, hypers, 0, inner.steps)


def _from_state(inner: Inner, state: Any) -> Inner:
    return dataclasses.replace(inner, start=lambda hypers: state)


def _moved(content: Any, device: torch.device) -> Any:
    if isinstance(content, dict):
        return {name: _moved(value, device) for name, value in content.items()}
    return content.to(device) if isinstance(content, Tensor) else content


def _plain(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of diagnostics: numbers and text; 0-d tensors become numbers, curves are left out."""
    found: dict[str, Any] = {}
    for name, value in diagnostics.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            found[name] = float(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def _as_json(result: OuterResult, config: OuterConfig) -> dict[str, Any]:
    kept = {
        name: getattr(result, name) for name in ("step", "outer", "holdout", "gap", "last_gap", "report", "history")
    }
    return {"start": config.start, "method": config.method, **kept}


def _require_same(path: Path, settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` where another run is there already."""
    there = json.loads(path.read_text()) if path.exists() else settings
    rule = resolve_rule(settings["rule"], **settings["rule_options"])
    # more steps may follow, unless the rule looked ahead to the last one
    extended = {"steps"} if there["steps"] < settings["steps"] and "horizon" not in rule.requirements() else set()
    for name, value in settings.items():
        if name not in {"checkpoint_every"} | extended and there.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a run with {name}={there.get(name)!r}, not {value!r}; "
                f"give the same settings to resume it, or choose another directory"
            )
