"""Scores and weighted values over one page of the cache, for the query heads that share its kv head.

    scores: out[h, i] = sum over e of query[h, e] * key[i, e]
    values: out[h, e] += sum over i of weight[h, i] * value[i, e]

Keys and values are bfloat16. Sums of one score, and of one output element over positions, keep their order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from nybble_kernels.numba.emit import F32, I16, I32, I64, PTR, Emitter, filled, vector

ARGUMENTS = (PTR, PTR, I64, PTR, I64, I64, I64, I64, PTR)
"""scores: query, keys, bytes between positions, out, bytes between heads of out, positions, head size, heads
values: weights, values, bytes between positions, out, the same of weights, positions, head size, heads
both: the page to ask for meanwhile, a line at a time; pages are scattered, so the processor cannot guess"""

TILE = 4  # positions whose scores are summed together
SHAPES = ((8, 4), (8, 1), (1, 1))  # (lanes, vectors at a time): head sizes in multiples of 32, of 8, any
TOGETHER = (3, 4, 2, 1)  # query heads that share a converted key or value; the first that divides the group


def scores_name(lanes: int, together: int) -> str:
    return f"scores_{lanes}h{together}"


def values_name(lanes: int, vectors: int, together: int) -> str:
    return f"values_{lanes}x{vectors}h{together}"


def shape_for(head_dim: int, group: int) -> tuple[int, int, int]:
    """(lanes, vectors, heads together) for heads of a size, `group` of which share a kv head."""
    lanes, vectors = next(s for s in SHAPES if head_dim % (s[0] * s[1]) == 0)
    return lanes, vectors, next(t for t in TOGETHER if group % t == 0)


def emit_scores(module: Any, lanes: int, together: int) -> None:
    e = Emitter(module, scores_name(lanes, together), ARGUMENTS)
    query, keys, slot_bytes, out, out_stride, positions, size, heads, following = e.function.args
    tile = TILE if lanes > 1 else 1
    tiles, rest = e.b.udiv(positions, e.i64(tile)), e.b.urem(positions, e.i64(tile))
    with e.loop(e.b.udiv(heads, e.i64(together))) as index:
        head = e.times(index, together)
        queries = [e.at(query, e.times(e.plus(head, h), e.times(size, 4))) for h in range(together)]
        targets = [e.at(out, e.times(e.plus(head, h), out_stride)) for h in range(together)]
        for count, step, start in ((tiles, tile, e.i64(0)), (rest, 1, e.times(tiles, tile))):
            with e.loop(count) as number:
                position = e.plus(start, e.times(number, step))
                rows = [e.at(keys, e.times(e.plus(position, i), slot_bytes)) for i in range(step)]
                soon = e.at(following, e.times(position, slot_bytes)) if step > 1 else None
                dots = _dots(e, lanes, queries, rows, size, soon, slot_bytes)
                for sums, target in zip(dots, targets, strict=True):
                    e.store(sums, target, e.times(position, 4), align=4)
    e.b.ret_void()


def _dots(
    e: Emitter, lanes: int, queries: list[Any], rows: list[Any], size: Any, soon: Any, slot_bytes: Any
) -> list[Any]:
    """For each query, float32 [rows]: the query by each row. `soon`: four rows to ask for, or None."""
    floats = vector(F32, lanes)
    slots = [e.variables(floats, len(rows)) for _ in queries]
    for slot in (s for line in slots for s in line):
        e.b.store(filled(floats, 0.0), slot)
    with e.loop(e.b.udiv(size, e.i64(lanes))) as chunk:
        if soon is not None:  # as many chunks of 16 bytes in a row as lines of 64 in four
            row, line = e.b.and_(chunk, e.i64(TILE - 1)), e.b.udiv(chunk, e.i64(TILE))
            e.prefetch(soon, e.times(row, slot_bytes), e.times(line, 64))
        keys = [
            e.floats_of_bfloat(e.load(vector(I16, lanes), row, e.times(chunk, 2 * lanes), align=2))
            for row in rows
        ]
        for query, line in zip(queries, slots, strict=True):
            x = e.load(floats, query, e.times(chunk, 4 * lanes), align=4)
            for slot, key in zip(line, keys, strict=True):
                e.b.store(e.fma(x, key, e.get(slot, floats)), slot)
    return [_sum_lanes(e, [e.get(slot, floats) for slot in line]) for line in slots]


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


def emit_values(module: Any, lanes: int, vectors: int, together: int) -> None:
    e = Emitter(module, values_name(lanes, vectors, together), ARGUMENTS)
    weights, values, slot_bytes, out, weight_stride, positions, size, heads, following = e.function.args
    floats, width = vector(F32, lanes), lanes * vectors
    with e.loop(e.b.udiv(heads, e.i64(together))) as index:
        head = e.times(index, together)
        rows = [e.at(weights, e.times(e.plus(head, h), weight_stride)) for h in range(together)]
        outs = [e.at(out, e.times(e.plus(head, h), e.times(size, 4))) for h in range(together)]
        with e.loop(e.b.udiv(size, e.i64(width))) as chunk:
            targets = [
                e.at(o, e.times(chunk, 4 * width), 4 * lanes * v) for o in outs for v in range(vectors)
            ]
            slots = [e.variable(e.load(floats, target, align=4)) for target in targets]
            with e.loop(positions) as position:
                at = e.times(position, 4)
                place = e.plus(e.times(position, slot_bytes), e.times(chunk, 2 * width))
                value = e.at(values, place)
                if vectors > 1:
                    e.prefetch(following, place)
                parts = [
                    e.floats_of_bfloat(e.load(vector(I16, lanes), value, 2 * lanes * v, align=2))
                    for v in range(vectors)
                ]
                for h, row in enumerate(rows):
                    weight = e.splat(e.load(F32, row, at, align=4), lanes)
                    for part, slot in zip(parts, slots[h * vectors : (h + 1) * vectors], strict=True):
                        e.b.store(e.fma(weight, part, e.get(slot, floats)), slot)
            for slot, target in zip(slots, targets, strict=True):
                e.store(e.get(slot, floats), target, align=4)
    e.b.ret_void()


def emit_attention(module: Any) -> None:
    """Every shape of both."""
    for together in TOGETHER:
        for lanes in sorted({lanes for lanes, _ in SHAPES}):
            emit_scores(module, lanes, together)
        for lanes, vectors in SHAPES:
            emit_values(module, lanes, vectors, together)
