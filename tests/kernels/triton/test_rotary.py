"""Norm, rotation and cache write of a chunk of a prompt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.triton.rotary import rotary
from support_kv import KV_TYPES, Cache, filled
from support_triton import assert_close, poisoned

EPS = 1e-6


def check(
    cache: Cache,
    heads: int,
    start: int,
    tokens: int,
    count: int,
    operand: torch.dtype = torch.float16,
    turn: bool = True,
    norm: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(11)
    kv_heads, width, device = cache.kv_heads, cache.width, cache.device
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(device)
    qkv[count:] = math.nan
    angles = torch.rand(start + count, width // 2, generator=generator) * 6
    norms = 1 + torch.rand(2, width, generator=generator).to(device)
    tables: tuple[Tensor | None, ...] = (
        angles.cos().to(device) if turn else None,
        angles.sin().to(device) if turn else None,
        norms[0] if norm else None,
        norms[1] if norm else None,
    )
    kv, scales = cache.copies()
    out = poisoned(tokens, heads * width, dtype=operand, device=device)
    table = cache.tables[0]
    rotary(qkv, cache.kv, cache.scales, table, *tables, start=start, count=count, eps=EPS, out=out)
    query, key, value = reference.turn(qkv[:count], kv_heads, width, start, *tables, EPS)
    reference.write_kv(kv, scales, table, start, key, value)
    assert_close(out[:count], query.flatten(1))
    assert not out[count:].any()
    cache.assert_close(kv, scales)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("start", [0, 15, 63, 200])
@pytest.mark.parametrize("tokens", [1, 50])
def test_every_start_and_length(tokens: int, start: int, block_size: int, device: torch.device) -> None:
    check(filled([start + tokens], 2, 64, block_size, torch.float16, device), 4, start, tokens, tokens)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("turn", [False, True], ids=["learned", "rotary"])
@pytest.mark.parametrize("width", [64, 80, 96, 128], ids="E{}".format)
def test_head_widths(width: int, turn: bool, norm: bool, device: torch.device) -> None:
    check(filled([30], 1, width, 16, torch.float16, device), 3, 10, 20, 20, turn=turn, norm=norm)


@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", KV_TYPES, ids=str)
def test_cache_types(stored: torch.dtype, operand: torch.dtype, device: torch.device) -> None:
    check(filled([30], 2, 64, 16, stored, device), 2, 10, 20, 20, operand)


@pytest.mark.parametrize("stored", [torch.float16, torch.int8], ids=str)
def test_padding_is_not_stored(stored: torch.dtype, device: torch.device) -> None:
    check(filled([13], 1, 64, 16, stored, device), 2, 3, 32, 10)
