"""A norm in a launch of its own: both kinds, odd widths, residual, and the folded norm as its twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble_kernels import reference
from nybble_kernels.triton.epilogue import Store
from nybble_kernels.triton.linear_f16 import linear_f16
from nybble_kernels.triton.norm import norm
from nybble_kernels.triton.tiles import Tile
from support_operand import operand_of, workspace_of
from support_triton import assert_close, poisoned

EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("width", [96, 576, 1100])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_matches_reference(kind: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    x, gain, shift = 4 * torch.randn(3, width) + 9, torch.rand(width) + 0.5, torch.randn(width)
    y = poisoned(4, width, dtype=dtype, device=device)
    bias = shift.to(device) if kind == "layer" else None
    norm(x.to(device), gain.to(device), bias, y[:3], norm=kind, eps=EPS)
    wanted = (
        reference.rms_norm(x, gain, EPS)
        if kind == "rms"
        else reference.layer_norm(x.double(), gain, shift, EPS)
    )
    assert_close(y[:3], wanted)
    assert y[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_residual_is_added_in_place(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(2, 200), torch.randn(2, 200).to(dtype)
    held, y = x.to(device, copy=True), poisoned(2, 200, dtype=torch.float16, device=device)
    norm(held, None, None, y, norm="rms", eps=EPS, residual=residual.to(device))
    assert_close(held, x + residual)
    assert_close(y, reference.rms_norm(x + residual, torch.ones(200), EPS))


def test_folded_norm_is_its_twin(device: torch.device) -> None:
    """W (u / rms) by the epilogue of a product, and W applied to the normed row."""
    weight, x, gain = torch.randn(64, 192).half() / 14, torch.randn(3, 192), torch.rand(192) + 0.5
    u = operand_of(x, 16, device)
    folded = replace(u, values=(u.values * gain.to(device)).half(), norm="rms", eps=EPS)
    y, first, second = (
        poisoned(3, 192, dtype=torch.float16, device=device),
        *poisoned(2, 3, 64, device=device),
    )
    workspace = workspace_of(Tile(), 64, 3, device)
    linear_f16(folded, 3, weight.to(device), Store(first), Tile(), workspace)
    norm(x.to(device), gain.to(device), None, y, norm="rms", eps=EPS)
    linear_f16(operand_of(y.cpu(), 16, device), 3, weight.to(device), Store(second), Tile(), workspace)
    assert_close(first, second, torch.float16)
