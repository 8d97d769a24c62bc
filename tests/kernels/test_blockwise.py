"""State in 8 bits: the map of the paper, errors within its bins, and steps that equal torch's on the same 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt.eight_bit import BLOCK, Blockwise, dynamic_map
from metaopt.eight_bit import dequantise as reference_dequantise
from metaopt.eight_bit import quantise as reference_quantise
from metaopt.program.program import evaluate
from metaopt.rule import flat_hp
from metaopt_classic.adam import AdamW
from metaopt_kernels.blockwise import blockwise_step, dequantise, quantise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: inf / inf
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def spread(size: int, signed: bool, device: torch.device, seed: int = 0) -> Tensor:
    """Numbers of nine decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (-9 * torch.rand(size, generator=generator))
    return (sizes * torch.randn(size, generator=generator).sign() if signed else sizes).to(device)


@SIGNS
def test_the_map_is_that_of_the_paper(signed: bool) -> None:
    numbers = dynamic_map(signed)
    assert len(numbers.unique()) == 256
    assert numbers.max() == 1
    assert 0 in numbers
    if signed:  # all but 1 have a mirror image
        assert sorted(-n for n in numbers.tolist() if n < 0) == sorted(n for n in numbers.tolist() if 0 < n < 1)
    for zeros in range(7):  # by hand: bits of fraction left of 8, one for the sign, one as indicator
        decade = numbers[(numbers > 10.0 ** -(zeros + 1)) & (numbers < 10.0**-zeros)].sort().values
        assert len(decade) == 2 ** ((6 if signed else 7) - zeros)
        if len(decade) > 1:
            torch.testing.assert_close(decade.diff(), decade.diff()[:1].expand(len(decade) - 1))
        torch.testing.assert_close(decade.mean(), torch.tensor(0.55 * 10.0**-zeros, dtype=torch.float64))


@SIGNS
@pytest.mark.parametrize("size", [0, 1, 255, 257, 3000])
def test_every_element_becomes_the_nearest_number(size: int, signed: bool, device: torch.device) -> None:
    values = spread(size, signed, device)
    stored, reference = quantise(values, signed), reference_quantise(values, signed)
    assert torch.equal(stored.absmax, reference.absmax)
    assert torch.equal(stored.codes, reference.codes)
    assert torch.equal(dequantise(stored, signed), reference_dequantise(reference, signed))
    for k, largest in enumerate(stored.absmax):
        block, found = (whole[k * BLOCK : (k + 1) * BLOCK] for whole in (values, stored.codes))
        scaled = block.double() / largest
        nearest = (scaled[:, None] - dynamic_map(signed).to(device)).abs().min(1).values
        made = (scaled - dynamic_map(signed).to(device)[found.long()]).abs()
        assert (made <= nearest + 1e-7 * scaled.abs()).all()


@SIGNS
def test_the_error_is_within_half_a_bin(signed: bool, device: torch.device) -> None:
    values = spread(5000, signed, device)
    stored = quantise(values, signed)
    scale = stored.absmax.repeat_interleave(BLOCK)[: len(values)]
    scaled, error = values.abs() / scale, (dequantise(stored, signed) - values).abs() / scale
    bins = 64 if signed else 128
    for zeros in range(7):
        inside = (scaled <= 10.0**-zeros) & (scaled > 10.0 ** -(zeros + 1))
        # bins double in number and shrink tenfold from one decade to the next one above
        assert error[inside].max() <= 0.45 * 10.0**-zeros / (bins / 2**zeros) * (1 + 1e-5)
    assert error[scaled <= 1e-7].max() <= 1.1e-7


@SIGNS
def test_numbers_of_the_map_are_kept(signed: bool, device: torch.device) -> None:
    numbers = dynamic_map(signed).float().to(device)
    stored = quantise(numbers, signed)
    assert torch.equal(stored.codes, torch.arange(256, dtype=torch.uint8, device=device))
    assert torch.equal(dequantise(stored, signed), numbers)


@SIGNS
def test_zeros_stay_zero_and_what_is_not_finite_stays_so(signed: bool, device: torch.device) -> None:
    zeros = quantise(torch.zeros(300, device=device), signed)
    assert not zeros.codes.any()
    assert not dequantise(zeros, signed).any()
    for value in (torch.nan, torch.inf):
        broken = torch.ones(600, device=device)
        broken[300] = value
        made = dequantise(quantise(broken, signed), signed)
        assert not made[256:512].isfinite().any()
        assert torch.equal(made[:256], torch.ones(256, device=device))
        assert torch.equal(made[512:], torch.ones(88, device=device))


