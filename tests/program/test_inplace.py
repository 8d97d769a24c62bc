"""The in-place executions compute what `evaluate` computes, whatever they overwrite on the way."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from random_programs import coefficients, copied, exact_programs, expected, positive, small_integers, smooth_programs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaopt.program import OPS, Program, Statement, compile_in_place, evaluate, in_place_source, trace
from metaopt.rule import ElementwiseRule, flat_hp
from metaopt.space import hyper

LISTS = pytest.mark.parametrize("lists", [False, True], ids=["loop", "foreach"])


def step(program: Program, columns: Sequence[Sequence[Tensor]], lists: bool) -> list[list[Tensor]]:
    """The columns after one step in place on copies."""
    after = copied(columns)
    run = compile_in_place(program, lists=lists)
    if lists:
        run(after, coefficients(program))
    else:
        for tensors in zip(*after, strict=True):
            run(tensors, coefficients(program))
    return after


class AdamW(ElementwiseRule):
    lr: float = hyper(1e-3, 0)
    betas: tuple[float, float] = hyper((0.9, 0.999), 0, 1, open_high=True)
    eps: float = hyper(1e-8, 0)
    weight_decay: float = hyper(1e-2, 0)
    slots = ("exp_avg", "exp_avg_sq")

    def coefficients(self, hp, t):
        beta1, beta2 = hp["betas"]
        return {
            "beta1": beta1,
            "beta2": beta2,
            "step_size": hp["lr"] / (1 - beta1**t),
            "correction": (1 - beta2**t) ** 0.5,
            "eps": hp["eps"],
            "decay": 1 - hp["lr"] * hp["weight_decay"],
        }

    def elementwise(self, param, grad, exp_avg, exp_avg_sq, beta1, beta2, step_size, correction, eps, decay):
        exp_avg = torch.lerp(exp_avg, grad, 1 - beta1)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        denominator = torch.sqrt(exp_avg_sq) / correction + eps
        return param * decay - step_size * exp_avg / denominator, exp_avg, exp_avg_sq


# -- agreement ---


@LISTS
@given(program=exact_programs())
def test_exact_arithmetic_agrees_bit_for_bit_and_gradients_are_untouched(lists: bool, program: Program) -> None:
    columns = small_integers(program)
    torch.testing.assert_close(step(program, columns, lists), expected(program, columns), rtol=0, atol=0)


@LISTS
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
@given(program=smooth_programs())
def test_real_arithmetic_agrees_to_rounding(lists: bool, dtype: torch.dtype, rtol: float, program: Program) -> None:
    # at most 9 operations of a few ulp each, amplified at most by powers of 3: 3**9 ulp is never reached in practice
    columns = positive(program, dtype)
    torch.testing.assert_close(step(program, columns, lists), expected(program, columns), rtol=rtol, atol=0)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 2.5, -2.5]


def one_op(op: str, *args: str | float) -> Program:
    tensors = ("param", "grad", "slot")
    return Program(("c1", "c2"), tensors, (Statement("v", op, args),), ("v", "slot"))


def forms(op: str) -> list[tuple[str | float, ...]]:
    """Every way in which an operation can take tensors, coefficients and constants."""
    if OPS[op].arity == 1:
        return [("param",), ("grad",)]
    if op == "where":
        return [("c1", "param", "slot"), ("c1", 2.0, "slot"), ("c1", "slot", 0.1)]
    pairs = [("param", "slot"), ("slot", "param"), ("param", "param"), ("param", "c2"), ("c2", "grad")]
    return [*pairs, ("param", 0.5), (1.0, "param"), ("param", float("nan")), (float("inf"), "param")]


@LISTS
@pytest.mark.parametrize("op", list(OPS))
def test_nan_and_infinity_pass_through_every_operation_as_in_torch(op: str, lists: bool) -> None:
    left, right = (t.reshape(-1).to(torch.float32) for t in torch.meshgrid(*[torch.tensor(SPECIAL)] * 2, indexing="ij"))
    columns = [[left], [left], [right]]
    for args in forms(op):
        program = one_op(op, *args)
        torch.testing.assert_close(
            step(program, columns, lists), expected(program, columns), equal_nan=True, msg=lambda m, a=args: f"{a}: {m}"
        )


@LISTS
def test_a_choice_between_plain_numbers_keeps_double_precision(lists: bool) -> None:
    program = Program(
        (), ("param", "grad"), (Statement("up", "gt", ("grad", 0.0)), Statement("v", "where", ("up", 0.1, 0.3))), ("v",)
    )
    columns = small_integers(program)
    truth = [torch.where(g > 0, 0.1, torch.tensor(0.3, dtype=torch.float64)) for g in columns[1]]
    torch.testing.assert_close(step(program, columns, lists)[0], truth, rtol=0, atol=0)


@LISTS
def test_a_comparison_used_as_a_number_is_one_or_zero(lists: bool) -> None:
    statements = (Statement("mask", "gt", ("grad", 0.0)), Statement("v", "add", ("mask", "mask")))
    program = Program((), ("param", "grad"), statements, ("v",))
    columns = small_integers(program)
    assert torch.equal(step(program, columns, lists)[0][2], 2.0 * (columns[1][2] > 0))


# -- outputs ---


@LISTS
@pytest.mark.parametrize(
    "outputs",
    [
        ("param", "b", "a"),
        ("a", "b", "param"),
        ("b", "param", "a"),
        ("param", "a", "b"),
        ("grad", "grad", "grad"),
        ("a", "a", "a"),
        ("b", 0.0, "c1"),
        (1.5, "param", "param"),
        ("v", "v", "a"),
        ("b", "v", "v"),
    ],
    ids=lambda outputs: "-".join(map(str, outputs)),
)
def test_outputs_are_assigned_all_at_once(outputs: tuple[str | float, ...], lists: bool) -> None:
    program = Program(("c1",), ("param", "grad", "a", "b"), (Statement("v", "add", ("a", 1.0)),), outputs)
    columns = small_integers(program)
    torch.testing.assert_close(step(program, columns, lists), expected(program, columns), rtol=0, atol=0)


@LISTS
def test_slots_swap_through_arithmetic(lists: bool) -> None:
    statements = (Statement("u", "mul", ("a", 2.0)), Statement("v", "add", ("b", "param")))
    program = Program((), ("param", "grad", "a", "b"), statements, ("grad", "v", "u"))
    columns = small_integers(program)
    torch.testing.assert_close(step(program, columns, lists), expected(program, columns), rtol=0, atol=0)


# -- the text ---


def test_adamw_is_op_for_op_what_torch_writes_by_hand() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: Counter[str] = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([param], foreach=True)
    optimizer.step()
    with Count() as theirs:
        optimizer.step()
    program = trace(AdamW())
    columns = [[torch.ones(3)] for _ in program.tensors]
    with Count() as ours:
        compile_in_place(program, lists=True)(columns, program.scalar_values({**flat_hp(AdamW().hp), "t": 2.0}))
    by_torch = Counter({op: n for op, n in theirs.ops.items() if op.startswith("_foreach")})
    by_torch["_foreach_add_"] -= 1  # the step counters
    assert ours.ops == by_torch
    source = in_place_source(program, lists=True)
    assert "copy" not in source and "clone" not in source


def test_adamw_follows_torch_for_ten_steps() -> None:
    torch.manual_seed(0)
    reference = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
    optimizer = torch.optim.AdamW([reference])
    program = trace(AdamW())
    columns = [reference.detach().clone(), None, *(torch.zeros(20, dtype=torch.float64) for _ in range(2))]
    for t in range(1, 11):
        reference.grad = columns[1] = torch.randn(20, dtype=torch.float64)
        optimizer.step()
        compile_in_place(program, lists=False)(columns, program.scalar_values({**flat_hp(AdamW().hp), "t": t}))
    torch.testing.assert_close(columns[0], reference.detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("terms", [("m", "grad"), ("grad", "m")])
def test_momentum_is_scaled_in_its_own_buffer(terms: tuple[str, str]) -> None:
    # folding momentum * buf into an addition to grad would put the result in the wrong place and cost a copy
    statements = (Statement("m", "mul", ("buf", "c1")), Statement("new", "add", terms))
    program = Program(("c1",), ("param", "grad", "buf"), statements, ("param", "new"))
    assert in_place_source(program, lists=False).splitlines()[1:] == ["    buf.mul_(c1)", "    buf.add_(grad)"]


@LISTS
@pytest.mark.parametrize(
    ("statements", "outputs"),
    [
        # x + c * y, where c * y is itself an output
        ((("v", "mul", ("c1", "a")), ("w", "add", ("param", "v"))), ("w", "v", "b")),
        # x + (c * y) * z, where c * y is read once more
        ((("u", "mul", ("c1", "a")), ("v", "mul", ("u", "b")), ("w", "sub", ("param", "v"))), ("w", "u", "b")),
        # x + w * (end - start) with start other than x
        ((("d", "sub", ("grad", "b")), ("v", "mul", ("c1", "d")), ("w", "add", ("a", "v"))), ("param", "w", "b")),
        # x + w * (end - x), with something else in between
        (
            (("d", "sub", ("grad", "a")), ("e", "neg", ("b",)), ("v", "mul", ("c1", "d")), ("w", "add", ("a", "v"))),
            ("e", "w", "b"),
        ),
        # x + w * (end - x), whose difference is read once more
        (
            (
                ("d", "sub", ("grad", "a")),
                ("v", "mul", ("c1", "d")),
                ("w", "add", ("a", "v")),
                ("x", "add", ("b", "d")),
            ),
            ("param", "w", "x"),
        ),
        # (x * y) + (x * y) / z
        ((("m", "mul", ("a", "b")), ("q", "div", ("m", "c2")), ("w", "add", ("m", "q"))), ("w", "b", "a")),
        # c * x - y, where only the first operand is a product
        ((("v", "mul", ("c1", "a")), ("w", "sub", ("v", "b"))), ("w", "a", "b")),
    ],
)
def test_a_fold_never_takes_what_someone_else_needs(statements, outputs, lists: bool) -> None:
    program = Program(
        ("c1", "c2"), ("param", "grad", "a", "b"), tuple(Statement(*parts) for parts in statements), outputs
    )
    columns = small_integers(program)
    torch.testing.assert_close(step(program, columns, lists), expected(program, columns), rtol=0, atol=0)


def test_names_of_the_program_do_not_meet_those_of_the_generated_text() -> None:
    statements = (Statement("old_a", "gt", ("a", "x0")), Statement("x1", "where", ("old_a", "x0", "b")))
    program = Program(("x0",), ("param", "grad", "a", "b"), statements, ("x1", "b", "a"))
    columns = small_integers(program)
    for lists in (False, True):
        after = copied(columns)
        if lists:
            compile_in_place(program, lists=True)(after, {"x0": 0.5})
        else:
            for tensors in zip(*after, strict=True):
                compile_in_place(program, lists=False)(tensors, {"x0": 0.5})
        for param, _, a, b, old_a, old_b in zip(*after, *columns[2:], strict=True):
            assert torch.equal(param, torch.where(old_a > 0.5, 0.5, old_b))
            assert torch.equal(a, old_b) and torch.equal(b, old_a)


@pytest.mark.parametrize("name", ["lambda", "torch", "zip"])
def test_a_name_that_python_cannot_take_is_refused(name: str) -> None:
    program = Program((), ("param", "grad", name), (), ("param", name))
    with pytest.raises(ValueError, match=f"{name!r} cannot name"):
        in_place_source(program, lists=True)


def test_a_traceback_shows_the_generated_line() -> None:
    with pytest.raises(RuntimeError) as mismatch:
        compile_in_place(one_op("add", "param", "slot"), lists=False)([torch.ones(2), torch.ones(2), torch.ones(3)], {})
    assert "param.add_(slot)" in "".join(traceback.format_exception(mismatch.value))


# -- tensors ---


@LISTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_float32_and_rounded_once(dtype: torch.dtype, lists: bool) -> None:
    program = trace(AdamW())
    values = program.scalar_values({**flat_hp(AdamW().hp), "t": 1.0})
    torch.manual_seed(0)
    param, grad, slots = torch.randn(50).to(dtype), torch.randn(50).to(dtype), [torch.rand(50), torch.rand(50)]
    wide = [param.float(), grad.float(), *(slot.clone() for slot in slots)]
    compile_in_place(program, lists=False)(wide, values)
    columns = [[t] if lists else t for t in (param, grad, *slots)]
    before = grad.clone()
    compile_in_place(program, lists=lists)(columns, values)
    assert torch.equal(param, wide[0].to(dtype)) and torch.equal(grad, before)
    assert slots[0].dtype == torch.float32 and torch.equal(slots[0], wide[2]) and torch.equal(slots[1], wide[3])


@LISTS
def test_leaves_that_require_grad_are_updated_without_history(lists: bool) -> None:
    program = one_op("mul", "param", 2.0)
    tensors = [torch.nn.Parameter(torch.ones(2)), torch.ones(2), torch.ones(2)]
    compile_in_place(program, lists=lists)([[t] if lists else t for t in tensors], {})
    assert tensors[0].is_leaf and torch.equal(tensors[0].detach(), torch.full((2,), 2.0))


@LISTS
def test_strided_and_scalar_tensors_are_updated_in_their_own_memory(lists: bool) -> None:
    program = one_op("add", "param", "slot")
    for view in (torch.zeros(4, 3).t(), torch.zeros(8)[::2], torch.zeros(())):
        tensors = [view, torch.zeros_like(view), torch.ones_like(view)]
        compile_in_place(program, lists=lists)([[t] if lists else t for t in tensors], {})
        assert torch.equal(view, torch.ones_like(view))


def test_no_parameters_is_no_work() -> None:
    compile_in_place(trace(AdamW()), lists=True)([[], [], [], []], {})


def test_evaluate_accepts_a_condition_on_the_step_count() -> None:
    # where(t > 5, ...): a condition that is one number for the whole tensor, as a float or per copy as a tensor
    statements = (Statement("late", "gt", ("t", 5.0)), Statement("v", "where", ("late", "grad", 0.0)))
    program = Program(("t",), ("param", "grad"), statements, ("v",))
    tensors = {"param": torch.ones(2), "grad": torch.full((2,), 3.0)}
    for t, value in ((6.0, 3.0), (5.0, 0.0), (torch.tensor(6.0), 3.0), (torch.tensor(1.0), 0.0)):
        assert torch.equal(evaluate(program, tensors, {"t": t})[0], torch.full((2,), value))
