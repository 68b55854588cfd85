"""Scores and weighted values over one page of the cache, for the query heads that share its kv head.

    scores: out[h, i] = sum over e of query[h, e] * key[i, e]
    values: out[h, e] += sum over i of weight[h, i] * value[i, e]

Keys and values are bfloat16. Sums of one score, and of one output element over positions, keep their order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from nybble_kernels.numba.emit import F32, I16, I32, I64, PTR, Emitter, vector

ARGUMENTS = (PTR, PTR, I64, PTR, I64, I64, I64, I64)
"""scores: query, keys, bytes between positions, out, bytes between heads of out, positions, head size, heads
values: weights, values, bytes between positions, out, bytes between heads of weights, positions, head size, heads"""

TILE = 4  # positions whose scores are summed together
SHAPES = ((8, 4), (8, 1), (1, 1))  # (lanes, vectors at a time): head sizes in multiples of 32, of 8, any


def scores_name(lanes: int) -> str:
    return f"scores_{lanes}"


def values_name(lanes: int, vectors: int) -> str:
    return f"values_{lanes}x{vectors}"


def shape_for(head_dim: int) -> tuple[int, int]:
    """The widest of SHAPES that divides a head."""
    return next(s for s in SHAPES if head_dim % (s[0] * s[1]) == 0)


def emit_scores(module: Any, lanes: int) -> None:
    e = Emitter(module, scores_name(lanes), ARGUMENTS)
    query, keys, slot_bytes, out, out_stride, positions, size, heads = e.function.args
    tile = TILE if lanes > 1 else 1
    tiles = e.b.udiv(positions, e.int(tile))
    rest = e.b.urem(positions, e.int(tile))
    with e.loop(heads) as head:
        q = e.at(query, e.times(head, e.times(size, 4)))
        target = e.at(out, e.times(head, out_stride))
        for count, step, start in ((tiles, tile, e.int(0)), (rest, 1, e.times(tiles, tile))):
            with e.loop(count) as index:
                position = e.plus(start, e.times(index, step))
                rows = [e.at(keys, e.times(e.plus(position, i), slot_bytes)) for i in range(step)]
                sums = _dots(e, lanes, q, rows, size)
                e.store(sums, target, e.times(position, 4), align=4)
    e.b.ret_void()


def _dots(e: Emitter, lanes: int, q: Any, rows: list[Any], size: Any) -> Any:
    """float32 [rows]: the query by each row."""
    floats = vector(F32, lanes)
    slots = e.variables(floats, len(rows))
    with e.loop(e.b.udiv(size, e.int(lanes))) as chunk:
        x = e.load(floats, q, e.times(chunk, 4 * lanes), align=4)
        for slot, row in zip(slots, rows, strict=True):
            key = e.floats_of_bfloat(e.load(vector(I16, lanes), row, e.times(chunk, 2 * lanes), align=2))
            e.b.store(e.fma(x, key, e.get(slot, floats)), slot)
    return _sum_lanes(e, [e.get(slot, floats) for slot in slots])


def _sum_lanes(e: Emitter, values: list[Any]) -> Any:
    """Vectors to one vector of their sums, neighbours first: the same tree for one vector as for four."""
    rows = len(values)
    while len(values) > 1:
        values = [_neighbours(e, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    result = values[0]
    while result.type.count > rows:
        lanes = result.type.count // 2
        pairs = _neighbours(e, result, result)
        result = e.b.shuffle_vector(pairs, pairs, ir.Constant(vector(I32, lanes), list(range(lanes))))
    return result


def _neighbours(e: Emitter, a: Any, b: Any) -> Any:
    """[a0 + a1, a2 + a3, ..., b0 + b1, ...]"""
    lanes = a.type.count
    even = ir.Constant(vector(I32, lanes), list(range(0, 2 * lanes, 2)))
    odd = ir.Constant(vector(I32, lanes), list(range(1, 2 * lanes, 2)))
    return e.b.fadd(e.b.shuffle_vector(a, b, even), e.b.shuffle_vector(a, b, odd))


def emit_values(module: Any, lanes: int, vectors: int) -> None:
    e = Emitter(module, values_name(lanes, vectors), ARGUMENTS)
    weights, values, slot_bytes, out, weight_stride, positions, size, heads = e.function.args
    floats, width = vector(F32, lanes), lanes * vectors
    with e.loop(heads) as head:
        row = e.at(weights, e.times(head, weight_stride))
        with e.loop(e.b.udiv(size, e.int(width))) as chunk:
            target = e.at(out, e.times(e.plus(e.times(head, size), e.times(chunk, width)), 4))
            slots = [e.variable(e.load(floats, target, 4 * lanes * v, align=4)) for v in range(vectors)]
            with e.loop(positions) as position:
                weight = e.splat(e.load(F32, row, e.times(position, 4), align=4), lanes)
                value = e.at(values, e.times(position, slot_bytes), e.times(chunk, 2 * width))
                for v, slot in enumerate(slots):
                    part = e.floats_of_bfloat(e.load(vector(I16, lanes), value, 2 * lanes * v, align=2))
                    e.b.store(e.fma(weight, part, e.get(slot, floats)), slot)
            for v, slot in enumerate(slots):
                e.store(e.get(slot, floats), target, 4 * lanes * v, align=4)
    e.b.ret_void()


def emit_attention(module: Any) -> None:
    """Every shape of both."""
    for lanes in sorted({lanes for lanes, _ in SHAPES}):
        emit_scores(module, lanes)
    for lanes, vectors in SHAPES:
        emit_values(module, lanes, vectors)
