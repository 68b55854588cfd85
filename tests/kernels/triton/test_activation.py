"""An activation in a launch of its own: every kind, with and without a gate, odd widths, same bits alone."""

from __future__ import annotations

import pytest
import torch

from nybble_kernels import reference
from nybble_kernels.triton.activation import activation
from support_operand import empty_operand, operand_of
from support_triton import assert_close


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_matches_reference(gated: bool, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    gate, up = 3 * torch.randn(3, 100), torch.randn(3, 100)
    operand = empty_operand(32, 100, 32, dtype, device)
    activation(gate.to(device), up.to(device) if gated else None, operand, kind=kind)
    wanted = reference.activation(gate.double(), kind).double() * (up.double() if gated else 1)
    assert_close(operand.values[:3], wanted)
    assert operand.values[3:].isnan().all() and operand.stats[..., 3:].isnan().all()
    expected = operand_of(wanted.float(), 32, torch.device("cpu"), 32).stats[:, :, :3]
    assert_close(operand.stats[:2, :, :3], expected[:2], torch.float16)
    rounded = operand_of(operand.values[:3].cpu(), 32, torch.device("cpu"), 32).stats[2, :, :3]
    assert torch.equal(operand.stats[2, :, :3].cpu(), rounded)


def test_halves_of_one_buffer(device: torch.device) -> None:
    both = torch.randn(20, 160)
    held = both.to(device)
    operand = empty_operand(20, 80, 64, torch.float16, device)
    activation(held[:, :80], held[:, 80:], operand, kind="silu")
    assert_close(operand.values, reference.activation(both[:, :80], "silu") * both[:, 80:])


def test_row_alone_equals_row_in_a_batch(device: torch.device) -> None:
    gate, up = (torch.randn(18, 96).to(device) for _ in range(2))
    together, alone = (empty_operand(18, 96, 64, torch.bfloat16, device) for _ in range(2))
    activation(gate, up, together, kind="silu")
    activation(gate[17:], up[17:], alone, kind="silu")
    assert torch.equal(together.values[17], alone.values[0])
    assert torch.equal(together.stats[..., 17], alone.stats[..., 0])
