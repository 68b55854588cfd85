"""The compiled step: walk the ops of a program, alone or with others."""

from __future__ import annotations

from nybble_kernels.numba.activation import activate
from nybble_kernels.numba.attention import attend
from nybble_kernels.numba.embed import embed
from nybble_kernels.numba.frame import (
    CHUNK,
    CODE,
    FIXED,
    PER_ROW,
    RECORD,
    SCRATCH,
    SCRATCH_STRIDE,
)
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.linear import dequantize, gemv
from nybble_kernels.numba.memory import atomic_get, atomic_set, get_i64
from nybble_kernels.numba.norm import norm
from nybble_kernels.numba.place import place
from nybble_kernels.numba.pool import COUNTERS, STEP, STOP, WORKER, WORKERS, await_units, finish_units, next_step, take, wake
from nybble_kernels.numba.quantize import quantize


@inline
def execute(op: int, frame: int, rows: int, scratch: int, low: int, high: int) -> None:
    """Units [low, high) of one op."""
    code = get_i64(op, CODE)
    if code == 3:
        gemv(op, frame, rows, scratch, low, high)
    elif code == 2:
        quantize(op, scratch, low, high)
    elif code == 1:
        norm(op, low, high)
    elif code == 4:
        place(op, frame, low, high)
    elif code == 5:
        attend(op, frame, scratch, low, high)
    elif code == 6:
        activate(op, low, high)
    elif code == 0:
        embed(op, frame, low, high)
    else:
        dequantize(op, low, high)


@inline
def walk(ops: int, count: int, frame: int, rows: int, pool: int, counters: int, step: int, thread: int) -> None:
    """All ops in order; between two ops everything of the first is finished. pool 0: no other threads."""
    scratch = get_i64(frame, SCRATCH) + thread * get_i64(frame, SCRATCH_STRIDE)
    for i in range(count):
        op = ops + 8 * RECORD * i
        total = get_i64(op, PER_ROW) * rows + get_i64(op, FIXED)
        if pool == 0:
            execute(op, frame, rows, scratch, 0, total)
            continue
        taken = counters + 8 * COUNTERS * i
        done = taken + 4 * COUNTERS
        chunk = get_i64(op, CHUNK)
        while True:
            low = take(taken, step, total, chunk)
            if low < 0:
                break
            high = min(low + chunk, total)
            execute(op, frame, rows, scratch, low, high)
            finish_units(done, step, high - low)
        await_units(done, step, total, pool)


def lead(ops: int, count: int, frame: int, rows: int, pool: int, counters: int, workers: int) -> None:
    """Run a step in the calling thread, with whichever workers join in."""
    if pool == 0:
        walk(ops, count, frame, rows, 0, 0, 0, 0)
        return
    step = (atomic_get(pool + 8 * STEP) >> 16) + 1
    atomic_set(pool + 8 * STEP, step << 16 | rows)
    wake(pool, workers)
    walk(ops, count, frame, rows, pool, counters, step, 0)


def follow(ops: int, count: int, frame: int, pool: int, counters: int, number: int) -> None:
    """The life of worker `number` (from 1): join steps until told to stop."""
    worker = pool + 8 * (WORKERS + WORKER * (number - 1))
    word = 0
    while True:
        word = next_step(pool, worker, word)
        if atomic_get(pool + 8 * STOP):
            return
        walk(ops, count, frame, word & 0xFFFF, pool, counters, word >> 16, number)
