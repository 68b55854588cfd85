"""Activations in one byte: scales of their own and static ones, after a norm and before it, rows of zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.triton.quantize import QuantizedOperand, norm_quantize, quantize, quantize_operand
from support_operand import operand_of
from support_triton import assert_close, poisoned

EPS = 1e-5
CODES = [torch.int8, torch.float8_e4m3fn]
NAMES = ["int8", "fp8"]
POISON = 77


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def room(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.full((rows, width), POISON, dtype=torch.int8, device=device).view(dtype)
    return values, poisoned(rows, device=device)


def assert_codes(values: Tensor, scales: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """The reference's codes, but for neighbours where x / scale lies within rounding of the middle."""
    assert_close(scales, wanted[1])
    found, expected = values.cpu().float(), wanted[0].float()
    assert ((found - expected).abs() <= expected.abs().clamp(min=8) / 8).all()
    assert (found != expected).float().mean() <= 0.01


@pytest.mark.parametrize("static", [None, 0.01], ids=["dynamic", "static"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codes", CODES, ids=NAMES)
@pytest.mark.parametrize("width", [96, 1100])
def test_rows(
    width: int, codes: torch.dtype, source: torch.dtype, static: float | None, device: torch.device
) -> None:
    x = (torch.randn(3, width) * torch.tensor([[1.0], [100.0], [0.01]])).to(source)
    values, scales = room(4, width, codes, device)
    quantize(x.to(device), values[:3], scales[:3], static=static)
    assert_codes(values[:3], scales[:3], reference.quantize(x, codes, static))
    assert (values[3].view(torch.int8) == POISON).all() and scales[3].isnan()


@pytest.mark.parametrize("codes", CODES, ids=NAMES)
def test_zeros_stay_zeros(codes: torch.dtype, device: torch.device) -> None:
    values, scales = room(2, 96, codes, device)
    quantize(torch.zeros(2, 96, device=device), values, scales)
    assert not values.float().any() and scales.isfinite().all()


def test_halves_round_to_even(device: torch.device) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -200.0, 200.0]])
    values, scales = room(1, 8, torch.int8, device)
    quantize(x.to(device), values, scales, static=1.0)
    assert values.tolist() == [[0, 2, 2, 0, -2, 126, -128, 127]]


@pytest.mark.parametrize("static", [None, 0.02], ids=["dynamic", "static"])
@pytest.mark.parametrize("codes", CODES, ids=NAMES)
@pytest.mark.parametrize("norm", [None, "rms"])
def test_operand_with_its_statistics(
    norm: str | None, codes: torch.dtype, static: float | None, device: torch.device
) -> None:
    """A static scale counts in units of what the norm makes of x, though the norm is still to come."""
    x = 3 * torch.randn(3, 1100).half()
    source = replace(operand_of(x, 16, device), norm=norm, eps=EPS)
    values, scales = room(16, 1100, codes, device)
    quantize_operand(source, 3, QuantizedOperand(values, scales, source), static=static)
    rms = 1.0 if norm is None else x.float().square().mean(1, keepdim=True).add(EPS).sqrt()
    if static is None:
        wanted = reference.quantize(x, codes)
    else:
        wanted = reference.quantize(x / rms, codes, static)
        wanted = wanted[0], wanted[1] * torch.as_tensor(rms).flatten()
    assert_codes(values[:3], scales[:3], wanted)
    assert (values[3:].view(torch.int8) == POISON).all() and scales[3:].isnan().all()


@pytest.mark.parametrize("static", [None, 0.02], ids=["dynamic", "static"])
@pytest.mark.parametrize("codes", CODES, ids=NAMES)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_and_quantize(norm: str, codes: torch.dtype, static: float | None, device: torch.device) -> None:
    x, residual = 3 * torch.randn(3, 576) + 1, torch.randn(3, 576).half()
    gain, shift = torch.rand(576) + 0.5, torch.randn(576)
    held, (values, scales) = x.to(device, copy=True), room(3, 576, codes, device)
    norm_quantize(
        held,
        gain.to(device),
        shift.to(device) if norm == "layer" else None,
        values,
        scales,
        norm=norm,
        eps=EPS,
        residual=residual.to(device),
        static=static,
    )
    summed = x + residual
    assert_close(held, summed)
    if norm == "rms":
        normed = reference.rms_norm(summed, gain, EPS)
    else:
        normed = reference.layer_norm(summed, gain, shift, EPS)
    assert_codes(values, scales, reference.quantize(normed, codes, static))


def test_static_scale_before_a_layer_norm_is_refused() -> None:
    source = replace(operand_of(torch.randn(1, 64).half(), 1, torch.device("cpu")), norm="layer")
    out = QuantizedOperand(*room(1, 64, torch.int8, torch.device("cpu")), source)
    with pytest.raises(ValueError, match="norm_quantize"):
        quantize_operand(source, 1, out, static=0.1)
