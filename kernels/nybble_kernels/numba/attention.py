"""One query against the paged cache: o = softmax(q kᵀ · scale) v.

The positions of a row are cut into at most `PARTS` runs of whole pages, each a unit of work over all heads,
so that a page is read in one piece. A part keeps for each head its largest score m, its sum s of
exp(score - m) and its unnormalised output; merging weighs the parts by exp(m - max m) (Milakov & Gimelshein
2018). How a row is cut depends on its position alone.
"""

from __future__ import annotations

from nybble_kernels.numba.floats import exp_f32
from nybble_kernels.numba.frame import BLOCK_SIZE, CHUNK, FIRST, KV_VALUES, POSITIONS
from nybble_kernels.numba.jit import f32, fast, fastest, inline
from nybble_kernels.numba.memory import call_pages, f32_of_bits, get_f32, get_i32, get_i64, set_f32
from nybble_kernels.numba.place import keys_of

PARTS = 8  # of a row, at most
SHORTEST = 64  # positions worth a part of their own
_ZERO, _ONE, _LOWEST = f32(0), f32(1), f32(-3.0e38)


@fastest
def largest(values: int, count: int) -> float:
    top = _LOWEST
    for i in range(count):
        top = max(top, get_f32(values, i))
    return top


@fast
def exponentials(scores: int, count: int, top: float, scale: float) -> float:
    """scores = exp((scores - top) * scale), in place; their sum."""
    total = _ZERO
    for i in range(count):
        value = exp_f32((get_f32(scores, i) - top) * scale)
        set_f32(scores, i, value)
        total += value
    return total


@inline
def attend(op: int, frame: int, scores: int, low: int, high: int) -> None:
    """Units [low, high), a unit is one part of one row. Arguments: qkv, bytes between rows, parts (float32
    [rows, PARTS, heads, head size + 2], the last two being m and s), query heads, kv heads, head size, layer,
    window or 0, bits of the scale, the kernels for scores and values.
    """
    heads, size = get_i64(op, FIRST + 3), get_i64(op, FIRST + 5)
    window, page = get_i64(op, FIRST + 7), get_i64(frame, BLOCK_SIZE)
    together = get_i64(op, CHUNK)
    for unit in range(low, high):
        row, turn = unit // PARTS, unit % PARTS
        part = turn % together * (PARTS // together) + turn // together  # a thread's are not neighbours
        last = get_i32(get_i64(frame, POSITIONS), row)
        first = max(0, last - window + 1) if window > 0 else 0
        pages = last // page + 1 - first // page
        parts = min(PARTS, (pages * page + SHORTEST - 1) // SHORTEST)
        each = (pages + parts - 1) // parts * page  # positions of a part
        start = max(first, first // page * page + part * each)
        stop = min(last + 1, first // page * page + (part + 1) * each)
        query = get_i64(op, FIRST) + get_i64(op, FIRST + 1) * row
        out = get_i64(op, FIRST + 2) + 4 * (PARTS * row + part) * heads * (size + 2)
        attend_part(op, frame, scores, row, start, stop, query, out)


@inline
def attend_part(
    op: int, frame: int, scores: int, row: int, start: int, stop: int, query: int, out: int
) -> None:
    """Positions [start, stop), or none: then no output either. scores: float32 [heads, stop - start]."""
    heads, size = get_i64(op, FIRST + 3), get_i64(op, FIRST + 5)
    scale = f32_of_bits(get_i64(op, FIRST + 8))
    stats = out + 4 * heads * size
    count = stop - start
    if count > 0:
        over_pages(op, frame, row, get_i64(op, FIRST + 9), query, scores, 1, start, stop)
    for h in range(heads):
        top, total = _LOWEST, _ZERO
        if count > 0:
            top = largest(scores + 4 * h * count, count)
            total = exponentials(scores + 4 * h * count, count, top, scale)
        set_f32(stats, 2 * h, top)
        set_f32(stats, 2 * h + 1, total)
    if count > 0:
        for i in range(heads * size):
            set_f32(out, i, _ZERO)
        over_pages(op, frame, row, get_i64(op, FIRST + 10), scores, out, 0, start, stop)


@inline
def over_pages(
    op: int, frame: int, row: int, kernel: int, source: int, target: int, keys: int, start: int, stop: int
) -> None:
    """Call a kernel for each page that holds positions [start, stop) and each kv head. keys 1: scores from
    the query, 0: values from the scores.
    """
    kv_heads, size, layer = get_i64(op, FIRST + 4), get_i64(op, FIRST + 5), get_i64(op, FIRST + 6)
    group = get_i64(op, FIRST + 3) // kv_heads
    page, slot_bytes, count = get_i64(frame, BLOCK_SIZE), 2 * kv_heads * size, stop - start
    side = 0 if keys == 1 else get_i64(frame, KV_VALUES)
    position = start + 0
    while position < stop:
        end = min(stop, (position // page + 1) * page)
        held = keys_of(frame, layer, row, position) + side + slot_bytes * (position % page)
        if end < stop:
            soon = keys_of(frame, layer, row, end) + side
        else:  # after the last keys come the first values
            soon = keys_of(frame, layer, row, start) + get_i64(frame, KV_VALUES)
        column = 4 * (position - start)
        for head in range(kv_heads):
            away = head * group
            if keys == 1:
                x, y = source + 4 * away * size, target + 4 * away * count + column
            else:
                x, y = source + 4 * away * count + column, target + 4 * away * size
            keys_at, soon_at, slots = held + 2 * size * head, soon + 2 * size * head, end - position
            call_pages(kernel, x, keys_at, slot_bytes, y, 4 * count, slots, size, group, soon_at)
        position = end


@inline
def merge(op: int, low: int, high: int) -> None:
    """Rows [low, high). Arguments: parts, out, query heads, head size, bits of the scale."""
    heads, size, scale = get_i64(op, FIRST + 2), get_i64(op, FIRST + 3), f32_of_bits(get_i64(op, FIRST + 4))
    part_bytes = 4 * heads * (size + 2)
    for row in range(low, high):
        parts = get_i64(op, FIRST) + row * PARTS * part_bytes
        out = get_i64(op, FIRST + 1) + 4 * row * heads * size
        for h in range(heads):
            merge_head(parts, part_bytes, heads * size + 2 * h, h * size, out + 4 * h * size, size, scale)


@fast
def merge_head(
    parts: int, part_bytes: int, stats: int, first: int, out: int, size: int, scale: float
) -> None:
    """out = sum of weight * output / sum of weight * s over the parts, weight = exp(m - max m)."""
    top, total = _LOWEST, _ZERO
    for p in range(PARTS):
        top = max(top, get_f32(parts + p * part_bytes, stats))
    for i in range(size):
        set_f32(out, i, _ZERO)
    for p in range(PARTS):
        part = parts + p * part_bytes
        share = get_f32(part, stats + 1)
        if share != _ZERO:
            weight = exp_f32((get_f32(part, stats) - top) * scale)
            total += weight * share
            for i in range(size):
                set_f32(out, i, get_f32(out, i) + weight * get_f32(part, first + i))
    inverse = _ONE / total
    for i in range(size):
        set_f32(out, i, get_f32(out, i) * inverse)
