"""One launch of a decode step's attention: numbers, what it stores, and what it must not look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nybble_kernels import reference
from nybble_kernels.triton.attention_decode import (
    attention_decode,
    counter_ints,
    default_splits,
    workspace_floats,
)
from support_kv import KV_TYPES, Cache, coarsest, filled
from support_triton import assert_close, poisoned

EPS = 1e-6


@dataclass
class Case:
    """A batch of one-token rows of one layer, each with its own history in the cache."""

    positions: list[int]
    heads: int
    cache: Cache
    operand: torch.dtype
    window: int | None = None
    softcap: float | None = None
    rotary: bool = True
    qk_norm: bool = False
    splits: int = 4

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        width, kv_heads, device = self.cache.width, self.cache.kv_heads, self.cache.device
        columns = (self.heads + 2 * kv_heads) * width
        self.qkv = torch.randn(len(self.positions), columns, generator=generator).to(device)
        angles = torch.rand(max(self.positions) + 1, width // 2, generator=generator) * 6
        self.cos, self.sin = (
            (angles.cos().to(device), angles.sin().to(device)) if self.rotary else (None, None)
        )
        norms = 1 + torch.rand(2, width, generator=generator).to(device)
        self.q_norm, self.k_norm = norms if self.qk_norm else (None, None)

    def run(self, rows: list[int] | None = None) -> Tensor:
        """The kernel over the chosen rows of the batch, in the cache as it is."""
        rows = list(range(len(self.positions))) if rows is None else rows
        device, width = self.cache.device, self.cache.width
        out = poisoned(len(rows), self.heads * width, dtype=self.operand, device=device)
        floats = workspace_floats(len(rows), self.heads, width, self.splits)
        workspace = poisoned(floats, device=device)
        counters = torch.zeros(counter_ints(len(rows), self.cache.kv_heads), dtype=torch.int32, device=device)
        attention_decode(
            self.qkv[rows].contiguous(),
            self.cache.kv,
            self.cache.scales,
            torch.tensor([self.positions[r] for r in rows], dtype=torch.int32, device=device),
            self.cache.tables[rows],
            self.cos,
            self.sin,
            self.q_norm,
            self.k_norm,
            eps=EPS,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            splits=self.splits,
            out=out,
            workspace=workspace,
            counters=counters,
        )
        assert not counters.any(), "a counter was left behind"
        return out

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.cache.width)

    def store(self, row: int, kv: Tensor, scales: Tensor | None) -> Tensor:
        """The reference's [H · E], which stores the row's new token in `kv`."""
        return reference.attention_decode(
            self.qkv[row],
            kv,
            scales,
            self.positions[row],
            self.cache.tables[row],
            self.cos,
            self.sin,
            self.q_norm,
            self.k_norm,
            EPS,
            self.scale,
            self.window,
            self.softcap,
        ).flatten()

    def expected(self, row: int) -> Tensor:
        """The reference over what the kernel has stored."""
        cache, position = self.cache, self.positions[row]
        query, _, _ = reference.turn(
            self.qkv[row][None],
            cache.kv_heads,
            cache.width,
            position,
            self.cos,
            self.sin,
            self.q_norm,
            self.k_norm,
            EPS,
        )
        return reference.attention_prefill(
            query,
            cache.kv,
            cache.scales,
            cache.tables[row],
            position,
            self.scale,
            self.window,
            self.softcap,
        ).flatten()

    def check(self) -> None:
        kv, scales = self.cache.copies()
        out = self.run()
        for row in range(len(self.positions)):
            assert_close(out[row], self.expected(row), coarsest(self.operand, self.cache.kv.dtype))
            self.store(row, kv, scales)
        self.cache.assert_close(kv, scales)


EDGES = [0, 15, 16, 63, 64, 65, 200]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shared", [1, 4, 7], ids="R{}".format)
def test_every_position_and_grouping(shared: int, block_size: int, splits: int, device: torch.device) -> None:
    cache = filled(EDGES, 1, 64, block_size, torch.float16, device)
    Case(EDGES, shared, cache, torch.float16, splits=splits).check()


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
@pytest.mark.parametrize("width", [64, 80, 96, 128], ids="E{}".format)
def test_head_widths(width: int, shared: int, device: torch.device) -> None:
    cache = filled([70, 130], 1, width, 16, torch.float16, device)
    Case([70, 130], shared, cache, torch.float16).check()


@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
@pytest.mark.parametrize("stored", KV_TYPES, ids=str)
def test_cache_types(stored: torch.dtype, shared: int, operand: torch.dtype, device: torch.device) -> None:
    cache = filled([5, 140], 2, 64, 16, stored, device)
    Case([5, 140], 2 * shared, cache, operand, qk_norm=True).check()


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
@pytest.mark.parametrize("window", [1, 16, 100])
def test_window(window: int, shared: int, device: torch.device) -> None:
    positions = [0, 64, 99, 100, 210]
    cache = filled(positions, 1, 64, 16, torch.float16, device)
    Case(positions, shared, cache, torch.float16, window=window).check()


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
def test_softcap_and_learned_positions(shared: int, device: torch.device) -> None:
    cache = filled([3, 140], 1, 64, 16, torch.float16, device)
    Case([3, 140], shared, cache, torch.float16, softcap=0.7, rotary=False).check()


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
def test_a_row_does_not_see_its_neighbours(shared: int, device: torch.device) -> None:
    positions = [140, 0, 65]
    cache = filled(positions, 1, 64, 16, torch.float16, device)
    case = Case(positions, shared, cache, torch.float16)
    together = case.run()
    for row in range(len(positions)):
        assert torch.equal(case.run([row])[0], together[row])
    assert torch.equal(case.run([2, 0])[0], together[2])


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_what_lies_beyond_the_length_does_not_matter(
    stored: torch.dtype, shared: int, device: torch.device
) -> None:
    """Neither NaN where nothing was stored, nor numbers of a former holder of the pages."""
    positions = [40, 129]
    results = []
    for rest in (math.nan, 100.0):
        cache = filled(positions, 1, 64, 16, stored, device, rest=rest)
        results.append(Case(positions, shared, cache, torch.float16).run())
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_pages_before_the_window_do_not_matter(device: torch.device) -> None:
    position, window = 200, 40
    results = []
    for old in (math.nan, 100.0):
        cache = filled([position], 1, 64, 16, torch.float16, device)
        stale = cache.tables[0, : (position + 1 - window) // 16].long()
        cache.kv[stale] = old
        results.append(Case([position], 4, cache, torch.float16, window=window).run())
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("shared", [1, 4], ids="R{}".format)
def test_an_idle_row_stores_nothing(shared: int, device: torch.device) -> None:
    cache = filled([20, 90], 1, 64, 16, torch.float16, device)
    case = Case([20, 90], shared, cache, torch.float16)
    busy = case.run([1])[0]
    case.positions[0] = -1
    before, _ = cache.copies()
    out = case.run()
    assert not out[0].any()
    assert torch.equal(out[1], busy)
    assert torch.equal(cache.kv.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("stored", KV_TYPES, ids=str)
def test_the_new_token_counts_as_it_is_stored(stored: torch.dtype, device: torch.device) -> None:
    """At position 0 the output is the stored value itself."""
    cache = filled([0], 2, 64, 16, stored, device)
    case = Case([0], 2, cache, torch.float16)
    out = case.run()
    _, value = reference.read_kv(cache.kv, cache.scales, cache.tables[0], 1)
    assert torch.equal(out[0], value.flatten().half())


def test_splits_fill_the_device() -> None:
    assert [default_splits(g, 132) for g in (32, 8, 4, 40, 264, 1)] == [8, 32, 32, 4, 1, 32]
