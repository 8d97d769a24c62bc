"""Every registered objective: its contract, its values against the papers' formulas, and what stays finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import load
from scipy.optimize import brentq
from torch import Tensor

from metaopt import registry
from metaopt.objective import DIFFERENTIATED, INPUTS, LOG_PROBABILITIES, PROBES, Kind, Objective, faults, probes
from metaopt.program import TraceError, evaluate
from metaopt.rule import flat_hp

GOLDEN, META = load("preference_losses")
NAMES = sorted(registry.specs("objective"))
OF_GOLDEN = {
    "dpo": "dpo",
    "hinge": "slic",
    "ipo": "ipo",
    "exp": "exponential",
    "lrml": "lrml",
    "padll": "padll",
    "cell": "cell",
}
PREFERENCES = [name for name in NAMES if registry.get("objective", name).tags[0] == "preference"]


def create(name: str, **arguments: Any) -> Objective:
    made = registry.create("objective", name, **arguments)
    assert isinstance(made, Objective)
    return made


def pairs(rho: Tensor) -> dict[str, Tensor]:
    """Log-probabilities whose log-ratio is rho."""
    zero = torch.zeros_like(rho)
    return dict(zip(LOG_PROBABILITIES, (rho, zero, zero, zero), strict=True))


def random_inputs(kind: Kind, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*(shape or (count,)), generator=rng, dtype=torch.float64)).to(dtype)

    if kind == "preference":
        lengths = {name: uniform(1, 9).round() for name in ("chosen_lengths", "rejected_lengths")}
        scores = {"chosen_scores": uniform(1, 2), "rejected_scores": uniform(0, 0.9)}
        return {name: uniform(-30, -0.1) for name in LOG_PROBABILITIES} | lengths | scores
    if kind == "classification":
        return {"logits": uniform(-3, 3, count, 4), "labels": torch.randint(4, (count,), generator=rng)}
    if kind == "regression":
        return {"prediction": uniform(-3, 3), "target": uniform(-3, 3)}
    if kind == "reweighting":
        return {"losses": uniform(0, 3)}
    return {"ratio": uniform(0.3, 3), "advantage": uniform(-2, 2)}


def gradient(objective: Objective, inputs: dict[str, Tensor], name: str) -> Tensor:
    x = inputs[name].detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective(inputs | {name: x}).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if slope is None else slope


# -- the contract --------------------------------------------------------------------------------------------------------


def test_the_issue_names_these_and_they_are_there() -> None:
    wanted = """dpo ipo slic exponential kto_pair orpo bco odpo dpo_shift ln_dpo rpo pmpo f_dpo_js simpo cpo lrml padll cell aql
        aqfl dbaql pfl cross_entropy focal polyloss label_smoothing hinge calibrated_ensemble soft_f1 ppo_clip learned_policy
        discovered_policy"""
    assert set(wanted.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_declaration_fits_the_kind(name: str) -> None:
    objective, spec = create(name), registry.get("objective", name)
    assert set(objective.inputs) <= set(INPUTS[objective.kind])
    assert ("batch-dependent" in spec.tags) == objective.batch_dependent


@pytest.mark.parametrize("name", NAMES)
def test_probes_give_finite_losses_and_gradients_in_every_dtype(name: str) -> None:
    assert faults(create(name), (torch.float64, torch.float32, torch.bfloat16, torch.float16)) == []


def test_faults_names_what_is_wrong() -> None:
    class Naive(type(create("dpo"))):  # type: ignore[misc]
        def loss(self, rho: Tensor, beta: Any) -> Tensor:
            return torch.log(1 + torch.exp(-beta * rho))

    first, second = faults(Naive(), (torch.float32,))[:2]
    assert first.startswith("the loss is inf at policy_chosen_logps -10000.0, ") and "torch.float32" in first
    assert second.startswith("the gradient by policy_chosen_logps is [nan] at")


@pytest.mark.parametrize("name", NAMES)
def test_only_flagged_objectives_change_when_the_batch_is_split(name: str) -> None:
    objective = create(name)
    inputs = random_inputs(objective.kind, 12)
    inputs |= {key: x / 20 for key, x in inputs.items() if key in LOG_PROBABILITIES}  # so that nothing saturates
    parts = [objective({key: x[rows] for key, x in inputs.items()}) for rows in (slice(0, 5), slice(5, 12))]
    whole = objective(inputs)
    if objective.batch_dependent:
        assert (torch.cat(parts) - whole).abs().max() > 1e-6
    else:
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_examples_does_not_matter(name: str) -> None:
    objective = create(name)
    inputs, order = random_inputs(objective.kind, 9), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = objective({key: x[order] for key, x in inputs.items()})
    # sums over the batch are made in another order
    torch.testing.assert_close(moved, objective(inputs)[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    objective = create(name)
    if name in ("kto_pair", "bco"):
        pytest.skip("its statistics of the batch are constants to the gradient")
    inputs = random_inputs(objective.kind, 5, seed=2)
    for key in DIFFERENTIATED[objective.kind]:
        x = inputs[key].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, key=key: objective(inputs | {key: x}), (x,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_run_under_vmap_with_hyperparameters_of_each_copy(name: str) -> None:
    objective = create(name)
    copies = [random_inputs(objective.kind, 6, seed) for seed in range(3)]
    stacked = {key: torch.stack([inputs[key] for inputs in copies]) for key in copies[0]}
    factors = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    scaled = lambda factor: {  # noqa: E731
        key: tuple(v * factor for v in value) if isinstance(value, tuple) else value * factor
        for key, value in objective.hp.items()
    }
    together = torch.vmap(lambda inputs, factor: objective(inputs, scaled(factor)))(stacked, factors)
    apart = torch.stack([objective(inputs, scaled(factor)) for inputs, factor in zip(copies, factors, strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)


def test_missing_inputs_and_shapes_that_would_broadcast_are_refused() -> None:
    inputs = random_inputs("preference", 3)
    with pytest.raises(ValueError, match=r"SimPO needs .*; the inputs lack chosen_lengths, rejected_lengths, and have"):
        create("simpo")({name: inputs[name] for name in LOG_PROBABILITIES})
    with pytest.raises(ValueError, match=r"Squared.* one value per example, got prediction \[3, 1\], target \[3\]"):
        create("mse")({"prediction": torch.zeros(3, 1), "target": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"beta must be in \(0, 100\], got 0"):
        create("dpo", beta=0)


# -- programs ------------------------------------------------------------------------------------------------------------

PROGRAMS = [name for name in NAMES if not create(name).batch_dependent and create(name).kind not in ("classification",)]
OPAQUE = {"learned_policy"}
"""A network: the expression language has no products of matrices."""


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - OPAQUE))
def test_a_traced_objective_computes_the_same_with_the_same_gradients(name: str) -> None:
    objective = create(name)
    program = objective.program
    assert not program.is_rule and program.tensors == objective.inputs and program.reach == "element"
    inputs = random_inputs(objective.kind, 40, seed=3)
    inputs["rho"] = torch.linspace(-60, 60, 40, dtype=torch.float64)
    read = {
        key: inputs[key].requires_grad_(key in ("rho", *DIFFERENTIATED[objective.kind])) for key in objective.inputs
    }
    (traced,), plain = evaluate(program, read, flat_hp(objective.hp)), objective(read)
    # log(1 + e^-x) where torch has log1p: an error of one rounding of 1
    torch.testing.assert_close(traced, plain, rtol=1e-12, atol=1e-15)
    moving = [x for x in read.values() if x.requires_grad]
    if moving:
        slopes = [
            torch.autograd.grad(loss.sum(), moving, allow_unused=True, materialize_grads=True)
            for loss in (traced, plain)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", ["kto_pair", "cross_entropy", "learned_policy"])
def test_what_is_no_program_says_why(name: str) -> None:
    with pytest.raises(TraceError, match=r"is not elementwise arithmetic|neither a number|has no"):
        _ = create(name).program


@pytest.mark.parametrize("name", ["dpo", "slic", "lrml", "exponential", "ppo_clip", "discovered_policy"])
def test_traced_gradients_are_finite_at_the_probes(name: str) -> None:
    objective = create(name)
    if objective.inputs == ("rho",):
        tried = [{"rho": torch.tensor([x])} for x in PROBES]
    else:
        tried = probes(objective.kind)
    for probe in tried:
        inputs = {key: probe[key].float().requires_grad_() for key in objective.inputs}
        (loss,) = evaluate(objective.program, inputs, flat_hp(objective.hp))
        slopes = torch.autograd.grad(loss.sum(), list(inputs.values()))
        assert torch.isfinite(torch.cat([loss, *slopes])).all(), probe


# -- preferences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["", "extreme/"])
@pytest.mark.parametrize("golden", OF_GOLDEN)
def test_values_and_slopes_equal_sixty_digit_closed_forms(golden: str, grid: str) -> None:
    objective = create(OF_GOLDEN[golden], beta=float(GOLDEN["beta"]))
    inputs = pairs(torch.from_numpy(GOLDEN["rho_extreme" if grid else "rho"]))
    slope = gradient(objective, inputs, LOG_PROBABILITIES[0])
    # the stated tolerance is 1e-12; of the extremes, e^-500, rounding of the exponent alone makes 1e-13 * 500
    rtol, tiny = (1e-9, 1e-300) if grid else (1e-12, 1e-14)
    np.testing.assert_allclose(objective(inputs), GOLDEN[f"{grid}value/{golden}"], rtol=rtol, atol=tiny)
    if golden == "padll":  # not differentiable at 0
        at = inputs[LOG_PROBABILITIES[0]] != 0
        slope, wanted = slope[at], GOLDEN[f"{grid}grad/{golden}"][at]
    else:
        wanted = GOLDEN[f"{grid}grad/{golden}"]
    np.testing.assert_allclose(slope, wanted, rtol=rtol, atol=tiny)


@pytest.mark.parametrize("golden", sorted(set(OF_GOLDEN) - {"padll"}))
def test_values_and_slopes_in_float32(golden: str) -> None:
    objective = create(OF_GOLDEN[golden], beta=float(GOLDEN["beta"]))
    inputs = pairs(torch.from_numpy(GOLDEN["rho"]).float())
    np.testing.assert_allclose(objective(inputs), GOLDEN[f"value/{golden}"], rtol=2e-6, atol=1e-6)
    slope = gradient(objective, inputs, LOG_PROBABILITIES[0])
    np.testing.assert_allclose(slope, GOLDEN[f"grad/{golden}"], rtol=2e-6, atol=1e-6)


def test_discopop_has_its_minimum_and_its_maximum_where_the_paper_plots_them() -> None:
    objective = create("lrml")
    (low, at_low), (high, at_high) = META["lrml_stationary"]

    def slope(rho: float) -> float:
        return gradient(objective, pairs(torch.tensor([rho], dtype=torch.float64)), LOG_PROBABILITIES[0]).item()

    for exact, value, near in ((low, at_low, -2.375), (high, at_high, 1.44)):
        found = brentq(slope, near - 0.5, near + 0.5, xtol=1e-12)
        assert found == pytest.approx(exact, abs=1e-9) and found == pytest.approx(near, abs=0.005)
        loss = objective(pairs(torch.tensor([found], dtype=torch.float64))).item()
        assert loss == pytest.approx(value, rel=1e-10)
    assert slope(low - 1) < 0 < slope(0) and slope(high + 1) < 0


@pytest.mark.parametrize("name", sorted(set(PREFERENCES) - {"pmpo"}))
def test_a_pair_that_is_far_on_the_wrong_side_is_pushed_back(name: str) -> None:
    objective = create(name)
    wrong = probes("preference")[0]  # rho = -1e4 by the chosen answer
    assert gradient(objective, wrong, LOG_PROBABILITIES[0]).item() <= 0
    bounded = {"kto_pair", "f_dpo_alpha"}  # saturate: what is hopeless is left alone
    mild = {name: x / 1e4 for name, x in wrong.items()} | {
        "chosen_lengths": torch.ones(1),
        "rejected_lengths": torch.ones(1),
    }
    at = mild if name in bounded else wrong
    assert gradient(objective, {k: v.double() for k, v in at.items()}, LOG_PROBABILITIES[0]).item() < 0
    right = probes("preference")[len(probes("preference")) // 2 - 1]  # rho = 1e4
    if name != "ipo":  # which aims at a margin
        assert gradient(objective, right, LOG_PROBABILITIES[0]).item() <= 0


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def written_out(name: str, p: dict[str, np.ndarray]) -> np.ndarray:
    """The papers' formulas as they stand, with default hyperparameters, in numpy."""
    good, bad = p["policy_chosen_logps"], p["policy_rejected_logps"]
    rho_w, rho_l = good - p["reference_chosen_logps"], bad - p["reference_rejected_logps"]
    n_w, n_l, gap = p["chosen_lengths"], p["rejected_lengths"], p["chosen_scores"] - p["rejected_scores"]
    rho = rho_w - rho_l
    z = 0.05 * rho
    x = z / 0.05
    dpo, slic = -np.log(sigmoid(z)), np.maximum(0, 1 - z)
    if name == "kto_pair":
        k_w, k_l = (max(0.0, r.mean()) for r in (rho_w, rho_l))
        return 0.5 * (1 - sigmoid(0.1 * (rho_w - k_l)) + 1 - sigmoid(0.1 * (k_w - rho_l)))
    if name == "orpo":
        q_w, q_l = np.exp(good / n_w), np.exp(bad / n_l)
        return -np.log(q_w) - 0.1 * np.log(sigmoid(np.log(q_w / (1 - q_w) / (q_l / (1 - q_l)))))
    if name == "bco":
        d = 0.1 * (rho_w.mean() + rho_l.mean()) / 2
        return -np.log(sigmoid(0.1 * rho_w - d)) - np.log(sigmoid(-(0.1 * rho_l - d)))
    if name == "aql":
        q = sigmoid(-(x - (0.5 + 0.01 * (sigmoid(x.mean()) - 0.5))))
        return q * dpo + (1 - q) * slic
    if name == "aqfl":
        a1 = x.std(ddof=1) * sigmoid(-x).mean()
        a = a1 + 0.05 * (sigmoid(x.mean()) - a1)
        b = sigmoid(0.1 * np.abs(x - a))
        return b * dpo + (1 - b) * slic
    if name == "dbaql":
        c = sigmoid(x.var(ddof=1))
        return c * -np.log(sigmoid(z / 0.9)) + (1 - c) * np.exp(-0.9 * z)
    u_w, u_l = np.exp(rho_w), np.exp(rho_l)
    return {
        "odpo": lambda: -np.log(sigmoid(0.1 * rho - np.log(gap))),
        "dpo_shift": lambda: -np.log(sigmoid(0.1 * (rho_w - 0.75 * rho_l))),
        "ln_dpo": lambda: -np.log(sigmoid(rho_w / n_w - rho_l / n_l)),
        "rpo": lambda: -np.log(sigmoid(0.1 * rho)) - 0.005 * good,
        "pmpo": lambda: -0.5 * good + 0.5 * bad - 0.5 * (rho_w + rho_l),
        "f_dpo_js": lambda: -np.log(sigmoid(0.1 * (np.log(2 * u_w / (1 + u_w)) - np.log(2 * u_l / (1 + u_l))))),
        "f_dpo_alpha": lambda: -np.log(sigmoid(0.1 * ((1 - u_w**-0.5) / 0.5 - (1 - u_l**-0.5) / 0.5))),
        "f_dpo_forward_kl": lambda: -np.log(sigmoid(0.1 * (-1 / u_w + 1 / u_l))),
        "simpo": lambda: -np.log(sigmoid(2 * good / n_w - 2 * bad / n_l - 1)),
        "cpo": lambda: -np.log(sigmoid(0.1 * (good - bad))) - good,
        "pfl": lambda: np.where(good > bad, dpo / 2, 2 * slic),
    }[name]()


