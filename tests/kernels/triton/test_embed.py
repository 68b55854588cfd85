"""Embeddings: every kind of table, learned positions, tokens that only the device knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.quantized import QuantizedTensor
from nybble_kernels.triton.embed import embed
from nybble_kernels.triton.packing import UnsupportedLayout
from support_operand import empty_operand
from support_quantized import quantized
from support_triton import assert_close, poisoned

WIDTH = 100
TOKENS = [5, 0, 49, 5]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ids(*values: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def table_of(kind: str) -> Tensor | QuantizedTensor:
    if kind.startswith("int"):
        return quantized(50, WIDTH, int(kind[3]), 32, kind[5:], 3)
    return torch.randn(50, WIDTH).to(getattr(torch, kind))


KINDS = ["float32", "float16", "bfloat16", "int8", "int8-zeros", "int4", "int4-zeros"]
CASES = [*((kind, torch.float16) for kind in KINDS), ("bfloat16", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_rows_of_every_table(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    table, gain = table_of(kind), torch.rand(WIDTH) + 0.5
    x, operand = poisoned(20, WIDTH, device=device), empty_operand(20, WIDTH, 64, dtype, device)
    embed(ids(*TOKENS, device=device), table.to(device), x, operand, weight=gain.to(device))
    wanted = reference.embed(torch.tensor(TOKENS), table)
    assert_close(x[:4], wanted)
    assert_close(operand.values[:4], wanted * gain)
    parts = wanted.double().split(64, dim=1)
    assert_close(operand.stats[0, :, :4], torch.stack([p.sum(1) for p in parts]), torch.float16)
    apart = torch.stack([(p - p.mean(1, keepdim=True)).square().sum(1) for p in parts])
    assert_close(operand.stats[1, :, :4], apart)
    largest = torch.stack([p.abs().amax(1) for p in operand.values[:4].double().split(64, dim=1)])
    assert_close(operand.stats[2, :, :4], largest)
    assert x[4:].isnan().all() and operand.values[4:].isnan().all() and operand.stats[..., 4:].isnan().all()


def test_learned_positions(device: torch.device) -> None:
    table, places = torch.randn(50, WIDTH), torch.randn(16, WIDTH).half()
    x, operand = poisoned(4, WIDTH, device=device), empty_operand(4, WIDTH, 32, torch.float16, device)
    embed(
        ids(*TOKENS, device=device),
        table.to(device),
        x,
        operand,
        positions=ids(0, 3, 13, -1, device=device),
        position_table=places.to(device),
        offset=2,
    )
    wanted = reference.embed(torch.tensor(TOKENS), table, torch.tensor([0, 3, 13, 0]), places, 2)
    assert_close(x, wanted)
    assert_close(operand.values, wanted)


def test_token_that_a_slot_drew(device: torch.device) -> None:
    """A negative token stands for the last one of its slot, even where the slot of another row is none."""
    table, last = torch.randn(50, WIDTH).to(device), ids(7, 31, 12, device=device)
    x, operand = poisoned(4, WIDTH, device=device), empty_operand(4, WIDTH, 64, torch.float16, device)
    tokens, slots = ids(-1, 4, -1, 9, device=device), ids(2, 0, 1, -1, device=device)
    embed(tokens, table, x, operand, slots=slots, last=last)
    assert torch.equal(x, table[[12, 4, 31, 9]])


def test_row_alone_equals_row_in_a_batch(device: torch.device) -> None:
    table = torch.randn(50, WIDTH).to(device)
    x, y = poisoned(20, WIDTH, device=device), poisoned(1, WIDTH, device=device)
    together, alone = (empty_operand(20, WIDTH, 64, torch.float16, device) for _ in range(2))
    embed(ids(*range(20), device=device), table, x, together)
    embed(ids(18, device=device), table, y, alone)
    assert torch.equal(x[18], y[0]) and torch.equal(together.values[18], alone.values[0])
    assert torch.equal(together.stats[..., 18], alone.stats[..., 0])


def test_levels_that_it_does_not_read_are_named() -> None:
    x, operand = torch.empty(1, WIDTH), empty_operand(1, WIDTH, 64, torch.float16, torch.device("cpu"))
    with pytest.raises(UnsupportedLayout, match="table of embeddings"):
        embed(ids(1, device=x.device), table_of("int4-minimums"), x, operand)