def test_tensors_of_any_shape_and_dtype_are_taken(device: torch.device) -> None:
    values = spread(2 * 3 * 4 * 5 * 6, True, device).reshape(2, 3, 4, 5, 6)
    assert dequantise(quantise(values, True), True).shape == values.shape
    assert torch.equal(quantise(values.mT, True).codes, quantise(values.mT.contiguous(), True).codes)
    assert torch.equal(quantise(values.bfloat16(), True).codes, quantise(values.bfloat16().float(), True).codes)
    assert dequantise(quantise(torch.tensor(-2.0, device=device), True), True) == pytest.approx(-2.0, rel=0.0071)


# -- steps -------------------------------------------------------------------------------------------------------------

RULES = {"adamw": (True, False), "lion": (True,), "momentum": (True,), "amsgrad": (True, False, False)}


def fresh(signed: tuple[bool, ...], params: list[Tensor]) -> list[list[Blockwise]]:
    return [[quantise(torch.zeros_like(p), sign) for p in params] for sign in signed]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_the_program_between_reading_and_writing_8_bits(
    rule: str, dtype: torch.dtype, device: torch.device
) -> None:
    program, signed = registry.create("optimizer", rule).program, RULES[rule]
    step = blockwise_step(program, signed, (dtype, dtype))
    assert step is not None
    shapes = [(), (1,), (0,), (257,), (2, 1, 3, 5, 40)]
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    slots, hp = fresh(signed, params), flat_hp(registry.create("optimizer", rule).hp)
    for t in (1, 2):
        grads = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        old = [
            [
                p.float().clone(),
                g.float(),
                *(reference_dequantise(column[i], s) for column, s in zip(slots, signed, strict=True)),
            ]
            for i, (p, g) in enumerate(zip(params, grads, strict=True))
        ]
        assert step.fits(params, grads, slots)
        step(params, grads, slots, program.scalar_values({**hp, "t": t}))
        for i, tensors in enumerate(old):
            new, *values = evaluate(program, dict(zip(program.tensors, tensors, strict=True)), {**hp, "t": t})
            # torch and the kernel may order a sum of three differently: an ulp
            torch.testing.assert_close(params[i], new.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
            for column, value, sign in zip(slots, values, signed, strict=True):
                nearest = reference_quantise(value, sign)
                torch.testing.assert_close(column[i].absmax, nearest.absmax, rtol=1e-6, atol=0)
                errors = [(reference_dequantise(stored, sign) - value).abs() for stored in (column[i], nearest)]
                # a value in the middle between two numbers may become either
                scale = nearest.absmax.repeat_interleave(BLOCK)[: value.numel()].reshape(value.shape)
                assert (errors[0] <= errors[1] + 1e-6 * scale).all()


def test_adamw_in_8_bits_trains_as_adamw_in_32(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 40, generator=generator).to(device)
    target = inputs @ torch.randn(40, 12, generator=generator).to(device)
    program, signed = AdamW(lr=0.1).program, RULES["adamw"]
    wide, narrow = torch.zeros(40, 12, device=device), torch.zeros(40, 12, device=device)
    step, slots = blockwise_step(program, signed), fresh(signed, [narrow])
    assert step is not None
    state = [torch.zeros_like(wide) for _ in signed]
    hp = flat_hp(AdamW(lr=0.1).hp)

    def gradient(p: Tensor) -> Tensor:
        return inputs.T @ (inputs @ p - target) / 64

    def loss(p: Tensor) -> float:
        return float((inputs @ p - target).square().mean())

    start = loss(wide)
    for t in range(1, 31):
        tensors = dict(zip(program.tensors, [wide, gradient(wide), *state], strict=True))
        wide, *state = evaluate(program, tensors, {**hp, "t": t})
        step([narrow], [gradient(narrow)], slots, program.scalar_values({**hp, "t": t}))
    assert loss(wide) < 0.05 * start
    assert loss(narrow) == pytest.approx(loss(wide), rel=0.1)
    assert (narrow - wide).norm() < 0.05 * wide.norm()


def test_what_does_not_fit_is_said(device: torch.device) -> None:
    program = AdamW().program
    step = blockwise_step(program, (True, False))
    assert step is not None
    params = [torch.ones(300, 2, device=device)]
    slots = fresh((True, False), params)
    assert step.fits(params, params, slots)
    assert not step.fits(params, params, slots[:1])
    assert not step.fits([torch.ones(2, 300, device=device).mT], params, slots)
    assert not step.fits([params[0].bfloat16()], params, slots)
    short = [[Blockwise(slot.codes, slot.absmax[:1]) for slot in column] for column in slots]
    assert not step.fits(params, params, short)
    assert blockwise_step(program, (True, False), (torch.float64, torch.float64)) is None
    with pytest.raises(ValueError, match=r"signed must say it of each slot \(exp_avg, exp_avg_sq\), got \(True,\)"):
        blockwise_step(program, (True,))
