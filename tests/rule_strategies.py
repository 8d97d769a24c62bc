"""Every rule that the property tests run on, hypothesis strategies for their inputs, and the ways to run them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import metaopt
from metaopt import registry, tree
from metaopt.learned import BoundRule
from metaopt.rule import Chain, Context, ElementwiseRule, ParamInfo, Params, State, UpdateRule, infer_info
from metaopt.space import Hyper, Option, hyper, learning_rate, option
from metaopt.task import Batch, Split, Task
from metaopt.torch_optimizer import RuleOptimizer
from metaopt_classic.adam import AdamW
from metaopt_classic.sgd import SGD
from metaopt_classic.wrappers import SAM, Cautious, ClipByGlobalNorm, DecoupledWeightDecay, Lookahead

HORIZON = 20
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# -- the rules ---------------------------------------------------------------------------------------------------------


class TenLines(ElementwiseRule):
    """What a user writes on his first day."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))
    beta: float = hyper(0.9, 0.0, 1.0, open_high=True, scale="decay", search=(0.5, 0.99))
    slots = ("momentum",)

    def elementwise(self, param: Any, grad: Any, momentum: Any, lr: Any, beta: Any) -> Any:  # type: ignore[override]
        momentum = torch.lerp(grad, momentum, beta)
        return param - lr * torch.tanh(momentum), momentum


class WholeLanguage(ElementwiseRule):
    """Corners of the language: jumps, a branch on t, slots that shift, initial values, outputs that are inputs."""

    lr: float = learning_rate(1e-2, search=(1e-3, 1e-1))
    reach: tuple[float, float] = hyper((0.3, 0.5), -1.0, 1.0, open_low=True, search=(-0.9, 1.0))
    power: float = hyper(0.25, 0.0, 1.0, open_low=True, search=(0.1, 1.0))
    gentle: bool = option(True, choices=(False, True))
    slots = ("last", "older", "peak", "start")

    def init_slot(self, slot: str, param: Tensor) -> Tensor:
        if slot == "start":
            return param.clone()
        return torch.full_like(param, 0.5 if slot == "peak" else 0.0)

    def coefficients(self, hp: Any, t: Any) -> dict[str, Any]:
        down, up = hp["reach"]
        return {
            "rate": hp["lr"] * metaopt.where(t < 3, t / 3, 1.0),
            "low": down - 1,
            "high": up + 1,
            "power": hp["power"],
        }

    def elementwise(  # type: ignore[override]
        self, param: Any, grad: Any, last: Any, older: Any, peak: Any, start: Any, rate: Any, low: Any, high: Any,
        power: Any,
    ) -> Any:  # fmt: skip
        peak = torch.maximum(0.9 * peak, abs(grad)).clamp(max=100.0)
        scaled = grad / (peak + 1e-3)
        if self.gentle:
            size = (scaled * param).square() ** 0.5
            scaled = scaled * torch.exp(-size) + torch.log(1 + size**power)
        step = torch.where(last * grad >= 0, torch.clamp(scaled, low, high), -0.5 * torch.sign(older))
        pull = (abs(param) > 10.0) * torch.sin(param - start) * torch.cos(param) * 0.01
        return param - rate * (step - (0.1 * torch.atan(scaled) - pull) / (peak * 4.0)), grad, last, peak, start


def _learned(name: str) -> UpdateRule:
    """A registered learned optimizer with meta-parameters none of which is zero."""
    learned = registry.create("learned_optimizer", name)
    generator = torch.Generator().manual_seed(1)
    theta = learned.init_theta(generator)
    noisy = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in theta.items()}
    return learned.bind(noisy)


REGISTERED: dict[str, UpdateRule] = {name: registry.create("optimizer", name) for name in registry.specs("optimizer")}
LEARNED = {"small_fc_lopt": _learned("small_fc_lopt")}
"""One for all executions of learned rules; what each of them promises is in learned/test_learned_properties.py."""
USERS: dict[str, UpdateRule] = {"ten_lines": TenLines(), "whole_language": WholeLanguage()}
UNCOUPLED_WRAPPERS: dict[str, UpdateRule] = {
    "lookahead": Lookahead(AdamW(), k=2),
    "cautious": Cautious(AdamW()),
    "weight_decay": DecoupledWeightDecay(TenLines()),
    "lookahead_cautious": Lookahead(Cautious(TenLines()), k=3),  # it has no weight_decay to split off
}
COUPLED_WRAPPERS: dict[str, UpdateRule] = {
    "clip_adamw": Chain(ClipByGlobalNorm(1.0), AdamW()),
    "clip_lookahead": Chain(ClipByGlobalNorm(0.1), Lookahead(SGD(momentum=0.9), k=2)),
    "sam": SAM(SGD(momentum=0.9)),
    "clip_sam": Chain(ClipByGlobalNorm(1.0), SAM(AdamW())),
}
"""A global norm couples all parameters."""

