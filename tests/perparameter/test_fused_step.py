"""The C++ form of per-parameter rules computes what the plain form computes, whatever the features, networks and shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_vectors import assert_trajectory_close, load, under
from perparameter_cases import RULES, SHAPES, Everything
from torch import Generator, Tensor

from metaopt import registry, tree
from metaopt.cpp_kernels import CppKernels
from metaopt.learned import Theta
from metaopt.perparameter import PerParameterRule, Prepared, table
from metaopt.perparameter.cpp import fused_step, supports
from metaopt.program.build import compiler, load_library
from metaopt.rule import Context, Params, State, infer_info
from metaopt.unroll import Carry, start, unroll
from metaopt_learned.adafac_mlp import AdafacMLP
from metaopt_learned.celo2 import Celo2

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

HP = {"lr": 1.0, "weight_decay": 0.1}


def copies_of(
    rule: PerParameterRule, k: int, stacked: bool, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> tuple[Theta, Params, list[Params]]:
    """Theta, [K, *shape] parameters and gradients of four steps, among them zeros and entries beyond the clip."""
    generator = Generator().manual_seed(1)
    thetas = [rule.init_theta(generator) for _ in range(k if stacked else 1)]
    theta = tree.stack(thetas) if stacked else thetas[0]
    theta = {name: v + 0.02 * torch.randn(v.shape, generator=generator) for name, v in theta.items()}
    params = {name: torch.randn(k, *shape, generator=generator) for name, shape in shapes.items()}
    scales = (1.0, 0.0, 10.0, 1e-3)
    grads = [
        {n: scale * torch.randn(p.shape, generator=generator) * (1 + torch.arange(float(k))).view(-1, *(1,) * (p.dim() - 1))
         for n, p in params.items()}
        for scale in scales
    ]  # fmt: skip
    return theta, params, grads


def run(
    rule: PerParameterRule, theta: Theta, params: Params, grads: list[Params], stacked: bool, fused: bool
) -> tuple[list[Params], State]:
    """Parameters after every step, and the last state, of copies; as `update` under vmap or by C++."""
    info = infer_info({name: p[0] for name, p in params.items()})
    dims = (0 if stacked else None, dict.fromkeys(HP))
    state = torch.vmap(lambda p, theta: rule.init(p, info, theta), (0, dims[0]))(params, theta)
    found = []
    k = len(next(iter(params.values())))
    for t, now in enumerate(grads):
        step, loss = torch.full((k,), t), torch.zeros(k)
        if fused:
            done = rule.update_copies(
                CppKernels(), theta, now, state, params, HP, Context(info, step, loss, step), dims
            )
            assert done is not None
        else:

            def update(theta: Theta, now: Params, state: State, params: Params, step: Tensor) -> tuple[Params, State]:
                return rule.update(theta, now, state, params, HP, Context(info, step))

            done = torch.vmap(update, (dims[0], 0, 0, 0, 0))(theta, now, state, params, step)
        params, state = done
        found.append(params)
    return found, state


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [as_dtype(entry, dtype) for entry in value]
    return tree.map_tree(lambda v: v.to(dtype), value)


def assert_plain(name: str, k: int, stacked: bool, dtype: torch.dtype, of_move: float, of_size: float) -> None:
    """C++ in ``dtype`` agrees with the plain form in float64."""
    rule = RULES[name]
    given = copies_of(rule, k, stacked)
    exact = (as_dtype(given[0], torch.float64), as_dtype(given[1], torch.float64), as_dtype(given[2], torch.float64))
    wanted, state = run(rule, *exact, stacked, fused=False)
    theta, params, grads = (as_dtype(part, dtype) for part in given)
    got, new_state = run(rule, theta, params, grads, stacked, fused=True)
    for parameter, initial in exact[1].items():
        assert_trajectory_close(
            torch.stack([p[parameter] for p in got]).double(),
            torch.stack([p[parameter] for p in wanted]),
            initial,
            of_move=of_move,
            of_size=of_size,
        )
        assert new_state[parameter].keys() == state[parameter].keys()
        for slot, value in state[parameter].items():
            error = (new_state[parameter][slot] - value).abs().max()
            assert error <= of_move * value.abs().max(), (parameter, slot)


@pytest.mark.parametrize("name", [name for name in RULES if name != "adafac_4"])
@pytest.mark.parametrize(("k", "stacked"), [(1, False), (3, True), (3, False)])
def test_it_is_the_plain_update(name: str, k: int, stacked: bool) -> None:
    assert_plain(name, k, stacked, torch.float64, 1e-11, 1e-15)  # the rounding of some thousand operations


@pytest.mark.parametrize("name", ["adafac_32", "everything"])
def test_it_is_the_plain_update_in_single_precision(name: str) -> None:
    # 1 - decay is what is left of decays near 1, to 6e-5; parameters round each step
    assert_plain(name, 3, True, torch.float32, 2e-4, 3e-7)


@pytest.mark.parametrize(("inputs", "prefix"), [("learned_inputs", ""), ("learned_inputs_edge", "edge/")])
def test_adafac_mlp_is_that_of_jax(inputs: str, prefix: str) -> None:
    rule = AdafacMLP(hidden=32, layout="jax")
    arrays, _ = load("adafac_mlp_lopt_h32")
    given, _ = load(inputs)
    theta = rule.theta_from_original(under(arrays, "theta"))
    initial, grads = under(given, "params0"), under(given, "grads")
    params, info = {name: p.unsqueeze(0) for name, p in initial.items()}, infer_info(initial)
    state = tree.map_tree(lambda v: v.unsqueeze(0), rule.init(initial, info, theta))
    trajectory = []
    for t in range(len(next(iter(grads.values())))):
        step = torch.tensor([t])
        now = {name: g[t].unsqueeze(0) for name, g in grads.items()}
        hp = {"lr": 1.0, "weight_decay": 0.0}
        done = rule.update_copies(
            CppKernels(),
            theta,
            now,
            state,
            params,
            hp,
            Context(info, step, torch.zeros(1), step),
            (None, dict.fromkeys(hp)),
        )
        assert done is not None
        params, state = done
        trajectory.append(params)
    for name, wanted in under(arrays, f"{prefix}params64").items():
        got = torch.cat([params[name] for params in trajectory])
        assert_trajectory_close(got, wanted, initial[name], of_move=1e-10, of_size=1e-14)


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


THREADS = """
extern "C" int threads() {
    int found = 0;
#ifdef _OPENMP
    #pragma omp parallel num_threads(2) reduction(+: found)
#endif
    found += 1;
    return found;
}
"""


@pytest.mark.parametrize("k", [1, 3])
def test_the_number_of_threads_changes_no_bit(k: int) -> None:
    # the first two are shared out by chunks where there are fewer copies than threads
    library = load_library(THREADS)
    if library is None or library.threads() != 2:
        pytest.skip("the compiler has no OpenMP that torch's threads can run")
    shapes = {"big": (200, 330), "flat": (50_001,), "small": (9, 4)}
    rule = RULES["adafac_4"]
    given = copies_of(rule, k, True, shapes)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(run(rule, *given, True, fused=True))
        finally:
            torch.set_num_threads(before)
    for params, state in results[1:]:
        assert_same_bits(params[-1], results[0][0][-1])
        assert_same_bits(state, results[0][1])


def test_large_tensors_agree_with_the_plain_update() -> None:
    shapes = {"big": (200, 330), "flat": (50_001,), "conv": (3, 300, 9, 8)}
    rule = RULES["everything"]
    generator = Generator().manual_seed(0)
    theta = as_dtype(rule.init_theta(generator), torch.float64)
    params = {n: torch.randn(1, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    grads = [{n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}]
    (wanted,), _ = run(rule, theta, params, grads, False, fused=False)
    (got,), _ = run(rule, theta, params, grads, False, fused=True)
    for name in shapes:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=1e-13)


def test_a_copy_does_not_see_the_others() -> None:
    rule = RULES["adafac_32"]
    theta, params, grads = copies_of(rule, 3, True)
    together, state = run(rule, theta, params, grads, True, fused=True)
    broken = [tree.map_tree(lambda g: torch.cat([g[:1], torch.full_like(g[1:2], math.nan), g[2:]]), g) for g in grads]
    beside_nan, broken_state = run(rule, theta, params, broken, True, fused=True)
    alone, own_state = run(
        rule, *(tree.index(part, slice(2, 3)) for part in (theta, params)), [tree.index(g, slice(2, 3)) for g in grads],
        True, fused=True,
    )  # fmt: skip
    assert_same_bits(tree.index(together[-1], 2), tree.index(beside_nan[-1], 2))
    assert_same_bits(tree.index(state, 2), tree.index(broken_state, 2))
    assert_same_bits(tree.index(together[-1], slice(2, 3)), alone[-1])
    assert_same_bits(tree.index(state, slice(2, 3)), own_state)
    assert all(p[1].isnan().all() for p in beside_nan[-1].values())


def test_narrow_parameters_are_stepped_in_single_precision() -> None:
    rule = RULES["adafac_4"]
    theta, params, grads = copies_of(rule, 2, True)
    narrow = as_dtype(params, torch.bfloat16)
    (got, *_), state = run(rule, theta, narrow, grads[:1], True, fused=True)
    (wanted, *_), wanted_state = run(rule, theta, narrow, grads[:1], True, fused=False)
    for name, value in wanted.items():
        assert got[name].dtype == torch.bfloat16
        torch.testing.assert_close(got[name], value, rtol=2**-7, atol=0)  # one step of bfloat16
        for slot in state[name]:
            assert state[name][slot].dtype == wanted_state[name][slot].dtype


@pytest.mark.parametrize(("name", "dtype"), [("adafac_4", torch.float32), ("matrices", torch.float64)])
def test_in_place_is_out_of_place(name: str, dtype: torch.dtype) -> None:
    rule = RULES[name]
    theta, params, (grads, *_) = as_dtype(copies_of(rule, 1, True), dtype)
    params = {name: p for name, p in params.items() if supports(rule.features, p.shape[1:], p)}
    info = infer_info({name: p[0] for name, p in params.items()})
    state = torch.vmap(lambda p, theta: rule.init(p, info, theta))(params, theta)
    own_theta, own_params, own_state = (tree.index(part, 0) for part in (theta, params, state))
    prepared = rule.prepare(own_theta, own_state, own_params, HP, Context(info)).map(lambda v: v.unsqueeze(0))
    step = rule.kernel_step
    apart = fused_step(step, prepared, grads, params, state)
    kept = tree.map_tree(torch.clone, params)
    inside = fused_step(step, prepared, grads, params, state, in_place=True)
    assert apart is not None and inside is not None
    assert_same_bits(apart[0], params)
    assert_same_bits(apart[1], {name: {s: v for s, v in state[name].items() if s != "step"} for name in state})
    assert not torch.equal(kept["wide"], params["wide"])


@pytest.mark.parametrize(
    ("rule", "lr", "stacked"),
    [
        (AdafacMLP(hidden=4), (1.0, 30.0, 300.0), True),
        (AdafacMLP(hidden=4), (1.0, 30.0, 300.0), False),
        (Celo2(), (1e-4, 1e-3, 1e-2), True),  # vectors are stepped by another rule
    ],
)
def test_an_unroll_is_the_same_without_a_compiler(
    rule: PerParameterRule, lr: tuple[float, ...], stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = registry.create("task", "digits_mlp")
    thetas = [rule.init_theta(Generator().manual_seed(i)) for i in range(3)]
    bound = rule.bind(tree.stack(thetas), stacked=True) if stacked else rule.bind(thetas[0])

    def run_all() -> tuple[Tensor, Carry]:
        with torch.no_grad():
            return unroll(task, bound, start(task, bound, [0, 1, 2]), 12, hp={"lr": torch.tensor(lr)}, backend="eager")

    fused, carry = run_all()
    monkeypatch.setenv("METAOPT_CXX", "")
    plain, plain_carry = run_all()
    assert not torch.equal(fused, plain)  # or nothing was fused
    # single-precision steps agree to about 1e-4 of a move, and moves are far below the loss
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=0)
    assert tree.map_tree(lambda v: v.shape, carry.tree()) == tree.map_tree(lambda v: v.shape, plain_carry.tree())


def test_what_it_does_not_know_is_left_to_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES["everything"]
    _, params, _ = copies_of(rule, 2, False)
    info = infer_info({name: p[0] for name, p in params.items()})
    assert rule.fuses(CppKernels(), params, info)
    assert not rule.fuses(CppKernels(), {name: p.to(torch.int32) for name, p in params.items()}, info)
    for features in (
        replace(rule.features, bias_correction=True),
        replace(rule.features, factored=3),  # which has no partner among two momenta
    ):
        monkeypatch.setattr(Everything, "seen", features)
        assert not rule.fuses(CppKernels(), params, info)
    monkeypatch.undo()
    monkeypatch.setenv("METAOPT_CXX", "")
    assert not rule.fuses(CppKernels(), params, info)


def test_a_layer_of_the_wrong_size_is_refused() -> None:
    rule = RULES["momenta_only"]
    theta, params, grads = copies_of(rule, 1, False)
    theta["matrix_w0"] = theta["matrix_w0"][:-1]
    with pytest.raises(ValueError, match="between 5 and 2 values has weight"):
        run(rule, theta, params, grads, False, fused=True)


Given = tuple[Prepared, Params, Params, State]


def given_to_cpp(rule: PerParameterRule) -> Given:
    """What `fused_step` takes, for two copies of a matrix, a vector and a kernel."""
    theta, params, (grads, *_) = copies_of(rule, 2, False, {name: SHAPES[name] for name in ("wide", "vector", "conv")})
    info = infer_info({name: p[0] for name, p in params.items()})
    own = tree.index(params, 0)
    state = rule.init(own, info, theta)
    prepared = rule.prepare(theta, state, own, HP, Context(info)).map(lambda v: torch.stack([v] * 2))
    return prepared, grads, params, tree.map_tree(lambda v: torch.stack([v] * 2), state)


def less(part: Any, *keys: str) -> None:
    """Remove the last of what ``part`` holds under the keys: an entry, or the end of a tensor [2, n]."""
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = part[keys[-1]][:, :-1]


@pytest.mark.parametrize("name", ["everything", "matrices"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prepared, grads, state: less(prepared.decays, "momentum"), "decays of momentum must have shape"),
        (lambda prepared, grads, state: less(prepared.decays, "factored"), "decays of factored must have shape"),
        (lambda prepared, grads, state: prepared.decays.pop("factored"), "decays has no 'factored'"),
        (lambda prepared, grads, state: prepared.scale.update(wide=torch.zeros(1)), r"scale of 'wide.* \(2,\)"),
        (lambda prepared, grads, state: prepared.keep.update(vector=torch.zeros(2, 97)), "keep of 'vector' must have"),
        (lambda prepared, grads, state: prepared.keep.pop("conv"), "'conv' has no keep"),
        (lambda prepared, grads, state: prepared.layers.pop("wide"), "'wide' has no layers"),
        (lambda prepared, grads, state: grads.pop("wide"), "'wide' has no gradient"),
        (lambda prepared, grads, state: less(grads, "vector"), "the gradient of 'vector' must have shape"),
        (lambda prepared, grads, state: less(state, "wide", "momentum"), "momentum of 'wide' must have shape"),
        (lambda prepared, grads, state: less(state, "conv", "row"), "row of 'conv.* must have shape"),
        (lambda prepared, grads, state: state["wide"].pop("col"), "state of 'wide' must hold .* row, col, got"),
        (
            lambda prepared, grads, state: state["vector"].update(diag=state["vector"]["diag"].double()),
            "diag of 'vector' must have dtype torch.float32",
        ),
    ],
)
def test_what_is_missing_or_of_another_size_is_refused_before_cpp_reads_it(
    name: str, change: Any, message: str
) -> None:
    rule = RULES[name]
    prepared, grads, params, state = given_to_cpp(rule)
    assert fused_step(rule.kernel_step, prepared, grads, params, state) is not None
    change(prepared, grads, state)
    with pytest.raises(ValueError, match=message) as raised:
        fused_step(rule.kernel_step, prepared, grads, params, state)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(1_000_000, 1), (2, 1_000_000), (3, 70_000)])
def test_skinny_matrices_are_left_to_the_chunks(shape: tuple[int, ...]) -> None:
    """C++ keeps the hidden units of every row and column: as many as a skinny matrix has elements, times their number."""
    features = AdafacMLP(hidden=32).features
    like = torch.zeros(())
    assert not supports(features, shape, like)
    assert supports(features, (shape[0] * shape[1],), like)
    assert all(supports(features, wide, like) for wide in [(50_257, 768), (30_000, 16), (4096, 4096), (9, 60_000)])


def test_a_skinny_matrix_is_stepped_beside_others() -> None:
    rule = RULES["adafac_4"]
    given = as_dtype(copies_of(rule, 1, False, {"skinny": (70_000, 2), "wide": (5, 150)}), torch.float64)
    wanted, _ = run(rule, *given, False, fused=False)
    got, _ = run(rule, *given, False, fused=True)
    for name, value in wanted[-1].items():
        torch.testing.assert_close(got[-1][name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_step_that_runs_out_of_memory_says_so(copies: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ allocates before it reads, here for 2^56 columns; an exception that leaves it would end the process."""
    rule = RULES["adafac_4"]
    prepared, *given = given_to_cpp(rule)
    one: list[Any] = [tree.map_tree(lambda v: v[:copies].contiguous(), {"wide": part["wide"]}) for part in given]
    monkeypatch.setattr(table, "geometry", lambda *_: (1 << 59, 8, 1, 1 << 56, 1, 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(MemoryError, match="execution='foreach'"):
        fused_step(rule.kernel_step, prepared.map(lambda v: v[:copies]), *one)
