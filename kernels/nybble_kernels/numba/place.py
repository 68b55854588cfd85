"""Between the qkv projection and attention: normalise and rotate q and k, write k and v into the cache."""

from __future__ import annotations

from nybble_kernels.numba.floats import bfloat_of
from nybble_kernels.numba.frame import (
    BLOCK_SIZE,
    FIRST,
    KV,
    KV_BLOCK,
    KV_LAYER,
    KV_VALUES,
    POSITIONS,
    TABLE_WIDTH,
    TABLES,
)
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.memory import f32_of_bits, get_f32, get_i32, get_i64, set_f32, set_u16
from nybble_kernels.numba.norm import rms_row


@inline
def keys_of(frame: int, layer: int, row: int, position: int) -> int:
    """Address of the keys of a block of the cache: the one that holds this position of this row."""
    size = get_i64(frame, BLOCK_SIZE)
    block = get_i32(get_i64(frame, TABLES), row * get_i64(frame, TABLE_WIDTH) + position // size)
    return get_i64(frame, KV) + layer * get_i64(frame, KV_LAYER) + block * get_i64(frame, KV_BLOCK)


@inline
def rotate_head(x: int, cos: int, sin: int, half: int) -> None:
    """(x[i], x[i + half]) turned by the angle of pair i, in place."""
    for i in range(half):
        a, b = get_f32(x, i), get_f32(x, half + i)
        c, s = get_f32(cos, i), get_f32(sin, i)
        set_f32(x, i, a * c - b * s)
        set_f32(x, half + i, b * c + a * s)


@inline
def place(op: int, frame: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: qkv, bytes between rows, query heads, kv heads, head size, cos or 0, sin,
    q norm or 0, k norm, bits of eps, layer.
    """
    heads, kv_heads, size = get_i64(op, FIRST + 2), get_i64(op, FIRST + 3), get_i64(op, FIRST + 4)
    cos, sin = get_i64(op, FIRST + 5), get_i64(op, FIRST + 6)
    q_norm, k_norm = get_i64(op, FIRST + 7), get_i64(op, FIRST + 8)
    eps = f32_of_bits(get_i64(op, FIRST + 9))
    for row in range(low, high):
        qkv = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row
        position = get_i32(get_i64(frame, POSITIONS), row)
        angle = 2 * size * position  # bytes: size / 2 floats a position
        for head in range(heads + kv_heads):
            x = qkv + 4 * size * head
            if q_norm != 0:
                rms_row(x, x, size, q_norm if head < heads else k_norm, eps)
            if cos != 0:
                rotate_head(x, cos + angle, sin + angle, size // 2)
        block = keys_of(frame, get_i64(op, FIRST + 10), row, position)
        slot = block + 2 * kv_heads * size * (position % get_i64(frame, BLOCK_SIZE))
        key = qkv + 4 * size * heads
        for i in range(kv_heads * size):
            set_u16(slot, i, bfloat_of(get_f32(key, i)))
        value = key + 4 * size * kv_heads
        for i in range(kv_heads * size):
            set_u16(slot + get_i64(frame, KV_VALUES), i, bfloat_of(get_f32(value, i)))
