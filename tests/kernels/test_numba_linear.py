"""Matrix by vector on packed weights: every kind, odd shapes, any batch, and back to floats."""

from __future__ import annotations

import pytest
import torch

from nybble_kernels import reference
from nybble_kernels.numba.builder import LOGITS
from nybble_kernels.numba.isa import BEST_FIRST, choose, host_features
from nybble_kernels.quantized import QuantizedTensor, Weight
from support_program import TOLERANCE, builder, error, fill, rounded_activations, run, view
from support_quantized import quantized

RUNNABLE = [i.name for i in BEST_FIRST if all(host_features().get(f, False) for f in i.needs)]

SHAPES = [  # n, k, bits, group, kind
    (48, 64, 4, 32, "zeros"),
    (48, 192, 4, 64, "zeros"),
    (17, 256, 4, 128, "symmetric"),
    (1, 96, 4, 96, "minimums"),
    (33, 64, 4, 64, "minimums"),
    (16, 100, 4, 32, "zeros"),
    (20, 77, 4, 77, "symmetric"),
    (16, 64, 4, 16, "zeros"),
    (16, 96, 4, 48, "minimums"),
    (40, 64, 3, 32, "zeros"),
    (40, 64, 2, 64, "symmetric"),
    (48, 192, 8, 192, "symmetric"),
    (31, 64, 8, 32, "zeros"),
    (16, 128, 8, 64, "minimums"),
    (16, 50, 5, 25, "zeros"),
    (50, 64, 6, 64, "symmetric"),
    (33, 96, 6, 32, "zeros"),
    (33, 128, 5, 64, "zeros"),
    (20, 64, 7, 32, "minimums"),
    (20, 64, 3, 64, "minimums"),
]
IDS = [f"int{b} g{g} {kind} {n}x{k}" for n, k, b, g, kind in SHAPES]


