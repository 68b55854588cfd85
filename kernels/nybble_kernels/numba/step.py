"""The compiled step: walk the ops of a program, alone or with others."""

from __future__ import annotations

from nybble_kernels.numba.activation import activate
from nybble_kernels.numba.attention import attend, merge
from nybble_kernels.numba.embed import embed
from nybble_kernels.numba.frame import (
    CHUNK,
    CODE,
    FIXED,
    PER_ROW,
    RECORD,
    SCRATCH,
    SCRATCH_STRIDE,
    SHARES,
)
from nybble_kernels.numba.jit import inline
from nybble_kernels.numba.linear import dequantize, gemv
from nybble_kernels.numba.memory import atomic_get, atomic_set, get_i64
from nybble_kernels.numba.norm import norm
from nybble_kernels.numba.place import place
from nybble_kernels.numba.pool import (
    COUNT,
    LINE,
    OPS,
    PROGRAM,
    PROGRAMS,
    STEP,
    STOP,
    STRIDE,
    WORDS,
    WORKER,
    WORKERS,
    await_units,
    finish_units,
    next_step,
    take,
    wake,
)
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
    elif code == 8:
        merge(op, low, high)
    elif code == 0:
        embed(op, frame, low, high)
    else:
        dequantize(op, low, high)


@inline
def share(
    op: int, frame: int, rows: int, scratch: int, pool: int, words: int, step: int, thread: int
) -> None:
    """Do this thread's share of an op, then what is left of the others', and wait for what they have taken.
    Step 0: there are no others.
    """
    total = atomic_get(op + 8 * PER_ROW) * rows + atomic_get(op + 8 * FIXED)
    shares, chunk = atomic_get(op + 8 * SHARES), atomic_get(op + 8 * CHUNK)
    if step == 0:
        execute(op, frame, rows, scratch, 0, total)
        return
    if total == 0 or atomic_get(pool + 8 * STEP) >> 24 != step:  # the record may be of a later step already
        return
    units, finished = total // shares, 0
    for turn in range(shares):
        part = (thread + turn) % shares
        while True:
            low = take(words + 8 * LINE * (1 + part), step, units, chunk)
            if low < 0:
                break
            high = min(low + chunk, units)
            execute(op, frame, rows, scratch, units * part + low, units * part + high)
            finished += high - low
    if finished != 0:
        finish_units(words, step, finished)
    await_units(words, step, total, pool)


@inline
def walk(pool: int, frame: int, program: int, rows: int, step: int, thread: int) -> None:
    """All ops in order; between two ops everything of the first is finished."""
    scratch = get_i64(frame, SCRATCH) + thread * get_i64(frame, SCRATCH_STRIDE)
    held = pool + 8 * (PROGRAMS + PROGRAM * program)
    ops, count, words = get_i64(held, OPS), atomic_get(held + 8 * COUNT), get_i64(held, WORDS)
    for i in range(count):
        own = words + i * get_i64(held, STRIDE)
        share(ops + 8 * RECORD * i, frame, rows, scratch, pool, own, step, thread)


@inline
def publish(pool: int, program: int, rows: int, workers: int) -> int:
    """Make a step known to the workers; the word that describes it."""
    if workers == 0:
        return program << 16 | rows
    word = ((atomic_get(pool + 8 * STEP) >> 24) + 1) << 24 | program << 16 | rows
    atomic_set(pool + 8 * STEP, word)
    wake(pool, workers)
    return word


def run(pool: int, frame: int, program: int, rows: int, workers: int, number: int) -> None:
    """Thread 0 runs a program over `rows` rows, with whichever workers join in. Thread `number` from 1 is a
    worker for life: it joins one step after another until told to stop.

    When thread 0 returns, the step's number is taken back: the records may be written anew, and a worker that
    is late must not take them for those of its step.
    """
    worker = pool + 8 * (WORKERS + WORKER * (number - 1))
    word = 0
    while True:
        word = publish(pool, program, rows, workers) if number == 0 else next_step(pool, worker, word)
        if number != 0 and atomic_get(pool + 8 * STOP) != 0:
            return
        if word & 0xFFFF != 0:
            walk(pool, frame, (word >> 16) & 0xFF, word & 0xFFFF, word >> 24, number)
        if number == 0:
            if workers != 0:
                atomic_set(pool + 8 * STEP, (word >> 24) + 1 << 24)
            return
