"""linear_f16: y = x Wᵀ for float16 and bfloat16 weights as they are stored, row after row, on tensor cores.

The weight is the left factor: its rows are the rows of the matrix instruction and rows of x its columns, so
16 rows of x cost what one costs. `stages` tiles of both are on their way to shared memory at a time.

The compiler places those copies, all of them behind the wait of a chained launch. Fetching the first tile by
hand before it would hold 32 registers a thread through the whole loop, so the program asks the L2 cache for
the first tiles instead.

K is cut into `split` parts of whole units of 128 inputs, summed in order: a row's bits depend on the shape of
the weight and on the row, not on the rows beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.triton.common import INTERPRETED, dot, launch_dependents, tile_and_block, wait
from nybble_kernels.triton.epilogue import Operand, Output, arguments, gather_parts
from nybble_kernels.triton.tiles import Tile, Workspace

UNIT = tl.constexpr(128)  # inputs; parts of K are whole units
STEP = 64  # inputs of a tile, times `unroll`
LINE = tl.constexpr(128)  # bytes that one request brings to the L2 cache


@triton.jit
def prefetch(pointers):
    """Ask the L2 cache for the lines that hold these addresses; nothing is held for them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_rows(at, first, last, WIDTH: tl.constexpr, COUNT: tl.constexpr, PDL: tl.constexpr):
    """Lines of COUNT tiles of WIDTH inputs from `first` on, for rows that begin at `at`."""
    if PDL:
        EACH: tl.constexpr = LINE * 8 // at.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, WIDTH // EACH) * EACH
        for tile in tl.static_range(COUNT):
            k = tl.minimum(first + tile * WIDTH + lines, last - 1)
            prefetch(at[:, None] + k[None, :])


@triton.jit(do_not_specialize=["M"])
def kernel(
    x, matrix, partial, counters,
    in_stats, colsum, bias, y, residual, weight, out_stats, M,
    K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    NORM: tl.constexpr, IN_TILE: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr,
    ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN outputs, part of K, block of BM rows)."""
    PART: tl.constexpr = (K + UNIT * SPLIT - 1) // (UNIT * SPLIT) * UNIT
    tile, block = tile_and_block(SPLIT)
    part = tl.program_id(1)
    first = part * PART
    last = tl.minimum(first + PART, K)
    mm = block * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    if N % BN != 0:
        n = tl.minimum(n, N - 1)  # what the rows beyond make is not stored
    rows = matrix + n.to(tl.int64) * K
    prefetch_rows(rows, first, last, BK, STAGES - 1 if STAGES > 1 else 1, PDL)
    wait(PDL)
    launch_dependents(PDL)
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        if K % BK == 0:
            w = tl.load(rows[:, None] + (start + k)[None, :], eviction_policy="evict_first")
            u = tl.load(x + (start + k)[:, None] + mm[None, :] * K, mask=mm[None, :] < M, other=0.0)
        else:
            held = start + k < K
            w = tl.load(
                rows[:, None] + (start + k)[None, :],
                mask=held[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            inside = held[:, None] & (mm[None, :] < M)
            u = tl.load(x + (start + k)[:, None] + mm[None, :] * K, mask=inside, other=0.0)
        acc = dot(w, u, acc)
    gather_parts(
        acc, partial, counters, tile, block, part, M,
        in_stats, colsum, bias, y, residual, weight, out_stats,
        N, BN, BM, SPLIT, NORM, K, IN_TILE, EPS, KIND, ACTIVATION, STRIDE, Y_STRIDE,
    )  # fmt: skip


def linear_f16(
    operand: Operand,
    rows: int,
    weight: Tensor,
    output: Output,
    tile: Tile,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    colsum: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """output(norm(x) Wᵀ + bias) for the first `rows` rows of `operand`. No allocation: it can be captured.

    weight: [N, K] in the type of the operand, contiguous · bias: [N] · colsum: float32 [N],
    Σₖ W[n, k] · norm weight[k], for a LayerNorm's mean. `tile.unroll` is 1 or 2: tiles of 64 or 128 inputs.
    """
    outputs, inputs = weight.shape
    kernel[(-(-outputs // tile.outputs), tile.split, -(-rows // tile.columns))](
        operand.values,
        weight,
        K=inputs,
        N=outputs,
        BN=tile.outputs,
        BM=tile.columns,
        BK=STEP * min(tile.unroll, 2),
        STAGES=tile.stages,
        **arguments(operand, rows, output, tile, workspace, bias, colsum, pdl),
    )
