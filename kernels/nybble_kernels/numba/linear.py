"""Linear layers of a step: blocks of 16 outputs by the rows of the batch; packed weights back to floats."""

from __future__ import annotations

from nybble_kernels.numba.frame import FIRST, LOGITS, LOGITS_STRIDE
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.layout import ROWS
from nybble_kernels.numba.memory import call_kernel, get_f32, get_i64, set_f32


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
def gemv(op: int, frame: int, rows: int, scratch: int, low: int, high: int) -> None:
    """Blocks [low, high) for every row. Arguments: weights, bytes of a block, kernels for 4, 2 and 1 rows,
    x, bytes between rows, y (0: the logits), bytes between rows, outputs, bias or 0, residual, groups, subs.
    """
    block_bytes = get_i64(op, FIRST + 1)
    x_stride, y, y_stride = get_i64(op, FIRST + 6), get_i64(op, FIRST + 7), get_i64(op, FIRST + 8)
    if y == 0:
        y, y_stride = get_i64(frame, LOGITS), get_i64(frame, LOGITS_STRIDE)
    outputs, bias, residual = get_i64(op, FIRST + 9), get_i64(op, FIRST + 10), get_i64(op, FIRST + 11)
    groups, subs = get_i64(op, FIRST + 12), get_i64(op, FIRST + 13)
    for block in range(low, high):
        weights = get_i64(op, FIRST) + block * block_bytes
        count = min(ROWS, outputs - ROWS * block)
        row = 0
        while row < rows:
            left = rows - row
            step = 4 if left >= 4 else 2 if left >= 2 else 1
            kernel = get_i64(op, FIRST + (2 if step == 4 else 3 if step == 2 else 4))
            x = get_i64(op, FIRST + 5) + row * x_stride
            call_kernel(kernel, weights, x, x_stride, scratch, 4 * ROWS, groups, subs)
            for m in range(step):
                target = y + (row + m) * y_stride + 4 * ROWS * block
                finish(
                    scratch + 4 * ROWS * m,
                    target,
                    count,
                    bias + 4 * ROWS * block if bias != 0 else 0,
                    residual,
                )
            row += step


@inline
def dequantize(op: int, low: int, high: int) -> None:
    """Blocks [low, high). Arguments: weights, bytes of a block, kernel, out, bytes between rows, outputs,
    groups, subs.
    """
    stride, outputs = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5)
    for block in range(low, high):
        weights = get_i64(op, FIRST) + block * get_i64(op, FIRST + 1)
        out = get_i64(op, FIRST + 3) + ROWS * block * stride
        count = min(ROWS, outputs - ROWS * block)
        kernel, groups, subs = get_i64(op, FIRST + 2), get_i64(op, FIRST + 6), get_i64(op, FIRST + 7)
        call_kernel(kernel, weights, out, stride, 0, count, groups, subs)
