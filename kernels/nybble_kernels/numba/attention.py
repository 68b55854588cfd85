"""One query against the paged cache: o = softmax(q kᵀ · scale) v, by groups of heads that share a kv head."""

from __future__ import annotations

import numpy as np

from nybble_kernels.numba.floats import exp_f32, f32_of_bfloat
from nybble_kernels.numba.frame import BLOCK_SIZE, FIRST, KV_VALUES, POSITIONS
from nybble_kernels.numba.jit import fast, inline
from nybble_kernels.numba.memory import f32_of_bits, get_f32, get_i32, get_i64, get_u16, set_f32
from nybble_kernels.numba.place import keys_of

f32 = np.float32
_ZERO, _ONE, _LOWEST = f32(0), f32(1), f32(-3.0e38)


@fast
def dot_head(query: int, key: int, size: int) -> float:
    """float32 [size] by bfloat16 [size]."""
    total = _ZERO
    for i in range(size):
        total += get_f32(query, i) * f32_of_bfloat(get_u16(key, i))
    return total


@fast
def softmax_row(scores: int, count: int) -> None:
    """In place."""
    top = _LOWEST
    for i in range(count):
        top = max(top, get_f32(scores, i))
    total = _ZERO
    for i in range(count):
        value = exp_f32(get_f32(scores, i) - top)
        set_f32(scores, i, value)
        total += value
    inverse = _ONE / total
    for i in range(count):
        set_f32(scores, i, get_f32(scores, i) * inverse)


@fast
def add_value(out: int, value: int, weight: float, size: int) -> None:
    for i in range(size):
        set_f32(out, i, get_f32(out, i) + weight * f32_of_bfloat(get_u16(value, i)))


@inline
def attend(op: int, frame: int, scratch: int, low: int, high: int) -> None:
    """Units [low, high), a unit is one kv head of one row. Arguments: qkv, bytes between rows, out, query heads,
    kv heads, head size, layer, window or 0, bits of the scale.
    """
    heads, kv_heads, size = get_i64(op, FIRST + 3), get_i64(op, FIRST + 4), get_i64(op, FIRST + 5)
    for unit in range(low, high):
        row, kv_head = unit // kv_heads, unit % kv_heads
        group = heads // kv_heads
        query = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row + 4 * size * group * kv_head
        out = get_i64(op, FIRST + 2) + 4 * size * (heads * row + group * kv_head)
        attend_group(op, frame, scratch, row, kv_head, query, out)


@inline
def attend_group(op: int, frame: int, scores: int, row: int, kv_head: int, query: int, out: int) -> None:
    heads, kv_heads, size = get_i64(op, FIRST + 3), get_i64(op, FIRST + 4), get_i64(op, FIRST + 5)
    layer, window, scale = get_i64(op, FIRST + 6), get_i64(op, FIRST + 7), f32_of_bits(get_i64(op, FIRST + 8))
    group = heads // kv_heads
    last = get_i32(get_i64(frame, POSITIONS), row)
    first = max(0, last - window + 1) if window > 0 else 0
    count = last + 1 - first
    block_size, values = get_i64(frame, BLOCK_SIZE), get_i64(frame, KV_VALUES)
    slot_bytes, head_bytes = 2 * kv_heads * size, 2 * size * kv_head
    for position in range(first, last + 1):
        key = keys_of(frame, layer, row, position) + slot_bytes * (position % block_size) + head_bytes
        for h in range(group):
            set_f32(scores, h * count + position - first, dot_head(query + 4 * size * h, key, size) * scale)
    for h in range(group):
        softmax_row(scores + 4 * h * count, count)
        for i in range(size):
            set_f32(out + 4 * size * h, i, _ZERO)
    for position in range(first, last + 1):
        value = keys_of(frame, layer, row, position) + values + slot_bytes * (position % block_size) + head_bytes
        for h in range(group):
            add_value(out + 4 * size * h, value, get_f32(scores, h * count + position - first), size)