def linear(
    x: torch.Tensor,
    weight: Weight,
    isa: str | None = None,
    bias: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Through a program; the output starts as NaN, with a guard on both sides."""
    program = builder(isa, rows=len(x), threads=threads)
    outputs = weight.shape[0]
    source, target = program.buffer(x.shape[1]), program.buffer(outputs + 40)
    fill(source, x)
    program.linear(source, target, weight, bias, column=24)
    run(program, len(x), threads)
    result = view(target)
    assert result[:, :24].isnan().all()
    assert result[:, 24 + outputs :].isnan().all()
    return result[:, 24 : 24 + outputs].clone()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize(("n", "k", "bits", "group", "kind"), SHAPES, ids=IDS)
def test_quantized_linears(n: int, k: int, bits: int, group: int, kind: str, isa: str) -> None:
    weight = quantized(n, k, bits, group, kind)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(5))
    y = linear(x, weight, isa)
    aligned = group % 32 == 0 or group >= k
    if aligned:
        rounded = rounded_activations(x).double() @ weight.dequantize().double().T
        assert error(y, rounded) < TOLERANCE["int8 exact"] * 10
    assert_close_to_float(y, x, weight)


@pytest.mark.parametrize("n", [1, 16, 33, 64, 70, 130, 270])
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("kind", ["zeros", "float"])
def test_shares_give_the_bits_of_one_thread(n: int, threads: int, kind: str) -> None:
    """Whatever is left of the last four blocks of a share, one row alone or several."""
    weight = torch.randn(n, 64) if kind == "float" else quantized(n, 64, 4, 32, kind)
    for rows in (1, 2, 9):
        x = torch.randn(rows, 64)
        assert torch.equal(linear(x, weight, threads=threads), linear(x, weight)), rows


def assert_close_to_float(y: torch.Tensor, x: torch.Tensor, weight: QuantizedTensor) -> None:
    """The error of int8 activations, relative to the terms that were summed: sums of one sign may cancel."""
    dense = weight.dequantize().double()
    terms = (x.double().square() @ dense.square().T).sqrt()
    worst = ((y.double() - x.double() @ dense.T).abs() / terms).square().mean().sqrt()
    assert float(worst) < TOLERANCE["int8 activations"]


@pytest.mark.parametrize(("n", "k", "bits", "group", "kind"), SHAPES, ids=IDS)
def test_instruction_sets_agree_to_the_bit(n: int, k: int, bits: int, group: int, kind: str) -> None:
    weight, x = quantized(n, k, bits, group, kind), torch.randn(7, k)
    plain = linear(x, weight, "plain")
    for isa in RUNNABLE:
        assert torch.equal(linear(x, weight, isa), plain), isa


def test_extreme_codes_and_activations_do_not_saturate() -> None:
    """Every product at its largest, every sign: 16-bit sums must hold them."""
    for bits in range(2, 9):
        codes = torch.full((16, 64), 2**bits - 1, dtype=torch.uint8)
        codes[8:] = 0
        weight = QuantizedTensor(codes, torch.ones(16, 1), bits, 64)
        x = torch.full((2, 64), 1.0)
        x[1] = -1.0
        expected = x.double() @ weight.dequantize().double().T
        assert error(linear(x, weight), expected) < TOLERANCE["int8 exact"]


@pytest.mark.parametrize(("n", "k"), [(48, 64), (17, 33), (1, 1), (5, 200)])
def test_float_linears_are_bfloat16(n: int, k: int) -> None:
    weight, x = torch.randn(n, k), torch.randn(6, k)
    expected = x.double() @ weight.bfloat16().double().T
    for isa in RUNNABLE:
        assert error(linear(x, weight, isa), expected) < TOLERANCE["bfloat16 weights"]


def test_a_permuted_weight_reads_its_inputs_in_their_order() -> None:
    q = quantized(20, 96, 4, 32, "zeros")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight = QuantizedTensor(q.codes, q.scales, 4, 32, zeros=q.zeros, permutation=order)
    x = torch.randn(2, 96)
    expected = rounded_activations(x[:, order]).double() @ q.dequantize().double().T
    assert error(linear(x, weight), expected) < TOLERANCE["int8 exact"] * 10


@pytest.mark.parametrize(
    "weight", [quantized(40, 96, 4, 32, "zeros"), quantized(40, 96, 8, 96, "symmetric"), torch.randn(40, 96)],
    ids=["w4", "w8", "float"],
)  # fmt: skip
def test_a_row_does_not_depend_on_its_company(weight: Weight) -> None:
    x = torch.randn(17, 96)
    alone = torch.cat([linear(row[None], weight) for row in x])
    for rows in (2, 3, 4, 5, 7, 8, 16, 17):
        assert torch.equal(linear(x[:rows], weight), alone[:rows]), rows


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bias_and_residual(threads: int) -> None:
    weight, bias = quantized(40, 64, 4, 32, "zeros"), torch.randn(40)
    program = builder(rows=3, threads=threads)
    x, y = program.buffer(64), program.buffer(40)
    values, before = torch.randn(3, 64), torch.randn(3, 40)
    fill(x, values)
    fill(y, before)
    program.linear(x, y, weight, bias, residual=True)
    run(program, 3, threads)
    expected = (
        before.double()
        + bias.double()
        + rounded_activations(values).double() @ weight.dequantize().double().T
    )
    assert error(view(y), expected) < TOLERANCE["int8 exact"] * 10


def test_inputs_are_rounded_once_for_linears_that_share_them_and_again_when_they_change() -> None:
    program = builder(rows=2)
    x, y = program.buffer(64), program.buffer(64)
    first, second = quantized(32, 64, 4, 32, "zeros"), quantized(32, 64, 8, 64, "symmetric")
    square = quantized(64, 64, 4, 64, "zeros", seed=3)
    values = torch.randn(2, 64)
    fill(x, values)
    program.linear(x, y, first)
    program.linear(x, y, second, column=32)
    assert len(program.ops) == 3
    program.linear(y, x, square)
    program.linear(x, y, square)
    run(program, 2)
    step = values
    middle = torch.cat([rounded_activations(step) @ w.dequantize().T for w in (first, second)], 1)
    step = rounded_activations(middle) @ square.dequantize().T
    expected = rounded_activations(step) @ square.dequantize().T
    assert error(view(y), expected) < 1e-3


def test_zero_inputs_give_zero() -> None:
    x = torch.zeros(2, 64)
    assert torch.equal(linear(x, quantized(16, 64, 4, 32, "zeros")), torch.zeros(2, 16))


def test_nan_is_not_lost() -> None:
    x = torch.randn(2, 64)
    x[1, 40] = float("nan")
    y = linear(x, quantized(16, 64, 4, 32, "zeros"))
    assert not y[0].isnan().any()
    assert y[1].isnan().all()


def test_logits_go_to_the_caller() -> None:
    program = builder(rows=2)
    x = program.buffer(32)
    values, weight = torch.randn(2, 32), quantized(21, 32, 8, 32, "symmetric")
    fill(x, values)
    program.linear(x, LOGITS, weight, kind="head")
    logits = torch.full((2, 30), float("nan"))
    run(program, 2, logits=logits)
    expected = reference.linear(rounded_activations(values), weight)
    assert error(logits[:, :21], expected) < TOLERANCE["int8 exact"] * 10
    assert logits[:, 21:].isnan().all()
    assert program.bytes["head"] == 2 * 576  # two blocks of 16 rows: 32 codes and a float32 scale each


def test_an_instruction_set_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"these can: .*plain"):
        choose("sse9")
