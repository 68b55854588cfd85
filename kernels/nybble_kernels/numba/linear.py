"""Linear layers of a step: blocks of 16 outputs by the rows of the batch; packed weights back to floats."""

from __future__ import annotations

from nybble_kernels.numba.frame import FIRST, LOGITS, LOGITS_STRIDE
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.layout import ROWS, STREAMS, TILES
from nybble_kernels.numba.memory import call_dequantize, call_gemv, get_f32, get_i64, set_f32

FOUR = ROWS * STREAMS  # outputs that one call of a kernel makes


@inline
def finish(tile: int, y: int, count: int, bias: int, residual: int) -> None:
    """y = tile + bias (+ y) for one row of a block."""
    for i in range(count):
        value = get_f32(tile, i)
        if bias != 0:
            value += get_f32(bias, i)
        if residual != 0:
            value += get_f32(y, i)
        set_f32(y, i, value)


@inline
def address_of(weights: int, size: int, stream: int, share: int, block: int) -> int:
    """Where a block lies: see `arena.Room`."""
    part, own = block // share, block % share
    return weights + (part * STREAMS + own % STREAMS) * stream + own // STREAMS * size


@inline
def gemv(op: int, frame: int, rows: int, scratch: int, low: int, high: int) -> None:
    """Fours of blocks [low, high), counted through all shares, for every row. Arguments: weights, bytes of a
    block, bytes between streams, blocks of a share, kernels for TILES rows, one for one row by two blocks
    or 0, x, bytes between rows, y (0: the logits), bytes between rows, bias or 0, residual, outputs, groups,
    subs.
    """
    size, stream, share = get_i64(op, FIRST + 1), get_i64(op, FIRST + 2), get_i64(op, FIRST + 3)
    x, x_stride = get_i64(op, FIRST + 9), get_i64(op, FIRST + 10)
    y, y_stride = get_i64(op, FIRST + 11), get_i64(op, FIRST + 12)
    if y == 0:
        y, y_stride = get_i64(frame, LOGITS), get_i64(frame, LOGITS_STRIDE)
    bias, residual, outputs = get_i64(op, FIRST + 13), get_i64(op, FIRST + 14), get_i64(op, FIRST + 15)
    groups, subs = get_i64(op, FIRST + 16), get_i64(op, FIRST + 17)
    fours = (share + STREAMS - 1) // STREAMS
    for unit in range(low, high):
        own = unit % fours * STREAMS
        first = unit // fours * share + own
        weights = address_of(get_i64(op, FIRST), size, stream, share, first)
        start = ROWS * first
        count = min(ROWS * min(STREAMS, share - own), outputs - start)
        blocks = 2 if count <= 2 * ROWS else STREAMS
        row = 0
        while row < rows and count > 0:
            tile = 0
            while TILES[tile] > rows - row:
                tile += 1
            step, kernel = TILES[tile], get_i64(op, FIRST + 4 + tile)
            if step == 1 and blocks == 2 and get_i64(op, FIRST + 8) != 0:
                kernel = get_i64(op, FIRST + 8)
            rows_at = x + row * x_stride
            call_gemv(kernel, weights, stream, rows_at, x_stride, scratch, 4 * FOUR, groups, subs, blocks)
            for m in range(step):
                target = y + (row + m) * y_stride + 4 * start
                finish(scratch + 4 * FOUR * m, target, count, bias + 4 * start if bias != 0 else 0, residual)
            row += step


@inline
def dequantize(op: int, low: int, high: int) -> None:
    """Blocks [low, high). Arguments: weights, bytes of a block, bytes between streams, blocks of a share,
    kernel, out, bytes between rows, outputs, groups, subs.
    """
    size, stream, share = get_i64(op, FIRST + 1), get_i64(op, FIRST + 2), get_i64(op, FIRST + 3)
    stride, outputs = get_i64(op, FIRST + 6), get_i64(op, FIRST + 7)
    for block in range(low, high):
        weights = address_of(get_i64(op, FIRST), size, stream, share, block)
        out = get_i64(op, FIRST + 5) + ROWS * block * stride
        count = min(ROWS, outputs - ROWS * block)
        kernel, groups, subs = get_i64(op, FIRST + 4), get_i64(op, FIRST + 8), get_i64(op, FIRST + 9)
        call_dequantize(kernel, weights, out, stride, 0, count, groups, subs)
