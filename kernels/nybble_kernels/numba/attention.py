"""One query against the paged cache: o = softmax(q kᵀ · scale) v, by groups of heads that share a kv head."""

from __future__ import annotations

from nybble_kernels.numba.floats import exp_f32
from nybble_kernels.numba.frame import BLOCK_SIZE, FIRST, KV_VALUES, POSITIONS
from nybble_kernels.numba.jit import f32, fast, fastest, inline
from nybble_kernels.numba.memory import call_pages, f32_of_bits, get_f32, get_i32, get_i64, prefetch, set_f32
from nybble_kernels.numba.place import keys_of

AHEAD = 3  # pages
_ZERO, _ONE, _LOWEST = f32(0), f32(1), f32(-3.0e38)


@fastest
def largest(values: int, count: int) -> float:
    top = _LOWEST
    for i in range(count):
        top = max(top, get_f32(values, i))
    return top


@fast
def softmax_row(scores: int, count: int, scale: float) -> None:
    """softmax(scores * scale), in place."""
    top = largest(scores, count)
    total = _ZERO
    for i in range(count):
        value = exp_f32((get_f32(scores, i) - top) * scale)
        set_f32(scores, i, value)
        total += value
    inverse = _ONE / total
    for i in range(count):
        set_f32(scores, i, get_f32(scores, i) * inverse)


@inline
def attend(op: int, frame: int, scratch: int, low: int, high: int) -> None:
    """Units [low, high), a unit is one kv head of one row. Arguments: qkv, bytes between rows, out, query
    heads, kv heads, head size, layer, window or 0, bits of the scale, the kernels for scores and values.
    """
    heads, kv_heads, size = get_i64(op, FIRST + 3), get_i64(op, FIRST + 4), get_i64(op, FIRST + 5)
    group = heads // kv_heads
    for unit in range(low, high):
        row, kv_head = unit // kv_heads, unit % kv_heads
        query = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row + 4 * size * group * kv_head
        out = get_i64(op, FIRST + 2) + 4 * size * (heads * row + group * kv_head)
        attend_group(op, frame, scratch, row, kv_head, query, out)


@inline
def attend_group(op: int, frame: int, scores: int, row: int, kv_head: int, query: int, out: int) -> None:
    """The query heads that share a kv head; scores: float32 [heads, positions]."""
    window, scale = get_i64(op, FIRST + 7), f32_of_bits(get_i64(op, FIRST + 8))
    size = get_i64(op, FIRST + 5)
    group = get_i64(op, FIRST + 3) // get_i64(op, FIRST + 4)
    last = get_i32(get_i64(frame, POSITIONS), row)
    first = max(0, last - window + 1) if window > 0 else 0
    count = last + 1 - first
    over_pages(op, frame, row, kv_head, get_i64(op, FIRST + 9), query, scores, 1, first, count)
    for h in range(group):
        softmax_row(scores + 4 * h * count, count, scale)
    for i in range(group * size):
        set_f32(out, i, _ZERO)
    over_pages(op, frame, row, kv_head, get_i64(op, FIRST + 10), scores, out, 0, first, count)


@inline
def fetch_page(base: int, slot_bytes: int, slots: int, size: int) -> None:
    """Ask for one head of a page ahead of its use: pages are scattered, so the processor cannot guess."""
    for slot in range(slots):
        for line in range(0, size, 64):
            prefetch(base + slot * slot_bytes + line)


@inline
def over_pages(
    op: int,
    frame: int,
    row: int,
    kv_head: int,
    kernel: int,
    source: int,
    target: int,
    keys: int,
    first: int,
    count: int,
) -> None:
    """Call a kernel for each page that holds positions [first, first + count). keys 1: scores, 0: values.

    The side of a kernel that has a column for each position moves on from page to page.
    """
    kv_heads, size, layer = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5), get_i64(op, FIRST + 6)
    group = get_i64(op, FIRST + 3) // kv_heads
    page = get_i64(frame, BLOCK_SIZE)
    slot_bytes = 2 * kv_heads * size
    away = 2 * size * kv_head + (0 if keys == 1 else get_i64(frame, KV_VALUES))
    start = first + 0
    while start < first + count:
        stop = min(first + count, (start // page + 1) * page)
        held = keys_of(frame, layer, row, start) + slot_bytes * (start % page) + away
        column = 4 * (start - first)
        soon = start + AHEAD * page
        if soon < first + count:
            fetch_page(keys_of(frame, layer, row, soon) + away, slot_bytes, page, 2 * size)
        if keys == 1:
            fetch_page(held + get_i64(frame, KV_VALUES), slot_bytes, stop - start, 2 * size)
        slots = stop - start
        if keys == 1:
            call_pages(kernel, source, held, slot_bytes, target + column, 4 * count, slots, size, group)
        else:
            call_pages(kernel, source + column, held, slot_bytes, target, 4 * count, slots, size, group)
        start = stop