BY_TENSOR = {**REGISTERED, **USERS, **LEARNED, **UNCOUPLED_WRAPPERS}
RULES = {**BY_TENSOR, **COUPLED_WRAPPERS}
ELEMENTWISE = {
    name: rule for name, rule in RULES.items() if isinstance(rule, ElementwiseRule) and rule.program.reach == "element"
}
OTHERS = {name: rule for name, rule in RULES.items() if name not in ELEMENTWISE}

# -- their inputs ------------------------------------------------------------------------------------------------------

SHAPES: tuple[tuple[int, ...], ...] = (
    (), (1,), (7,), (37,), (3, 5), (5, 3), (4, 4), (2, 3, 4), (3, 2, 2, 2), (1, 6), (0,), (0, 3)
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A rule with its hyperparameters, initial parameters, and what the gradients will be.

    The gradient at parameters p and update t is ``grads[t] + curvature * p``; only rules that evaluate elsewhere (SAM)
    see a curvature.
    """

    rule: UpdateRule
    params: Params
    grads: tuple[Params, ...]

    @property
    def info(self) -> dict[str, ParamInfo]:
        return infer_info(self.params)

    @property
    def curvature(self) -> float:
        return 0.5 if "closure" in self.rule.requirements() else 0.0

    def gradient(self, given: Tensor, param: Tensor) -> Tensor:
        """Of one parameter; ``given`` itself where there is no curvature, so that a bad parameter spoils no gradient."""
        return given + self.curvature * param if self.curvature else given.clone()

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype


def make_problem(
    rule: UpdateRule,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    seed: int,
    zeros: float = 0.2,
    decades: tuple[float, float] = (-6.0, 3.0),
) -> Problem:
    """Values of either sign and many magnitudes; a share of ``zeros`` is exactly 0."""
    generator = torch.Generator().manual_seed(seed)

    def values(shape: tuple[int, ...]) -> Tensor:
        uniform = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        value = 10 ** (decades[0] + (decades[1] - decades[0]) * uniform[0]) * torch.where(uniform[1] < 0.5, -1.0, 1.0)
        return torch.where(uniform[2] < zeros, 0.0, value).to(dtype)

    def tensors() -> Params:
        return {f"w{i}": values(shape) for i, shape in enumerate(shapes)}

    return Problem(rule, tensors(), tuple(tensors() for _ in range(steps)))


def numbers(declared: Hyper) -> st.SearchStrategy[float]:
    """Values inside the domain: the range worth searching, the default, and the ends that belong to the domain."""
    defaults = declared.default if isinstance(declared.default, tuple) else (declared.default,)
    low, high = declared.search or (declared.low, declared.high)
    usual = declared.grid(17) if declared.contains(low) and declared.contains(high) else []
    ends = [end for end in (declared.low, declared.high) if math.isfinite(end)]
    return st.sampled_from([x for x in (*defaults, *usual, *ends) if declared.contains(x)])


def outside(declared: Hyper) -> st.SearchStrategy[float]:
    """Values outside the domain; infinity and NaN are never inside."""
    below = [declared.low - gap for gap in (1e-9, 1.0)] + [declared.low] * declared.open_low
    above = [declared.high + gap for gap in (1e-9, 1.0)] + [declared.high] * declared.open_high
    return st.sampled_from([math.nan, math.inf, -math.inf, *filter(math.isfinite, (*below, *above))])


def _one_or_tuple(declared: Hyper, draw: st.DrawFn) -> Any:
    if isinstance(declared.default, tuple):
        return tuple(draw(numbers(declared)) for _ in declared.default)
    return draw(numbers(declared))


def middle(rule: UpdateRule) -> dict[str, Any]:
    """Hyperparameters well inside their domains, none at its default."""
    points = {name: rule.declared()[name].grid(5)[2] for name in rule.hp}
    return {name: (points[name],) * len(v) if isinstance(v, tuple) else points[name] for name, v in rule.hp.items()}


@st.composite
def options(draw: st.DrawFn, rule: UpdateRule) -> UpdateRule:
    """``rule`` with other options."""
    chosen = {}
    for name, declared in rule.declared().items():
        if isinstance(declared, Option) and declared.choices is not None:
            chosen[name] = draw(st.sampled_from(declared.choices))
        elif isinstance(declared, Option) and declared.low is not None:
            chosen[name] = draw(st.integers(declared.low, max(declared.low, rule.values()[name])))
    # the width of a learned rule belongs to its theta
    return rule if isinstance(rule, BoundRule) else rule.replaced(**chosen)


@st.composite
def hyperparameters(draw: st.DrawFn, rule: UpdateRule) -> UpdateRule:
    """``rule`` with other hyperparameters."""
    declared = {name: d for name, d in rule.declared().items() if isinstance(d, Hyper)}
    return rule.replaced(**{name: _one_or_tuple(d, draw) for name, d in declared.items()})


@st.composite
def copies(
    draw: st.DrawFn,
    rule: UpdateRule,
    dtype: torch.dtype,
    count: int,
    *,
    steps: int | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    other_options: bool = True,
) -> list[Problem]:
    """Problems of one structure: they differ in values and hyperparameters."""
    rule = draw(options(rule)) if other_options else rule
    chosen = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3))
    length = draw(st.integers(1, 6)) if steps is None else steps
    zeros = draw(st.sampled_from([0.2, 0.0, 1.0]))
    return [
        make_problem(draw(hyperparameters(rule)), dtype, chosen, length, draw(st.integers(0, 2**31)), zeros)
        for _ in range(count)
    ]


def problems(rule: UpdateRule, dtype: torch.dtype, **arguments: Any) -> st.SearchStrategy[Problem]:
    """One problem."""
    return copies(rule, dtype, 1, **arguments).map(lambda found: found[0])


class Bowl(Task):
    """The smallest task: half the squared norm of a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__("bowl", Split(), Split(), Split(), batch_size=1, horizon=HORIZON)

    def init(self, generator: torch.Generator) -> Params:
        return {"w": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return sum(((p * p).sum() / 2 for p in params.values()), torch.zeros(()))


# -- the ways to run them ----------------------------------------------------------------------------------------------


def advance(
    problem: Problem, params: Params, state: State, given: Params, hp: Mapping[str, Any], step: Tensor | None
) -> tuple[Params, State]:
    """One functional update."""

    def closure(at: Params) -> tuple[Tensor, Params]:
        found = {name: problem.gradient(given[name], p) for name, p in at.items()}
        return sum(((given[name] * p).sum() for name, p in at.items()), torch.zeros(())), found

    loss, grads = closure(params)
    ctx = Context(problem.info, step=step, loss=loss, horizon=torch.tensor(HORIZON), closure=closure)
    return problem.rule.update(grads, state, params, hp, ctx)


def functional(problem: Problem, *, shared_step: bool, hp: Mapping[str, Any] | None = None) -> tuple[Params, State]:
    """``rule.update`` from step to step; ``shared_step`` tells it that all parameters have one step count."""
    params, state = problem.params, problem.rule.init(problem.params, problem.info)
    for t, given in enumerate(problem.grads):
        step = torch.tensor(t) if shared_step else None
        params, state = advance(problem, params, state, given, problem.rule.hp if hp is None else hp, step)
    return params, state


def vmapped(problems: Sequence[Problem]) -> list[tuple[Params, State]]:
    """All copies at once, each with its own values and hyperparameters."""
    first = problems[0]
    params, state = (
        tree.stack([p.params for p in problems]),
        tree.stack([p.rule.init(p.params, p.info) for p in problems]),
    )
    hp = {
        name: tuple(torch.tensor(entry, dtype=torch.float64) for entry in zip(*values, strict=True))
        if isinstance(values[0], tuple)
        else torch.tensor(values, dtype=torch.float64)
        for name in first.rule.hp
        if (values := [p.rule.hp[name] for p in problems])
    }
    step = torch.vmap(lambda *arguments: advance(first, *arguments))
    for t in range(len(first.grads)):
        given = tree.stack([p.grads[t] for p in problems])
        params, state = step(params, state, given, hp, torch.full((len(problems),), t))
    return [(tree.index(params, k), tree.index(state, k)) for k in range(len(problems))]


class Stepper:
    """A problem under a torch optimizer, ours or an exported one."""

    def __init__(self, problem: Problem, make: Any = None, execution: Any = "auto") -> None:
        self.problem = problem
        self.params = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
        if make is None:
            self.optimizer: Any = RuleOptimizer(problem.rule, self.params.values(), execution, HORIZON)
        else:
            self.optimizer = make(list(self.params.values()))

    def step(self, given: Params) -> None:
        """One step; the gradient of a parameter that is not in ``given`` stays None."""

        def closure() -> Tensor:
            with torch.no_grad():
                for name, p in self.params.items():
                    p.grad = self.problem.gradient(given[name], p) if name in given else None
            return torch.zeros(())

        if "closure" in self.problem.rule.requirements():
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def run(self) -> tuple[Params, State]:
        for given in self.problem.grads:
            self.step(given)
        return self.result()

    def result(self) -> tuple[Params, State]:
        state = {name: dict(self.optimizer.state[p]) for name, p in self.params.items()}
        return {name: p.detach() for name, p in self.params.items()}, state