@pytest.mark.parametrize("name", sorted(set(PREFERENCES) - set(OF_GOLDEN.values())))
def test_the_others_equal_their_formulas_written_out(name: str) -> None:
    inputs = {key: x / 6 if key.endswith("logps") else x for key, x in random_inputs("preference", 30, seed=5).items()}
    want = written_out(name, {key: x.numpy() for key, x in inputs.items()})
    # the formulas as they stand lose digits in 1 - p and in log(sigmoid)
    np.testing.assert_allclose(create(name)(inputs), want, rtol=1e-10, atol=1e-12)


def test_reverse_kl_gives_dpo() -> None:
    inputs = random_inputs("preference", 20)
    torch.testing.assert_close(create("f_dpo_js", divergence="reverse_kl")(inputs), create("dpo")(inputs))


# -- classes, numbers, weights -------------------------------------------------------------------------------------------


def test_classification_losses_equal_those_of_torch_and_the_papers() -> None:
    inputs = random_inputs("classification", 50)
    logits, labels = inputs["logits"], inputs["labels"]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    p = torch.exp(-nll)
    others = torch.stack([row[[j for j in range(4) if j != y]] for row, y in zip(logits, labels.tolist(), strict=True)])
    own = logits.gather(1, labels[:, None])
    m = own[:, 0] - others.amax(1)
    smoothed = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    mean = (torch.log(1 + torch.exp(-m)) + (1 - m).clamp(min=0) + (1 - m).clamp(min=0) ** 2 + torch.exp(-m)) / 4
    want = {
        "cross_entropy": nll,
        "label_smoothing": smoothed,
        "focal": (1 - p) ** 2 * nll,
        "polyloss": nll + 1 - p,
        "hinge": (1 - m).clamp(min=0),
        "squared_hinge": (1 - m).clamp(min=0) ** 2,
        "summed_hinge": (1 + others - own).clamp(min=0).sum(1),
        "calibrated_ensemble": mean,
    }
    for name, loss in want.items():
        torch.testing.assert_close(create(name)(inputs), loss, rtol=1e-10, atol=1e-12, msg=name)


