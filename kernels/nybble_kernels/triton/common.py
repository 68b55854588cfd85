"""What every kernel shares: the mode it runs in, and the two halves of programmatic dependent launch."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter on the CPU (chosen before Triton is imported)."""


BLOCKS = tl.constexpr(8)
"""Blocks of rows that share the weights in the L2 cache, where rows are many."""


@triton.jit
def wait(PDL: tl.constexpr):
    """Until every earlier kernel of the chain has finished and its stores are seen.

    A kernel that is launched with `launch_pdl` starts while the one before it still runs: before this line it
    may read only what no kernel of the chain writes.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel of the chain start. Its own `wait` still lasts until this one has ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 sums.

    The interpreter multiplies the raw bits of bfloat16, and its BLAS sums a column differently beside others:
    there it gets float64, and a row's bits are its own as they are on tensor cores.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64), out_dtype=tl.float64).to(
            tl.float32
        )
    else:
        return tl.dot(a, b, acc)


@triton.jit
def tile_and_block(SPLIT: tl.constexpr):
    """(tile of outputs, block of rows), in an order that finds weights in the L2 cache if sums are whole."""
    tile = tl.program_id(0)
    block = tl.program_id(2)
    if SPLIT == 1:
        block, tile = tl.swizzle2d(block, tile, tl.num_programs(2), tl.num_programs(0), BLOCKS)
    return tile, block
