"""The PyTorch path against the reference: which op holds a weight, and what it computes."""

from __future__ import annotations

import pytest
import torch

from nybble_kernels import reference, torch_cpu
from support_quantized import quantized

CASES = {
    "int4-g32": (quantized(48, 96, 4, 32, "zeros"), torch_cpu.Int4Linear),
    "int4-g64-symmetric": (quantized(32, 128, 4, 64, "symmetric"), torch_cpu.Int4Linear),
    "int4-minimum": (quantized(32, 64, 4, 32, "minimums"), torch_cpu.Int4Linear),
    "int4-odd-outputs": (quantized(33, 64, 4, 32, "zeros"), torch_cpu.FloatLinear),
    "int4-group-of-48": (quantized(32, 96, 4, 48, "zeros"), torch_cpu.FloatLinear),
    "int4-short-group": (quantized(32, 80, 4, 64, "zeros"), torch_cpu.FloatLinear),
    "int8-row": (quantized(40, 80, 8, 80, "symmetric"), torch_cpu.Int8Linear),
    "int8-odd-inputs": (quantized(40, 100, 8, 100, "symmetric"), torch_cpu.FloatLinear),
    "int8-grouped": (quantized(32, 64, 8, 32, "symmetric"), torch_cpu.FloatLinear),
    "int3": (quantized(32, 64, 3, 32, "zeros"), torch_cpu.FloatLinear),
    "float": (torch.randn(24, 40, generator=torch.Generator().manual_seed(1)), torch_cpu.FloatLinear),
}


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 40])
@pytest.mark.parametrize("name", CASES)
def test_linear_matches_the_reference(name: str, rows: int) -> None:
    weight, kind = CASES[name]
    packed = torch_cpu.pack(weight)
    assert isinstance(packed, kind)
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    truth = reference.linear(x.double().float(), weight)
    error = (packed(x) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 8e-3  # bfloat16 activations and scales


@pytest.mark.parametrize("name", CASES)
def test_dequantize_into_is_the_weight(name: str) -> None:
    weight, _ = CASES[name]
    out = torch.full(tuple(weight.shape), torch.nan)
    torch_cpu.pack(weight).dequantize_into(out)
    truth = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    assert (out - truth).abs().max() <= 0.01 * truth.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_see_each_other(name: str) -> None:
    weight, _ = CASES[name]
    packed = torch_cpu.pack(weight)
    x = torch.randn(16, weight.shape[1])
    together = packed(x)
    for rows in (1, 3, 8):
        assert torch.equal(packed(x[:rows]), together[:rows])


@pytest.mark.parametrize(("size", "half"), [(1.0, True), (1e-4, False), (1e8, False)])
def test_scales_of_int8_rows_are_float16_where_that_is_as_good(size: float, half: bool) -> None:
    weight = size * torch.randn(20, 64)
    weight[3] = 0.0
    rows = torch_cpu.quantize_rows(weight, 32)
    assert torch.equal(rows.scales.half().float(), rows.scales) is half
    assert not rows.dequantize()[3].any()
    assert (rows.dequantize() - weight).abs().max() <= rows.scales.max() * 0.57


@pytest.mark.parametrize("group", [None, 32])
def test_int8_rows_stay_near_half_a_step(group: int | None) -> None:
    weight = torch.randn(20, 64) * torch.rand(20, 1)
    quantized_rows = torch_cpu.quantize_rows(weight, group)
    error = (quantized_rows.dequantize() - weight).abs().unflatten(1, (-1, group or 64)).amax(-1)
    # half a step, and what rounding the scale takes from the largest: 127 / 2048
    assert (error <= quantized_rows.scales * 0.57).all()