def test_the_smooth_hinge_is_continuous_with_its_slope() -> None:
    m = torch.tensor([-1e-9, 0.0, 1e-9, 1 - 1e-9, 1.0, 2.0], dtype=torch.float64)
    inputs = {"logits": torch.stack([m, torch.zeros_like(m)], 1), "labels": torch.zeros(6, dtype=torch.int64)}
    torch.testing.assert_close(
        create("smooth_hinge")(inputs), torch.tensor([0.5, 0.5, 0.5, 0, 0, 0]).double(), rtol=0, atol=2e-9
    )
    slope = gradient(create("smooth_hinge"), inputs, "logits")[:, 0]
    torch.testing.assert_close(slope, torch.tensor([-1.0, -1, -1, 0, 0, 0]).double(), rtol=0, atol=2e-9)


@pytest.mark.parametrize("name", ["soft_f1", "soft_recall"])
def test_soft_metrics_become_the_metric_where_predictions_are_sure(name: str) -> None:
    from sklearn.metrics import f1_score, recall_score

    inputs = random_inputs("classification", 60)
    said = inputs["logits"].argmax(1)
    metric = f1_score if name == "soft_f1" else recall_score
    want = 1 - metric(inputs["labels"], said, average="macro")
    sure = inputs | {"logits": 50 * torch.nn.functional.one_hot(said, 4).double()}
    # a sure class counts 1 - e^-36 and the others e^-36
    torch.testing.assert_close(create(name)(sure), torch.full((60,), want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_regression_losses_equal_those_of_torch_and_their_limits() -> None:
    inputs = random_inputs("regression", 50)
    prediction, target = inputs["prediction"], inputs["target"]
    e = prediction - target
    want = {
        "mse": e**2,
        "mae": e.abs(),
        "huber": torch.nn.functional.huber_loss(prediction, target, reduction="none"),
        "log_cosh": torch.log(torch.cosh(e)),
        "quantile": 0.5 * e.abs(),
        "cauchy": torch.log1p(e**2 / 2),
    }
    for name, loss in want.items():
        torch.testing.assert_close(create(name)(inputs), loss, rtol=1e-12, atol=1e-14, msg=name)
    torch.testing.assert_close(create("quantile", level=0.9)(inputs), torch.where(e < 0, -0.9 * e, 0.1 * e))


def test_weights_of_examples() -> None:
    losses = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    want: dict[tuple[str, Any], list[float]] = {
        ("self_paced", 1.0): [0.5, 0, 0, 1],
        ("hardest_share", 0.5): [0, 2, 2, 0],
        ("easiest_share", 0.5): [2, 0, 0, 2],
        ("hardest_share", 0.1): [0, 4, 0, 0],
        ("focal_weights", 2.0): [(1 - math.exp(-x)) ** 2 for x in losses.tolist()],
        ("tilted", 1.0): [4 * math.exp(x) / sum(map(math.exp, losses.tolist())) for x in losses.tolist()],
        ("tilted", 0.0): [1, 1, 1, 1],
    }
    for (name, value), weights in want.items():
        key = next(iter(create(name).declared()))
        made = create(name, **{key: value})({"losses": losses})
        torch.testing.assert_close(made, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-12, msg=name)
    ties = create("hardest_share", share=0.25)({"losses": torch.tensor([1.0, 1.0, 0.0, 0.0])})
    assert ties.tolist() == [2, 2, 0, 0], "equal losses count alike"


# -- policies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if registry.get("objective", name).tags[0] == "rl"])
def test_drifts_keep_the_conditions_of_mirror_learning(name: str) -> None:
    objective = create(name)
    ratio = torch.cat([torch.logspace(-4, 4, 101), torch.ones(1)]).double()
    for advantage in (-3.0, -0.1, 0.0, 0.1, 3.0):
        inputs = {"ratio": ratio, "advantage": torch.full_like(ratio, advantage)}
        drift = objective(inputs) + ratio * advantage
        assert (drift >= -1e-9 * ratio).all(), "rounding of r A aside"
        one = {key: x[-1:] for key, x in inputs.items()}
        assert objective(one).item() == -advantage
        assert gradient(objective, one, "ratio").item() == pytest.approx(-advantage, abs=1e-12)


def test_ppo_is_the_minimum_of_the_paper() -> None:
    inputs = random_inputs("rl", 100)
    r, a = inputs["ratio"], inputs["advantage"]
    want = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    torch.testing.assert_close(create("ppo_clip")(inputs), want, rtol=1e-12, atol=1e-14)


def test_discovered_policy_optimisation_equals_its_closed_form() -> None:
    inputs = random_inputs("rl", 100)
    r, a = inputs["ratio"].numpy(), inputs["advantage"].numpy()
    plus = np.maximum(0, (r - 1) * a - 2 * np.tanh((r - 1) * a / 2))
    minus = np.maximum(0, np.log(r) * a - 0.6 * np.tanh(np.log(r) * a / 0.6))
    np.testing.assert_allclose(
        create("discovered_policy")(inputs), -(r * a - np.where(a >= 0, plus, minus)), rtol=1e-12
    )


def test_fp16_gradients_saturate_where_float32_ones_are_finite() -> None:
    steep: Callable[[torch.dtype], float] = lambda dtype: gradient(  # noqa: E731
        create("exponential", beta=1.0), pairs(torch.tensor([-30.0], dtype=dtype)), LOG_PROBABILITIES[0]
    ).item()
    assert steep(torch.float32) == pytest.approx(-math.exp(30), rel=1e-5)
    assert steep(torch.float16) == -65504
