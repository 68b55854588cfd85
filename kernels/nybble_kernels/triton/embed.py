"""embed: token ids to the residual stream, and to the operand of the first product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nybble_kernels.quantized import QuantizedTensor
from nybble_kernels.triton.common import launch_dependents, wait
from nybble_kernels.triton.epilogue import Operand, write_operand
from nybble_kernels.triton.packing import UnsupportedLayout

ROWS = 16  # tokens of one program, in every batch: statistics are summed in one order


@triton.jit
def entries(
    table, scales, zeros, token, n, inside, WIDTH: tl.constexpr, GROUP: tl.constexpr, CENTER: tl.constexpr
):
    """Columns n of the rows of these tokens, float32 [len(n), len(token)]."""
    row = token.to(tl.int64)[None, :]
    v = tl.load(table + row * WIDTH + n[:, None], mask=inside, other=0).to(tl.float32)
    if scales is not None:
        at = row * ((WIDTH + GROUP - 1) // GROUP) + (n // GROUP)[:, None]
        if zeros is not None:
            v -= tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
        else:
            v -= CENTER
        v *= tl.load(scales + at, mask=inside, other=0.0)
    return v


@triton.jit(do_not_specialize=["M", "offset"])
def _embed(
    tokens, slots, last, table, scales, zeros, positions, position_table,
    x, weight, operand, stats, M, offset,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, CENTER: tl.constexpr, TILE: tl.constexpr,
    BM: tl.constexpr, STRIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    mm = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tile * TILE + tl.arange(0, TILE)
    live = mm < M
    wait(PDL)
    launch_dependents(PDL)
    token = tl.load(tokens + mm, mask=live, other=0)
    if last is not None:
        slot = tl.maximum(tl.load(slots + mm, mask=live, other=0), 0)
        token = tl.where(token < 0, tl.load(last + slot, mask=live, other=0), token)
    inside = live[None, :] & (n[:, None] < WIDTH)
    v = entries(table, scales, zeros, token, n, inside, WIDTH, GROUP, CENTER)
    if position_table is not None:
        place = tl.maximum(tl.load(positions + mm, mask=live, other=0), 0) + offset
        at = place.to(tl.int64)[None, :] * WIDTH + n[:, None]
        v += tl.load(position_table + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + mm[None, :] * WIDTH + n[:, None], v, mask=inside)
    u = v
    if weight is not None:
        u = v * tl.load(weight + n, mask=n < WIDTH, other=0.0).to(tl.float32)[:, None]
    write_operand(u, v, n, mm, M, operand, stats, tile, WIDTH, STRIDE, TILE)


def embed(
    tokens: Tensor,
    table: Tensor | QuantizedTensor,
    x: Tensor,
    operand: Operand,
    *,
    weight: Tensor | None = None,
    slots: Tensor | None = None,
    last: Tensor | None = None,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    pdl: bool = False,
) -> None:
    """x[m] = table[tokens[m]] (+ position_table[positions[m] + offset]); `operand` gets u = x ∘ weight.

    tokens: int32 [M]; where `last` (int32) is given, a negative one stands for `last[slots[m]]`, the token
    that slot drew and that the host has not seen · table: [V, D], any float type, or levels in groups ·
    x: float32 [>= M, D] · weight: [D], of the norm that follows, or all ones · positions: int32 [M],
    negative ones of idle rows count as 0.
    """
    rows, width = tokens.shape[0], table.shape[1]
    quantized = table if isinstance(table, QuantizedTensor) else None
    held = table.codes if isinstance(table, QuantizedTensor) else table
    assert held.is_contiguous() and x.shape[1] == width == operand.width
    if quantized is not None and (quantized.minimums is not None or quantized.permutation is not None):
        raise UnsupportedLayout(f"{quantized.describe()}: no table of embeddings")
    _embed[(-(-width // operand.tile), -(-rows // ROWS))](
        tokens,
        slots,
        last,
        held,
        None if quantized is None else quantized.scales,
        None if quantized is None else quantized.zeros,
        positions,
        position_table,
        x,
        weight,
        operand.values,
        operand.stats,
        rows,
        offset,
        WIDTH=width,
        GROUP=1 if quantized is None else quantized.group_size,
        CENTER=0 if quantized is None else 2 ** (quantized.bits - 1),
        TILE=operand.tile,
        BM=ROWS,
        STRIDE=operand.stats.stride(1),
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
