"""Attention of a chunk of a prompt: numbers, and that a row does not depend on the chunk it comes in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.triton.attention_prefill import attention_prefill
from support_kv import KV_TYPES, Cache, coarsest, filled
from support_triton import assert_close, poisoned


def queries(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def run(
    query: Tensor,
    cache: Cache,
    start: int,
    count: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    out = poisoned(*query.shape, dtype=query.dtype, device=query.device)
    attention_prefill(
        query.contiguous(),
        cache.kv,
        cache.scales,
        cache.tables[0],
        start=start,
        count=len(query) if count is None else count,
        scale=1 / math.sqrt(cache.width),
        window=window,
        softcap=softcap,
        out=out,
    )
    return out


def expected(
    query: Tensor, cache: Cache, start: int, window: int | None = None, softcap: float | None = None
) -> Tensor:
    heads = query.view(len(query), -1, cache.width)
    scale = 1 / math.sqrt(cache.width)
    mixed = reference.attention_prefill(
        heads, cache.kv, cache.scales, cache.tables[0], start, scale, window, softcap
    )
    return mixed.flatten(1)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("start", [0, 15, 64, 65, 200])
@pytest.mark.parametrize("tokens", [1, 130])
def test_every_start_and_length(tokens: int, start: int, block_size: int, device: torch.device) -> None:
    cache = filled([start + tokens], 1, 64, block_size, torch.float16, device)
    query = queries(tokens, 2 * 64, torch.float16, device)
    assert_close(run(query, cache, start), expected(query, cache, start))


@pytest.mark.parametrize("shared", [1, 4, 7], ids="R{}".format)
@pytest.mark.parametrize("width", [64, 80, 128], ids="E{}".format)
def test_head_widths_and_grouping(width: int, shared: int, device: torch.device) -> None:
    cache = filled([50], 2, width, 16, torch.float16, device)
    query = queries(30, 2 * shared * width, torch.float16, device)
    assert_close(run(query, cache, 20), expected(query, cache, 20))


@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", KV_TYPES, ids=str)
def test_cache_types(stored: torch.dtype, operand: torch.dtype, device: torch.device) -> None:
    cache = filled([90], 1, 64, 16, stored, device)
    query = queries(50, 2 * 64, operand, device)
    assert_close(run(query, cache, 40), expected(query, cache, 40), coarsest(operand, stored))


@pytest.mark.parametrize("window", [1, 16, 100])
def test_window(window: int, device: torch.device) -> None:
    cache = filled([210], 1, 64, 16, torch.float16, device)
    query = queries(140, 64, torch.float16, device)
    assert_close(run(query, cache, 70, window=window), expected(query, cache, 70, window))


def test_softcap(device: torch.device) -> None:
    cache = filled([80], 1, 64, 16, torch.float16, device)
    query = queries(40, 64, torch.float16, device)
    assert_close(run(query, cache, 40, softcap=0.7), expected(query, cache, 40, softcap=0.7))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("start", [0, 7, 64, 100])
def test_bits_do_not_depend_on_the_chunks(
    start: int, window: int | None, stored: torch.dtype, device: torch.device
) -> None:
    cache = filled([start + 48], 1, 64, 16, stored, device)
    operand = torch.bfloat16 if stored == torch.bfloat16 else torch.float16
    query = queries(48, 2 * 64, operand, device)
    whole = run(query, cache, start, window=window)
    parts = run(query[:16], cache, start, window=window), run(query[16:], cache, start + 16, window=window)
    assert torch.equal(whole, torch.cat(parts))
    rows = [run(query[t : t + 1], cache, start + t, window=window) for t in (0, 15, 47)]
    assert torch.equal(whole[[0, 15, 47]], torch.cat(rows))


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_lies_beyond_the_length_does_not_matter(stored: torch.dtype, device: torch.device) -> None:
    query = queries(60, 2 * 64, torch.float16, device)
    results = [
        run(query, filled([99], 1, 64, 16, stored, device, rest=rest), 39) for rest in (math.nan, 100.0)
    ]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_padding_rows_are_zeros(device: torch.device) -> None:
    cache = filled([45], 1, 64, 16, torch.float16, device)
    query = queries(140, 2 * 64, torch.float16, device)
    query[25:] = math.nan
    out = run(query, cache, 20, count=25)
    assert torch.equal(out[:25], run(query[:25], cache, 20))
    assert not out[25:].any()
