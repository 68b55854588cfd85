"""Kernels that compute nothing: a pure read of memory, and an empty launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import launch_dependents, wait

WORDS = 1024  # int32 words in a row of a tile: 4 KiB


@triton.jit
def _read(source, out, ROWS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)[:, None]
    tile = tl.load(source + rows * WORDS + tl.arange(0, WORDS)[None, :], eviction_policy="evict_first")
    wait(PDL)
    launch_dependents(PDL)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(tile, axis=1), axis=0))


@triton.jit
def _empty(out, PDL: tl.constexpr):
    wait(PDL)
    launch_dependents(PDL)


def read(source: Tensor, out: Tensor, *, rows: int, warps: int, pdl: bool = False) -> None:
    """out[i] = sum of tile i, so that no load is dropped. source: int32 [R, WORDS]; out: int32 [R / rows]."""
    launch: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _read[(source.shape[0] // rows,)](source, out, ROWS=rows, WORDS=WORDS, PDL=pdl, num_warps=warps, **launch)


def empty(out: Tensor, *, pdl: bool = False) -> None:
    """One program that does nothing: what a launch in a chain costs."""
    launch: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _empty[(1,)](out, PDL=pdl, num_warps=4, **launch)
