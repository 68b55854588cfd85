"""Kernels with one known property each: what the harness is held against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble_kernels.triton.common import launch_dependents, wait
from support_aot import Case, Limits


@triton.jit
def dot_rows(q, x, out, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """Eight bits a weight, a row of K weights for each of BLOCK rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, 512)
    sums = tl.zeros((BLOCK, 512), tl.float32)
    for start in range(0, K, 512):
        weights = tl.load(q + rows[:, None] * K + start + lanes[None, :])
        sums += weights.to(tl.float32) * tl.load(x + start + lanes)[None, :]
    tl.store(out + rows, tl.sum(sums, 1), mask=rows < n)


@triton.jit
def strided(q, out, stride: tl.constexpr):
    """Neighbouring lanes are `stride` apart: each load is a single byte."""
    lanes = tl.arange(0, 512)
    tl.store(out + lanes, tl.load(q + lanes * stride))


@triton.jit
def repeated(q, out):
    """64 bytes: of four warps, each second one reads what another has read."""
    lanes = tl.arange(0, 64)
    tl.store(out + lanes, tl.load(q + lanes))


@triton.jit
def hoard(x, out):
    """64 values a thread, all alive until the last is known."""
    tile = tl.arange(0, 128)[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(x + tile)
    tl.store(out + tile, values * tl.sum(values, 1)[:, None])


@triton.jit
def matmul(a, b, out):
    r = tl.arange(0, 64)
    square = r[:, None] * 64 + r[None, :]
    tl.store(out + square, tl.dot(tl.load(a + square), tl.load(b + square)))


@triton.jit
def load_late(x, lanes):
    return tl.load(x + lanes)


@triton.jit
def chained(q, x, out, n, ORDER: tl.constexpr, PDL: tl.constexpr):
    """Weights before the wait, x behind it; or one mistake."""
    lanes = tl.arange(0, 512)
    if ORDER == "ends" and tl.program_id(0) >= n:
        return
    if ORDER == "writes":
        tl.store(out + lanes, lanes)
    weights = lanes
    if ORDER != "late":
        weights = tl.load(q + lanes)
    if ORDER == "reads":
        early = tl.load(x + lanes)
    wait(PDL)
    launch_dependents(PDL)
    if ORDER == "late":
        weights += tl.load(q + lanes)
    if ORDER != "reads":
        early = load_late(x, lanes)
    tl.store(out + lanes, weights + early)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bytes_of(*sizes: int) -> list[torch.Tensor]:
    return [meta(size, dtype=torch.int8) for size in sizes]


def rows(block: int, odd: int = 0) -> None:
    q = meta(4096 * 4096 + 1, dtype=torch.int8)[odd:]
    dot_rows[(4096 // block,)](q, meta(4096), meta(4096), 4096, K=4096, BLOCK=block, num_warps=4)


def chain(order: str, pdl: bool) -> None:
    q, x, out = (meta(512, dtype=torch.int32) for _ in range(3))
    chained[(1,)](q, x, out, 5, ORDER=order, PDL=pdl, num_warps=4, launch_pdl=pdl)


EIGHT_BITS = {"streams": ("q",), "weight_bits": 8}
CASES = [
    Case("rows", lambda _: rows(8), Limits(forbids=("HMMA", "HGMMA")), **EIGHT_BITS),
    Case("rows-of-16", lambda _: rows(16), **EIGHT_BITS),
    Case("unaligned", lambda _: rows(8, odd=1), **EIGHT_BITS),
    Case("strided", lambda _: strided[(1,)](*bytes_of(9999, 512), 3), streams=("q",)),
    Case("misnamed", lambda _: strided[(1,)](*bytes_of(9999, 512), 3), streams=("weights",)),
    Case("alone", lambda _: repeated[(1,)](*bytes_of(512, 512), num_warps=1), **EIGHT_BITS),
    Case("repeated", lambda _: repeated[(1,)](*bytes_of(512, 512), num_warps=4), **EIGHT_BITS),
    Case("hoard", lambda _: hoard[(1,)](meta(8192), meta(8192), num_warps=4, maxnreg=40)),
    Case("matmul", lambda _: matmul[(1,)](*(meta(4096, dtype=torch.float16) for _ in range(2)), meta(4096))),
    *(
        Case(f"chain-{order}", lambda pdl, order=order: chain(order, pdl), streams=("q",), before_wait=("q",))
        for order in ("good", "ends", "writes", "reads", "late")
    ),
    Case("two", lambda _: (rows(8), rows(8))),
]
