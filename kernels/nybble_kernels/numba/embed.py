"""The embedding of a token, from a float table or from the packed head it is tied to."""

from __future__ import annotations

from nybble_kernels.numba.floats import f32_of_bfloat
from nybble_kernels.numba.frame import FIRST, POSITIONS, TOKENS
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.layout import ROWS
from nybble_kernels.numba.linear import address_of
from nybble_kernels.numba.memory import call_dequantize, get_f32, get_i32, get_i64, get_u16, set_f32

BFLOAT, FLOAT, PACKED = 0, 1, 2  # kinds of table


@inline
def embed(op: int, frame: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: x, width, kind, table, bytes of a block, bytes between streams, blocks of
    a share, kernel, groups, subs, learned positions (float32) or 0, the row of position 0 in them.
    """
    width, kind, table = get_i64(op, FIRST + 1), get_i64(op, FIRST + 2), get_i64(op, FIRST + 3)
    positions = get_i64(op, FIRST + 10)
    for row in range(low, high):
        x = get_i64(op, FIRST) + 4 * width * row
        token = get_i32(get_i64(frame, TOKENS), row)
        if kind == PACKED:
            size, stream, share = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5), get_i64(op, FIRST + 6)
            block = address_of(table, size, stream, share, token // ROWS)
            kernel, groups, subs = get_i64(op, FIRST + 7), get_i64(op, FIRST + 8), get_i64(op, FIRST + 9)
            call_dequantize(kernel, block, x, 0, token % ROWS, 1, groups, subs)
        elif kind == BFLOAT:
            for i in range(width):
                set_f32(x, i, f32_of_bfloat(get_u16(table, token * width + i)))
        else:
            for i in range(width):
                set_f32(x, i, get_f32(table, token * width + i))
        if positions != 0:
            at = get_i32(get_i64(frame, POSITIONS), row) + get_i64(op, FIRST + 11)
            for i in range(width):
                set_f32(x, i, get_f32(x, i) + get_f32(positions, at * width + i))
